"""Layers for inference: the activation inside, on a CPU the weight in the order that oneDNN reads.

    y = act(W x + b)          x (..., in_features), y (..., out_features)
    y = act(conv(x) + b)      x, y (batch, channels, height, width), channels-last

A library reorders W in every call, which for a convolution from 3 channels or on a small map takes
longer than the layer itself; and for products of matrices PyTorch may take a library that leaves
half of the processor idle. Reordered once, W is read straight through, and the activation behind
the layer is computed on the way out.

On an NVIDIA GPU, in float16, W stays as it is; cuBLAS adds b and computes GELU behind a product,
and cuDNN adds b and computes ReLU behind a convolution: a pass over y or two less. That GELU is the
tanh form, as close to the exact one as float16 is.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ops import exporting

__all__ = ["PackedConv2d", "PackedLinear", "fuses"]


class _Packed(NamedTuple):
    """A reordered weight, and from which state of which one for an input of which size."""

    source: Tensor
    stamp: tuple[Any, ...]
    weight: Tensor


@cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """Those that this build of PyTorch, on this processor, has reordered weights for."""
    names = (
        "_reorder_linear_weight",
        "_linear_pointwise",
        "_reorder_convolution_weight",
        "_convolution_pointwise",
        "_is_mkldnn_bf16_supported",
    )
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not all(hasattr(ops, name) for name in names):
        return ()
    return (torch.float32, *([torch.bfloat16] if ops._is_mkldnn_bf16_supported() else []))


def _supported(x: Tensor) -> bool:
    """Whether x can meet a reordered weight. Whatever traces sees the plain layer."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu":
        return False
    if x.dtype not in _dtypes() or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
        return False
    return bool(torch.backends.mkldnn.enabled)


def _library_fuses(x: Tensor) -> bool:
    """Whether NVIDIA's libraries compute activations behind this x. In bfloat16 cuBLAS takes four
    times as long for some sizes."""
    if x.device.type != "cuda" or x.dtype != torch.float16 or torch.version.hip or not x.numel():
        return False
    return not (torch.is_autocast_enabled("cuda") or exporting())


def _in_onednn(act: nn.Module | None) -> tuple[str, str] | None:
    """An activation's name and form there, None where there is none."""
    if act is None:
        return "none", ""
    if type(act) is nn.ReLU:
        return "relu", ""
    return ("gelu", act.approximate) if type(act) is nn.GELU else None


def fuses(act: nn.Module) -> bool:
    """Whether a packed layer can compute this activation."""
    return _in_onednn(act) is not None


class _Packing(nn.Module):
    """A layer's parameters under their names, and beside them the reordered weight.

    It is made when the layer first runs without gradients on a CPU, in float32 or bfloat16, and
    again when the weight changes or an input of another size comes. Where no library has a form of
    its own, the layer is the one that it was made from. The reordered weight takes as much memory
    as the weight itself and is in no state dict or copy.
    """

    weight: Tensor
    bias: Any
    _packed: _Packed | None = None

    def _take(self, source: Any, act: nn.Module | None) -> None:
        then = _in_onednn(act)
        if then is None:
            raise ValueError(f"{type(self).__name__}: act cannot be {act}")
        self.weight, self.bias, self.act, self._then = source.weight, source.bias, act, then
        self.train(source.training)

    def _differentiates(self, x: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        return any(p is not None and p.requires_grad for p in (x, self.weight, self.bias))

    def _packs(self, x: Tensor) -> bool:
        return x.dtype == self.weight.dtype and _supported(x) and not self._differentiates(x)

    def _fuses(self, act: type[nn.Module], x: Tensor) -> bool:
        if type(self.act) is not act or self.bias is None or x.dtype != self.weight.dtype:
            return False
        return _library_fuses(x) and not self._differentiates(x)

    def _reordered(self, size: Any, reorder: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The weight for inputs of this size; None where its changes would not be noticed."""
        source = self.weight
        try:
            stamp = source._version, source.data_ptr(), size
        except RuntimeError:
            # An inference tensor counts no writes.
            return None
        packed = self._packed
        if packed is None or packed.source is not source or packed.stamp != stamp:
            with torch.inference_mode(False), torch.no_grad():
                packed = self._packed = _Packed(source, stamp, reorder(source.detach()))
        return packed.weight

    def _plain(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.act is None else self.act(y)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}


class PackedLinear(_Packing, nn.Linear):
    """act(linear(x)) for the linear layer `source`; `act` is ReLU, GELU or None."""

    def __init__(self, source: nn.Linear, act: nn.Module | None = None):
        super().__init__(
            source.in_features, source.out_features, source.bias is not None, device="meta"
        )
        self._take(source, act)

    def forward(self, x: Tensor) -> Tensor:
        if self._fuses(nn.GELU, x):
            flat = x.reshape(-1, self.in_features)
            y = torch._addmm_activation(self.bias, flat, self.weight.t(), use_gelu=True)
            return y.view(*x.shape[:-1], self.out_features)
        if not self._packs(x):
            return self._plain(x)
        rows = x.numel() // self.in_features
        weight = self._reordered(rows, lambda w: torch.ops.mkldnn._reorder_linear_weight(w, rows))
        if weight is None:
            return self._plain(x)
        then, form = self._then
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, then, [], form)


class PackedConv2d(_Packing, nn.Conv2d):
    """act(conv(x)), channels-last, for the convolution `source`; `act` is ReLU, GELU or None."""

    def __init__(self, source: nn.Conv2d, act: nn.Module | None = None):
        made: Any = super()
        made.__init__(
            source.in_channels, source.out_channels, source.kernel_size, source.stride,
            source.padding, source.dilation, source.groups, source.bias is not None,
            source.padding_mode, device="meta",
        )  # fmt: skip
        if source.padding_mode != "zeros" or isinstance(source.padding, str):
            raise ValueError("PackedConv2d: source must be padded with zeros, by numbers")
        self._take(source, act)

    def library_fuses(self, x: Tensor) -> bool:
        """Whether the convolution of x and what is behind it are one call of NVIDIA's library."""
        return x.dim() == 4 and self._fuses(nn.ReLU, x)

    def forward(self, x: Tensor) -> Tensor:
        if self.library_fuses(x):
            return torch.ops.aten.cudnn_convolution_relu(
                x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
            )
        if x.dim() != 4 or not self._packs(x):
            return self._plain(x)
        how = self.padding, self.stride, self.dilation, self.groups
        size = tuple(x.shape)
        weight = self._reordered(
            size, lambda w: torch.ops.mkldnn._reorder_convolution_weight(w, *how, size)
        )
        if weight is None:
            return self._plain(x)
        then, form = self._then
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, self.bias, *how, then, [], form
        )
