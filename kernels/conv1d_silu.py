"""Depthwise 'same' convolution over the sequence, non-causal, then SiLU; forward and backward.

    a_t = bias + sum_k weight_k x_{t + k - left}           left = (width - 1) // 2, x = 0 outside
    y_t = silu(a_t)                                        (or a_t without activation)

Backward, with a recomputed from x and not stored:

    da_t = dy_t silu'(a_t)                                 dx_t = sum_k weight_k da_{t - k + left}
    dweight_k = sum_{batch,t} da_t x_{t + k - left}        dbias = sum_{batch,t} da_t

Shapes: x, y (batch, seqlen, dim); weight (dim, width) or (dim, 1, width); bias (dim,). Any float
dtype up to float32 in, float32 inside.

Split: the op moves bytes and little else. All batch * seqlen rows form one axis; a program owns
BLOCK_L of them and BLOCK_D channels, neighbouring rows come from the cache. A neighbour beyond its
sequence's end is masked, so blocks may span batch entries and no length wastes lanes. The backward
pass recomputes da of the neighbours too. dweight and dbias have two stages, one partial per program
and one torch sum, hence the same bits in every run.

Source: the convolution of the MambaVision mixer, arXiv 2407.08083, section 3.
"""

import torch
import triton
import triton.language as tl

from . import _device as dev

