"""ONNX: each operator in parts that ONNX knows, the recurrence as one `Scan` node.

torch.onnx has no form for a custom operator. Before it translates a program exported by
torch.export, `decompositions` put these in their place:

    conv1d_silu      padding, a depthwise convolution, SiLU
    selective_scan   torch's higher-order scan, whose body is one step; it becomes ONNX's `Scan`
    mixer            two convolutions, two projections, the scan

So the graph stays small, a `Scan` per mixer, and the batch may have any size. Arithmetic is float32
in the operators, as everywhere. torch's scan is a prototype there and may change.
"""

from collections.abc import Callable
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops  # noqa: F401  (the operators that are replaced)
from .files import replacing

__all__ = ["decompositions", "export"]

_OPS = torch.ops.mambavision


def _refuse(*tensors: Tensor) -> None:
    if any(x.is_complex() or x.dtype == torch.float64 for x in tensors):
        raise ValueError("mambavision.onnx: complex A and float64 have no ONNX form here")


def _conv1d_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: bool, *unused: Any
) -> Any:
    _refuse(x)
    width, dtype = weight.shape[-1], x.dtype
    left = (width - 1) // 2
    x = F.pad(x.float().transpose(1, 2), (left, width - 1 - left))
    kernel = weight.float().reshape(-1, 1, width)
    y = F.conv1d(x, kernel, None if bias is None else bias.float(), groups=weight.shape[0])
    return (F.silu(y) if activation else y).transpose(1, 2).to(dtype)


def _step(h: Tensor, dt: Tensor, x: Tensor, B: Tensor, C: Tensor, A: Tensor) -> list[Tensor]:
    """h, A (batch, groups, channels, dstate); dt, x without dstate; B, C without channels."""
    h = torch.exp(dt.unsqueeze(-1) * A) * h + x.unsqueeze(-1) * B.unsqueeze(-2)
    return [h, (h * C.unsqueeze(-2)).sum(-1)]


def _selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, delta_softplus: bool, reverse: bool,
    *unused: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _refuse(u, A)
    from torch._higher_order_ops.scan import scan_op

    (batch, seqlen, dim), dstate, dtype = u.shape, A.shape[1], u.dtype
    u, dt, A, B, C = (x.float() for x in (u, delta, A, B, C))
    if delta_bias is not None:
        dt = dt + delta_bias.float()
    if delta_softplus:
        dt = F.softplus(dt)

    def grouped(x: Tensor) -> Tensor:
        """(batch, seqlen, groups, dstate); what is constant has a group per channel."""
        if x.dim() == 2:
            return x.expand(batch, seqlen, dim, dstate)
        return x.unsqueeze(2) if x.dim() == 3 else x

    B, C = grouped(B), grouped(C)
    # To read B and C by channel costs nothing, so one number of groups serves both.
    groups = B.shape[2] if B.shape[2] == C.shape[2] else dim
    B, C = (x.repeat_interleave(groups // x.shape[2], 2) for x in (B, C))
    states = (batch, groups, dim // groups, dstate)
    steps = [*(x.unflatten(2, states[1:3]) for x in (dt, dt * u)), B, C]
    steps = [(x.flip(1) if reverse else x).transpose(0, 1).contiguous() for x in steps]
    if initial_state is None:
        start = u.new_zeros(states)
    else:
        start = initial_state.float().reshape(states)
    last, y = scan_op(_step, [start], steps, additional_inputs=(A.unflatten(0, states[1:3]),))
    y = y.transpose(0, 1).flatten(2)
    if reverse:
        y = y.flip(1)
    if D is not None:
        y = y + D.float() * u
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(dtype), last.flatten(1, 2), u.new_empty(0)


def _mixer(
    xz: Tensor, conv_x_weight: Tensor, conv_z_weight: Tensor, x_proj_weight: Tensor,
    dt_proj_weight: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor, conv_x_bias: Tensor | None,
    conv_z_bias: Tensor | None, *unused: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _refuse(xz)
    x, z = xz.float().chunk(2, dim=-1)
    x = _conv1d_silu(x, conv_x_weight, conv_x_bias, True)
    z = _conv1d_silu(z, conv_z_weight, conv_z_bias, True)
    dt_rank, dstate = dt_proj_weight.shape[1], A.shape[1]
    projected = F.linear(x, x_proj_weight.float())
    dt_low, B, C = projected.split([dt_rank, dstate, dstate], dim=-1)
    delta = F.linear(dt_low, dt_proj_weight.float())
    y, _, states = _selective_scan(x, delta, A, B, C, D, None, delta_bias, None, True, False)
    yz = torch.cat([y, z], dim=-1).to(xz.dtype)
    return yz, dt_low.to(xz.dtype), torch.cat([B, C], dim=-1), states


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What replaces each operator, for `torch.export.ExportedProgram.run_decompositions`.

    >>> program = torch.export.export(model, (images,))  # doctest: +SKIP
    >>> program = program.run_decompositions(decompositions())  # doctest: +SKIP
    >>> torch.onnx.export(program, (images,), "model.onnx", opset_version=20)  # doctest: +SKIP
    """
    return {
        _OPS.conv1d_silu_fwd.default: _conv1d_silu,
        _OPS.selective_scan_fwd.default: _selective_scan,
        _OPS.mixer_fwd.default: _mixer,
    }


def export(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    path: str | PathLike[str],
    *,
    opset_version: int = 20,
) -> None:
    """Writes a model in evaluation mode as an ONNX file, with a `Scan` node per mixer.

    `inputs` are an example: their first axis, the batch, may have any size in the file, the others
    are fixed. The model may be any that holds the operators of this package: a `MambaVision`, one
    from `optimize_for_inference`, of timm or of `fuse_mixers`, a mixer. Weights are in the file;
    those of more than 2 GB in a second one, PATH.data. Files appear whole or not at all.

    Raises RuntimeError for a model in training mode and where onnx and onnxscript are not
    installed, FileNotFoundError for a folder that is not there, ValueError for complex A and
    float64.

    >>> export(model.eval(), torch.randn(2, 3, 224, 224), "model.onnx")  # doctest: +SKIP
    """
    missing = [name for name in ("onnx", "onnxscript") if not find_spec(name)]
    if missing:
        raise RuntimeError(
            f"mambavision.onnx: {' and '.join(missing)} missing: pip install "
            "'mambavision-triton[onnx]'"
        )
    if any(module.training for module in model.modules()):
        raise RuntimeError(
            "mambavision.onnx: the model is in training mode; call model.eval() first"
        )
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"mambavision.onnx: no folder {path.parent}")
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    # To torch.export an axis of length 1 is one that never has another.
    inputs = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in inputs)
    shapes: Any = torch.export.ShapesCollection()
    batch = torch.export.Dim("batch", min=1)
    for x in inputs:
        shapes[x] = {0: batch}
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
        program = program.run_decompositions(decompositions())
        exported: Any = torch.onnx.export(program, inputs, opset_version=opset_version, dynamo=True)
    # torch puts weights of more than 2 GB, which no file of this kind holds, into a second file.
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        exported.save(Path(folder) / path.name)
        for file in sorted(Path(folder).iterdir(), reverse=True):
            with replacing(path.with_name(file.name)) as temporary:
                file.replace(temporary)
