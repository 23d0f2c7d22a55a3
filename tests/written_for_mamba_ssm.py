"""A small vision model as users of mamba-ssm write one: eager, channel-first around the scan.

It imports mamba_ssm and knows nothing of this project. Names and shapes of the mixer's parameters
are the published ones.
"""

import math

import torch
import torch.nn.functional as F
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import nn


class EagerMixer(nn.Module):
    def __init__(self, d_model, d_state=8, d_conv=3, expand=1):
        super().__init__()
        dim = expand * d_model // 2
        self.d_state, self.dt_rank = d_state, math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * dim, bias=False)
        self.x_proj = nn.Linear(dim, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, dim)
        self.conv1d_x = nn.Conv1d(dim, dim, d_conv, groups=dim, bias=False)
        self.conv1d_z = nn.Conv1d(dim, dim, d_conv, groups=dim, bias=False)
        self.out_proj = nn.Linear(2 * dim, d_model, bias=False)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim))

    def forward(self, hidden):
        dim = self.D.shape[0]
        x, z = self.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)
        x = F.silu(F.conv1d(x, self.conv1d_x.weight, padding="same", groups=dim))
        z = F.silu(F.conv1d(z, self.conv1d_z.weight, padding="same", groups=dim))
        sizes = (self.dt_rank, self.d_state, self.d_state)
        dt_low, B, C = self.x_proj(x.transpose(1, 2)).split(sizes, dim=-1)
        y = selective_scan_fn(
            x,
            self.dt_proj(dt_low).transpose(1, 2),
            -torch.exp(self.A_log.float()),
            B.transpose(1, 2).contiguous(),
            C.transpose(1, 2).contiguous(),
            self.D.float(),
            z=None,
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
            return_last_state=None,
        )
        return self.out_proj(torch.cat([y, z], dim=1).transpose(1, 2))


class EagerBlock(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.mixer = EagerMixer(d_model)

    def forward(self, x):
        return x + self.mixer(self.norm(x))


class EagerModel(nn.Module):
    def __init__(self, d_model=32, depth=2, num_classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, d_model, 4, stride=4)
        self.blocks = nn.ModuleList(EagerBlock(d_model) for _ in range(depth))
        self.head = nn.Linear(d_model, num_classes)

    def forward(self, images):
        x = self.stem(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))
