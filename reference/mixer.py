"""The middle of the MambaVision mixer, between in_proj and out_proj, in plain PyTorch.

    x, z  = halves of xz                                   xz (batch, seqlen, 2 dim)
    x     = silu(conv_x(x)),  z = silu(conv_z(z))          depthwise, 'same' padding
    w     = x W_x^T = [dt_low, B, C]                       W_x (dt_rank + 2 dstate, dim)
    delta = dt_low W_dt^T                                  W_dt (dim, dt_rank)
    yz    = [selective_scan(x, delta, A, B, C, D), z]      with delta_bias and softplus

`delta_bias` is all that is added inside the softplus. Every line is an operator that rounds to xz's
dtype, as in an eager model. The backward pass is the chain rule, line by line from the last.

The mixer is that of MambaVision, arXiv 2407.08083.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .conv1d_silu import conv1d_silu, conv1d_silu_backward
from .selective_scan import selective_scan, selective_scan_backward


class MixerGrads(NamedTuple):
    dxz: Tensor
    dconv_x_weight: Tensor
    dconv_z_weight: Tensor
    dx_proj_weight: Tensor
    ddt_proj_weight: Tensor
    dA: Tensor
    dD: Tensor
    ddelta_bias: Tensor
    dconv_x_bias: Tensor | None
    dconv_z_bias: Tensor | None


def _intermediates(
    xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, conv_x_bias, conv_z_bias,
    dstate,
):  # fmt: skip
    x_in, z_in = xz.chunk(2, dim=-1)
    x = conv1d_silu(x_in, conv_x_weight, conv_x_bias)
    z = conv1d_silu(z_in, conv_z_weight, conv_z_bias)
    w = x @ x_proj_weight.to(x.dtype).t()
    dt_low, B, C = w.split([dt_proj_weight.shape[1], dstate, dstate], dim=-1)
    delta = dt_low @ dt_proj_weight.to(x.dtype).t()
    return x, z, dt_low, delta, B, C


def mixer(
    xz: Tensor,
    conv_x_weight: Tensor,
    conv_z_weight: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    A: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    *,
    conv_x_bias: Tensor | None = None,
    conv_z_bias: Tensor | None = None,
) -> Tensor:
    """yz of the module docstring, (batch, seqlen, 2 dim) in xz's dtype."""
    x, z, _, delta, B, C = _intermediates(
        xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, conv_x_bias, conv_z_bias,
        A.shape[1],
    )  # fmt: skip
    y = selective_scan(x, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True)
    return torch.cat([y, z], dim=-1)


def mixer_backward(
    dyz: Tensor,
    xz: Tensor,
    conv_x_weight: Tensor,
    conv_z_weight: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    A: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    *,
    conv_x_bias: Tensor | None = None,
    conv_z_bias: Tensor | None = None,
) -> MixerGrads:
    """Gradients of sum(dyz * yz), each in its argument's dtype."""
    x, _, dt_low, delta, B, C = _intermediates(
        xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, conv_x_bias, conv_z_bias,
        A.shape[1],
    )  # fmt: skip
    dy, dz = dyz.chunk(2, dim=-1)
    x_in, z_in = xz.chunk(2, dim=-1)
    scan = selective_scan_backward(
        dy, x, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True
    )
    ddt_low = scan.ddelta @ dt_proj_weight.to(x.dtype)
    dw = torch.cat([ddt_low, scan.dB, scan.dC], dim=-1)
    dx = scan.du + dw @ x_proj_weight.to(x.dtype)
    conv_x = conv1d_silu_backward(dx, x_in, conv_x_weight, conv_x_bias)
    conv_z = conv1d_silu_backward(dz, z_in, conv_z_weight, conv_z_bias)
    return MixerGrads(
        torch.cat([conv_x.dx, conv_z.dx], dim=-1),
        conv_x.dweight,
        conv_z.dweight,
        torch.einsum("btr,btd->rd", dw, x).to(x_proj_weight.dtype),
        torch.einsum("btd,btr->dr", scan.ddelta, dt_low).to(dt_proj_weight.dtype),
        scan.dA,
        scan.dD,
        scan.ddelta_bias,
        conv_x.dbias,
        conv_z.dbias,
    )
