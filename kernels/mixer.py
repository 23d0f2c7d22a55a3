"""The middle of the MambaVision mixer, between in_proj and out_proj; forward and backward.

    x, z = halves of xz                                    xz (batch, seqlen, 2 dim)
    x    = silu(conv_x(x)),  z = silu(conv_z(z))           depthwise, 'same' padding
    w    = x W_x^T = [dt_low, B, C]                        W_x (dt_rank + 2 dstate, dim)
    delta = dt_low W_dt^T                                  W_dt (dim, dt_rank)
    yz   = [selective_scan(x, delta, A, B, C, D), z]       with delta_bias, softplus

Backward: xz, dt_low, [B, C] and the scan's states are saved, x and delta are recomputed. After the
backward pass of the scan

    ddt_low = ddelta W_dt                                  dW_dt = ddelta^T dt_low
    dx   += dw W_x,  dw = [ddt_low, dB, dC]                dW_x = dw^T x

and dx and dz go through the convolutions into the halves of dxz.

Split: forward, three launches. The first reads xz once: a program owns BLOCK_L rows, convolves them
channel block by channel block, accumulates x W_x^T in registers on the way (`tl.dot`), and writes x
and z into the halves of yz, dt_low, and [B, C] in float32. Then one library matrix product for
delta. Then the scan, which reads x out of yz and writes y over it. The matrix products of the
backward pass are the library's, too.

Source: arXiv 2407.08083, section 3. `delta_bias` is all that is added inside the softplus.
"""

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear

from . import _device as dev
from .conv1d_silu import conv1d_silu_bwd, conv1d_silu_fwd, conv_rows, rows_of
from .selective_scan import selective_scan_bwd, selective_scan_fwd

# Rows and channels at a time, and the most columns of w one program accumulates: more would spill.
CONFIG = {
    "BLOCK_L": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 1, "enable_fp_fusion": True
}  # fmt: skip
MAX_BLOCK_R = 128


