"""What the operators refuse, before any work: one check per operator.

Each message says the operator, the argument, what was expected and what was given. ValueError for
wrong shapes, sizes and devices, TypeError for wrong types and dtypes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_add_layer_norm", "check_attention", "check_conv1d_silu", "check_mixer", "check_norm_act",
    "check_selective_scan", "check_stem_conv",
]  # fmt: skip

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
CONV_WEIGHT = (("dim", "width"), ("dim", "1", "width"))


def _text(shape: Iterable[Any]) -> str:
    axes = [str(axis) for axis in shape]
    return "(" + ", ".join(axes) + ("," if len(axes) == 1 else "") + ")"


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Check:
    """Checks the arguments of one call in turn; the sizes of the first ones bind the others."""

    def __init__(self, op: str):
        self.op = op
        self.sizes: dict[str, int] = {"1": 1}
        self.first: tuple[str, torch.device] | None = None

    def tensor(
        self, name: str, x: Any, *layouts: tuple[str, ...], dtypes: tuple[torch.dtype, ...] = FLOATS
    ) -> None:
        """x is a tensor of one of the dtypes and layouts, on the device of the first tensor."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.op}: {name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in dtypes:
            names = ", ".join(map(_dtype_text, dtypes))
            raise TypeError(
                f"{self.op}: {name} must have one of the dtypes {names}, got {_dtype_text(x.dtype)}"
            )
        if not self._fits(x.shape, layouts):
            self.refuse_shape(name, x, layouts)
        if self.first is None:
            self.first = name, x.device
        elif x.device != self.first[1]:
            raise ValueError(
                f"{self.op}: all tensors must be on one device, "
                f"got {self.first[0]} on {self.first[1]} and {name} on {x.device}"
            )

    def optional(self, name: str, x: Any, *layouts: tuple[str, ...], **options: Any) -> None:
        if x is not None:
            self.tensor(name, x, *layouts, **options)

    def _fits(self, shape: torch.Size, layouts: tuple[tuple[str, ...], ...]) -> bool:
        """One layout has this rank and, axis by axis, these sizes; unknown sizes may be any."""
        for axes in layouts:
            if len(axes) == len(shape):
                for axis, size in zip(axes, shape, strict=True):
                    if self.sizes.get(axis, size) != size:
                        break
                else:
                    return True
        return False

    def refuse_shape(self, name: str, x: Tensor, layouts: tuple[tuple[str, ...], ...]) -> None:
        of_rank = [axes for axes in layouts if len(axes) == x.dim()]
        texts = []
        for axes in of_rank or layouts:
            names, known = _text(axes), _text(self.sizes.get(axis, axis) for axis in axes)
            texts.append(names if names == known else f"{names} = {known}")
        raise ValueError(
            f"{self.op}: {name} must have shape {' or '.join(texts)}, got {_text(x.shape)}"
        )

    def not_empty(self, axis: str, size: int, name: str, x: Tensor) -> None:
        if size < 1:
            raise ValueError(
                f"{self.op}: {axis} must be at least 1, got {size}, "
                f"{name} having shape {_text(x.shape)}"
            )

    def size(self, axis: str, size: int, name: str, x: Tensor) -> None:
        """From here on, `axis` has this size, which x says and which is not 0."""
        self.not_empty(axis, size, name, x)
        self.sizes[axis] = size

    def flag(self, name: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"{self.op}: {name} must be True or False, got {value!r}")


def check_conv1d_silu(x: Any, weight: Any, bias: Any, activation: Any) -> None:
    check = _Check("conv1d_silu")
    check.tensor("x", x, ("batch", "seqlen", "dim"))
    check.size("seqlen", x.shape[1], "x", x)
    check.size("dim", x.shape[2], "x", x)
    check.tensor("weight", weight, *CONV_WEIGHT)
    check.not_empty("width", weight.shape[-1], "weight", weight)
    check.optional("bias", bias, ("dim",))
    check.flag("activation", activation)


def check_selective_scan(
    op: str, time_last: bool, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any,
    delta_bias: Any, initial_state: Any, **flags: Any,
) -> None:  # fmt: skip
    """`time_last`: mamba-ssm's layout, complex B and C being interleaved pairs of real numbers."""

    def layout(batch: str, time: str, *rest: str) -> tuple[str, ...]:
        return (batch, *rest, time) if time_last else (batch, time, *rest)

    check = _Check(op)
    sequence = layout("batch", "seqlen", "dim")
    check.tensor("u", u, sequence)
    seqlen, dim = u.shape[2 if time_last else 1], u.shape[1 if time_last else 2]
    check.sizes["batch"] = u.shape[0]
    check.size("seqlen", seqlen, "u", u)
    check.size("dim", dim, "u", u)
    check.sizes["2 * seqlen"] = 2 * seqlen
    check.tensor("delta", delta, sequence)
    check.tensor("A", A, ("dim", "dstate"), dtypes=FLOATS + COMPLEX)
    check.size("dstate", A.shape[1], "A", A)
    for name, x in (("B", B), ("C", C)):
        pairs = time_last and A.is_complex() and isinstance(x, Tensor) and x.dim() > 2
        time = "2 * seqlen" if pairs else "seqlen"
        plain = layout("batch", time, "dstate")
        grouped = layout("batch", time, "groups", "dstate")
        dtypes = COMPLEX if A.is_complex() and not pairs else FLOATS
        check.tensor(name, x, ("dim", "dstate"), plain, grouped, dtypes=dtypes)
        groups = x.shape[grouped.index("groups")] if x.dim() == 4 else 1
        if groups < 1 or dim % groups:
            raise ValueError(f"{op}: groups of {name} must divide dim = {dim}, got {groups}")
    check.optional("D", D, ("dim",))
    check.optional("z", z, sequence)
    check.optional("delta_bias", delta_bias, ("dim",))
    states = FLOATS + COMPLEX if A.is_complex() else FLOATS
    check.optional("initial_state", initial_state, ("batch", "dim", "dstate"), dtypes=states)
    for name, value in flags.items():
        # mamba-ssm's callers pass None for False
        if value is not None or name != "return_last_state":
            check.flag(name, value)


