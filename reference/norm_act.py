"""All that stands behind a convolution, in plain PyTorch.

    a = (x + bias - mean) / sqrt(var + eps) weight + shift   a = x + bias without a norm
    y = residual + gamma act(a)

act is "none", "relu" or "gelu", the last in its tanh form,
a (1 + tanh(sqrt(2 / pi) (a + 0.044715 a^3))) / 2.

Shapes: x, residual, y (batch, dim, height, width); bias, mean, var, weight, shift, gamma (dim,).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .conv1d_silu import accumulation_dtype


def norm_act(
    x: Tensor, bias: Tensor | None, norm: Sequence[Any] | None, act: str, gamma: Tensor | None,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """y of the module docstring, in x's dtype. `norm` is (mean, var, weight, shift, eps)."""
    dtype = accumulation_dtype(x)

    def by_channel(parameter: Tensor) -> Tensor:
        return parameter.to(dtype)[:, None, None]

    a = x.to(dtype)
    if bias is not None:
        a = a + by_channel(bias)
    if norm is not None:
        mean, var, weight, shift, eps = norm
        a = (a - by_channel(mean)) / torch.sqrt(by_channel(var) + eps)
        if weight is not None:
            a = a * by_channel(weight)
        if shift is not None:
            a = a + by_channel(shift)
    if act == "relu":
        a = torch.where(a < 0, 0, a)
    elif act == "gelu":
        a = a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) / 2
    if gamma is not None:
        a = by_channel(gamma) * a
    if residual is not None:
        a = residual.to(dtype) + a
    return a.to(x.dtype)
