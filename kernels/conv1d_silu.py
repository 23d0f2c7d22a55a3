"""Depthwise 'same' convolution over the sequence, non-causal, then SiLU; forward and backward.

    a_t = bias + sum_k weight_k x_{t + k - left}           left = (width - 1) // 2, x = 0 outside
    y_t = silu(a_t)                                        (or a_t without activation)

Backward, with a recomputed from x and not stored:

    da_t = dy_t silu'(a_t)                                 dx_t = sum_k weight_k da_{t - k + left}
    dweight_k = sum_{batch,t} da_t x_{t + k - left}        dbias = sum_{batch,t} da_t

Shapes: x, y (batch, seqlen, dim); weight (dim, width) or (dim, 1, width); bias (dim,). Any float
dtype up to float32 in, float32 inside.

Split: the op moves bytes and little else. Every sequence is cut into runs of STEPS rows; a program
owns BLOCK_L runs and BLOCK_D channels, and walks its runs side by side, so that a row is loaded and
converted once and serves its neighbours out of registers. Runs begin and end with rows of other
runs, loaded again, or with the zeros outside the sequence. A lane holds neighbouring channels, 16
bytes where 8 divides dim. The backward pass recomputes da of the rows next to a run, and adds up
dweight and dbias in registers over all blocks of runs of a program; their sums have two stages, one
partial per program and one torch sum, hence the same bits in every run.

Source: the convolution of the MambaVision mixer, arXiv 2407.08083, section 3.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import _device as dev

# 7 rows a run: 14 x 14 and 7 x 7 windows are whole runs, and longer runs hold more registers and
# compile longer. A lane holds 8 channels forward, and 4 backward, whose sums live in registers.
CONFIGS = {
    "fwd": {"STEPS": 7, "BLOCK_L": 16, "BLOCK_D": 32, "num_warps": 2, "enable_fp_fusion": True},
    "bwd": {"STEPS": 7, "BLOCK_L": 16, "BLOCK_D": 32, "num_warps": 4, "enable_fp_fusion": True},
}
# Backward, beyond this number of programs each takes several blocks of runs: twice what a large GPU
# holds at once, and fewer partial sums.
PROGRAMS = 1024


@triton.jit
def runs_of(block, batch, seqlen, BLOCK_L: tl.constexpr, STEPS: tl.constexpr):
    """Of each run of a block, (BLOCK_L, 1): its first row of all batch * seqlen, 64 bits wide, that
    row's step, and whether there is such a run."""
    # Divisions of 64 bits are subroutines; a grid has less than 2^31 blocks. BLOCK_L runs times
    # the runs of one sequence must fit as well, which 10^7 steps do
    block = tl.cast(block, tl.int32)
    runs = tl.cdiv(seqlen, STEPS)
    run = block % runs * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    b = block // runs * BLOCK_L + run // runs
    t = run % runs * STEPS
    return b.to(tl.int64) * seqlen + t, t, b < batch


