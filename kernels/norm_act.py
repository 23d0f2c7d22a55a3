"""All that stands behind a convolution, in one pass over the map; forward only.

    a = (x + bias - mean) rsqrt(var + eps) weight + shift    a = x + bias without a norm
    y = residual + gamma act(a)

act is the identity, relu or gelu in its tanh form, a sigmoid(2 sqrt(2 / pi) (a + 0.044715 a^3)).

Shapes: x, residual, y (batch, dim, height, width), channels-last, so that a row is a pixel of dim
channels; bias, mean, var, weight, shift, gamma (dim,). Any float dtype up to float32 in, float32
inside; y has x's.

Split: a program owns BLOCK_L rows with all their channels, padded to a power of two. Of the
parameters it makes one factor and one summand per channel. Moved are x, and the residual, once in
and y once out; PyTorch passes over the map once for each of these operations.
"""

import torch
import triton
import triton.language as tl

from . import _device as dev

# Elements a program, channels padded: 16 for each lane. Several such tiles a program, which load
# the parameters less often, were no faster on an H200.
ELEMENTS = 2048
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

# 2 sqrt(2 / pi)
GELU = tl.constexpr(1.5957691216057308)


@triton.jit
def load_row(ptr, offs_d, mask_d, default: tl.constexpr):
    """A parameter in float32, `default` where there is none."""
    if ptr is None:
        return tl.full(offs_d.shape, default, tl.float32)
    else:
        return tl.load(ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _norm_act_kernel(
    x_ptr,  # (rows, dim)
    bias_ptr,  # (dim,) or None
    mean_ptr,  # (dim,), or None: no norm
    var_ptr,  # (dim,) or None
    weight_ptr,  # (dim,) or None
    shift_ptr,  # (dim,) or None
    gamma_ptr,  # (dim,) or None
    residual_ptr,  # (rows, dim) or None
    y_ptr,  # (rows, dim)
    rows, eps, dim: tl.constexpr, ACT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < dim
    add = load_row(bias_ptr, offs_d, mask_d, 0.0)
    if mean_ptr is not None:
        factor = tl.rsqrt(load_row(var_ptr, offs_d, mask_d, 0.0) + eps)
        factor *= load_row(weight_ptr, offs_d, mask_d, 1.0)
        add = (add - load_row(mean_ptr, offs_d, mask_d, 0.0)) * factor
        add += load_row(shift_ptr, offs_d, mask_d, 0.0)
    else:
        factor = tl.full(offs_d.shape, 1.0, tl.float32)
    mask = (row < rows) & mask_d
    at = row * dim + offs_d
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * factor + add
    if ACT == "relu":
        # Not tl.maximum, for which NaN is the smaller one
        y = tl.where(y < 0.0, 0.0, y)
    elif ACT == "gelu":
        y = y * dev.sigmoid((y + 0.044715 * y * y * y) * GELU)
    if gamma_ptr is not None:
        y *= load_row(gamma_ptr, offs_d, mask_d, 1.0)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dev.store(y_ptr + at, y, mask)


def norm_act(x, bias, norm, act, gamma, residual):
    """y of the module docstring on the Triton path, without gradients, channels-last as x has to
    be. Arguments are those of `mambavision.ops.norm_act`, which checks them."""
    batch, dim, height, width = x.shape
    *statistics, eps = norm or (None, None, None, None, 0.0)
    bias, gamma = dev.packed(bias), dev.packed(gamma)
    mean, var, weight, shift = map(dev.packed, statistics)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    block_d = triton.next_power_of_2(dim)
    block_l = max(1, ELEMENTS // block_d)
    rows = batch * height * width
    if rows:
        args = (x, bias, mean, var, weight, shift, gamma, residual, y, rows, eps, dim, act)
        options = {"BLOCK_L": block_l, "BLOCK_D": block_d, **OPTIONS}
        dev.launch(_norm_act_kernel, (triton.cdiv(rows, block_l),), args, options)
    return y
