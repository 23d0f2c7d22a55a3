"""What the operators of this backend share."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def work_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 activations, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` without autograd and without autocast."""

    @wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        device = args[0].device.type
        with torch.no_grad():
            if not torch.is_autocast_enabled(device):
                return function(*args, **kwargs)
            with torch.autocast(device, enabled=False):
                return function(*args, **kwargs)

    return plain


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a backward pass raise under create_graph. torch's once_differentiable lets it through
    where the output's gradient is a constant, and then drops the second derivative silently."""

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("a second derivative (create_graph=True) is not implemented")
        return backward(ctx, *grads)

    return checked


def cast(x: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Gradient x in the dtype of its argument; the real part where that is real."""
    if x is None or like is None:
        return None
    if x.is_complex() and not like.is_complex():
        x = x.real
    return x.to(like.dtype)


def silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(dy, x)
