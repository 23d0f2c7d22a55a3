"""A residual sum and the layer norm behind it, in plain PyTorch.

    s = x + gamma y                                        s = x where there is no y
    n = (s - mean(s)) / sqrt(var(s) + eps) weight + bias   mean and variance over dim

Shapes: x, y, s, n (..., dim); gamma, weight, bias (dim,).
"""

import torch
from torch import Tensor

from .conv1d_silu import accumulation_dtype


def add_layer_norm(
    x: Tensor, y: Tensor | None, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(s, n) of the module docstring, in x's dtype."""
    dtype = accumulation_dtype(x)
    s = x.to(dtype)
    if y is not None:
        s = s + (y.to(dtype) if gamma is None else gamma.to(dtype) * y.to(dtype))
    mean = s.mean(-1, keepdim=True)
    var = ((s - mean) ** 2).mean(-1, keepdim=True)
    n = (s - mean) / torch.sqrt(var + eps) * weight.to(dtype) + bias.to(dtype)
    return s.to(x.dtype), n.to(x.dtype)
