"""A residual sum and the layer norm behind it, in one pass; forward only.

    s = x + gamma y                                        s = x where there is no y
    n = (s - mean(s)) rsqrt(var(s) + eps) weight + bias    mean and variance over dim

Shapes: x, y, s, n (..., dim); gamma, weight, bias (dim,). Any float dtype up to float32 in, float32
inside; s and n have x's dtype.

Split: a program owns BLOCK_L rows, few enough for one warp, whose sums over channels are exchanges
between its lanes; channels are padded to a power of two. Moved are x and y once in, s and n once
out, where two operations read s again.

Source: Ba et al., arXiv 1607.06450.
"""

import torch
import triton
import triton.language as tl

from . import _device as dev

# Elements a program: 32 for each lane of one warp, channels padded.
ELEMENTS = 1024


@triton.jit(do_not_specialize=["rows"])
def _add_layer_norm_kernel(
    x_ptr,  # (rows, dim)
    y_ptr,  # (rows, dim) or None
    gamma_ptr,  # (dim,) or None
    weight_ptr,  # (dim,)
    bias_ptr,  # (dim,)
    s_ptr,  # (rows, dim), or None where y is
    n_ptr,  # (rows, dim)
    rows, eps, dim: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < dim
    mask = (row < rows) & mask_d
    at = row * dim + offs_d
    s = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if gamma_ptr is not None:
            y *= tl.load(gamma_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        s += y
        dev.store(s_ptr + at, s, mask)
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    centred = tl.where(mask_d, s - tl.sum(s, 1, keep_dims=True) / dim, 0.0)
    # What rounding left of the mean, where that is far from 0
    centred = tl.where(mask_d, centred - tl.sum(centred, 1, keep_dims=True) / dim, 0.0)
    var = tl.sum(centred * centred, 1, keep_dims=True) / dim
    dev.store(n_ptr + at, centred * tl.rsqrt(var + eps) * weight + bias, mask)


def add_layer_norm(x, y, gamma, weight, bias, eps):
    """(s, n) of the module docstring on the Triton path, without gradients; s is x itself where y
    is None. Arguments are those of `mambavision.ops.add_layer_norm`."""
    dim = x.shape[-1]
    x = x.contiguous()
    s = x if y is None else torch.empty_like(x)
    n = torch.empty_like(x)
    block_d = triton.next_power_of_2(dim)
    block_l = max(1, ELEMENTS // block_d)
    rows = x.numel() // dim
    if rows:
        args = (
            x,
            dev.packed(y),
            dev.packed(gamma),
            weight.contiguous(),
            bias.contiguous(),
            None if y is None else s,
            n,
            rows, eps, dim,
        )  # fmt: skip
        options = {
            "BLOCK_L": block_l,
            "BLOCK_D": block_d,
            "num_warps": max(1, block_d // 2048),
            "enable_fp_fusion": True,
        }
        dev.launch(_add_layer_norm_kernel, (triton.cdiv(rows, block_l),), args, options)
    return s, n
