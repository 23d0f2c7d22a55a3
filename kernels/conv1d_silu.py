"""Depthwise convolution over the sequence, 'same' padding, non-causal, followed by SiLU; forward and backward.

    a_t = bias + sum_k weight_k x_{t + k - left}            left = (width - 1) // 2, x = 0 outside the sequence
    y_t = silu(a_t)                                         (or a_t without activation)

Backward, with a recomputed from x and not stored:

    da_t = dy_t silu'(a_t)                                  dx_t = sum_k weight_k da_{t - k + left}
    dweight_k = sum_{batch,t} da_t x_{t + k - left}         dbias = sum_{batch,t} da_t

Shapes: x, y (batch, seqlen, dim); weight (dim, width) or (dim, 1, width); bias (dim,). Any float dtype in, float32
inside.

How it is split: the op moves bytes and little else. batch * seqlen rows form one long axis; a program owns BLOCK_L of
them and BLOCK_D channels. Neighbouring rows come from the cache; a neighbour beyond its sequence's end is masked, so
blocks may span batch entries and no length wastes lanes. The backward pass needs da of the neighbours and recomputes
it. dweight and dbias are two-stage: one partial per program, then one torch sum, hence the same bits in every run.

Source: the convolution of the MambaVision mixer, arXiv 2407.08083, section 3.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ._device import channel_last, dsilu, silu

# Rows and channels per program: 2,048 elements for 4 warps, 16 a lane.
CONFIG = {"BLOCK_L": 32, "BLOCK_D": 64, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def rows_of(block, batch, seqlen, BLOCK_L: tl.constexpr):
    """Batch entry, time and validity of the BLOCK_L rows of a block, (BLOCK_L, 1), 64 bits wide."""
    offs = block * BLOCK_L + tl.arange(0, BLOCK_L).to(tl.int64)[:, None]
    return offs // seqlen, offs % seqlen, offs < batch.to(tl.int64) * seqlen


@triton.jit
def load_shifted(ptr, stride_b, stride_l, b, t, mask, shift: tl.constexpr, offs_d, seqlen):
    """Rows t + shift of a (batch, seqlen, dim) tensor, 0 outside the sequence."""
    inside = mask & (t + shift >= 0) & (t + shift < seqlen)
    return tl.load(ptr + b * stride_b + (t + shift) * stride_l + offs_d, mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def conv_rows(
    x_ptr,
    stride_xb,
    stride_xl,
    weight_ptr,
    bias_ptr,
    b,
    t,
    mask,
    offs_d,
    mask_d,
    seqlen,
    WIDTH: tl.constexpr,
):
    """a of the module docstring for rows (b, t), (BLOCK_L, 1), and channels offs_d, (1, BLOCK_D)."""
    a = tl.zeros((t.shape[0], offs_d.shape[1]), tl.float32)
    if bias_ptr is not None:
        a += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH):
        weight = tl.load(weight_ptr + offs_d * WIDTH + k, mask=mask_d, other=0.0).to(tl.float32)
        a += weight * load_shifted(
            x_ptr, stride_xb, stride_xl, b, t, mask, k - (WIDTH - 1) // 2, offs_d, seqlen
        )
    return a


@triton.jit(do_not_specialize=["batch", "seqlen"])
def _conv1d_silu_fwd_kernel(
    x_ptr, stride_xb, stride_xl,  # (batch, seqlen, dim)
    weight_ptr,  # (dim, width)
    bias_ptr,  # (dim,) or None
    y_ptr, stride_yb, stride_yl,  # (batch, seqlen, dim)
    batch, seqlen, dim,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks_d = tl.cdiv(dim, BLOCK_D)
    offs_d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < dim
    b, t, mask_l = rows_of(pid // blocks_d, batch, seqlen, BLOCK_L)
    mask = mask_l & mask_d
    y = conv_rows(
        x_ptr, stride_xb, stride_xl, weight_ptr, bias_ptr, b, t, mask, offs_d, mask_d, seqlen, WIDTH
    )
    if ACTIVATION:
        y = silu(y)
    tl.store(
        y_ptr + b * stride_yb + t * stride_yl + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask
    )


@triton.jit(do_not_specialize=["batch", "seqlen"])
def _conv1d_silu_bwd_kernel(
    dy_ptr, stride_dyb, stride_dyl,  # (batch, seqlen, dim)
    x_ptr, stride_xb, stride_xl,  # (batch, seqlen, dim)
    weight_ptr,  # (dim, width)
    bias_ptr,  # (dim,) or None
    dx_ptr, stride_dxb, stride_dxl,  # (batch, seqlen, dim)
    dweight_ptr,  # (row blocks, width, dim), summed over the blocks by the caller
    dbias_ptr,  # (row blocks, dim), likewise
    batch, seqlen, dim,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks_d = tl.cdiv(dim, BLOCK_D)
    block = pid // blocks_d
    offs_d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < dim
    b, t, mask_l = rows_of(block, batch, seqlen, BLOCK_L)
    mask = mask_l & mask_d
    LEFT: tl.constexpr = (WIDTH - 1) // 2

    dx = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    for k in tl.static_range(WIDTH):
        # The row that read x_t through weight_k
        s = t + (LEFT - k)
        mask_s = mask & (s >= 0) & (s < seqlen)
        da = load_shifted(dy_ptr, stride_dyb, stride_dyl, b, t, mask, LEFT - k, offs_d, seqlen)
        if ACTIVATION:
            da *= dsilu(
                conv_rows(
                    x_ptr,
                    stride_xb,
                    stride_xl,
                    weight_ptr,
                    bias_ptr,
                    b,
                    s,
                    mask_s,
                    offs_d,
                    mask_d,
                    seqlen,
                    WIDTH,
                )
            )
        dx += da * tl.load(weight_ptr + offs_d * WIDTH + k, mask=mask_d, other=0.0).to(tl.float32)
        x = load_shifted(x_ptr, stride_xb, stride_xl, b, t, mask, 0, offs_d, seqlen)
        dweight = tl.sum(da * x, axis=0)[None, :]
        tl.store(dweight_ptr + (block * WIDTH + k) * dim + offs_d, dweight, mask=mask_d)
        if k == LEFT:
            tl.store(dbias_ptr + block * dim + offs_d, tl.sum(da, axis=0)[None, :], mask=mask_d)
    tl.store(
        dx_ptr + b * stride_dxb + t * stride_dxl + offs_d, dx.to(dx_ptr.dtype.element_ty), mask=mask
    )


def _row_blocks(batch, seqlen):
    return triton.cdiv(batch * seqlen, CONFIG["BLOCK_L"])


def conv1d_silu_fwd(x, weight, bias, activation, y=None):
    """y; written into `y` where given, whose rows may be those of a wider buffer."""
    batch, seqlen, dim = x.shape
    x = channel_last(x)
    if y is None:
        y = torch.empty(batch, seqlen, dim, dtype=x.dtype, device=x.device)
    grid = (_row_blocks(batch, seqlen) * triton.cdiv(dim, CONFIG["BLOCK_D"]),)
    if batch:
        with torch.cuda.device_of(x):
            _conv1d_silu_fwd_kernel[grid](
                x, x.stride(0), x.stride(1),
                weight.contiguous(),
                bias,
                y, y.stride(0), y.stride(1),
                batch, seqlen, dim,
                weight.shape[-1], activation, **CONFIG,
            )  # fmt: skip
    return y


def conv1d_silu_bwd(dy, x, weight, bias, activation, dx=None):
    """(dx, dweight, dbias), dbias None without a bias; dx written into `dx` where given."""
    batch, seqlen, dim = x.shape
    width = weight.shape[-1]
    dy, x = channel_last(dy), channel_last(x)
    blocks = _row_blocks(batch, seqlen)
    if dx is None:
        dx = torch.empty(batch, seqlen, dim, dtype=x.dtype, device=x.device)
    dweight = torch.empty(blocks, width, dim, dtype=torch.float32, device=x.device)
    dbias = torch.empty(blocks, dim, dtype=torch.float32, device=x.device)
    if batch:
        with torch.cuda.device_of(x):
            _conv1d_silu_bwd_kernel[(blocks * triton.cdiv(dim, CONFIG["BLOCK_D"]),)](
                dy, dy.stride(0), dy.stride(1),
                x, x.stride(0), x.stride(1),
                weight.contiguous(),
                bias,
                dx, dx.stride(0), dx.stride(1),
                dweight,
                dbias,
                batch, seqlen, dim,
                width, activation, **CONFIG,
            )  # fmt: skip
    dweight = dweight.sum(0).t().reshape(weight.shape).to(weight.dtype)
    return dx, dweight, None if bias is None else dbias.sum(0).to(bias.dtype)


class Conv1dSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        ctx.save_for_backward(x, weight, bias)
        ctx.activation = activation
        return conv1d_silu_fwd(x, weight, bias, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *conv1d_silu_bwd(dy, *ctx.saved_tensors, ctx.activation), None


def conv1d_silu(x, weight, bias=None, *, activation=True):
    """silu(conv1d(x)) of the module docstring on the Triton path, differentiable in every tensor.

    Arguments are those of `mambavision.ops.conv1d_silu`, which checks them.
    """
    return Conv1dSilu.apply(x, weight, bias, activation)
