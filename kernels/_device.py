"""What the kernels share: activations, the tuples of registers a scan works on, the launch.

Activations take and return float32. Everything goes through exp2, one instruction on every target,
and one polynomial; there is no libdevice call, so CUDA, HIP and the interpreter run the same
arithmetic.

A state register is a tile (BLOCK_D, BLOCK_N), BLOCK_N states of each channel; the dstate states of
a channel are a tuple of them.
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


@triton.jit
def load_vector(ptr, offs_d):
    """(BLOCK_D,) of a (dim,) tensor, 0 where there is none."""
    if ptr is None:
        return tl.zeros(offs_d.shape, tl.float32)
    else:
        return tl.load(ptr + offs_d).to(tl.float32)


@triton.jit
def load_states(ptr, offs_d, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    """The dstate values of each channel of a (dim, dstate) tensor, a tuple of state registers."""
    return to_float32(load_alike(ptr + offs_d * dstate, offs_d, dstate, BLOCK_N))


@triton.jit
def load_alike(ptr, offs_d, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    """dstate values from ptr on, a tuple of state registers in memory's dtype. For a row of B or C
    every lane reads one address, up to 16 bytes at a time, and no value travels between lanes."""
    values = ()
    for r in tl.static_range((dstate + BLOCK_N - 1) // BLOCK_N):
        offs_n = r * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        at = (ptr + offs_d * 0)[:, None] + offs_n
        if dstate % BLOCK_N == 0:
            values = values + (tl.load(at),)
        else:
            values = values + (tl.load(at, mask=offs_n < dstate, other=0.0),)
    return values


@triton.jit
def rows(tile):
    """The rows of a tile, a power of 2 of at most 16. A lane gets the column, or columns, that it
    works on, through shared memory where it had loaded others."""
    COUNT: tl.constexpr = tile.shape[0]
    WIDTH: tl.constexpr = tile.shape[1]
    # Bits of the row's number behind the column, the highest last: halves stay in order
    if COUNT == 1:
        parts = (tl.reshape(tile, (WIDTH,)),)
    elif COUNT == 2:
        parts = (tl.permute(tile, (1, 0)),)
    elif COUNT == 4:
        parts = (tl.permute(tl.reshape(tile, (2, 2, WIDTH)), (2, 1, 0)),)
    elif COUNT == 8:
        parts = (tl.permute(tl.reshape(tile, (2, 2, 2, WIDTH)), (3, 2, 1, 0)),)
    else:
        parts = (tl.permute(tl.reshape(tile, (2, 2, 2, 2, WIDTH)), (4, 3, 2, 1, 0)),)
    for s in tl.static_range(4):
        if 2 << s <= COUNT:
            halves = ()
            for k in tl.static_range(len(parts)):
                halves = halves + tl.split(parts[k])
            parts = halves
    return parts


@triton.jit
def to_float32(values):
    wide = ()
    for r in tl.static_range(len(values)):
        wide = wide + (values[r].to(tl.float32),)
    return wide


@triton.jit
def store_states(ptr, values, offs_d, mask_d, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    for r in tl.static_range(len(values)):
        offs_n = r * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        mask = mask_d[:, None] & (offs_n < dstate)
        tl.store(ptr + offs_d[:, None] * dstate + offs_n, values[r], mask=mask)


@triton.jit
def zeros(like):
    values = ()
    for r in tl.static_range(len(like)):
        values = values + (tl.zeros_like(like[r]),)
    return values


@triton.jit
def load_first(ptr, b, like, offs_d, dim, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    """Entry b of a (batch, dim, dstate) tensor, or zeros where there is none."""
    if ptr is None:
        return zeros(like)
    else:
        return load_states(ptr + b * dim * dstate, offs_d, dstate, BLOCK_N)


@triton.jit
def add_product(sums, values, factor):
    grown = ()
    for r in tl.static_range(len(sums)):
        grown = grown + (sums[r] + values[r] * factor,)
    return grown


@triton.jit
def _across(x, BIT: tl.constexpr):
    """What the lane across BIT holds of a (32,) tensor."""
    return tl.gather(x, tl.arange(0, 32) ^ BIT, 0)


@triton.jit
def _columns(tile, BLOCK_N: tl.constexpr):
    """The columns of a (BLOCK_D, BLOCK_N) state register, BLOCK_N 1, 2 or 4."""
    BLOCK_D: tl.constexpr = tile.shape[0]
    if BLOCK_N == 1:
        return (tl.reshape(tile, (BLOCK_D,)),)
    elif BLOCK_N == 2:
        return tl.split(tile)
    else:
        even, odd = tl.split(tl.reshape(tile, (BLOCK_D, 2, 2)))
        c0, c2 = tl.split(even)
        c1, c3 = tl.split(odd)
        return c0, c1, c2, c3


@triton.jit
def dot_states(a, b, first):
    """first + <a, b> over the states of each channel, (BLOCK_D,)."""
    if a[0].shape[0] >= 32:
        # A lane holds whole channels: a chain of fused multiply-adds
        for r in tl.static_range(len(a)):
            a_r = _columns(a[r], a[r].shape[1])
            b_r = _columns(tl.broadcast_to(b[r], a[r].shape), a[r].shape[1])
            for n in tl.static_range(a[r].shape[1]):
                first += a_r[n] * b_r[n]
        return first
    else:
        products = a[0] * b[0]
        for r in tl.static_range(1, len(a)):
            products += a[r] * b[r]
        return first + tl.sum(products, axis=1)


@triton.jit
def halve(a, x, b, y, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first of five steps of summing a x and b y over the channels of a warp, a and b dstate
    values of each channel, x and y (32,): the lower lanes go on with a x, the upper ones with b y.
    """
    upper = tl.arange(0, 32) >= 16
    kept, sent = tl.where(upper, y, x), tl.where(upper, x, y)
    values = ()
    for r in tl.static_range(len(a)):
        a_r, b_r = _columns(a[r], BLOCK_N), _columns(b[r], BLOCK_N)
        for n in tl.static_range(BLOCK_N):
            if r * BLOCK_N + n < triton.next_power_of_2(dstate):
                received = _across(tl.where(upper, a_r[n], b_r[n]) * sent, 16)
                values = values + (tl.where(upper, b_r[n], a_r[n]) * kept + received,)
    for _ in tl.static_range(triton.next_power_of_2(dstate) - len(a) * BLOCK_N):
        values = values + (tl.zeros_like(x),)
    return values


