"""All that stands behind a convolution, as PyTorch's own operations.

    y = residual + gamma act(batch_norm(x + bias))
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_act(
    x: Tensor, bias: Tensor | None, norm: Sequence[Any] | None, act: str, gamma: Tensor | None,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """y; arguments are those of `mambavision.ops.norm_act`."""
    dtype = x.dtype
    if bias is not None:
        x = x + bias.to(x.dtype)[:, None, None]
    if norm is not None:
        mean, var, weight, shift = norm[:4]
        if any(s is not None and s.dtype != dtype for s in norm[:4]):
            # Each device has mixtures of its own that it refuses
            wide = torch.promote_types(dtype, torch.float32)
            x, mean, var = x.to(wide), mean.to(wide), var.to(wide)
            weight = None if weight is None else weight.to(wide)
            shift = None if shift is None else shift.to(wide)
        x = F.batch_norm(x, mean, var, weight, shift, eps=norm[4]).to(dtype)
    if act == "relu":
        x = F.relu(x)
    elif act == "gelu":
        x = F.gelu(x, approximate="tanh")
    if gamma is not None:
        x = gamma.to(x.dtype)[:, None, None] * x
    return x if residual is None else residual.to(dtype) + x