@triton.jit(do_not_specialize=["batch", "seqlen"])
def _conv_proj_kernel(
    xz_ptr, stride_xzb, stride_xzl,  # (batch, seqlen, 2 dim)
    conv_x_weight_ptr,  # (dim, width)
    conv_z_weight_ptr,  # (dim, width)
    conv_x_bias_ptr,  # (dim,) or None
    conv_z_bias_ptr,  # (dim,) or None
    x_proj_weight_ptr,  # (dt_rank + 2 dstate, dim)
    yz_ptr,  # (batch, seqlen, 2 dim), receives [x, z]
    dt_low_ptr,  # (batch, seqlen, dt_rank)
    BC_ptr,  # (batch, seqlen, 2 dstate)
    batch, seqlen, dim: tl.constexpr, dt_rank: tl.constexpr,
    dstate: tl.constexpr, WIDTH_X: tl.constexpr, WIDTH_Z: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    width = dt_rank + 2 * dstate
    blocks_r = tl.cdiv(width, BLOCK_R)
    offs_r = pid % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    b, t, mask_l = rows_of(pid // blocks_r, batch, seqlen, BLOCK_L)
    row = b * seqlen + t
    dtype = xz_ptr.dtype.element_ty
    w = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
    for d0 in range(0, dim, BLOCK_D):
        offs_d = d0 + tl.arange(0, BLOCK_D)[None, :]
        mask_d = offs_d < dim
        mask = mask_l & mask_d
        x = conv_rows(
            xz_ptr, stride_xzb, stride_xzl, conv_x_weight_ptr, conv_x_bias_ptr,
            b, t, mask, offs_d, mask_d, seqlen, WIDTH_X,
        )  # fmt: skip
        x = dev.silu(x).to(dtype)
        offs_k = d0 + tl.arange(0, BLOCK_D)[:, None]
        mask_W = (offs_k < dim) & (offs_r < width)
        W = tl.load(x_proj_weight_ptr + offs_r * dim + offs_k, mask=mask_W, other=0.0).to(dtype)
        # "ieee": Triton's default for float32 is TF32, three digits
        w = tl.dot(x, W, w, input_precision="ieee")
        # Where w takes several programs, each needs x, and one writes it
        if pid % blocks_r == 0:
            z = conv_rows(
                xz_ptr + dim, stride_xzb, stride_xzl, conv_z_weight_ptr, conv_z_bias_ptr,
                b, t, mask, offs_d, mask_d, seqlen, WIDTH_Z,
            )  # fmt: skip
            tl.store(yz_ptr + row * 2 * dim + offs_d, x, mask=mask)
            dev.store(yz_ptr + row * 2 * dim + dim + offs_d, dev.silu(z), mask)
    dev.store(dt_low_ptr + row * dt_rank + offs_r, w, mask_l & (offs_r < dt_rank))
    offs_n = offs_r - dt_rank
    mask_n = (offs_n >= 0) & (offs_n < 2 * dstate)
    tl.store(BC_ptr + row * 2 * dstate + offs_n, w, mask=mask_l & mask_n)


def mixer_fwd(
    xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
    conv_x_bias, conv_z_bias, save_states,
):  # fmt: skip
    """(yz, dt_low, BC, states): the output, and what the backward pass keeps."""
    batch, seqlen, dim = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    dstate, dt_rank = A.shape[1], dt_proj_weight.shape[1]
    xz = dev.channel_last(xz)
    yz = xz.new_empty(batch, seqlen, 2 * dim)
    dt_low = xz.new_empty(batch, seqlen, dt_rank)
    BC = xz.new_empty(batch, seqlen, 2 * dstate, dtype=torch.float32)
    block_r = min(max(16, triton.next_power_of_2(dt_rank + 2 * dstate)), MAX_BLOCK_R)
    blocks_r = triton.cdiv(dt_rank + 2 * dstate, block_r)
    grid = (triton.cdiv(batch * seqlen, CONFIG["BLOCK_L"]) * blocks_r,)
    if batch:
        with torch.cuda.device_of(xz):
            _conv_proj_kernel[grid](
                xz, xz.stride(0), xz.stride(1),
                conv_x_weight.contiguous(),
                conv_z_weight.contiguous(),
                conv_x_bias,
                conv_z_bias,
                x_proj_weight.contiguous(),
                yz,
                dt_low,
                BC,
                batch, seqlen, dim, dt_rank,
                dstate, conv_x_weight.shape[-1], conv_z_weight.shape[-1], block_r, **CONFIG,
            )  # fmt: skip
    with torch.autocast(xz.device.type, enabled=False):
        delta = linear(dt_low, dt_proj_weight.to(xz.dtype))
    x, (B, C) = yz[..., :dim], BC.chunk(2, dim=-1)
    _, _, states = selective_scan_fwd(
        x, delta, A, B, C, D, None, delta_bias, None, True, False, save_states, y=x
    )
    return yz, dt_low, BC, states


def mixer_bwd(
    dyz, xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
    conv_x_bias, conv_z_bias, dt_low, BC, states,
):  # fmt: skip
    """(dxz, dconv_x_weight, dconv_z_weight, dx_proj_weight, ddt_proj_weight, dA, dD, ddelta_bias,
    dconv_x_bias, dconv_z_bias), None where an argument is."""
    dim, dtype = xz.shape[2] // 2, xz.dtype
    xz, dyz = dev.channel_last(xz), dev.channel_last(dyz)
    W_x, W_dt = x_proj_weight.to(dtype), dt_proj_weight.to(dtype)
    B, C = BC.chunk(2, dim=-1)
    with torch.autocast(xz.device.type, enabled=False):
        x = conv1d_silu_fwd(xz[..., :dim], conv_x_weight, conv_x_bias, True)
        delta = linear(dt_low, W_dt)
        dx, ddelta, dA, dB, dC, dD, _, ddelta_bias, _ = selective_scan_bwd(
            dyz[..., :dim], None, x, delta, A, B, C, D, None, delta_bias, None, states, True, False
        )
        ddt_proj_weight = ddelta.flatten(0, 1).t() @ dt_low.flatten(0, 1)
        dw = torch.cat([ddelta @ W_dt, dB.to(dtype), dC.to(dtype)], dim=-1).flatten(0, 1)
        dx_proj_weight = dw.t() @ x.flatten(0, 1)
        dx = torch.addmm(dx.flatten(0, 1), dw, W_x).view(x.shape)
    dxz = xz.new_empty(xz.shape)
    _, dconv_x_weight, dconv_x_bias = conv1d_silu_bwd(
        dx, xz[..., :dim], conv_x_weight, conv_x_bias, True, dx=dxz[..., :dim]
    )
    _, dconv_z_weight, dconv_z_bias = conv1d_silu_bwd(
        dyz[..., dim:], xz[..., dim:], conv_z_weight, conv_z_bias, True, dx=dxz[..., dim:]
    )
    return (
        dxz,
        dconv_x_weight,
        dconv_z_weight,
        dx_proj_weight.to(x_proj_weight.dtype),
        ddt_proj_weight.to(dt_proj_weight.dtype),
        dA,
        dD,
        ddelta_bias,
        dconv_x_bias,
        dconv_z_bias,
    )


class Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        yz, dt_low, BC, states = mixer_fwd(*inputs, any(ctx.needs_input_grad))
        ctx.save_for_backward(*inputs, dt_low, BC, states)
        return yz

    @staticmethod
    @dev.first_derivative_only
    def backward(ctx, dyz):
        return mixer_bwd(dyz, *ctx.saved_tensors)


def mixer(
    xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias, *,
    conv_x_bias=None, conv_z_bias=None,
):  # fmt: skip
    """yz: the mixer's middle above on the Triton path, differentiable in every tensor.

    Arguments are those of `mambavision.ops.mixer`, which checks them.
    """
    return Mixer.apply(
        xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
        conv_x_bias, conv_z_bias,
    )  # fmt: skip
