"""The ways in which a whole model is run, as data, and the gate that each passes first.

A way takes one of our models in float32 and returns it ready to run in a dtype. Its logits on two
random images are compared with those of the model with the mixer as published and a plain loop over
time, in float64. Allowed is twice the error which that same eager model makes in the way's dtype,
the larger of its errors in two memory layouts, plus eight roundings, relative to the largest logit.
Gradients are held to the same rule.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from models import (
    NoScanMixer,
    Unavailable,
    as_published,
    loop_scan,
    mamba_ssm_scan,
    with_mixers,
)  # fmt: skip
from torch import Tensor, nn

__all__ = ["TRAINING_WAYS", "WAYS", "Gate", "TrainingGate", "Way", "Wrong"]

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Wrong(RuntimeError):
    """A way that computes something else; the message says how far off it is."""


@dataclass(frozen=True)
class Way:
    """`make(model, dtype)` returns the model to run, in `setting`'s memory layout.

    `gated` is False for what computes something else on purpose, to show what a part costs, `graph`
    for what runs in a CUDA graph of its own. A command asks for it as `asked_as`, the provider's
    name unless given; what is not `default` is measured only when asked for.
    """

    provider: str
    setting: str
    make: Callable[[nn.Module, torch.dtype], nn.Module]
    layout: torch.memory_format = torch.contiguous_format
    gated: bool = True
    graph: bool = True
    default: bool = True
    asked_as: str = ""

    @property
    def option(self) -> str:
        return self.asked_as or self.provider


def _plain(layout: torch.memory_format, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(dtype=dtype, memory_format=layout)


def _optimized(model: nn.Module, dtype: torch.dtype, **options: bool | str) -> nn.Module:
    try:
        from mambavision.inference import optimize_for_inference
    except ImportError:
        raise Unavailable("mambavision has no optimize_for_inference") from None
    if options.get("cuda_graph") and not next(model.parameters()).is_cuda:
        raise Unavailable("CUDA graphs need a GPU")
    return optimize_for_inference(model, dtype, **options)


def scan_for(model: nn.Module) -> Callable[..., Tensor]:
    """mamba-ssm's scan on a GPU where it is installed, a loop over time otherwise."""
    if next(model.parameters()).is_cuda:
        try:
            return mamba_ssm_scan()
        except Unavailable:
            pass
    return loop_scan


