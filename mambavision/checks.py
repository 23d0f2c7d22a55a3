"""What the operators refuse, before any work: one check per operator.

Each message says the operator, the argument, what was expected and what was given. ValueError for
wrong shapes, sizes and devices, TypeError for wrong types and dtypes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_conv1d_silu", "check_mixer", "check_selective_scan"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)

def _shape_text(shape: Iterable[Any]) -> str:
    axes = [str(axis) for axis in shape]
    return "(" + ", ".join(axes) + ("," if len(axes) == 1 else "") + ")"


def _check_dtype(op: str, name: str, x: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(
            f"{op}: {name} must have one of the dtypes {names}, "
            f"got {str(x.dtype).removeprefix('torch.')}"
        )


def _layout_text(axes: tuple[str, ...], sizes: dict[str, int]) -> str:
    names, known = _shape_text(axes), _shape_text(sizes.get(axis, axis) for axis in axes)
    return names if names == known else f"{names} = {known}"


def _check_shape(op: str, name: str, x: Tensor, *layouts: tuple[str, ...], **sizes: int) -> None:
    """x has the shape of the layout with its rank; an axis without a known size may have any."""
    fitting = [axes for axes in layouts if len(axes) == x.dim()]
    for axes in fitting:
        if all(sizes.get(axis, size) == size for axis, size in zip(axes, x.shape, strict=True)):
            return
    text = " or ".join(_layout_text(axes, sizes) for axes in fitting or layouts)
    raise ValueError(f"{op}: {name} must have shape {text}, got {_shape_text(x.shape)}")


def _check_positive(op: str, name: str, x: Tensor, **sizes: int) -> None:
    for axis, size in sizes.items():
        if size < 1:
            raise ValueError(
                f"{op}: {axis} must be at least 1, got {size}, "
                f"{name} having shape {_shape_text(x.shape)}"
            )


def _check_flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def _check_devices(op: str, **tensors: Tensor | None) -> None:
    (first, x), *others = tensors.items()
    assert x is not None
    for name, other in others:
        if other is not None and other.device != x.device:
            raise ValueError(
                f"{op}: all tensors must be on one device, "
                f"got {first} on {x.device} and {name} on {other.device}"
            )


def _check_conv_weight(op: str, name: str, weight: Any, dim: int) -> None:
    _check_dtype(op, name, weight, FLOATS)
    _check_shape(op, name, weight, ("dim", "width"), ("dim", "1", "width"), dim=dim, **{"1": 1})
    _check_positive(op, name, weight, width=weight.shape[-1])


def _check_vectors(op: str, dim: int, **vectors: Any) -> None:
    for name, x in vectors.items():
        if x is not None:
            _check_dtype(op, name, x, FLOATS)
            _check_shape(op, name, x, ("dim",), dim=dim)


def check_conv1d_silu(x: Any, weight: Any, bias: Any, activation: Any) -> None:
    op = "conv1d_silu"
    _check_dtype(op, "x", x, FLOATS)
    _check_shape(op, "x", x, ("batch", "seqlen", "dim"))
    _check_positive(op, "x", x, seqlen=x.shape[1], dim=x.shape[2])
    _check_conv_weight(op, "weight", weight, x.shape[2])
    _check_vectors(op, x.shape[2], bias=bias)
    _check_flag(op, "activation", activation)
    _check_devices(op, x=x, weight=weight, bias=bias)


def check_selective_scan(
    op: str, time_last: bool, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any,
    delta_bias: Any, initial_state: Any, **flags: Any,
) -> None:  # fmt: skip
    """`time_last`: mamba-ssm's layout, complex B and C being interleaved pairs of real numbers."""

    def axes(*names: str) -> tuple[str, ...]:
        return (names[0], *names[2:], names[1]) if time_last else names

    _check_dtype(op, "u", u, FLOATS)
    _check_shape(op, "u", u, axes("batch", "seqlen", "dim"))
    batch, (seqlen, dim) = u.shape[0], (u.shape[:0:-1] if time_last else u.shape[1:])
    _check_positive(op, "u", u, seqlen=seqlen, dim=dim)
    sizes = {"batch": batch, "seqlen": seqlen, "2 * seqlen": 2 * seqlen, "dim": dim}
    for name, x in (("delta", delta), ("z", z)):
        if x is not None or name == "delta":
            _check_dtype(op, name, x, FLOATS)
            _check_shape(op, name, x, axes("batch", "seqlen", "dim"), **sizes)
    _check_dtype(op, "A", A, FLOATS + COMPLEX)
    _check_shape(op, "A", A, ("dim", "dstate"), **sizes)
    _check_positive(op, "A", A, dstate=A.shape[1])
    sizes["dstate"] = A.shape[1]
    for name, x in (("B", B), ("C", C)):
        pairs = time_last and A.is_complex() and isinstance(x, Tensor) and x.dim() > 2
        _check_dtype(op, name, x, COMPLEX if A.is_complex() and not pairs else FLOATS)
        time = "2 * seqlen" if pairs else "seqlen"
        grouped = axes("batch", time, "groups", "dstate")
        _check_shape(
            op, name, x, ("dim", "dstate"), axes("batch", time, "dstate"), grouped, **sizes
        )
        groups = x.shape[grouped.index("groups")] if x.dim() == 4 else 1
        if groups < 1 or dim % groups:
            raise ValueError(f"{op}: groups of {name} must divide dim = {dim}, got {groups}")
    _check_vectors(op, dim, D=D, delta_bias=delta_bias)
    if initial_state is not None:
        _check_dtype(op, "initial_state", initial_state, FLOATS + COMPLEX * A.is_complex())
        _check_shape(op, "initial_state", initial_state, ("batch", "dim", "dstate"), **sizes)
    for name, value in flags.items():
        if value is not None or name != "return_last_state":
            _check_flag(op, name, value)
    _check_devices(
        op, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias,
        initial_state=initial_state,
    )  # fmt: skip


