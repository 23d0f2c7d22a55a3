"""What a model costs, counted and not measured: operations and memory, on tensors without values.

Importing this module makes torch's flop counter (`torch.utils.flop_counter.FlopCounterMode`) see
the fused operators. It counts products with their sums, two operations for each pair, and leaves
elementwise functions out (exp, softplus, SiLU, norms). Per entry, step and channel (batch x seqlen
x dim) an operator counts as

    conv1d_silu      2 width
    selective_scan   6 dstate (dt A, dt u B, the sum a h + b, the product with C), 2 with D
    mixer            two convolutions, x_proj 2 (dt_rank + 2 dstate), dt_proj 2 dt_rank, the scan

and its backward pass as twice that, plus once what is computed again: all but x_proj. Of torch's
own operators the counter does not know attention on a CPU; `count` runs on the meta device.

Memory is counted as float32 or another dtype of the model takes it on a CPU, with the states that
the PyTorch backend keeps. Temporaries inside one operator are not seen.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from . import ops  # noqa: F401  (the operators that are counted)
from .blocks import Attention, Stage
from .mixer import MambaVisionMixer
from .model import MambaVision

__all__ = ["Cost", "Part", "count"]

_OPS = torch.ops.mambavision


@register_flop_formula(_OPS.conv1d_silu_fwd)
def _conv1d_silu(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * weight[-1]


@register_flop_formula(_OPS.conv1d_silu_bwd)
def _conv1d_silu_backward(dy: Any, x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 3 * _conv1d_silu(x, weight)


@register_flop_formula(_OPS.selective_scan_fwd)
def _scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, *_: Any, **__: Any) -> int:
    return prod(u) * (6 * A[1] + (2 if D is not None else 0))


@register_flop_formula(_OPS.selective_scan_bwd)
def _scan_backward(dy: Any, dlast_state: Any, *inputs: Any, **__: Any) -> int:
    return 3 * _scan(*inputs)


def _parts_of_mixer(
    xz: Any, conv_x: Any, conv_z: Any, x_proj: Any, dt_proj: Any, A: Any, D: Any, *_: Any, **__: Any
) -> tuple[int, int]:
    """(x_proj's operations, all others)."""
    x = (*xz[:2], xz[2] // 2)
    convolutions = _conv1d_silu(x, conv_x) + _conv1d_silu(x, conv_z)
    return 2 * prod(x) * x_proj[0], (
        convolutions + 2 * prod(x) * dt_proj[1] + _scan(x, x, A, None, None, D)
    )


@register_flop_formula(_OPS.mixer_fwd)
def _mixer(*inputs: Any, **__: Any) -> int:
    return sum(_parts_of_mixer(*inputs))


@register_flop_formula(_OPS.mixer_bwd)
def _mixer_backward(dyz: Any, *inputs: Any, **__: Any) -> int:
    once, again = _parts_of_mixer(*inputs)
    return 2 * once + 3 * again


class Part(NamedTuple):
    """The stem, a stage or the head. `macs` are without those of `attention_macs`."""

    name: str
    holds: str
    output: tuple[int, ...]
    parameters: int
    macs: float
    attention_macs: float
    kept_bytes: int


class Cost(NamedTuple):
    """Of one forward pass of a batch.

    `flops` is the total of torch's flop counter. `macs` is half of it without the attention
    products q k^T and p v (`attention_macs`), as the published tables count; both hold `fused_macs`
    of the fused mixers. `kept_bytes`: what training keeps for the backward pass; `peak_bytes`: the
    most that lives at once in inference. Both without parameters.
    """

    parameters: int
    flops: float
    macs: float
    attention_macs: float
    fused_macs: float
    kept_bytes: int
    peak_bytes: int
    parts: list[Part]


def _parts(model: MambaVision) -> dict[str, list[tuple[str, nn.Module]]]:
    """Modules by the part of the model they belong to."""
    stages = {f"stage {i + 1}": [(f"levels.{i}", s)] for i, s in enumerate(model.levels)}
    head = [("norm", model.norm), ("head", model.head)]
    return {"stem": [("patch_embed", model.patch_embed)], **stages, "head": head}


def _holds(module: nn.Module) -> str:
    """What a part is made of, in words."""
    if not isinstance(module, Stage):
        return "norm, mean, linear" if isinstance(module, nn.BatchNorm2d) else "2 convolutions"
    mixers = sum(isinstance(m, MambaVisionMixer) for m in module.modules())
    attentions = sum(isinstance(m, Attention) for m in module.modules())
    if not mixers + attentions:
        return f"{len(module.blocks)} conv"
    return f"{mixers} mixer, {attentions} attention, window {module.window_size}"


class _Living(TorchDispatchMode):
    """Bytes of the storages that live at once, from those that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in tree_iter(args) if isinstance(x, Tensor)}
        for x in tree_iter(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in inputs | self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextmanager
def _keeping(own: set[int], note: Callable[[int], None]) -> Iterator[None]:
    """Calls `note` with the bytes of each storage, not among `own`, that autograd keeps."""
    # The tensors are held, so that no storage takes another's place.
    seen: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        key = x.untyped_storage()._cdata
        if key not in own and key not in seen:
            seen[key] = x
            note(x.untyped_storage().nbytes())
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        yield


def _memory(model: MambaVision, shape: tuple[int, ...]) -> tuple[dict[str, int], int]:
    """(bytes kept for the backward pass by part, bytes alive at once in inference)."""
    kept = dict.fromkeys(_parts(model), 0)
    place = "stem"

    def enter(name: str, *_: Any) -> None:
        nonlocal place
        place = name

    def note(size: int) -> None:
        kept[place] += size

    hooks = [
        module.register_forward_pre_hook(partial(enter, name))
        for name, modules in _parts(model).items()
        for _, module in modules[:1]
    ]
    dtype = next(model.parameters()).dtype
    # On the CPU and not on the meta device: there attention would keep its matrix.
    with FakeTensorMode():
        state = {
            name: torch.empty(x.shape, dtype=x.dtype, requires_grad=isinstance(x, nn.Parameter))
            for name, x in (*model.named_parameters(), *model.named_buffers())
        }
        own = {x.untyped_storage()._cdata for x in state.values()}
        x = torch.empty(shape, dtype=dtype)
        with _keeping(own, note):
            out = functional_call(model.train(), state, (x,))
        del out
        living = _Living()
        with torch.no_grad(), living:
            functional_call(model.eval(), state, (x,))
    for hook in hooks:
        hook.remove()
    return kept, living.peak + x.untyped_storage().nbytes()


def count(model: MambaVision, height: int, width: int, batch: int = 1) -> Cost:
    """The cost of a model of these arguments and this dtype for a batch of images of this size.

    The model itself is neither run nor changed: one like it is made without memory. Raises
    ValueError for sizes below 32.

    >>> cost = count(create_model("mamba_vision_T"), 224, 224)  # doctest: +SKIP
    >>> f"{cost.macs / 1e9:.2f} G"  # doctest: +SKIP
    '4.46 G'
    """
    dtype = next(model.parameters()).dtype
    with torch.device("meta"):
        model = MambaVision(**model.arguments).to(dtype)
    shape = (batch, model.in_chans, height, width)
    outputs: dict[str, tuple[int, ...]] = {}

    def note(name: str, module: Any, inputs: Any, output: Any) -> None:
        outputs[name] = tuple((output[0] if isinstance(output, tuple) else output).shape[1:])

    parts = _parts(model)
    hooks = [m[-1][1].register_forward_hook(partial(note, name)) for name, m in parts.items()]
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(torch.empty(shape, device="meta", dtype=dtype))
    for hook in hooks:
        hook.remove()
    counts = counter.get_flop_counts()
    kept, peak = _memory(model, shape)

    def macs(name: str) -> float:
        return sum(counts.get(f"MambaVision.{name}", {}).values()) / 2

    # What an attention counts beyond its linear layers are the products.
    products = {
        name: macs(name) - macs(f"{name}.qkv") - macs(f"{name}.proj")
        for name, module in model.named_modules()
        if isinstance(module, Attention)
    }
    rows = []
    for part, modules in parts.items():
        within = sum(n for name, n in products.items() if name.startswith(modules[0][0]))
        rows.append(
            Part(
                part,
                _holds(modules[0][1]),
                outputs[part],
                sum(p.numel() for _, m in modules for p in m.parameters()),
                sum(macs(name) for name, _ in modules) - within,
                within,
                kept[part],
            )
        )
    flops, attention = counter.get_total_flops(), sum(products.values())
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        flops=flops,
        macs=flops / 2 - attention,
        attention_macs=attention,
        fused_macs=counts["Global"].get(_OPS.mixer_fwd, 0) / 2,
        kept_bytes=sum(kept.values()),
        peak_bytes=peak,
        parts=rows,
    )
