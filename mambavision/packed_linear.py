"""Linear layers for inference on a CPU: the weight in the order in which oneDNN reads it.

    y = W x + b, or gelu(W x + b)        x (..., in_features), y (..., out_features)

A library reorders W in every call, which for the few rows of one image's last stage costs a fifth
of the layer; reordered once, it is read straight through, and gelu is computed on the way out.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PackedLinear"]

_DTYPES = (torch.float32, torch.bfloat16)


class _Packed(NamedTuple):
    """A reordered weight, and from which state of which one for how many rows."""

    source: Tensor
    stamp: tuple[int, int, int]
    weight: Tensor


def _supported(x: Tensor) -> bool:
    """Whether x can meet a reordered weight. Whatever traces sees the plain layer."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu":
        return False
    if x.dtype not in _DTYPES or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


class PackedLinear(nn.Linear):
    """A linear layer's parameters under their names, and beside them the reordered weight.

    It is made when the layer first runs without gradients on a CPU, in float32 or bfloat16, and
    again when the weight changes or other numbers of rows come; elsewhere this is nn.Linear. The
    reordered weight takes as much memory as the weight itself and is in no state dict or copy.
    """

    _packed: _Packed | None = None

    def __init__(self, source: nn.Linear, gelu: bool = False):
        super().__init__(
            source.in_features, source.out_features, source.bias is not None, device="meta"
        )
        self.weight, self.bias, self.gelu = source.weight, source.bias, gelu
        self.train(source.training)

    def _reordered(self, rows: int) -> Tensor | None:
        source = self.weight
        try:
            stamp = source._version, source.data_ptr(), rows
        except RuntimeError:
            # An inference tensor counts no writes.
            return None
        packed = self._packed
        if packed is None or packed.source is not source or packed.stamp != stamp:
            with torch.inference_mode(False), torch.no_grad():
                weight = torch.ops.mkldnn._reorder_linear_weight(source.detach(), rows)
            packed = self._packed = _Packed(source, stamp, weight)
        return packed.weight

    def forward(self, x: Tensor) -> Tensor:
        weight = None
        if not torch.is_grad_enabled() and x.dtype == self.weight.dtype and _supported(x):
            weight = self._reordered(x.numel() // self.in_features)
        if weight is None:
            y = F.linear(x, self.weight, self.bias)
            return F.gelu(y) if self.gelu else y
        then, form = ("gelu", "none") if self.gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, then, [], form)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}
