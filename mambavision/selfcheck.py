"""Are the fused operators right on this machine, and what do they gain?

Each operator runs forward and backward on random data with the sizes of MambaVision-T's third
stage. Its outputs and every gradient are compared with the reference in float64. What is allowed
is twice the error that the reference itself makes when it runs in the operator's dtype, plus eight
roundings of that dtype, each relative to the largest value of the tensor.

Then three ways are timed, forward and backward together: the operator, the reference (an explicit
loop over time with a backward by hand), and eager PyTorch, the operator as one would first write it
(`eager_mixer` below), differentiated by autograd.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import isnan
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, reference

__all__ = ["OpCheck", "check_ops", "eager_conv1d_silu", "eager_mixer", "eager_selective_scan"]

Arguments = dict[str, Tensor]


@dataclass(frozen=True)
class OpCheck:
    """One operator in one dtype; `error` and `allowed` are those of `tensor`, nearest its limit."""

    op: str
    backend: str
    dtype: str
    shape: str
    tensor: str
    error: float
    allowed: float
    seconds: float
    seconds_reference: float
    seconds_eager: float

    @property
    def ok(self) -> bool:
        # A NaN is not below anything.
        return self.error <= self.allowed


def eager_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    width = weight.shape[-1]
    left = (width - 1) // 2
    padded = F.pad(x.transpose(1, 2), (left, width - 1 - left))
    y = F.conv1d(padded, weight.reshape(-1, 1, width), bias, groups=weight.shape[0])
    return F.silu(y).transpose(1, 2)


def eager_selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    dt = F.softplus(delta.float() + delta_bias)
    decay = torch.exp(dt[..., None] * A)  # (batch, seqlen, dim, dstate)
    step = (dt * u)[..., None] * B.float()[:, :, None, :]
    h = torch.zeros_like(step[:, 0])
    ys = []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + step[:, t]
        ys.append((h * C[:, t, None, :]).sum(-1))
    return (torch.stack(ys, dim=1) + D * u).to(u.dtype)


def eager_mixer(
    xz: Tensor,
    conv_x_weight: Tensor,
    conv_z_weight: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    A: Tensor,
    D: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    dt_rank, dstate = dt_proj_weight.shape[1], A.shape[1]
    x, z = xz.chunk(2, dim=-1)
    x = eager_conv1d_silu(x, conv_x_weight)
    z = eager_conv1d_silu(z, conv_z_weight)
    dt_low, B, C = F.linear(x, x_proj_weight).split([dt_rank, dstate, dstate], dim=-1)
    delta = F.linear(dt_low, dt_proj_weight)
    y = eager_selective_scan(x, delta, A, B, C, D, delta_bias)
    return torch.cat([y, z], dim=-1)


def _arguments(batch: int, seqlen: int, dim: int, dstate: int, dt_rank: int, width: int) -> dict:
    """{op: (arguments, flags)} in float64."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=draw, dtype=torch.float64)

    scan = {
        "A": -torch.arange(1.0, dstate + 1, dtype=torch.float64).repeat(dim, 1),
        "D": 1 + normal(dim, scale=0.1),
        "delta_bias": normal(dim, scale=0.5) - 3,
    }
    sequence = (batch, seqlen, dim)
    return {
        "conv1d_silu": (
            {"x": normal(*sequence), "weight": normal(dim, width), "bias": normal(dim)},
            {},
        ),
        "selective_scan": (
            {
                "u": normal(*sequence),
                "delta": normal(*sequence),
                "B": normal(batch, seqlen, dstate),
                "C": normal(batch, seqlen, dstate),
                **scan,
            },
            {"delta_softplus": True},
        ),
        "mixer": (
            {
                "xz": normal(batch, seqlen, 2 * dim),
                "conv_x_weight": normal(dim, width),
                "conv_z_weight": normal(dim, width),
                "x_proj_weight": normal(dt_rank + 2 * dstate, dim, scale=dim**-0.5),
                "dt_proj_weight": normal(dim, dt_rank, scale=dt_rank**-0.5),
                **scan,
            },
            {},
        ),
    }


