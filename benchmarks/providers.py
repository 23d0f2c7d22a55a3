"""Who computes an operator, as data: ours, the reference, mamba-ssm, eager PyTorch.

A provider turns a `Problem` into a `Call`, outside of any timing: arguments in the layout that it
likes best, and a function of them.

    triton, torch       mambavision.ops with that backend
    reference           a loop over time, with its backward pass by hand
    eager               as one would first write it, differentiated by autograd
    mamba_ssm           mamba-ssm's selective_scan_fn, (batch, dim, seqlen)
    mamba_ssm_padded    the same with the length padded to the next tile of its kernel
    mamba_ssm_folded    the same with batch and length laid out as rows of 2,048 steps: another
                        function, a lower bound of what resetting states inside rows could cost
    eager, of mixers    the mixer as published, on mamba-ssm's scan where there is one, else on a
                        loop over time, which is also `eager_loop`
    compiled            torch.compile of eager
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from models import EagerMixer, Unavailable, loop_scan, mamba_ssm_scan
from problems import FLAGS, FLOAT32, PER_SEQUENCE, ByHand, Call, Problem
from shapes import Shape
from torch import Tensor, nn

from mambavision import MambaVisionMixer, ops
from mambavision.selfcheck import eager_selective_scan

__all__ = ["OPS", "PROVIDERS", "Provider"]

Tensors = dict[str, Tensor]


def _of_arguments(function: Callable[..., Tensor], problem: Problem, **flags: Any) -> Call:
    """A call with the reference's arguments."""
    leaves = {name: x.detach().clone() for name, x in problem.tensors.items()}
    return Call(lambda: function(**leaves, **flags), leaves, problem.dy)


def _need_gpu(problem: Problem) -> None:
    if problem.dy.device.type != "cuda":
        raise Unavailable(f"the Triton kernels need a GPU, the tensors are on {problem.dy.device}")


def _ours(backend: str, problem: Problem) -> Call:
    if backend == "triton":
        _need_gpu(problem)
    function = getattr(ops, problem.op)
    return _of_arguments(function, problem, backend=backend, **FLAGS[problem.op])


# mamba-ssm. A warp or more of its kernel holds a tile of the length; a length that is a multiple of
# its tile takes vector loads.
TILES = (128, 256, 512, 1024, 2048)
FOLD = 2048


def _tile(seqlen: int) -> int:
    return next((tile for tile in TILES if seqlen <= tile), math.ceil(seqlen / FOLD) * FOLD)


def _channel_first(tensors: Tensors, length: int) -> Tensors:
    """Contiguous (batch, dim, length), zeros behind the sequence."""
    return {
        name: F.pad(x.mT, (0, length - x.shape[1])).contiguous() for name, x in tensors.items()
    }


def _mamba_ssm_call(problem: Problem, sequences: Tensors, length: int) -> Call:
    scan = mamba_ssm_scan()
    given = {n: x.detach().clone() for n, x in problem.tensors.items() if n in FLOAT32}
    *parts, dy = _channel_first(sequences, length).values()
    u, delta, B, C = parts
    leaves = {"u": u, "delta": delta, "A": given["A"], "B": B, "C": C}
    leaves |= {"D": given["D"], "delta_bias": given["delta_bias"]}
    A, D, bias = given["A"], given["D"], given["delta_bias"]
    seqlen = problem.shape.seqlen

    def restore(name: str, x: Tensor) -> Tensor:
        return x[..., :seqlen].mT if name.removeprefix("d") in PER_SEQUENCE else x

    return Call(lambda: scan(u, delta, A, B, C, D, None, bias, True), leaves, dy, restore)


def _sequences(problem: Problem) -> Tensors:
    return {name: problem.tensors[name] for name in ("u", "delta", "B", "C")} | {"dy": problem.dy}


def _mamba_ssm(problem: Problem, padded: bool = False) -> Call:
    seqlen = problem.shape.seqlen
    length = _tile(seqlen) if padded else seqlen
    call = _mamba_ssm_call(problem, _sequences(problem), length)
    call.setting = f"length {length}" if padded else None
    return call