def check_mixer(
    xz: Any, conv_x_weight: Any, conv_z_weight: Any, x_proj_weight: Any, dt_proj_weight: Any,
    A: Any, D: Any, delta_bias: Any, conv_x_bias: Any, conv_z_bias: Any,
) -> None:  # fmt: skip
    check = _Check("mixer")
    layout = ("batch", "seqlen", "2 * dim")
    check.tensor("xz", xz, layout)
    if xz.shape[2] % 2:
        check.refuse_shape("xz", xz, (layout,))
    check.size("seqlen", xz.shape[1], "xz", xz)
    check.size("dim", xz.shape[2] // 2, "xz", xz)
    for name, weight in (("conv_x_weight", conv_x_weight), ("conv_z_weight", conv_z_weight)):
        check.tensor(name, weight, *CONV_WEIGHT)
        check.size("width", weight.shape[-1], name, weight)
    check.tensor("dt_proj_weight", dt_proj_weight, ("dim", "dt_rank"))
    dt_rank = dt_proj_weight.shape[1]
    check.size("dt_rank", dt_rank, "dt_proj_weight", dt_proj_weight)
    check.tensor("A", A, ("dim", "dstate"))
    check.size("dstate", A.shape[1], "A", A)
    rows = "dt_rank + 2 * dstate"
    check.sizes[rows] = dt_rank + 2 * A.shape[1]
    check.tensor("x_proj_weight", x_proj_weight, (rows, "dim"))
    check.tensor("D", D, ("dim",))
    check.tensor("delta_bias", delta_bias, ("dim",))
    check.optional("conv_x_bias", conv_x_bias, ("dim",))
    check.optional("conv_z_bias", conv_z_bias, ("dim",))


def check_attention(qkv: Any, num_heads: Any) -> None:
    check = _Check("attention")
    layout = ("batch", "seqlen", "3 * dim")
    check.tensor("qkv", qkv, layout)
    if qkv.shape[2] % 3:
        check.refuse_shape("qkv", qkv, (layout,))
    check.size("seqlen", qkv.shape[1], "qkv", qkv)
    check.size("dim", qkv.shape[2] // 3, "qkv", qkv)
    dim = qkv.shape[2] // 3
    if not isinstance(num_heads, int):
        raise TypeError(f"attention: num_heads must be an integer, got {num_heads!r}")
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"attention: num_heads must divide dim = {dim}, got {num_heads}")


def check_add_layer_norm(x: Any, y: Any, gamma: Any, weight: Any, bias: Any) -> None:
    check = _Check("add_layer_norm")
    check.tensor("weight", weight, ("dim",))
    check.size("dim", weight.shape[0], "weight", weight)
    rows = tuple(f"axis {axis}" for axis in range(x.dim() - 1)) if isinstance(x, Tensor) else ()
    check.tensor("x", x, (*rows, "dim"))
    check.sizes.update(zip(rows, x.shape, strict=False))
    check.optional("y", y, (*rows, "dim"))
    check.optional("gamma", gamma, ("dim",))
    check.tensor("bias", bias, ("dim",))


def _check_norm(check: _Check, norm: Any) -> None:
    if norm is None:
        return
    if not isinstance(norm, tuple) or len(norm) != 5:
        raise TypeError(f"{check.op}: norm must be None or (mean, var, weight, shift, eps)")
    check.tensor("mean", norm[0], ("dim",))
    check.tensor("var", norm[1], ("dim",))
    check.optional("weight", norm[2], ("dim",))
    check.optional("shift", norm[3], ("dim",))


def check_norm_act(x: Any, bias: Any, norm: Any, act: Any, gamma: Any, residual: Any) -> None:
    check = _Check("norm_act")
    layout = ("batch", "dim", "height", "width")
    check.tensor("x", x, layout)
    for axis, size in zip(layout[2:], x.shape[2:], strict=True):
        check.size(axis, size, "x", x)
    check.size("dim", x.shape[1], "x", x)
    check.sizes["batch"] = x.shape[0]
    check.optional("bias", bias, ("dim",))
    _check_norm(check, norm)
    if act not in ("none", "relu", "gelu"):
        raise ValueError(f"norm_act: act must be 'none', 'relu' or 'gelu', got {act!r}")
    check.optional("gamma", gamma, ("dim",))
    check.optional("residual", residual, layout)


def check_stem_conv(x: Any, W: Any, bias: Any, norm: Any) -> None:
    check = _Check("stem_conv")
    check.tensor("x", x, ("batch", "in_chans", "height", "width"))
    for axis, size in zip(("in_chans", "height", "width"), x.shape[1:], strict=True):
        check.size(axis, size, "x", x)
    check.sizes["3"] = 3
    check.tensor("W", W, ("dim", "in_chans", "3", "3"))
    check.size("dim", W.shape[0], "W", W)
    check.optional("bias", bias, ("dim",))
    _check_norm(check, norm)