@triton.jit
def store_sums_of_step(
    ptr, a, x, b, y, mask, dstate: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Sums over channels of a x and, behind them, of b y, where states lie over lanes."""
    for r in tl.static_range(len(a)):
        n = r * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = (n < dstate) & mask
        tl.store(ptr + n, tl.sum(a[r] * x[:, None], axis=0), mask=mask_n)
        tl.store(ptr + dstate + n, tl.sum(b[r] * y[:, None], axis=0), mask=mask_n)


@triton.jit
def store_sums(ptr, stride: tl.constexpr, values, steps, STEPS: tl.constexpr, dstate: tl.constexpr):
    """The other four: sums over each half of the lanes of what `halve` left of STEPS steps, all at
    once. Rows begin at ptr, a stride apart; those from `steps` on are not stored."""
    lanes = tl.arange(0, 32)
    for s in tl.static_range(4):
        if len(values) > 1:
            upper = (lanes & (8 >> s)) != 0
            halved = ()
            for r in tl.static_range(len(values) // 2):
                low, high = values[r], values[r + len(values) // 2]
                received = _across(tl.where(upper, low, high), 8 >> s)
                halved = halved + (tl.where(upper, high, low) + received,)
            values = halved
        else:
            values = (values[0] + _across(values[0], 8 >> s),)
    V: tl.constexpr = triton.next_power_of_2(dstate)
    for r in tl.static_range(len(values)):
        # Of STEPS V values, lane l of a half holds those from l STEPS V / 16 on
        index = lanes % 16 * (STEPS * V) // 16 + r
        step, n = index // V, index % V
        mask = (lanes % 16 * (STEPS * V) % 16 == 0) & (n < dstate) & (step < steps)
        tl.store(ptr + step * stride + lanes // 16 * dstate + n, values[r], mask=mask)


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