# Kept in float32 whatever the activations are.
FLOAT32 = ("A", "D", "delta_bias")

EAGER: dict[str, Callable[..., Tensor]] = {
    "conv1d_silu": eager_conv1d_silu,
    "selective_scan": eager_selective_scan,
    "mixer": eager_mixer,
}


def _run_reference(op: str, arguments: Arguments, flags: dict, dy: Tensor) -> Arguments:
    """Output and gradients by name."""
    y = getattr(reference, op)(**arguments, **flags)
    grads = getattr(reference, f"{op}_backward")(dy, **arguments, **flags)._asdict()
    return {"y": y} | {f"d{name}": grads[f"d{name}"] for name in arguments}


def _run_autograd(
    function: Callable[..., Tensor], arguments: Arguments, flags: dict, dy: Tensor
) -> Arguments:
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items()}
    y = function(**leaves, **flags)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {
        f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


def _error(value: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest value of the truth."""
    value = value.to(truth.device, truth.dtype)
    return float((value - truth).abs().max() / truth.abs().max().clamp_min(1e-30))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _seconds(ways: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Medians. They take turns, so that a busy moment meets all; the first turn is not timed."""
    times: list[list[float]] = [[] for _ in ways]
    begun = time.perf_counter()
    for turn in range(21):
        for run, kept in zip(ways, times, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if turn:
                kept.append(time.perf_counter() - start)
        if turn >= 3 and time.perf_counter() - begun > 2:
            break
    return [median(kept) for kept in times]


def _check(op: str, arguments: Arguments, flags: dict, dy: Tensor, shape: str) -> OpCheck:
    device, dtype = dy.device, dy.dtype
    # Forced, so that the table names what ran.
    backend = "triton" if device.type == "cuda" and find_spec("triton") else "torch"
    function = partial(getattr(ops, op), backend=backend)
    # The truth starts from the same rounded numbers. MPS has no float64.
    exact = torch.device("cpu") if device.type == "mps" else device
    doubled = {name: value.to(exact, torch.float64) for name, value in arguments.items()}
    truth = _run_reference(op, doubled, flags, dy.to(exact, torch.float64))
    plain = _run_reference(op, arguments, flags, dy)
    fused = _run_autograd(function, arguments, flags, dy)
    errors = {name: _error(fused[name], truth[name]) for name in truth}
    roundings = 8 * torch.finfo(dtype).eps
    limits = {name: 2 * _error(plain[name], truth[name]) + roundings for name in truth}
    # A NaN, which compares with nothing, comes first.
    worst = max(errors, key=lambda n: (isnan(errors[n]), errors[n] / limits[n]))
    seconds, seconds_reference, seconds_eager = _seconds(
        [
            lambda: _run_autograd(function, arguments, flags, dy),
            lambda: _run_reference(op, arguments, flags, dy),
            lambda: _run_autograd(EAGER[op], arguments, {}, dy),
        ],
        device,
    )
    return OpCheck(
        op=op,
        backend=backend,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        tensor=worst,
        error=errors[worst],
        allowed=limits[worst],
        seconds=seconds,
        seconds_reference=seconds_reference,
        seconds_eager=seconds_eager,
    )


def check_ops(device: torch.device) -> Iterator[OpCheck]:
    """Checks and times every operator with the best backend of this device, one row at a time."""
    sizes = {"batch": 64 if device.type == "cuda" else 4, "seqlen": 196, "dim": 160, "dstate": 8}
    shape = ", ".join(f"{name} {size}" for name, size in sizes.items())
    dtypes = (torch.float32, torch.float16) if device.type == "cuda" else (torch.float32,)
    draw = torch.Generator().manual_seed(1)
    for op, (exact, flags) in _arguments(**sizes, dt_rank=20, width=3).items():
        dy = torch.randn(next(iter(exact.values())).shape, generator=draw, dtype=torch.float64)
        for dtype in dtypes:
            kept = dict.fromkeys(FLOAT32, torch.float32)
            given = {n: v.to(device, kept.get(n, dtype)) for n, v in exact.items()}
            yield _check(op, given, flags, dy.to(device, dtype), shape)