# Rows and channels per program: 2,048 elements for 4 warps, 16 a lane.
CONFIG = {"BLOCK_L": 32, "BLOCK_D": 64, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def rows_of(block, batch, seqlen, BLOCK_L: tl.constexpr):
    """Batch entry, time and mask of the rows of a block, (BLOCK_L, 1), 64 bits wide."""
    offs = block * BLOCK_L + tl.arange(0, BLOCK_L).to(tl.int64)[:, None]
    return offs // seqlen, offs % seqlen, offs < tl.cast(batch, tl.int64) * seqlen


@triton.jit
def _load_shifted(ptr, stride_b, stride_l, b, t, mask, shift, offs_d, seqlen):
    """Rows t + shift of a (batch, seqlen, dim) tensor, 0 outside the sequence."""
    s = t + shift
    mask = mask & (s >= 0) & (s < seqlen)
    return tl.load(ptr + b * stride_b + s * stride_l + offs_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def conv_rows(
    x_ptr, stride_xb, stride_xl, weight_ptr, bias_ptr, b, t, mask, offs_d, mask_d, seqlen,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """a for the rows (b, t), (BLOCK_L, 1), and the channels offs_d, (1, BLOCK_D)."""
    a = tl.zeros((t.shape[0], offs_d.shape[1]), tl.float32)
    if bias_ptr is not None:
        a += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH):
        weight = tl.load(weight_ptr + offs_d * WIDTH + k, mask=mask_d, other=0.0).to(tl.float32)
        shift = k - (WIDTH - 1) // 2
        a += weight * _load_shifted(x_ptr, stride_xb, stride_xl, b, t, mask, shift, offs_d, seqlen)
    return a


@triton.jit
def _owned_tile(batch, seqlen, dim, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row block, its rows and channels with their masks; grid axis 0 alone, 64 bits wide."""
    pid = tl.program_id(0).to(tl.int64)
    blocks_d = tl.cdiv(dim, BLOCK_D)
    offs_d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    b, t, mask_l = rows_of(pid // blocks_d, batch, seqlen, BLOCK_L)
    return pid // blocks_d, b, t, offs_d, mask_l & (offs_d < dim), offs_d < dim


@triton.jit(do_not_specialize=["batch", "seqlen"])
def _conv1d_silu_fwd_kernel(
    x_ptr, stride_xb, stride_xl,  # (batch, seqlen, dim)
    weight_ptr,  # (dim, width)
    bias_ptr,  # (dim,) or None
    y_ptr, stride_yb, stride_yl,  # (batch, seqlen, dim)
    batch, seqlen, dim: tl.constexpr,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    _, b, t, offs_d, mask, mask_d = _owned_tile(batch, seqlen, dim, BLOCK_L, BLOCK_D)
    y = conv_rows(
        x_ptr, stride_xb, stride_xl, weight_ptr, bias_ptr, b, t, mask, offs_d, mask_d, seqlen, WIDTH
    )
    if ACTIVATION:
        y = dev.silu(y)
    dev.store(y_ptr + b * stride_yb + t * stride_yl + offs_d, y, mask)


@triton.jit(do_not_specialize=["batch", "seqlen"])
def _conv1d_silu_bwd_kernel(
    dy_ptr, stride_dyb, stride_dyl,  # (batch, seqlen, dim)
    x_ptr, stride_xb, stride_xl,  # (batch, seqlen, dim)
    weight_ptr,  # (dim, width)
    bias_ptr,  # (dim,) or None
    dx_ptr, stride_dxb, stride_dxl,  # (batch, seqlen, dim)
    dweight_ptr,  # (row blocks, width, dim)
    dbias_ptr,  # (row blocks, dim)
    batch, seqlen, dim: tl.constexpr,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, b, t, offs_d, mask, mask_d = _owned_tile(batch, seqlen, dim, BLOCK_L, BLOCK_D)
    x = _load_shifted(x_ptr, stride_xb, stride_xl, b, t, mask, 0, offs_d, seqlen)
    dx = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    for k in tl.static_range(WIDTH):
        # Row s = t - k + left is the one that read x_t through weight_k
        shift = (WIDTH - 1) // 2 - k
        s = t + shift
        da = _load_shifted(dy_ptr, stride_dyb, stride_dyl, b, t, mask, shift, offs_d, seqlen)
        if ACTIVATION:
            mask_s = mask & (s >= 0) & (s < seqlen)
            da *= dev.dsilu(
                conv_rows(
                    x_ptr, stride_xb, stride_xl, weight_ptr, bias_ptr, b, s, mask_s, offs_d, mask_d,
                    seqlen, WIDTH,
                )
            )  # fmt: skip
        weight = tl.load(weight_ptr + offs_d * WIDTH + k, mask=mask_d, other=0.0).to(tl.float32)
        dx += weight * da
        dweight = tl.sum(da * x, axis=0)[None, :]
        tl.store(dweight_ptr + (block * WIDTH + k) * dim + offs_d, dweight, mask=mask_d)
        if shift == 0:
            dbias = tl.sum(da, axis=0)[None, :]
            tl.store(dbias_ptr + block * dim + offs_d, dbias, mask=mask_d)
    dev.store(dx_ptr + b * stride_dxb + t * stride_dxl + offs_d, dx, mask)


def conv1d_silu_fwd(x, weight, bias, activation, y=None):
    """y; written into `y` where given, whose rows may be those of a wider buffer."""
    batch, seqlen, dim = x.shape
    x = dev.channel_last(x)
    y = x.new_empty(x.shape) if y is None else y
    blocks = triton.cdiv(batch * seqlen, CONFIG["BLOCK_L"])
    if batch:
        with torch.cuda.device_of(x):
            _conv1d_silu_fwd_kernel[(blocks * triton.cdiv(dim, CONFIG["BLOCK_D"]),)](
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
    dy, x = dev.channel_last(dy), dev.channel_last(x)
    dx = x.new_empty(x.shape) if dx is None else dx
    blocks = triton.cdiv(batch * seqlen, CONFIG["BLOCK_L"])
    dweight = x.new_empty(blocks, width, dim, dtype=torch.float32)
    dbias = x.new_empty(blocks, dim, dtype=torch.float32)
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
    @dev.first_derivative_only
    def backward(ctx, dy):
        return *conv1d_silu_bwd(dy, *ctx.saved_tensors, ctx.activation), None


def conv1d_silu(x, weight, bias=None, *, activation=True):
    """y: the convolution above on the Triton path, differentiable in every tensor.

    Arguments are those of `mambavision.ops.conv1d_silu`, which checks them.
    """
    return Conv1dSilu.apply(x, weight, bias, activation)