def check_mixer(
    xz: Any, conv_x_weight: Any, conv_z_weight: Any, x_proj_weight: Any, dt_proj_weight: Any,
    A: Any, D: Any, delta_bias: Any, conv_x_bias: Any, conv_z_bias: Any,
) -> None:  # fmt: skip
    op = "mixer"
    _check_dtype(op, "xz", xz, FLOATS)
    if xz.dim() != 3 or xz.shape[2] % 2:
        raise ValueError(
            f"{op}: xz must have shape (batch, seqlen, 2 * dim), got {_shape_text(xz.shape)}"
        )
    dim = xz.shape[2] // 2
    _check_positive(op, "xz", xz, seqlen=xz.shape[1], dim=dim)
    _check_conv_weight(op, "conv_x_weight", conv_x_weight, dim)
    _check_conv_weight(op, "conv_z_weight", conv_z_weight, dim)
    _check_dtype(op, "dt_proj_weight", dt_proj_weight, FLOATS)
    _check_shape(op, "dt_proj_weight", dt_proj_weight, ("dim", "dt_rank"), dim=dim)
    dt_rank = dt_proj_weight.shape[1]
    _check_positive(op, "dt_proj_weight", dt_proj_weight, dt_rank=dt_rank)
    _check_dtype(op, "A", A, FLOATS)
    _check_shape(op, "A", A, ("dim", "dstate"), dim=dim)
    dstate = A.shape[1]
    _check_positive(op, "A", A, dstate=dstate)
    _check_dtype(op, "x_proj_weight", x_proj_weight, FLOATS)
    rows = "dt_rank + 2 * dstate"
    sizes = {rows: dt_rank + 2 * dstate, "dim": dim}
    _check_shape(op, "x_proj_weight", x_proj_weight, (rows, "dim"), **sizes)
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        _check_dtype(op, name, x, FLOATS)
    _check_vectors(
        op, dim, D=D, delta_bias=delta_bias, conv_x_bias=conv_x_bias, conv_z_bias=conv_z_bias
    )
    _check_devices(
        op, xz=xz, conv_x_weight=conv_x_weight, conv_z_weight=conv_z_weight,
        x_proj_weight=x_proj_weight, dt_proj_weight=dt_proj_weight, A=A, D=D,
        delta_bias=delta_bias, conv_x_bias=conv_x_bias, conv_z_bias=conv_z_bias,
    )  # fmt: skip
