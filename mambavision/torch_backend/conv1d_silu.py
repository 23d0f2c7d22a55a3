"""Depthwise convolution over the sequence, 'same' padding, then SiLU, in plain PyTorch.

    a_t = bias + sum_k weight_k x_{t + k - left}            left = (width - 1) // 2, x = 0 outside
    y_t = silu(a_t)                                         (or a_t without activation)

Backward, with a recomputed from x and not stored:

    da_t = dy_t silu'(a_t)                                  dx_t = sum_k weight_k da_{t - k + left}
    dweight_k = sum_{batch,t} da_t x_{t + k - left}         dbias = sum_{batch,t} da_t

Shapes: x, y (batch, seqlen, dim); weight (dim, width) or (dim, 1, width); bias (dim,). One
multiply-add of whole sequences per tap: the library's convolution wants time on the last axis, and
the two transposes cost more than three taps.

Source: the convolution of the MambaVision mixer, arXiv 2407.08083, section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import first_derivative_only, plainly, silu_backward, work_dtype


def _shifted(x: Tensor, shift: int) -> tuple[slice, slice]:
    """The positions t, and t + shift, where both lie inside the sequence."""
    seqlen, ahead, behind = x.shape[1], max(0, shift), max(0, -shift)
    return slice(behind, max(behind, seqlen - ahead)), slice(ahead, max(ahead, seqlen - behind))


def _conv1d(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """a_t = bias + sum_k w_k x_{t + k - left}, w (width, dim), by one multiply-add per tap."""
    left = (w.shape[0] - 1) // 2
    a = x * w[left] if bias is None else torch.addcmul(bias, x, w[left])
    for k in range(w.shape[0]):
        if k != left:
            here, there = _shifted(x, k - left)
            a[:, here].addcmul_(x[:, there], w[k])
    return a


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments in the dtype of the arithmetic, the weight as (width, dim)."""
    dtype = work_dtype(x)
    w = weight.reshape(weight.shape[0], -1).t().to(dtype).contiguous()
    return x.to(dtype), w, None if bias is None else bias.to(dtype)


@plainly
def conv1d_silu_fwd(x, weight, bias, activation, y=None):
    """y; written into `y` where given."""
    dtype = x.dtype
    a = _conv1d(*_inputs(x, weight, bias))
    if activation:
        F.silu(a, inplace=True)
    return a.to(dtype) if y is None else y.copy_(a)


@plainly
def conv1d_silu_bwd(dy, x, weight, bias, activation, dx=None):
    """(dx, dweight, dbias), dbias None without a bias; dx written into `dx` where given."""
    dtype = x.dtype
    x, w, bias_ = _inputs(x, weight, bias)
    da = dy.to(x.dtype)
    if activation:
        da = silu_backward(da, _conv1d(x, w, bias_))
    width = w.shape[0]
    left = (width - 1) // 2
    dx_ = da * w[left]
    dw = torch.zeros_like(w)
    for k in range(width):
        here, there = _shifted(x, k - left)
        if k != left:
            dx_[:, there].addcmul_(da[:, here], w[k])
        dw[k] = (da[:, here] * x[:, there]).sum((0, 1))
    return (
        dx_.to(dtype) if dx is None else dx.copy_(dx_),
        dw.t().reshape(weight.shape).to(weight.dtype),
        None if bias is None else da.sum((0, 1)).to(bias.dtype),
    )


class Conv1dSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        ctx.save_for_backward(x, weight, bias)
        ctx.activation = activation
        return conv1d_silu_fwd(x, weight, bias, activation)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        return *conv1d_silu_bwd(dy, *ctx.saved_tensors, ctx.activation), None


def conv1d_silu(x, weight, bias=None, *, activation=True):
    """silu(conv1d(x)), differentiable in every tensor.

    Arguments are those of `mambavision.ops.conv1d_silu`, which checks them.
    """
    return Conv1dSilu.apply(x, weight, bias, activation)
