"""Device helpers shared by the kernels.

First sigmoid, SiLU and softplus with their derivatives, on float32. Everything goes through exp2, one instruction on every target, and one polynomial; there
is no libdevice call, so CUDA, HIP and the interpreter run the same arithmetic.
"""

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
def log1p_unit(e):
    """log(1 + e) for 0 <= e <= 1 as e P(e), relative error below 2.2e-7 in float32 down to the smallest e.

    P is the polynomial of degree 8 that minimises the largest relative error of log(1 + e) / e on [0, 1] (3e-8 before
    rounding). 1 + e is never formed, so tiny steps keep their relative accuracy, which log2(1 + e) would lose.
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
def load_states(ptr, offs_d, mask_d, stride_d, stride_n, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    """dstate values of each channel as a tuple of registers, (BLOCK_D,) each or, over lanes, (BLOCK_D, BLOCK_N)."""
    values = ()
    for r in tl.static_range((dstate + BLOCK_N - 1) // BLOCK_N):
        if BLOCK_N == 1:
            value = tl.load(ptr + offs_d * stride_d + r * stride_n, mask=mask_d, other=0.0)
        else:
            offs_n = r * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = mask_d[:, None] & (offs_n < dstate)[None, :]
            value = tl.load(ptr + offs_d[:, None] * stride_d + offs_n[None, :] * stride_n, mask=mask, other=0.0)
        values = values + (value.to(tl.float32),)
    return values


@triton.jit
def store_states(ptr, values, offs_d, mask_d, stride_d, stride_n, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    for r in tl.static_range((dstate + BLOCK_N - 1) // BLOCK_N):
        if BLOCK_N == 1:
            tl.store(ptr + offs_d * stride_d + r * stride_n, values[r], mask=mask_d)
        else:
            offs_n = r * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = mask_d[:, None] & (offs_n < dstate)[None, :]
            tl.store(ptr + offs_d[:, None] * stride_d + offs_n[None, :] * stride_n, values[r], mask=mask)


@triton.jit
def zeros(like):
    values = ()
    for r in tl.static_range(len(like)):
        values = values + (tl.zeros_like(like[r]),)
    return values


@triton.jit
def first_states(ptr, b, like, offs_d, mask_d, dim, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    """Entry b of a (batch, dim, dstate) tensor, or zeros where there is none."""
    if ptr is None:
        return zeros(like)
    else:
        return load_states(ptr + b * dim * dstate, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)


@triton.jit
def load_row(ptr, in_seq, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    """B_t or C_t as a tuple of scalars or, over lanes, (1, BLOCK_N) rows: shared by all channels of the program."""
    values = ()
    for r in tl.static_range((dstate + BLOCK_N - 1) // BLOCK_N):
        if BLOCK_N == 1:
            value = tl.load(ptr + r, mask=in_seq, other=0.0)
        else:
            offs_n = r * BLOCK_N + tl.arange(0, BLOCK_N)
            value = tl.load(ptr + offs_n, mask=(offs_n < dstate) & in_seq, other=0.0)[None, :]
        values = values + (value.to(tl.float32),)
    return values


@triton.jit
def load_vector(ptr, offs_d, mask_d):
    """(BLOCK_D,) of a (dim,) tensor, 0 where there is none."""
    if ptr is None:
        return tl.zeros(offs_d.shape, tl.float32)
    else:
        return tl.load(ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)


@triton.jit
def row_of(t0, i: tl.constexpr, seqlen, REVERSE: tl.constexpr):
    """Where logical step t0 + i lies: with REVERSE the sequence is walked from its end, without a flipped copy."""
    if REVERSE:
        return tl.cast(seqlen - 1 - t0, tl.int64) - i
    else:
        return tl.cast(t0, tl.int64) + i


@triton.jit
def load_block(
    ptr, stride_l: tl.constexpr, offs_d, mask_d, t0, seqlen,
    STEPS: tl.constexpr, EVEN_L: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Steps t0 .. t0 + STEPS - 1 of one batch entry as a tuple of (BLOCK_D,), 0 behind the end."""
    values = ()
    for i in tl.static_range(STEPS):
        mask = mask_d if EVEN_L else mask_d & (t0 + i < seqlen)
        row = row_of(t0, i, seqlen, REVERSE)
        values = values + (tl.load(ptr + row * stride_l + offs_d, mask=mask, other=0.0).to(tl.float32),)
    return values


@triton.jit
def store_block(
    ptr, stride_l: tl.constexpr, values, offs_d, mask_d, t0, seqlen,
    STEPS: tl.constexpr, EVEN_L: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(STEPS):
        mask = mask_d if EVEN_L else mask_d & (t0 + i < seqlen)
        row = row_of(t0, i, seqlen, REVERSE)
        tl.store(ptr + row * stride_l + offs_d, values[i].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def over_states(x, BLOCK_N: tl.constexpr):
    """(BLOCK_D,) as it meets a register of states: itself, or a column where states lie along lanes."""
    if BLOCK_N == 1:
        return x
    else:
        return x[:, None]


@triton.jit
def add(a, b):
    values = ()
    for r in tl.static_range(len(a)):
        values = values + (a[r] + b[r],)
    return values


@triton.jit
def sum_states(x, BLOCK_N: tl.constexpr):
    if BLOCK_N == 1:
        return x
    else:
        return tl.sum(x, axis=1)


@triton.jit
def _exchange(a, b, lanes, BIT: tl.constexpr):
    """Lanes without BIT add up a, lanes with BIT add up b, each with the lane that differs in BIT."""
    upper = (lanes & BIT) != 0
    return tl.where(upper, b, a) + tl.gather(tl.where(upper, a, b), lanes ^ BIT, 0)


@triton.jit
def sum_channels(values, V: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums over channels of V tensors (V a power of two, at most 32) at once: (32,), lane l has that of value l V / 32.

    Summing them one by one takes 5 exchanges each. Here an exchange serves two values, of which each half of the
    lanes then carries one: 16 exchanges for 16 values instead of 80.
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
                halved = halved + (_exchange(values[r], values[r + (V >> (s + 1))], lanes, 16 >> s),)
            values = halved
        else:
            values = (values[0] + tl.gather(values[0], lanes ^ (16 >> s), 0),)
    return values[0]


@triton.jit
def store_row_sums(
    ptr, values, in_seq, dstate: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Sums over the program's channels of one or more rows of dstate values, stored one behind the other."""
    if BLOCK_N == 1:
        count: tl.constexpr = len(values)
        V: tl.constexpr = triton.next_power_of_2(len(values))
        for _ in tl.static_range(V - count):
            values = values + (tl.zeros_like(values[0]),)
        index = tl.arange(0, 32) * V // 32
        first = tl.arange(0, 32) * V % 32 == 0
        tl.store(ptr + index, sum_channels(values, V, BLOCK_D), mask=first & (index < count) & in_seq)
    else:
        R: tl.constexpr = (dstate + BLOCK_N - 1) // BLOCK_N
        for r in tl.static_range(len(values)):
            offs_n = r % R * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = (offs_n < dstate) & in_seq
            tl.store(ptr + r // R * dstate + offs_n, tl.sum(values[r], axis=0), mask=mask)


def channel_last(x):
    """x (batch, seqlen, dim) as every kernel reads it: adjacent channels, rows at one distance inside a batch entry.
    Any other layout costs a contiguous copy."""
    return x if x.stride(2) == 1 and x.stride(0) >= x.stride(1) else x.contiguous()
