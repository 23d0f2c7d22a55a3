"""The middle of the MambaVision mixer, between in_proj and out_proj, in plain PyTorch.

    x, z   = halves of xz                                   xz (batch, seqlen, 2 dim)
    x      = silu(conv_x(x)),  z = silu(conv_z(z))          depthwise, 'same' padding
    dt_low, B, C = split(x W_x^T)                           W_x (dt_rank + 2 dstate, dim)
    delta  = dt_low W_dt^T                                  W_dt (dim, dt_rank)
    yz     = [selective_scan(x, delta, A, B, C, D), z]      with delta_bias and softplus

Backward: x and delta are computed again; kept are xz, dt_low, [B C] and the scan's states.

    ddt_low = ddelta W_dt        dW_dt = ddelta^T dt_low     with dw = [ddt_low dB dC]
    dx     += dw W_x             dW_x = dw^T x               and dx, dz through the convolutions

Arithmetic in float32 (float64 for float64) from xz to yz; only dt_low, which is kept, is rounded to
xz's dtype. Source: arXiv 2407.08083, section 3.
"""

import torch
import torch.nn.functional as F

from ._common import cast, first_derivative_only, plainly, work_dtype
from .conv1d_silu import conv1d_silu_bwd, conv1d_silu_fwd
from .selective_scan import selective_scan_bwd, selective_scan_fwd


@plainly
def mixer_fwd(
    xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
    conv_x_bias, conv_z_bias, save_states,
):  # fmt: skip
    """(yz, dt_low, BC, states): the output and what the backward pass needs; states is empty unless
    `save_states`."""
    dtype, dim, dt_rank = work_dtype(xz), xz.shape[2] // 2, dt_proj_weight.shape[1]
    W_x, W_dt = x_proj_weight.to(dtype), dt_proj_weight.to(dtype)
    x, z = xz.to(dtype).chunk(2, dim=-1)
    yz = xz.new_empty(xz.shape)
    x = conv1d_silu_fwd(x, conv_x_weight, conv_x_bias, True)
    conv1d_silu_fwd(z, conv_z_weight, conv_z_bias, True, y=yz[..., dim:])
    projected = F.linear(x, W_x)
    dt_low = projected[..., :dt_rank].to(xz.dtype, copy=True, memory_format=torch.contiguous_format)
    BC = projected[..., dt_rank:].contiguous()
    delta = F.linear(dt_low.to(dtype), W_dt)
    B, C = BC.chunk(2, dim=-1)
    _, _, states = selective_scan_fwd(
        x, delta, A, B, C, D, None, delta_bias, None, True, False, save_states, y=yz[..., :dim]
    )
    return yz, dt_low, BC, states


@plainly
def mixer_bwd(
    dyz, xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
    conv_x_bias, conv_z_bias, dt_low, BC, states,
):  # fmt: skip
    """(dxz, dconv_x_weight, dconv_z_weight, dx_proj_weight, ddt_proj_weight, dA, dD, ddelta_bias,
    dconv_x_bias, dconv_z_bias), None where the argument is None."""
    dtype, dim = work_dtype(xz), xz.shape[2] // 2
    W_x, W_dt = x_proj_weight.to(dtype), dt_proj_weight.to(dtype)
    (x, z), (B, C) = xz.to(dtype).chunk(2, dim=-1), BC.chunk(2, dim=-1)
    dt_low = dt_low.to(dtype)
    x_ = conv1d_silu_fwd(x, conv_x_weight, conv_x_bias, True)
    delta = F.linear(dt_low, W_dt)
    dx, ddelta, dA, dB, dC, dD, _, ddelta_bias, _ = selective_scan_bwd(
        dyz[..., :dim], None, x_, delta, A, B, C, D, None, delta_bias, None, states, True, False
    )
    dprojected = torch.cat([ddelta @ W_dt, dB, dC], dim=-1).flatten(0, 1)
    ddt_proj_weight = ddelta.flatten(0, 1).t() @ dt_low.flatten(0, 1)
    dx_proj_weight = dprojected.t() @ x_.flatten(0, 1)
    dx = torch.addmm(dx.flatten(0, 1), dprojected, W_x).view(x_.shape)
    dxz = xz.new_empty(xz.shape)
    _, dconv_x_weight, dconv_x_bias = conv1d_silu_bwd(
        dx, x, conv_x_weight, conv_x_bias, True, dx=dxz[..., :dim]
    )
    _, dconv_z_weight, dconv_z_bias = conv1d_silu_bwd(
        dyz[..., dim:], z, conv_z_weight, conv_z_bias, True, dx=dxz[..., dim:]
    )
    return (
        dxz, dconv_x_weight, dconv_z_weight, cast(dx_proj_weight, x_proj_weight),
        cast(ddt_proj_weight, dt_proj_weight), dA, dD, ddelta_bias, dconv_x_bias, dconv_z_bias,
    )  # fmt: skip


class Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *inputs, grad_enabled = arguments
        save_states = grad_enabled and any(ctx.needs_input_grad)
        yz, dt_low, BC, states = mixer_fwd(*inputs, save_states)
        ctx.save_for_backward(*inputs, dt_low, BC, states)
        return yz

    @staticmethod
    @first_derivative_only
    def backward(ctx, dyz):
        return *mixer_bwd(dyz, *ctx.saved_tensors), None


def mixer(
    xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias, *,
    conv_x_bias=None, conv_z_bias=None,
):  # fmt: skip
    """yz, differentiable in every tensor.

    Arguments are those of `mambavision.ops.mixer`, which checks them.
    """
    return Mixer.apply(
        xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
        conv_x_bias, conv_z_bias, torch.is_grad_enabled(),  # always off within `forward`
    )  # fmt: skip
