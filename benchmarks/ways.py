"""The ways in which a whole model is run, as data, and the gate that each passes first.

A way takes one of our models in float32 and returns it ready to run in a dtype. Its logits on two
random images are compared with those of the model with the mixer as published and a plain loop over
time, in float64. Allowed is twice the error which that same eager model makes in the way's dtype,
plus eight roundings, relative to the largest logit.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from models import EagerMixer, NoScanMixer, loop_scan, mamba_ssm_scan, with_mixers
from torch import Tensor, nn

__all__ = ["WAYS", "Gate", "Unavailable", "Way"]

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Unavailable(RuntimeError):
    """A way that this machine or installation cannot go; the message says why."""


@dataclass(frozen=True)
class Way:
    """`make(model, dtype)` returns the model to run, in `setting`'s memory layout.

    `gated` is False for what computes something else on purpose, to show what a part costs.
    """

    provider: str
    setting: str
    make: Callable[[nn.Module, torch.dtype], nn.Module]
    layout: torch.memory_format = torch.contiguous_format
    gated: bool = True
    default: bool = True


def _plain(layout: torch.memory_format, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(dtype=dtype, memory_format=layout)


def _optimized(model: nn.Module, dtype: torch.dtype, **options: bool) -> nn.Module:
    try:
        from mambavision.inference import optimize_for_inference
    except ImportError:
        raise Unavailable("mambavision has no optimize_for_inference") from None
    return optimize_for_inference(model, dtype=dtype, **options)


def scan_for(model: nn.Module) -> Callable[..., Tensor]:
    """mamba-ssm's scan on a GPU where it is installed, a loop over time otherwise."""
    if next(model.parameters()).is_cuda:
        try:
            return mamba_ssm_scan()
        except RuntimeError:
            pass
    return loop_scan


def _eager(layout: torch.memory_format, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    scan = scan_for(model)
    eager = with_mixers(model, lambda mixer: EagerMixer(mixer, scan))
    return eager.to(dtype=dtype, memory_format=layout)


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
    *_in_layouts("eager", _eager),
    Way("compiled", "channels_last", partial(_compiled, torch.channels_last), torch.channels_last),
    *_in_layouts("no_scan", _no_scan, gated=False, default=False),
]


class Gate:
    """Whether a way's logits are those of the model; see the top of this file."""

    def __init__(self, model: nn.Module, images: Tensor):
        self.images = images
        self.eager = with_mixers(model, lambda mixer: EagerMixer(mixer, loop_scan)).eval()
        with torch.inference_mode():
            self.truth = copy.deepcopy(self.eager).double()(images.double())
        self.allowed: dict[torch.dtype, float] = {}

    def _error(self, logits: Tensor) -> float:
        difference = (logits.double() - self.truth).abs().max() / self.truth.abs().max()
        return float(difference)

    def limit(self, dtype: torch.dtype) -> float:
        if dtype not in self.allowed:
            with torch.inference_mode():
                logits = copy.deepcopy(self.eager).to(dtype)(self.images.to(dtype))
            self.allowed[dtype] = 2 * self._error(logits) + 8 * torch.finfo(dtype).eps
        return self.allowed[dtype]

    def fault(self, model: nn.Module, way: Way, dtype: torch.dtype) -> str | None:
        """None, or what is wrong in one line."""
        images = self.images.to(dtype=dtype, memory_format=way.layout)
        with torch.inference_mode():
            logits = model(images)
        error, limit = self._error(logits), self.limit(dtype)
        # A NaN is not below anything.
        if error <= limit:
            return None
        return f"logits are off by {error:.1e} of the largest, allowed {limit:.1e}"
