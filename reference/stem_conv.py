"""The first convolution of an image, with norm and ReLU, in plain PyTorch.

    y = relu((conv(x) + bias - mean) / sqrt(var + eps) weight + shift)

conv is 3 x 3 with stride 2, zeros around. Shapes: x (batch, in_chans, height, width), W (dim,
in_chans, 3, 3), bias and the norm's (dim,); y (batch, dim, height / 2, width / 2), rounded up.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .conv1d_silu import accumulation_dtype
from .norm_act import norm_act


def stem_conv(x: Tensor, W: Tensor, bias: Tensor | None, norm: Sequence[Any] | None) -> Tensor:
    """y of the module docstring, in x's dtype. `norm` is (mean, var, weight, shift, eps)."""
    dtype = accumulation_dtype(x)
    batch, in_chans, height, width = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    around = torch.zeros(batch, in_chans, 2 * rows + 1, 2 * columns + 1, dtype=dtype)
    around = around.to(x.device)
    around[:, :, 1 : height + 1, 1 : width + 1] = x.to(dtype)
    a = torch.zeros(batch, W.shape[0], rows, columns, dtype=dtype, device=x.device)
    for i in range(3):
        for j in range(3):
            read = around[:, :, i : i + 2 * rows : 2, j : j + 2 * columns : 2]
            a = a + torch.einsum("bchw,dc->bdhw", read, W[:, :, i, j].to(dtype))
    return norm_act(a, bias, norm, "relu", None, None).to(x.dtype)