@triton.jit
def load_run(
    ptr, stride_l: tl.constexpr, row, t, mask, offs_d, seqlen,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Rows FIRST .. LAST counted from the beginning of each run, a tuple of (BLOCK_L, BLOCK_D), 0
    outside the sequence."""
    ptr = ptr + (row * stride_l + offs_d)
    rows = ()
    for i in tl.static_range(FIRST, LAST + 1):
        if i < 0:
            mask_i = mask & (t + i >= 0)
        elif i > 0:
            mask_i = mask & (t + i < seqlen)
        else:
            mask_i = mask
        rows = rows + (tl.load(ptr + i * stride_l, mask=mask_i, other=0.0),)
    return rows


@triton.jit
def load_taps(weight_ptr, bias_ptr, offs_d, mask_d, WIDTH: tl.constexpr):
    """The convolution's weights, a tuple, and bias, 0 where there is none; each (1, BLOCK_D)."""
    taps = ()
    for k in tl.static_range(WIDTH):
        weight = tl.load(weight_ptr + offs_d * WIDTH + k, mask=mask_d, other=0.0)
        taps = taps + (weight.to(tl.float32),)
    bias = tl.zeros(offs_d.shape, tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    return taps, bias


@triton.jit
def convolve(rows, i: tl.constexpr, taps, bias):
    """a of the step that reads rows[i], rows[i + 1], ..."""
    a = bias
    for k in tl.static_range(len(taps)):
        a += taps[k] * rows[i + k].to(tl.float32)
    return a


@triton.jit
def store_step(ptr, stride_l: tl.constexpr, row, t, i, value, mask, offs_d, seqlen):
    """Row i of each run, unless it lies behind the end of the sequence."""
    dev.store(ptr + (row * stride_l + offs_d) + i * stride_l, value, mask & (t + i < seqlen))


@triton.jit
def channels_of(block, dim: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channels of a block and their mask, (1, BLOCK_D)."""
    offs_d = block * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    if dim % BLOCK_D == 0:
        mask_d = tl.full((1, BLOCK_D), True, tl.int1)
    else:
        mask_d = offs_d < dim
    return offs_d, mask_d


@triton.jit
def convolve_fwd(
    x_ptr, stride_xl: tl.constexpr,  # (batch, seqlen, dim)
    weight_ptr,  # (dim, width)
    bias_ptr,  # (dim,) or None
    y_ptr, stride_yl: tl.constexpr,  # (batch, seqlen, dim)
    block, offs_d, mask_d, batch, seqlen, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """y of one block of runs and of channels."""
    left: tl.constexpr = (WIDTH - 1) // 2
    row, t, mask_l = runs_of(block, batch, seqlen, BLOCK_L, STEPS)
    mask = mask_l & mask_d
    xs = load_run(
        x_ptr, stride_xl, row, t, mask, offs_d, seqlen, -left, STEPS + WIDTH - 2 - left
    )
    taps, bias = load_taps(weight_ptr, bias_ptr, offs_d, mask_d, WIDTH)
    for i in tl.static_range(STEPS):
        y = convolve(xs, i, taps, bias)
        if ACTIVATION:
            y = dev.silu(y)
        store_step(y_ptr, stride_yl, row, t, i, y, mask, offs_d, seqlen)


@triton.jit(do_not_specialize=["batch", "seqlen"])
def _conv1d_silu_fwd_kernel(
    x_ptr, stride_xl: tl.constexpr,  # (batch, seqlen, dim)
    weight_ptr,  # (dim, width)
    bias_ptr,  # (dim,) or None
    y_ptr, stride_yl: tl.constexpr,  # (batch, seqlen, dim)
    batch, seqlen, dim: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks_d = tl.cdiv(dim, BLOCK_D)
    offs_d, mask_d = channels_of(pid % blocks_d, dim, BLOCK_D)
    convolve_fwd(
        x_ptr, stride_xl, weight_ptr, bias_ptr, y_ptr, stride_yl, pid // blocks_d, offs_d, mask_d,
        batch, seqlen, WIDTH, ACTIVATION, STEPS, BLOCK_L,
    )  # fmt: skip


@triton.jit
def convolve_bwd(
    dy_ptr, stride_dyl: tl.constexpr,  # (batch, seqlen, dim)
    x_ptr, stride_xl: tl.constexpr,  # (batch, seqlen, dim)
    taps, bias,
    dx_ptr, stride_dxl: tl.constexpr,  # (batch, seqlen, dim)
    sums_ptr,  # (dim, COLUMNS), of this program
    first, count, offs_d, mask_d, batch, seqlen,
    ACTIVATION: tl.constexpr, DBIAS: tl.constexpr, COLUMNS: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx of `count` blocks of runs from `first` on, and their sums: dweight, then dbias if asked
    for."""
    WIDTH: tl.constexpr = len(taps)
    left: tl.constexpr = (WIDTH - 1) // 2
    right: tl.constexpr = WIDTH - 1 - left
    sums = ()
    for _ in tl.static_range(WIDTH + DBIAS):
        sums = sums + (tl.zeros((BLOCK_L, BLOCK_D), tl.float32),)
    for block in range(first, first + count):
        row, t, mask_l = runs_of(block, batch, seqlen, BLOCK_L, STEPS)
        mask = mask_l & mask_d
        dys = load_run(
            dy_ptr, stride_dyl, row, t, mask, offs_d, seqlen, -right, STEPS - 1 + left
        )
        xs = load_run(
            x_ptr, stride_xl, row, t, mask, offs_d, seqlen, 1 - WIDTH, STEPS + WIDTH - 2
        )
        das = ()
        # das[j] is of the run's row j - right, which read xs[j] .. xs[j + WIDTH - 1]
        for j in tl.static_range(STEPS + WIDTH - 1):
            da = dys[j].to(tl.float32)
            if ACTIVATION:
                da *= dev.dsilu(convolve(xs, j, taps, bias))
            das = das + (da,)
            if j >= right and j < right + STEPS:
                new = ()
                for k in tl.static_range(WIDTH):
                    new = new + (sums[k] + da * xs[j + k].to(tl.float32),)
                if DBIAS:
                    new = new + (sums[WIDTH] + da,)
                sums = new
            if j >= WIDTH - 1:
                # Row t was read through weight_k by row t - k + left
                dx = taps[0] * da
                for k in tl.static_range(1, WIDTH):
                    dx += taps[k] * das[j - k]
                i = j - (WIDTH - 1)
                store_step(dx_ptr, stride_dxl, row, t, i, dx, mask, offs_d, seqlen)
    for k in tl.static_range(len(sums)):
        total = tl.sum(sums[k], axis=0)[None, :]
        tl.store(sums_ptr + offs_d * COLUMNS + k, total, mask=mask_d)


@triton.jit(do_not_specialize=["batch", "seqlen", "count"])
def _conv1d_silu_bwd_kernel(
    dy_ptr, stride_dyl: tl.constexpr,  # (batch, seqlen, dim)
    x_ptr, stride_xl: tl.constexpr,  # (batch, seqlen, dim)
    weight_ptr,  # (dim, width)
    bias_ptr,  # (dim,) or None
    dx_ptr, stride_dxl: tl.constexpr,  # (batch, seqlen, dim)
    sums_ptr,  # (programs over rows, dim, width, and one more with a bias)
    batch, seqlen, count, dim: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks_d = tl.cdiv(dim, BLOCK_D)
    offs_d, mask_d = channels_of(pid % blocks_d, dim, BLOCK_D)
    taps, bias = load_taps(weight_ptr, bias_ptr, offs_d, mask_d, WIDTH)
    columns: tl.constexpr = WIDTH if bias_ptr is None else WIDTH + 1
    convolve_bwd(
        dy_ptr, stride_dyl, x_ptr, stride_xl, taps, bias, dx_ptr, stride_dxl,
        sums_ptr + pid // blocks_d * dim * columns, pid // blocks_d * count, count, offs_d, mask_d,
        batch, seqlen, ACTIVATION, bias_ptr is not None, columns, STEPS, BLOCK_L, BLOCK_D,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def blocks_of(config, batch, seqlen, dim):
    """Blocks of runs, and of channels."""
    config = CONFIGS[config]
    runs = batch * triton.cdiv(seqlen, config["STEPS"])
    return triton.cdiv(runs, config["BLOCK_L"]), triton.cdiv(dim, config["BLOCK_D"])


@lru_cache(maxsize=1024)
def share_out(blocks, blocks_d):
    """Blocks of runs that one program of the backward pass takes, and programs over rows."""
    count = max(1, triton.cdiv(blocks * blocks_d, PROGRAMS))
    return count, triton.cdiv(blocks, count)


def conv1d_silu_fwd(x, weight, bias, activation):
    """y."""
    batch, seqlen, dim = x.shape
    x, stride_xl = dev.rows_of(x)
    y = x.new_empty(batch, seqlen, dim)
    blocks, blocks_d = blocks_of("fwd", batch, seqlen, dim)
    if batch:
        args = (
            x, stride_xl,
            weight.contiguous(),
            dev.packed(bias),
            y, dim,
            batch, seqlen, dim, weight.shape[-1], activation,
        )  # fmt: skip
        dev.launch(_conv1d_silu_fwd_kernel, (blocks * blocks_d,), args, CONFIGS["fwd"])
    return y


def conv1d_silu_bwd(dy, x, weight, bias, activation):
    """(dx, dweight, dbias), dbias None without a bias."""
    batch, seqlen, dim = x.shape
    width = weight.shape[-1]
    (dy, stride_dyl), (x, stride_xl) = dev.rows_of(dy), dev.rows_of(x)
    dx = x.new_empty(batch, seqlen, dim)
    blocks, blocks_d = blocks_of("bwd", batch, seqlen, dim)
    count, programs = share_out(blocks, blocks_d)
    sums = x.new_empty(programs, dim, width + (bias is not None), dtype=torch.float32)
    if batch:
        args = (
            dy, stride_dyl,
            x, stride_xl,
            weight.contiguous(),
            dev.packed(bias),
            dx, dim,
            sums,
            batch, seqlen, count, dim, width, activation,
        )  # fmt: skip
        dev.launch(_conv1d_silu_bwd_kernel, (programs * blocks_d,), args, CONFIGS["bwd"])
    sums = sums.sum(0)
    dweight = sums[:, :width].reshape(weight.shape).to(weight.dtype)
    # A copy: the results of an operator may not share memory
    dbias = None if bias is None else sums[:, width].to(bias.dtype, copy=True)
    return dx, dweight, dbias


class Conv1dSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        ctx.save_for_backward(x, weight, bias)
        ctx.activation = activation
        return conv1d_silu_fwd(x, weight, bias, activation)

    @staticmethod
    @dev.first_derivative_only
    def backward(ctx, dy):
        return *conv1d_silu_bwd(dy, *ctx.saved_tensors, ctx.activation), None


def conv1d_silu(x, weight, bias=None, *, activation=True):
    """y: the convolution above on the Triton path, differentiable in every tensor.

    Arguments are those of `mambavision.ops.conv1d_silu`, which checks them.
    """
    return Conv1dSilu.apply(x, weight, bias, activation)
