"""The first convolution of an image, with norm and ReLU; forward only.

    y = relu((conv(x) + bias - mean) rsqrt(var + eps) weight + shift)

conv is 3 x 3 with stride 2, zeros around: an output pixel (i, j) reads rows 2 i - 1 .. 2 i + 1 and
columns 2 j - 1 .. 2 j + 1 of the image.

Shapes: x (batch, in_chans, height, width) of any strides, W (dim, in_chans, 3, 3), bias and the
norm's (dim,); y (batch, dim, height / 2, width / 2), rounded up, channels-last. float16 or bfloat16
in, float32 inside.

Split: three channels are too few for what a library does with convolutions; but all 9 in_chans
numbers that an output pixel reads are one row of a matrix product. A program owns BLOCK_L output
pixels with all their channels and gathers these rows, out of the first cache for the most part. y
is written once, and norm and ReLU cost no pass of their own.

Source: the stem of MambaVision, arXiv 2407.08083, section 3.
"""

import triton
import triton.language as tl

from . import _device as dev
from .norm_act import load_row

# On an H200, for 128 images of 224 x 224 and dim 32: 51 us, the library 112, the bytes alone 33.
BLOCK_L, WARPS = 128, 4
# What one program holds of W; more channels are the library's.
MAX_IN_CHANS, MAX_DIM = 7, 128


@triton.jit(do_not_specialize=["batch", "height", "width"])
def _stem_conv_kernel(
    x_ptr, stride_xb, stride_xc, stride_xh, stride_xw,  # (batch, in_chans, height, width)
    W_ptr,  # (dim, 3, 3, in_chans)
    bias_ptr,  # (dim,) or None
    mean_ptr,  # (dim,), or None: no norm
    var_ptr,  # (dim,) or None
    weight_ptr,  # (dim,) or None
    shift_ptr,  # (dim,) or None
    y_ptr,  # (batch, out height, out width, dim)
    batch, height, width, eps, in_chans: tl.constexpr, dim: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Divisions of 64 bits are subroutines; below 2^31 pixels 32 bits do
    pixel = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    row = pixel // out_width
    b = row // out_height
    i, j = row % out_height, pixel % out_width
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    down, right = offs_k // (3 * in_chans), offs_k // in_chans % 3
    h, w = 2 * i - 1 + down, 2 * j - 1 + right
    inside = (b < batch) & (offs_k < 9 * in_chans)
    inside = inside & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    # A pixel's own place and, the same for all of them, that of what it reads
    at = b.to(tl.int64) * stride_xb
    at += (2 * i - 1).to(tl.int64) * stride_xh + (2 * j - 1).to(tl.int64) * stride_xw
    c = (offs_k % in_chans).to(tl.int64)
    around = c * stride_xc + down.to(tl.int64) * stride_xh + right.to(tl.int64) * stride_xw
    x = tl.load(x_ptr + at + around, mask=inside, other=0.0)

    offs_k = tl.arange(0, BLOCK_K)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < dim
    mask_w = (offs_k < 9 * in_chans) & mask_d
    W = tl.load(W_ptr + offs_d * (9 * in_chans) + offs_k, mask=mask_w, other=0.0)
    y = tl.dot(x, W.to(x.dtype)) + load_row(bias_ptr, offs_d, mask_d, 0.0)
    if mean_ptr is not None:
        factor = tl.rsqrt(load_row(var_ptr, offs_d, mask_d, 0.0) + eps)
        factor *= load_row(weight_ptr, offs_d, mask_d, 1.0)
        y = (y - load_row(mean_ptr, offs_d, mask_d, 0.0)) * factor
        y += load_row(shift_ptr, offs_d, mask_d, 0.0)
    # Not tl.maximum, for which NaN is the smaller one
    y = tl.where(y < 0.0, 0.0, y)
    dev.store(y_ptr + pixel.to(tl.int64) * dim + offs_d, y, (b < batch) & mask_d)


def stem_conv_serves(x, W):
    """Whether a program can hold such a convolution, on tensor cores, and 32 bits its pixels."""
    fits = x.shape[1] <= MAX_IN_CHANS and W.shape[0] <= MAX_DIM and x.numel() < 2**31
    return fits and x.element_size() == 2


def stem_conv(x, W, bias, norm):
    """y of the module docstring on the Triton path, without gradients. Arguments are those of
    `mambavision.ops.stem_conv`, which checks them and `stem_conv_serves`."""
    (batch, in_chans, height, width), dim = x.shape, W.shape[0]
    *statistics, eps = norm or (None, None, None, None, 0.0)
    mean, var, weight, shift = map(dev.packed, statistics)
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    y = x.new_empty(batch, out_height, out_width, dim)
    if batch:
        args = (
            x, *x.stride(),
            W.permute(0, 2, 3, 1).contiguous(),
            dev.packed(bias),
            mean,
            var,
            weight,
            shift,
            y,
            batch, height, width, eps, in_chans, dim,
        )  # fmt: skip
        options = {
            "BLOCK_L": BLOCK_L,
            "BLOCK_K": max(16, triton.next_power_of_2(9 * in_chans)),
            "BLOCK_D": max(16, triton.next_power_of_2(dim)),
            "num_warps": WARPS,
            "enable_fp_fusion": True,
        }
        programs = triton.cdiv(batch * out_height * out_width, BLOCK_L)
        dev.launch(_stem_conv_kernel, (programs,), args, options)
    return y.permute(0, 3, 1, 2)
