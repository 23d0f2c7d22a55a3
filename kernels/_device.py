"""Device helpers shared by the kernels: activations, and the tuples of registers a scan works on.

Activations take and return float32. Everything goes through exp2, one instruction on every target,
and one polynomial; there is no libdevice call, so CUDA, HIP and the interpreter run the same
arithmetic.

A state register holds one state of each channel, (BLOCK_D,), or with BLOCK_N > 1 that many side by
side over lanes, (BLOCK_D, BLOCK_N). The dstate states of a channel are a tuple of such registers.
"""

from functools import wraps

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


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
def log1p_unit(e):
    """log(1 + e) for 0 <= e <= 1 as e P(e), relative error below 2.2e-7 in float32 everywhere.

    P, of degree 8, minimises the largest relative error of log(1 + e) / e on [0, 1] (3e-8 before
    rounding). 1 + e is never formed, so that tiny steps keep their relative accuracy.
    """
    p = 0.005232170689851046
    p = p * e - 0.029503170400857925
    p = p * e + 0.07822262495756149
    p = p * e - 0.13662965595722198
    p = p * e + 0.19105874001979828
    p = p * e - 0.24842947721481323
    p = p * e + 0.33319091796875
    p = p * e - 0.4999949336051941
    p = p * e + 0.9999999403953552
    return p * e


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)): no overflow, no cancellation."""
    return tl.maximum(x, 0.0) + log1p_unit(tl.exp2(tl.abs(x) * -LOG2E))


@triton.jit
def store(ptr, value, mask):
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(ptr, offs_d, mask_d):
    """(BLOCK_D,) of a (dim,) tensor, 0 where there is none."""
    if ptr is None:
        return tl.zeros(offs_d.shape, tl.float32)
    else:
        return tl.load(ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)


@triton.jit
def rows_from(t0, seqlen, STEPS: tl.constexpr, REVERSE: tl.constexpr):
    """Where logical steps t0 .. t0 + STEPS - 1 lie: with REVERSE the sequence is walked from its
    end, without a flipped copy."""
    rows = ()
    for i in tl.static_range(STEPS):
        if REVERSE:
            rows = rows + (tl.cast(seqlen - 1 - t0, tl.int64) - i,)
        else:
            rows = rows + (tl.cast(t0, tl.int64) + i,)
    return rows


@triton.jit
def masks_from(t0, seqlen, STEPS: tl.constexpr, EVEN_L: tl.constexpr):
    """Which of these steps lie inside the sequence."""
    masks = ()
    for i in tl.static_range(STEPS):
        if EVEN_L:
            masks = masks + (tl.full((), True, tl.int1),)
        else:
            masks = masks + (tl.cast(t0, tl.int32) + i < seqlen,)
    return masks


@triton.jit
def load_rows(ptr, stride_l: tl.constexpr, rows, masks, offs_d, mask_d):
    """These rows of a (seqlen, dim) tensor as a tuple of (BLOCK_D,), 0 behind the end."""
    values = ()
    for i in tl.static_range(len(rows)):
        value = tl.load(ptr + rows[i] * stride_l + offs_d, mask=mask_d & masks[i], other=0.0)
        values = values + (value.to(tl.float32),)
    return values


@triton.jit
def store_rows(ptr, stride_l: tl.constexpr, values, rows, masks, offs_d, mask_d):
    for i in tl.static_range(len(rows)):
        store(ptr + rows[i] * stride_l + offs_d, values[i], mask_d & masks[i])


@triton.jit
def load_states(
    ptr, offs_d, mask_d, stride_d, stride_n, dstate: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The dstate values of each channel, a tuple of state registers."""
    values = ()
    for r in tl.static_range((dstate + BLOCK_N - 1) // BLOCK_N):
        if BLOCK_N == 1:
            value = tl.load(ptr + offs_d * stride_d + r * stride_n, mask=mask_d, other=0.0)
        else:
            offs_n = r * BLOCK_N + tl.arange(0, BLOCK_N)
            offs = offs_d[:, None] * stride_d + offs_n[None, :] * stride_n
            mask = mask_d[:, None] & (offs_n < dstate)[None, :]
            value = tl.load(ptr + offs, mask=mask, other=0.0)
        values = values + (value.to(tl.float32),)
    return values


@triton.jit
def store_states(
    ptr, values, offs_d, mask_d, stride_d, stride_n, dstate: tl.constexpr, BLOCK_N: tl.constexpr
):
    for r in tl.static_range(len(values)):
        if BLOCK_N == 1:
            tl.store(ptr + offs_d * stride_d + r * stride_n, values[r], mask=mask_d)
        else:
            offs_n = r * BLOCK_N + tl.arange(0, BLOCK_N)
            offs = offs_d[:, None] * stride_d + offs_n[None, :] * stride_n
            mask = mask_d[:, None] & (offs_n < dstate)[None, :]
            tl.store(ptr + offs, values[r], mask=mask)


@triton.jit
def zeros(like):
    values = ()
    for r in tl.static_range(len(like)):
        values = values + (tl.zeros_like(like[r]),)
    return values


@triton.jit
def load_first(ptr, b, like, offs_d, mask_d, dim, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    """Entry b of a (batch, dim, dstate) tensor, or zeros where there is none."""
    if ptr is None:
        return zeros(like)
    else:
        return load_states(ptr + b * dim * dstate, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)


@triton.jit
def load_row(ptr, mask, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    """B or C of one step, shared by the channels: scalars, or (1, BLOCK_N) for wide registers."""
    values = ()
    for r in tl.static_range((dstate + BLOCK_N - 1) // BLOCK_N):
        if BLOCK_N == 1:
            value = tl.load(ptr + r, mask=mask, other=0.0)
        else:
            offs_n = r * BLOCK_N + tl.arange(0, BLOCK_N)
            value = tl.load(ptr + offs_n, mask=(offs_n < dstate) & mask, other=0.0)[None, :]
        values = values + (value.to(tl.float32),)
    return values


@triton.jit
def over_states(x, BLOCK_N: tl.constexpr):
    """(BLOCK_D,) as it meets a state register: itself, or a column before a wide one."""
    if BLOCK_N == 1:
        return x
    else:
        return x[:, None]


@triton.jit
def sum_states(x, BLOCK_N: tl.constexpr):
    """Sum over the states of one register, (BLOCK_D,)."""
    if BLOCK_N == 1:
        return x
    else:
        return tl.sum(x, axis=1)


@triton.jit
def add(a, b):
    values = ()
    for r in tl.static_range(len(a)):
        values = values + (a[r] + b[r],)
    return values


@triton.jit
def _exchange(a, b, lanes, BIT: tl.constexpr):
    """Adds up a in lanes without BIT and b in lanes with it, each with the lane across BIT."""
    upper = (lanes & BIT) != 0
    return tl.where(upper, b, a) + tl.gather(tl.where(upper, a, b), lanes ^ BIT, 0)


@triton.jit
def _sum_channels(values, V: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums over channels of V (BLOCK_D,) tensors at once, V a power of two up to 32: (32,), of
    which element l belongs to value l V / 32.

    One by one, each sum takes 5 exchanges between lanes. Here one exchange serves two values, of
    which each half of the lanes then carries one: 16 exchanges for 16 values instead of 80.
    """
    lanes = tl.arange(0, 32)
    for s in tl.static_range(3):
        if BLOCK_D >> s > 32:
            folded = ()
            for r in tl.static_range(V):
                a, b = tl.split(tl.reshape(values[r], (BLOCK_D >> (s + 1), 2)))
                folded = folded + (a + b,)
            values = folded
    for s in tl.static_range(5):
        if V >> s > 1:
            halved = ()
            for r in tl.static_range(V >> (s + 1)):
                pair = _exchange(values[r], values[r + (V >> (s + 1))], lanes, 16 >> s)
                halved = halved + (pair,)
            values = halved
        else:
            values = (values[0] + tl.gather(values[0], lanes ^ (16 >> s), 0),)
    return values[0]


@triton.jit
def store_channel_sums(
    ptr, values, mask, dstate: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Sums over channels of one or two tuples of dstate states, one row behind the other."""
    if BLOCK_N == 1:
        count: tl.constexpr = len(values)
        V: tl.constexpr = triton.next_power_of_2(count)
        for _ in tl.static_range(V - count):
            values = values + (tl.zeros_like(values[0]),)
        offs = tl.arange(0, 32) * V
        first = (offs % 32 == 0) & (offs // 32 < count)
        tl.store(ptr + offs // 32, _sum_channels(values, V, BLOCK_D), mask=first & mask)
    else:
        R: tl.constexpr = (dstate + BLOCK_N - 1) // BLOCK_N
        for r in tl.static_range(len(values)):
            offs_n = r % R * BLOCK_N + tl.arange(0, BLOCK_N)
            sums = tl.sum(values[r], axis=0)
            tl.store(ptr + r // R * dstate + offs_n, sums, mask=(offs_n < dstate) & mask)


def channel_last(x):
    """x (batch, seqlen, dim) as the kernels read it: adjacent channels, rows at one distance inside
    a batch entry. Any other layout costs a contiguous copy."""
    return x if x.stride(2) == 1 and x.stride(0) >= x.stride(1) else x.contiguous()


def first_derivative_only(backward):
    """Makes a backward pass raise under create_graph. torch's once_differentiable lets it through
    where the output's gradient is a constant, and then drops the second derivative silently."""

    @wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError("a second derivative (create_graph=True) is not implemented")
        return backward(ctx, *grads)

    return checked