def _mamba_ssm_folded(problem: Problem) -> Call:
    steps = problem.batch * problem.shape.seqlen
    rows = math.ceil(steps / FOLD)

    def fold(x: Tensor) -> Tensor:
        return F.pad(x.flatten(0, 1), (0, 0, 0, rows * FOLD - steps)).unflatten(0, (rows, FOLD))

    sequences = {name: fold(x) for name, x in _sequences(problem).items()}
    call = _mamba_ssm_call(problem, sequences, FOLD)
    call.setting = "cost only, another function"
    return call


# Eager PyTorch


def _channel_first_conv(x: Tensor, weight: Tensor) -> Tensor:
    return F.silu(F.conv1d(x, weight, None, padding="same", groups=weight.shape[0]))


def _eager_conv(problem: Problem, compiled: bool = False) -> Call:
    x = problem.tensors["x"].mT.contiguous()
    weight = problem.tensors["weight"].detach().clone()[:, None]

    def restore(name: str, found: Tensor) -> Tensor:
        return found[:, 0] if name == "dweight" else found.mT

    function = _compiled(_channel_first_conv) if compiled else _channel_first_conv
    dy = problem.dy.mT.contiguous()
    return Call(lambda: function(x, weight), {"x": x, "weight": weight}, dy, restore)


def _compiled(function: Any) -> Any:
    torch._dynamo.reset()
    # Buffers given away could not serve a second backward pass of the same forward pass.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)


@cache
def _scan_on(device: str) -> tuple[Callable[..., Tensor], str]:
    """The scan of eager mixers, and what rows call it."""
    if device == "cuda":
        try:
            return mamba_ssm_scan(), "mamba-ssm's scan"
        except Unavailable:
            pass
    return loop_scan, "loop over time"


def _scan_for(problem: Problem, loop: bool, compiled: bool) -> tuple[Callable[..., Tensor], str]:
    scan, name = (loop_scan, "loop over time") if loop else _scan_on(problem.dy.device.type)
    if compiled and scan is loop_scan:
        raise Unavailable("needs mamba-ssm's scan: compiling unrolls a loop over time")
    return scan, name


def published_mixer(
    xz: Tensor, conv_x_weight: Tensor, conv_z_weight: Tensor, x_proj_weight: Tensor,
    dt_proj_weight: Tensor, A: Tensor, D: Tensor, bias: Tensor, scan: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """All between in_proj and out_proj, one operation after another; `bias` enters twice."""
    seqlen, dstate, dt_rank = xz.shape[1], A.shape[1], dt_proj_weight.shape[1]
    x, z = rearrange(xz, "b l d -> b d l").chunk(2, dim=1)
    x, z = _channel_first_conv(x, conv_x_weight), _channel_first_conv(z, conv_z_weight)
    rows = F.linear(rearrange(x, "b d l -> (b l) d"), x_proj_weight)
    dt, B, C = rows.split([dt_rank, dstate, dstate], dim=-1)
    dt = F.linear(dt, dt_proj_weight, bias.to(xz.dtype))
    delta = rearrange(dt, "(b l) d -> b d l", l=seqlen)
    B = rearrange(B, "(b l) n -> b n l", l=seqlen).contiguous()
    C = rearrange(C, "(b l) n -> b n l", l=seqlen).contiguous()
    y = scan(x, delta, A, B, C, D, None, bias, True)
    return rearrange(torch.cat([y, z], dim=1), "b d l -> b l d")


def _eager_mixer(problem: Problem, loop: bool = False, compiled: bool = False) -> Call:
    scan, scan_name = _scan_for(problem, loop, compiled)
    leaves = {name: x.detach().clone() for name, x in problem.tensors.items()}
    # Its own bias is half of all that is added inside the softplus.
    leaves["delta_bias"] = leaves["delta_bias"] / 2
    for conv in ("conv_x_weight", "conv_z_weight"):
        leaves[conv] = leaves[conv][:, None]
    function = _compiled(published_mixer) if compiled else published_mixer

    def restore(name: str, x: Tensor) -> Tensor:
        if name == "ddelta_bias":
            return x / 2
        return x[:, 0] if name.startswith("dconv") else x

    run = partial(function, *leaves.values(), scan)
    return Call(run, leaves, problem.dy, restore, scan_name)


# Modules, from in_proj to out_proj


def _module_call(problem: Problem, make: Callable[[MambaVisionMixer], nn.Module]) -> Call:
    shape, given = problem.shape, problem.tensors
    mixer = MambaVisionMixer(
        shape.d_model, shape.dstate, shape.width, expand=1, device=problem.dy.device
    )
    mixer = mixer.to(problem.dy.dtype)
    own = {
        "in_proj_weight": mixer.in_proj.weight,
        "conv_x_weight": mixer.conv1d_x.weight,
        "conv_z_weight": mixer.conv1d_z.weight,
        "x_proj_weight": mixer.x_proj.weight,
        "dt_proj_weight": mixer.dt_proj.weight,
        "A_log": mixer.A_log,
        "D": mixer.D,
        "dt_proj_bias": mixer.dt_proj.bias,
        "out_proj_weight": mixer.out_proj.weight,
    }
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name].view(parameter.shape))
    hidden = given["hidden"].detach().clone()
    module = make(mixer)

    def restore(name: str, x: Tensor) -> Tensor:
        return x[:, 0] if name.startswith("dconv") else x

    leaves = {"hidden": hidden, **own}
    return Call(lambda: module(hidden), leaves, problem.dy, restore, module=module)


