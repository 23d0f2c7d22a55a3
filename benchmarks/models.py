"""Whole models to compare: ours, the same as published, and peers.

As published, a model runs PyTorch's own layers one after another, and in its mixer

    xz    = in_proj(hidden), rearranged to (batch, 2 dim, seqlen)
    x, z  = silu(conv1d(x)), silu(conv1d(z))        two depthwise F.conv1d, 'same' padding
    dt, B, C = split(x_proj(x rows))                rows: (batch seqlen, dim)
    delta = dt_proj(dt), B and C rearranged to (batch, dstate, seqlen)
    y     = scan(x, delta, -exp(A_log), B, C, D, delta_bias=dt_proj.bias, softplus)
    out   = out_proj([y, z] rearranged back)

`scan` is mamba-ssm's where it can be imported, and otherwise a plain loop over time.

Source: Hatamizadeh and Kautz, arXiv 2407.08083.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mambavision import MambaVisionMixer, create_model
from mambavision.ops import conv1d_silu

__all__ = [
    "EagerMixer", "NoScanMixer", "Unavailable", "as_published", "loop_scan", "mamba_ssm_scan",
    "ours", "peer", "with_mixers",
]  # fmt: skip


class Unavailable(RuntimeError):
    """What this machine or installation does not have; the message says why."""


def loop_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: None,
    delta_bias: Tensor, delta_softplus: bool,
) -> Tensor:  # fmt: skip
    """The scan as one would first write it; arguments and layouts are those of mamba-ssm.

    Every decay is computed ahead, in float32 (float64 for float64 inputs), then states step by
    step. u and delta (batch, dim, seqlen), B and C (batch, dstate, seqlen).
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    dt = delta.to(wide) + delta_bias.to(wide)[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    x, B, C = u.to(wide), B.to(wide), C.to(wide)
    decay = torch.exp(dt[..., None] * A[:, None])  # (batch, dim, seqlen, dstate)
    step = (dt * x)[..., None] * B.transpose(1, 2)[:, None]
    h = torch.zeros_like(step[:, :, 0])
    ys = []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + step[:, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1))
    return (torch.stack(ys, dim=2) + D[:, None] * x).to(u.dtype)


def mamba_ssm_scan() -> Callable[..., Tensor]:
    """mamba-ssm's compiled scan. Unavailable, with the reason, where there is none."""
    try:
        import selective_scan_cuda  # noqa: F401
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unavailable(f"mamba-ssm's scan cannot be imported: {first}") from None
    return selective_scan_fn


class EagerMixer(nn.Module):
    """The mixer as published, with the parameters of one of ours."""

    def __init__(self, mixer: MambaVisionMixer, scan: Callable[..., Tensor]):
        super().__init__()
        for name in ("in_proj", "x_proj", "dt_proj", "conv1d_x", "conv1d_z", "out_proj"):
            setattr(self, name, getattr(mixer, name))
        self.A_log, self.D = mixer.A_log, mixer.D
        self.dt_rank, self.d_state, self.d_conv = mixer.dt_rank, mixer.d_state, mixer.d_conv
        self.scan = scan

    def _convolve(self, x: Tensor, convolution: nn.Conv1d) -> Tensor:
        weight = convolution.weight
        return F.silu(F.conv1d(x, weight, None, padding="same", groups=weight.shape[0]))

    def forward(self, hidden: Tensor) -> Tensor:
        seqlen = hidden.shape[1]
        xz = rearrange(self.in_proj(hidden), "b l d -> b d l")
        x, z = xz.chunk(2, dim=1)
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        A = -torch.exp(self.A_log.to(wide))
        x, z = self._convolve(x, self.conv1d_x), self._convolve(z, self.conv1d_z)
        rows = self.x_proj(rearrange(x, "b d l -> (b l) d"))
        dt, B, C = rows.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = rearrange(self.dt_proj(dt), "(b l) d -> b d l", l=seqlen)
        B = rearrange(B, "(b l) n -> b n l", l=seqlen).contiguous()
        C = rearrange(C, "(b l) n -> b n l", l=seqlen).contiguous()
        bias = self.dt_proj.bias.to(wide)
        y = self.scan(x, delta, A, B, C, self.D.to(wide), None, bias, True)
        return self.out_proj(rearrange(torch.cat([y, z], dim=1), "b d l -> b l d"))


class NoScanMixer(nn.Module):
    """All of our mixer but the scan, whose output is its input: what the scan's cost is held to."""

    def __init__(self, mixer: MambaVisionMixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden: Tensor) -> Tensor:
        mixer = self.mixer
        x, z = mixer.in_proj(hidden).chunk(2, dim=-1)
        x = conv1d_silu(x, mixer.conv1d_x.weight, backend=mixer.backend)
        z = conv1d_silu(z, mixer.conv1d_z.weight, backend=mixer.backend)
        dt_low = mixer.x_proj(x)[..., : mixer.dt_rank]
        F.linear(dt_low, mixer.dt_proj.weight)
        return mixer.out_proj(torch.cat([x, z], dim=-1))


def _mixers(model: nn.Module) -> Iterator[tuple[nn.Module, str, MambaVisionMixer]]:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, MambaVisionMixer):
                yield parent, name, child


def with_mixers(model: nn.Module, make: Callable[[MambaVisionMixer], nn.Module]) -> nn.Module:
    """A copy of a model, weights and all, with each mixer replaced by what `make` makes of it."""
    model = copy.deepcopy(model)
    for parent, name, mixer in _mixers(model):
        setattr(parent, name, make(mixer))
    return model


def as_published(model: nn.Module, scan: Callable[..., Tensor]) -> nn.Module:
    """The model as published, with the weights of one of ours: that mixer, and around it PyTorch's
    own operations, one layer after another."""
    model = with_mixers(model, lambda mixer: EagerMixer(mixer, scan))
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "torch"
    return model


def ours(name: str, device: str, **overrides: Any) -> nn.Module:
    """A model with random weights under which every part of it moves the logits.

    As initialised, layer scales of 1e-5 and small projections would hide a wrong mixer from a
    comparison of logits. Nothing here changes what has to be computed.
    """
    torch.manual_seed(0)
    # Made where it will run: drawing hundreds of millions of weights on a CPU takes seconds.
    with torch.device(device):
        model = create_model(name, mamba_dt_init=True, **overrides)
    with torch.no_grad():
        for _, _, mixer in _mixers(model):
            for linear in (mixer.in_proj, mixer.x_proj, mixer.out_proj):
                linear.weight.normal_(std=linear.in_features**-0.5)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.rsplit(".", 1)[-1] in ("gamma", "gamma_1", "gamma_2"):
                parameter.uniform_(0.5, 1.0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
        model.head.weight.normal_(std=model.head.in_features**-0.5)
    return model


def peer(name: str, device: str, resolution: int) -> nn.Module:
    """A model of timm with random weights. Unavailable where timm cannot be imported."""
    try:
        with warnings.catch_warnings():
            # torchvision's, about image files.
            warnings.simplefilter("ignore")
            import timm
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unavailable(f"timm cannot be imported: {first}") from None
    # Some are made for one size of images.
    fixed = getattr(timm.models.get_pretrained_cfg(name), "fixed_input_size", False)
    with torch.device(device):
        return timm.create_model(name, **({"img_size": resolution} if fixed else {}))
