"""Depthwise 'same' convolution over the sequence, then SiLU, in plain PyTorch.

    a_t = bias + sum_k weight_k x_{t + k - left}           left = (width - 1) // 2, x = 0 outside
    y_t = silu(a_t) = a_t sigmoid(a_t)                     (or a_t without activation)

Backward:

    da_t = dy_t silu'(a_t)                                 silu' = s + a s (1 - s), s = sigmoid(a)
    dx_t = sum_k weight_k da_{t - k + left}
    dweight_k = sum_{batch,t} da_t x_{t + k - left}        dbias = sum_{batch,t} da_t

Shapes: x, y (batch, seqlen, dim); weight (dim, width) or (dim, 1, width); bias (dim,). An even
width pads less on the left: of width - 1 zeros, (width - 1) // 2 stand before the sequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Conv1dSiluGrads(NamedTuple):
    dx: Tensor
    dweight: Tensor
    dbias: Tensor | None


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _shifted(x: Tensor, shift: int) -> Tensor:
    """x_{t + shift}, zero outside the sequence."""
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        if 0 <= t + shift < x.shape[1]:
            y[:, t] = x[:, t + shift]
    return y


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    width = weight.shape[-1]
    a = torch.zeros_like(x) if bias is None else bias.expand_as(x)
    for k in range(width):
        a = a + weight[:, k] * _shifted(x, k - (width - 1) // 2)
    return a


def conv1d_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: bool = True
) -> Tensor:
    """y of the module docstring, in x's dtype."""
    dtype = accumulation_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    a = _convolve(x.to(dtype), weight.to(dtype).flatten(1), bias)
    return (a * torch.sigmoid(a) if activation else a).to(x.dtype)


def conv1d_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: bool = True
) -> Conv1dSiluGrads:
    """Gradients of sum(dy * y), each in its argument's dtype."""
    dtype = accumulation_dtype(x)
    dy_, x_, w = dy.to(dtype), x.to(dtype), weight.to(dtype).flatten(1)
    width = w.shape[-1]
    left = (width - 1) // 2
    if activation:
        a = _convolve(x_, w, None if bias is None else bias.to(dtype))
        s = torch.sigmoid(a)
        da = dy_ * (s + a * s * (1 - s))
    else:
        da = dy_
    dx = torch.zeros_like(x_)
    dweight = torch.zeros_like(w)
    for k in range(width):
        dx = dx + w[:, k] * _shifted(da, left - k)
        dweight[:, k] = (da * _shifted(x_, k - left)).sum((0, 1))
    return Conv1dSiluGrads(
        dx.to(x.dtype),
        dweight.view(weight.shape).to(weight.dtype),
        None if bias is None else da.sum((0, 1)).to(bias.dtype),
    )