def _our_module(backend: str, problem: Problem) -> Call:
    if backend == "triton":
        _need_gpu(problem)

    def chosen(mixer: MambaVisionMixer) -> nn.Module:
        mixer.backend = backend
        return mixer

    return _module_call(problem, chosen)


def _eager_module(problem: Problem, loop: bool = False, compiled: bool = False) -> Call:
    scan, name = _scan_for(problem, loop, compiled)

    def make(mixer: MambaVisionMixer) -> nn.Module:
        eager = EagerMixer(mixer, scan)
        return _compiled(eager) if compiled else eager

    call = _module_call(problem, make)
    call.setting = name
    return call


# Which provider is measured where


def _always(*_: Any) -> bool:
    return True


def _never(*_: Any) -> bool:
    return False


def _pads(shape: Shape, batch: int, device: str) -> bool:
    return _tile(shape.seqlen) != shape.seqlen


def _fills_a_row(shape: Shape, batch: int, device: str) -> bool:
    return batch * shape.seqlen >= FOLD


def _loops(device: str) -> bool:
    """Whether eager mixers have nothing but a loop."""
    return _scan_on(device)[0] is loop_scan


def _differs_from_eager(shape: Shape, batch: int, device: str) -> bool:
    return not _loops(device)


@dataclass(frozen=True)
class Provider:
    """`make(problem)` returns the call, or raises Unavailable with the reason.

    A provider that is not `gated` computes something else on purpose. One that is `slow` on a
    device (thousands of launches, or a compiler) is measured at the first size only unless it is
    asked for. Where it does not apply, it would repeat another.
    """

    name: str
    make: Callable[[Problem], Call]
    gated: bool = True
    slow: Callable[[str], bool] = _never
    applies: Callable[[Shape, int, str], bool] = _always


def _on_gpu(device: str) -> bool:
    return device == "cuda"


def _backends(make: Callable[[str, Problem], Call]) -> Iterator[Provider]:
    yield Provider("triton", partial(make, "triton"))
    yield Provider("torch", partial(make, "torch"), slow=_on_gpu)


def _eagers(make: Callable[..., Call]) -> Iterator[Provider]:
    yield Provider("eager", make, slow=_loops)
    loop = partial(make, loop=True)
    yield Provider("eager_loop", loop, slow=_always, applies=_differs_from_eager)
    yield Provider("compiled", partial(make, compiled=True), slow=_always)


REFERENCE = Provider("reference", ByHand, slow=_always)
PROVIDERS: dict[str, list[Provider]] = {
    "selective_scan": [
        *_backends(_ours),
        Provider("mamba_ssm", _mamba_ssm),
        Provider("mamba_ssm_padded", partial(_mamba_ssm, padded=True), applies=_pads),
        Provider("mamba_ssm_folded", _mamba_ssm_folded, gated=False, applies=_fills_a_row),
        Provider("eager", partial(_of_arguments, eager_selective_scan), slow=_always),
        REFERENCE,
    ],
    "conv1d_silu": [
        *_backends(_ours),
        Provider("eager", _eager_conv),
        Provider("compiled", partial(_eager_conv, compiled=True), slow=_always),
        REFERENCE,
    ],
    "mixer": [*_backends(_ours), *_eagers(_eager_mixer), REFERENCE],
    "mixer_module": [*_backends(_our_module), *_eagers(_eager_module)],
}
OPS = tuple(PROVIDERS)
