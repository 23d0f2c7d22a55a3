"""A residual sum and the layer norm behind it, as PyTorch's own operations.

    s = x + gamma y                                        s = x where there is no y
    n = layer_norm(s)
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_layer_norm(
    x: Tensor, y: Tensor | None, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(s, n); arguments are those of `mambavision.ops.add_layer_norm`."""
    dtype = x.dtype
    if y is not None:
        x = x + (y if gamma is None else gamma * y).to(dtype)
    if weight.dtype == bias.dtype == dtype:
        return x, F.layer_norm(x, weight.shape, weight, bias, eps)
    # PyTorch refuses some mixtures
    wide = torch.promote_types(dtype, torch.float32)
    return x, F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(dtype)
