"""The first convolution of an image, with norm and ReLU, as PyTorch's own operations."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .norm_act import norm_act


def stem_conv(x: Tensor, W: Tensor, bias: Tensor | None, norm: Sequence[Any] | None) -> Tensor:
    """y; arguments are those of `mambavision.ops.stem_conv`."""
    return norm_act(F.conv2d(x, W, None, stride=2, padding=1), bias, norm, "relu", None, None)