def _eager(layout: torch.memory_format, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    scan = scan_for(model)
    return as_published(model, scan).to(dtype=dtype, memory_format=layout)


def _compiled_as_it_is(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return torch.compile(_plain(torch.channels_last, model, dtype))


def _compiled(layout: torch.memory_format, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    if scan_for(model) is loop_scan:
        raise Unavailable("needs mamba-ssm's scan: compiling unrolls a loop over time")
    return torch.compile(_eager(layout, model, dtype))


def _no_scan(layout: torch.memory_format, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return with_mixers(model, NoScanMixer).to(dtype=dtype, memory_format=layout)


def _in_layouts(provider: str, make: Callable, **flags: bool) -> list[Way]:
    return [
        Way(provider, name, partial(make, layout), layout, **flags)
        for name, layout in LAYOUTS.items()
    ]


# "ours" is the triton or the torch backend, whichever the device gets.
WAYS = [
    *_in_layouts("ours", _plain),
    Way("ours", "optimized", _optimized, torch.channels_last),
    Way("ours", "optimized, CUDA graph", partial(_optimized, cuda_graph=True), torch.channels_last,
        graph=False),
    Way("ours", "compiled", _compiled_as_it_is, torch.channels_last, asked_as="compiled"),
    Way("ours", "optimized, compiled", partial(_optimized, compile=True), torch.channels_last,
        asked_as="compiled"),
    Way("ours", "optimized, compiled, CUDA graph",
        partial(_optimized, compile=True, cuda_graph=True), torch.channels_last,
        asked_as="compiled", graph=False),
    Way("ours", "optimized, autotuned, CUDA graph",
        partial(_optimized, compile="max-autotune-no-cudagraphs", cuda_graph=True),
        torch.channels_last, asked_as="compiled", graph=False),
    *_in_layouts("eager", _eager),
    Way("compiled", "channels_last", partial(_compiled, torch.channels_last), torch.channels_last),
    *_in_layouts("no_scan", _no_scan, gated=False, default=False),
]  # fmt: skip


# Training has the same ways but the one that is for inference; weights stay float32.
TRAINING_WAYS = [way for way in WAYS if not way.setting.startswith("optimized") and way.gated]


def _check(error: float, limit: float, what: str) -> None:
    # A NaN is not below anything.
    if not error <= limit:
        raise Wrong(f"{what} off by {error:.1e}, allowed {limit:.1e}")


class Gate:
    """Whether a way's logits are those of the model."""

    def __init__(self, model: nn.Module, images: Tensor):
        self.images = images
        self.eager = as_published(model, loop_scan).eval()
        with torch.inference_mode():
            self.truth = copy.deepcopy(self.eager).double()(images.double())
        self.limits: dict[torch.dtype, float] = {}

    def _error(self, logits: Tensor, truth: Tensor) -> float:
        return float((logits.double() - truth).abs().max() / self.truth.abs().max())

    def limit(self, dtype: torch.dtype) -> float:
        if dtype not in self.limits:
            eager, errors = copy.deepcopy(self.eager).to(dtype), []
            for layout in LAYOUTS.values():
                images = self.images.to(dtype=dtype, memory_format=layout)
                with torch.inference_mode():
                    logits = eager.to(memory_format=layout)(images)
                    errors.append(self._error(logits, self.truth))
            self.limits[dtype] = 2 * max(errors) + 8 * torch.finfo(dtype).eps
        return self.limits[dtype]

    def check(self, model: nn.Module, way: Way, dtype: torch.dtype, batch: int = 2) -> None:
        """Raises Wrong where it is not. The images take turns up to the batch that is measured:
        what is compiled for a shape is then what is checked."""
        turns = torch.arange(batch) % len(self.images)
        images = self.images[turns].to(dtype=dtype, memory_format=way.layout)
        with torch.inference_mode():
            error = self._error(model(images), self.truth[turns])
        _check(error, self.limit(dtype), "logits, relative to the largest,")


class TrainingGate:
    """Whether a way's gradients are those of the model, by kind of parameter.

    A kind is a parameter's name without its numbers, so that one of few elements is compared
    together with its like in the other blocks. Errors are relative to the norm of the kind.
    """

    def __init__(self, model: nn.Module, images: Tensor):
        self.images = images
        self.eager = as_published(model, loop_scan)
        exact = copy.deepcopy(self.eager).double()
        self.truth = self._gradients(exact, images.double(), torch.float64)
        self.limits: dict[torch.dtype, dict[str, float]] = {}

    def _gradients(self, model: nn.Module, images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        device = images.device.type
        with torch.autocast(device, dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
            logits = model(images)
        # Weights that differ between images, or the last batch norm leaves no gradient; and large
        # ones, or float16 rounds small gradients to zero.
        draw = torch.Generator().manual_seed(2)
        weights = 32 * torch.randn(logits.shape, generator=draw, dtype=torch.float64)
        (logits.double() * weights.to(logits.device)).sum().backward()
        kinds: dict[str, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            kind = re.sub(r"\d+", "#", name.removeprefix("_orig_mod."))
            kinds.setdefault(kind, []).append(parameter.grad.double().flatten())
            parameter.grad = None
        return {kind: torch.cat(grads) for kind, grads in kinds.items()}

    def _errors(self, found: dict[str, Tensor]) -> dict[str, float]:
        return {
            kind: float((found[kind] - exact).norm() / exact.norm().clamp_min(1e-30))
            for kind, exact in self.truth.items()
        }

    def limit(self, dtype: torch.dtype) -> dict[str, float]:
        if dtype not in self.limits:
            eager, eps, errors = copy.deepcopy(self.eager), torch.finfo(dtype).eps, []
            for layout in LAYOUTS.values():
                model, images = (x.to(memory_format=layout) for x in (eager, self.images))
                errors.append(self._errors(self._gradients(model, images, dtype)))
            self.limits[dtype] = {
                kind: 2 * max(found[kind] for found in errors) + 8 * eps for kind in self.truth
            }
        return self.limits[dtype]

    def check(self, model: nn.Module, way: Way, dtype: torch.dtype) -> None:
        """Raises Wrong where they are not, and names the parameters."""
        statistics = {name: x.clone() for name, x in model.named_buffers()}
        images = self.images.to(memory_format=way.layout)
        errors = self._errors(self._gradients(model, images, dtype))
        with torch.no_grad():
            for name, x in model.named_buffers():
                x.copy_(statistics[name])
        for kind, limit in self.limit(dtype).items():
            _check(errors[kind], limit, f"gradients of {kind}, relative to their norm,")
