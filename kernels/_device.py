"""What the kernels share: activations, rounding stores, the launch.

Activations take and return float32. Everything goes through exp2, one instruction on every target,
and one polynomial; there is no libdevice call, so CUDA, HIP and the interpreter run the same
arithmetic.
"""

from functools import wraps
from operator import itemgetter

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x):
    # exp2 of a large positive number is inf, and 1 / (1 + inf) is the right 0
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def dsilu(x):
    """d silu / dx = s + x s (1 - s) with s = sigmoid(x)."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def log1p_unit(e, UNIT: tl.constexpr):
    """UNIT log(1 + e) for 0 <= e <= 1 as e P(e), relative error below 2.9e-7 in float32 everywhere.

    P / UNIT, of degree 8, minimises the largest relative error of log(1 + e) / e on [0, 1] (3e-8
    before rounding). 1 + e is never formed, so that tiny steps keep their relative accuracy.
    """
    p = 0.005232170689851046 * UNIT
    p = p * e - 0.029503170400857925 * UNIT
    p = p * e + 0.07822262495756149 * UNIT
    p = p * e - 0.13662965595722198 * UNIT
    p = p * e + 0.19105874001979828 * UNIT
    p = p * e - 0.24842947721481323 * UNIT
    p = p * e + 0.33319091796875 * UNIT
    p = p * e - 0.4999949336051941 * UNIT
    p = p * e + 0.9999999403953552 * UNIT
    return p * e


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)): no overflow, no cancellation."""
    return tl.maximum(x, 0.0) + log1p_unit(tl.exp2(tl.abs(x) * -LOG2E), 1.0)


@triton.jit
def softplus2(x):
    """log2(1 + 2^x): softplus with both of its sides in units of ln 2."""
    return tl.maximum(x, 0.0) + log1p_unit(tl.exp2(-tl.abs(x)), LOG2E)


@triton.jit
def dsoftplus(x, softplus_x):
    """d softplus / dx = sigmoid(x) = exp(x - softplus(x)), without a division."""
    return tl.exp2((x - softplus_x) * LOG2E)


@triton.jit
def store(ptr, value, mask):
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


class _Codes:
    """The machine codes of a kernel by what they depend on, types, alignment, numbers; each with
    the constants that launches leave to options."""

    def __init__(self, kernel, args):
        names = kernel.arg_names
        pointers = [name.endswith("_ptr") for name in names[: len(args)]]
        self.tensors = itemgetter(*(i for i, pointer in enumerate(pointers) if pointer))
        self.numbers = itemgetter(*(i for i, pointer in enumerate(pointers) if not pointer))
        self.optional = names[len(args) :]
        # Held, or another kernel might come to have its id
        self.kernel, self.found = kernel, {}

    def key(self, device, args, options):
        tensors = [
            x if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in self.tensors(args)
        ]
        return device.index, self.numbers(args), *options.values(), *tensors


# By the id of a kernel: Triton hashes its source
_codes = {}


def launch(kernel, grid, args, options):
    """Runs a kernel on the device of its first argument; constants that `args` lacks are options.

    Triton inspects every argument of every call to find the machine code for it, several times the
    work of the launch itself. Here that code is looked up. Where there is none to keep, as in the
    interpreter, each call takes Triton's own way.
    """
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, args, options)
    codes = _codes.get(id(kernel))
    if codes is not None and (known := codes.found.get(codes.key(device, args, options))):
        code, constants = known
        code[(*grid, 1, 1)](*args, *constants)
        return
    code = kernel[grid](*args, **options)
    if code is not None:
        codes = _codes.setdefault(id(kernel), codes or _Codes(kernel, args))
        constants = [options[name] for name in codes.optional]
        codes.found[codes.key(device, args, options)] = code, constants


def rows_of(x):
    """x (batch, seqlen, dim) as the kernels read it, adjacent channels and all rows at one
    distance, also across batch entries; and that distance. Another layout costs a copy."""
    batch, seqlen, dim = x.shape
    stride_b, stride_l, stride_d = x.stride()
    # An axis of length 1 may have any stride
    if seqlen == 1:
        stride_l = stride_b
    if stride_d == 1 and (batch == 1 or stride_b == seqlen * stride_l):
        return x, stride_l
    return x.clone(memory_format=torch.contiguous_format), dim


def packed(x):
    """A parameter in adjacent memory; None where it is."""
    return None if x is None else x.contiguous()


def cast(x, like):
    """A gradient in the dtype of its argument; None where that is None."""
    if like is None:
        return None
    return x if x.dtype == like.dtype else x.to(like.dtype)


def first_derivative_only(backward):
    """Makes a backward pass raise under create_graph. torch's once_differentiable lets it through
    where the output's gradient is a constant, and then drops the second derivative silently."""

    @wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError("a second derivative (create_graph=True) is not implemented")
        return backward(ctx, *grads)

    return checked
