"""Selective scan, forward and backward, channel-last and sequential over the sequence.

    dt_t = softplus(delta_t + delta_bias)                 (or without softplus)
    h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t              h_{-1} = initial state or 0
    y_t  = <C_t, h_t> + D u_t                              (times silu(z_t) with a gate z)

Backward, from the last step to the first, with g_t = dL/dh_t and p_t = exp(dt_t A) h_{t-1}:

    g_t  = C_t dy_t + exp(dt_{t+1} A) g_{t+1}              begins as the last state's gradient or 0
    du_t = dt_t <g_t, B_t> + D dy_t                        d(dt)_t = <g_t, A p_t + B_t u_t>
    dB_t = sum_dim g_t dt_t u_t                            dC_t = sum_dim dy_t h_t
    dA   = sum_{batch,t} g_t dt_t p_t                      dD = sum_{batch,t} dy_t u_t
    ddelta_t = d(dt)_t sigmoid(delta_t + delta_bias)       ddelta_bias = sum_{batch,t} ddelta_t

Nothing divides by a decay, so decays may underflow.

Shapes: u, delta, z, y (batch, seqlen, dim); A (dim, dstate); B, C (batch, seqlen, dstate), or
(batch, seqlen, groups, dstate), or constant over time (dim, dstate); D, delta_bias (dim,); states
(batch, dim, dstate). Any float dtype up to float32 in, float32 inside.

Split: one warp owns one batch entry and BLOCK_D channels of one group, and walks the sequence; the
states are a tuple of registers (`_registers.py`). B_t and C_t are the same for all channels: every
lane reads all of them, 16 bytes at a time. One reading serves two channels where they are a lane's
own, because channels are many (BLOCK_D = 64), or belong to two lanes next to each other, each with
half of the states of both (LANES = 2), which tell each other dt, dt u and their part of y; sums
over channels then begin inside a lane. Above dstate 16 states lie side by side over lanes.

A few channels make too few warps. Forward, the lanes of a program then share out SPLIT pieces of
the sequence: each walks its piece twice, first from no state for the one that it leaves, which
gives the states that enter the pieces, then from that for y.

A step's rows are used once, far from any cache, and one or two warps a scheduler hide nothing. So
the loops copy tiles of STEPS rows to shared memory, asynchronously, two iterations before they are
used (`STAGES`): Triton does this by itself where a lane copies at least 4 bytes.

In training the forward pass keeps the state before every STEPS steps (`states`), or the programs of
the backward pass write it first, for themselves; then they re-run these steps in registers and
sweep them in reverse. Sums over programs have two stages, partials and a second launch that adds
them in order, hence the same bits in every run.

Source: Gu and Dao, arXiv 2312.00752, section 3; the gradients follow from the equations above.
"""

from functools import cache
from operator import le
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _device as dev
from . import _registers as reg
from ._device import LN2, LOG2E

MAX_DSTATE = 64
STAGES = tl.constexpr(3)  # iterations in flight


class Config(NamedTuple):
    """Launch parameters for up to `dstate` states, `seqlen` steps, `channels` = batch * dim and
    `itemsize` bytes of an element of B or C."""

    dstate: int
    seqlen: float
    channels: float
    itemsize: float
    STEPS: tuple[int, ...]  # the first of those that walk the fewest steps
    BLOCK_D: int
    BLOCK_N: int
    LANES: int  # where 2 BLOCK_N divides the number of states, else 1
    SPLIT: int
    why: str


ANY = float("inf")
# The first that serves a call. `make static-report` counts registers, spills and instructions.
FORWARD = (
    Config(8, ANY, 2048, ANY, (7, 4), 32, 4, 2, 16, "16 times the warps, twice the work"),
    Config(8, ANY, 8192, ANY, (7,), 32, 4, 2, 8, "8 times the warps for twice the work"),
    Config(8, ANY, 51000, 2, (8, 7), 32, 4, 2, 1, "a lane widens half of B and C: 1 to 6 % faster"),
    Config(8, ANY, 51000, ANY, (8, 7), 32, 4, 1, 1, "7 divides windows of 7 x 7 and 14 x 14"),
    Config(8, 64, ANY, 2, (8, 7), 32, 4, 2, 1, "more warps hide where short sequences begin"),
    Config(8, 64, ANY, ANY, (8, 7), 32, 4, 1, 1, "as above"),
    Config(8, ANY, ANY, ANY, (8, 7), 64, 4, 1, 1, "two channels a lane read B and C once"),
    Config(16, ANY, ANY, ANY, (4,), 32, 4, 2, 1, "twice the registers per step, half the steps"),
    Config(64, ANY, ANY, ANY, (2,), 8, 16, 1, 1, "64 states fit no lane; 4 lanes hold them"),
)
# Forward passes that keep states, one for each run of steps that the backward pass takes: STEPS are
# a multiple of that.
KEEPING = (
    Config(8, ANY, 45000, 2, (8,), 32, 4, 2, 1, "29.4 us at T, stage 3; 34 with 4 steps"),
    Config(8, ANY, 45000, ANY, (8,), 32, 4, 1, 1, "28.9 us at T, stage 3; 33 with 4 steps"),
    Config(8, 512, ANY, ANY, (4,), 32, 4, 1, 1, "61 us at L, stage 3; 72 with 8 steps, 71 64 wide"),
    Config(8, ANY, ANY, ANY, (8,), 64, 4, 1, 1, "390 us at 1024 x 512; 444 with 32 wide"),
    Config(16, ANY, ANY, ANY, (4,), 32, 4, 2, 1, "as without states kept"),
    Config(64, ANY, ANY, ANY, (2,), 8, 16, 1, 1, "as without states kept"),
)
BACKWARD = (
    Config(8, ANY, ANY, ANY, (4,), 32, 4, 2, 1, "193 slots a step; 7 steps take 16 s to compile"),
    Config(16, ANY, ANY, ANY, (2,), 32, 4, 2, 1, "twice the registers per step, half the steps"),
    Config(64, ANY, ANY, ANY, (2,), 4, 16, 1, 1, "64 states fit no lane; 8 lanes hold them"),
)
# One warp per program: a channel's work is sequential, more warps help only by number. Fusing
# a * b + c is a quarter of the arithmetic, and Triton releases differ in their default. Left alone,
# NVIDIA's assembler saves registers for warps that are not there and runs a step's chain of
# instructions one by one: on an H200 the backward pass is a quarter slower.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}
if not torch.version.hip:
    OPTIONS["maxnreg"] = 255
# Small programs: what they read is in the cache or far away, and many must be waiting for it
SUMS = {"ENTRIES": 64, "COLUMNS": 32, "ROWS": 128, "num_warps": 4, "enable_fp_fusion": True}


def _config(table, *sizes):
    """The first line for this dstate, seqlen, channels and itemsize."""
    return next(c for c in table if all(map(le, sizes, c)))


@cache
def _forward_constants(batch, seqlen, dim, groups, dstate, itemsize, save_states):
    """STEPS, BLOCK_D, BLOCK_N, LANES, SPLIT, EVEN_L, EVEN_D, KEEP of a launch."""
    config = _config(KEEPING if save_states else FORWARD, dstate, seqlen, batch * dim, itemsize)
    keep = _config(BACKWARD, dstate).STEPS[0]
    return *_constants(config, seqlen, dim // groups, dstate), keep


@cache
def _backward_constants(seqlen, dim, groups, dstate):
    """As above, but for KEEP."""
    return _constants(_config(BACKWARD, dstate), seqlen, dim // groups, dstate)


def _constants(config, seqlen, group_dim, dstate):
    walked = {n: triton.cdiv(seqlen, config.SPLIT * n) * config.SPLIT * n for n in config.STEPS}
    steps = min(walked, key=walked.get)
    block_n = min(config.BLOCK_N, triton.next_power_of_2(dstate))
    lanes = config.LANES if dstate % (config.LANES * block_n) == 0 else 1
    # Masks are cheap next to a machine code more
    even_l = config.SPLIT == 1 and walked[steps] == seqlen
    even_d = group_dim % (config.BLOCK_D // config.SPLIT) == 0
    return steps, config.BLOCK_D, block_n, lanes, config.SPLIT, even_l, even_d


@triton.jit
def _owned_channels(
    dim, group_dim, BLOCK_D: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_D: tl.constexpr,
):  # fmt: skip
    """Batch entry, channel block, group, columns of its rows, channels and which of them are this
    program's, the last two for each channel that a lane has states of, its own first. Everything
    lies on grid axis 0, and the program id is 64 bits wide before it meets a stride: neither 65,535
    batch entries nor 2^31 elements are a limit."""
    pid = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = BLOCK_D // SPLIT
    blocks_per_group = tl.cdiv(group_dim, WIDTH)
    blocks = (dim // group_dim) * blocks_per_group
    block = pid % blocks
    group = block // blocks_per_group
    first = (block % blocks_per_group) * WIDTH
    # A last block that sticks out begins earlier, so that rows stay whole, and leaves to the one
    # before what is that one's; a group narrower than a block repeats its last channel
    begin = first
    if not EVEN_D and group_dim > WIDTH:
        begin = tl.minimum(first, group_dim - WIDTH)
    columns = begin + tl.arange(0, BLOCK_D) % WIDTH
    if not EVEN_D and group_dim <= WIDTH:
        columns = tl.minimum(columns, group_dim - 1)
    columns += group * group_dim
    offs, masks = (), ()
    for c in tl.static_range(LANES):
        channel = (tl.arange(0, BLOCK_D) ^ c) % WIDTH
        if BLOCK_D > 32:
            # A lane's two states are not of channels next to each other, so what it loads and
            # stores may not be either
            channel = tl.max_contiguous(channel, 1)
        offs_in_group = begin + channel
        mask_d = tl.full((BLOCK_D,), True, tl.int1)
        if not EVEN_D:
            if group_dim > WIDTH:
                mask_d = offs_in_group >= first
            else:
                mask_d = offs_in_group < group_dim
                offs_in_group = tl.minimum(offs_in_group, group_dim - 1)
        offs, masks = offs + (group * group_dim + offs_in_group,), masks + (mask_d,)
    return pid // blocks, block, group, columns, offs, masks


@triton.jit
def _step_size(
    delta, delta_bias, t, seqlen, DELTA_SOFTPLUS: tl.constexpr, EVEN_L: tl.constexpr
):
    """dt of step t; 0 behind the end, where the state then passes unchanged."""
    dt = delta + delta_bias
    if DELTA_SOFTPLUS:
        dt = dev.softplus(dt)
    if not EVEN_L:
        dt = tl.where(t < seqlen, dt, 0.0)
    return dt


@triton.jit
def _step_size2(
    delta, delta_bias2, t, seqlen, DELTA_SOFTPLUS: tl.constexpr, EVEN_L: tl.constexpr
):
    """dt of step t in units of ln 2, as is delta_bias2; an instruction less for it, one less for
    the decay."""
    dt = delta * LOG2E + delta_bias2
    if DELTA_SOFTPLUS:
        dt = dev.softplus2(dt)
    if not EVEN_L:
        dt = tl.where(t < seqlen, dt, 0.0)
    return dt


@triton.jit
def _next_state(h, A, B_t, dt, u, LANES: tl.constexpr):
    """exp(dt A) h + dt B u, dt in units of ln 2."""
    dts, dtus = reg.of_both(dt, LANES), reg.of_both(dt * (u * LN2), LANES)
    h_next = ()
    for r in tl.static_range(len(A)):
        dt, dtu = dts[r * LANES // len(A)][:, None], dtus[r * LANES // len(A)][:, None]
        h_next = h_next + (tl.exp2(dt * A[r]) * h[r] + dtu * B_t[r % len(B_t)],)
    return h_next


@triton.jit
def _and(masks, condition):
    both = ()
    for c in tl.static_range(len(masks)):
        both = both + (masks[c] & condition,)
    return both


@triton.jit
def _lane_before(tile, DISTANCE: tl.constexpr):
    """Rows of a (BLOCK_D, BLOCK_N) tile, DISTANCE lanes further up."""
    lanes = tl.maximum(tl.arange(0, tile.shape[0]) - DISTANCE, 0)
    return tl.gather(tile, lanes[:, None] + tl.zeros(tile.shape, tl.int32), 0)


@triton.jit
def _state_before_piece(h0, h, A, total, piece, SPLIT: tl.constexpr, LANES: tl.constexpr):
    """The state that enters each piece, h0 the first one, from what each leaves of no state (the
    first: of h0), h, and the sum of its steps. Over a piece a state x becomes exp(total A) x + h;
    these maps are composed over 2, 4, 8, ... pieces."""
    WIDTH: tl.constexpr = piece.shape[0] // SPLIT
    totals = reg.of_both(total, LANES)
    entering = ()
    for r in tl.static_range(len(A)):
        decay, left = tl.exp2(totals[r * LANES // len(A)][:, None] * A[r]), h[r]
        for s in tl.static_range(5):
            if 1 << s < SPLIT:
                before, composed = _lane_before(left, WIDTH << s), _lane_before(decay, WIDTH << s)
                # No state stays none, also where the decay overflows
                more = (piece >= 1 << s)[:, None]
                left += tl.where(more & (before != 0.0), decay * before, 0.0)
                decay *= tl.where(more, composed, 1.0)
        entering = entering + (tl.where((piece == 0)[:, None], h0[r], _lane_before(left, WIDTH)),)
    return entering


@triton.jit
def _walk(
    h, A, D, delta_bias2, u_ptr, stride_ul: tl.constexpr, delta_ptr, stride_deltal: tl.constexpr,
    B_ptr, stride_Bl: tl.constexpr, C_ptr, stride_Cl: tl.constexpr, z_ptr, stride_zl: tl.constexpr,
    y_ptr, stride_yl: tl.constexpr, states_ptr, start, length, seqlen, columns, offs, masks,
    dim: tl.constexpr, dstate: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr,
    DELTA_SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr, EVEN_L: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """From state h over `length` steps from `start` on: the state behind them and the sum of dt,
    which is in units of ln 2. y and the states before every KEEP steps are written if asked for.
    Pointers are those of the batch entry."""
    total = tl.zeros_like(delta_bias2)
    if CONST_B:
        B_t = reg.load_states(B_ptr, offs, dstate, BLOCK_N)
    if y_ptr is not None:
        y_ptr += reg.row_of(start, seqlen, REVERSE) * stride_yl + offs[0]
        if CONST_C:
            C_t = reg.load_states(C_ptr, offs, dstate, BLOCK_N)
    for walked in tl.range(0, length, STEPS, num_stages=STAGES):
        t0 = start + walked
        us = reg.load_rows(u_ptr, stride_ul, t0, seqlen, columns, STEPS, SPLIT, REVERSE)
        deltas = reg.load_rows(delta_ptr, stride_deltal, t0, seqlen, columns, STEPS, SPLIT, REVERSE)
        if not CONST_B:
            Bs = reg.load_states_by_step(
                B_ptr, stride_Bl, t0, seqlen, offs, dstate, BLOCK_N, STEPS, SPLIT, REVERSE
            )
        if y_ptr is not None:
            if z_ptr is not None:
                zs = reg.load_rows(z_ptr, stride_zl, t0, seqlen, columns, STEPS, SPLIT, REVERSE)
            if not CONST_C:
                Cs = reg.load_states_by_step(
                    C_ptr, stride_Cl, t0, seqlen, offs, dstate, BLOCK_N, STEPS, SPLIT, REVERSE
                )
        ys = ()
        for i in tl.static_range(STEPS):
            if states_ptr is not None and i % KEEP == 0:
                at = states_ptr + tl.cast((t0 + i) // KEEP, tl.int64) * dim * dstate
                in_seq = masks if EVEN_L else _and(masks, t0 + i < seqlen)
                reg.store_states(at, h, offs, in_seq, dstate, BLOCK_N)
            if not CONST_B:
                B_t = reg.of_step(Bs, i, dstate, BLOCK_N, SPLIT, LANES)
            dt = _step_size2(deltas[i], delta_bias2, t0 + i, seqlen, DELTA_SOFTPLUS, EVEN_L)
            total += dt
            h = _next_state(h, A, B_t, dt, us[i], LANES)
            if y_ptr is not None:
                if not CONST_C:
                    C_t = reg.of_step(Cs, i, dstate, BLOCK_N, SPLIT, LANES)
                y = reg.dot_states(h, C_t, D * us[i], LANES)
                if z_ptr is not None:
                    y *= dev.silu(zs[i])
                ys = ys + (y,)
        if y_ptr is not None:
            for i in tl.static_range(STEPS):
                mask = masks[0] if EVEN_L else masks[0] & (t0 + i < seqlen)
                dev.store(y_ptr + i * (-stride_yl if REVERSE else stride_yl), ys[i], mask)
            y_ptr += STEPS * (-stride_yl if REVERSE else stride_yl)
    return h, total


# Not compiled anew for each
GENERIC = ["batch", "seqlen"]


@triton.jit(do_not_specialize=GENERIC)
def _scan_fwd_kernel(
    u_ptr, stride_ul: tl.constexpr,  # (batch, seqlen, dim)
    delta_ptr, stride_deltal: tl.constexpr,  # (batch, seqlen, dim)
    A_ptr,  # (dim, dstate)
    B_ptr, stride_Bl: tl.constexpr, stride_Bg: tl.constexpr,  # (batch, seqlen, groups, dstate)
    C_ptr, stride_Cl: tl.constexpr, stride_Cg: tl.constexpr,  # or constant, as A
    D_ptr,  # (dim,) or None
    z_ptr, stride_zl: tl.constexpr,  # (batch, seqlen, dim) or None
    delta_bias_ptr,  # (dim,) or None
    initial_state_ptr,  # (batch, dim, dstate) or None
    y_ptr, stride_yl: tl.constexpr,  # (batch, seqlen, dim)
    last_state_ptr,  # (batch, dim, dstate) or None
    states_ptr,  # (batch, chunks, dim, dstate) or None
    seqlen, dim: tl.constexpr, group_dim: tl.constexpr,
    dstate: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr,
    DELTA_SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr,
    SPLIT: tl.constexpr, EVEN_L: tl.constexpr, EVEN_D: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    b, _, group, columns, offs, masks = _owned_channels(
        dim, group_dim, BLOCK_D, LANES, SPLIT, EVEN_D
    )
    u_ptr += b * seqlen * stride_ul
    delta_ptr += b * seqlen * stride_deltal
    y_ptr += b * seqlen * stride_yl
    if z_ptr is not None:
        z_ptr += b * seqlen * stride_zl
    if not CONST_B:
        B_ptr += b * seqlen * stride_Bl + group * stride_Bg
    if not CONST_C:
        C_ptr += b * seqlen * stride_Cl + group * stride_Cg
    if states_ptr is not None:
        states_ptr += b * tl.cdiv(seqlen, KEEP) * dim * dstate
    A = reg.load_states(A_ptr, offs, dstate, BLOCK_N)
    D = reg.load_vector(D_ptr, offs[0])
    delta_bias2 = reg.load_vector(delta_bias_ptr, offs[0]) * LOG2E
    h = reg.load_first(initial_state_ptr, b, A, offs, dim, dstate, BLOCK_N)

    start, length = 0, seqlen
    if SPLIT > 1:
        # Each lane walks a piece of the sequence, first for the state that it leaves
        length = tl.cdiv(seqlen, SPLIT * STEPS) * STEPS
        piece = tl.arange(0, BLOCK_D) // (BLOCK_D // SPLIT)
        start = piece * length
        left, total = _walk(
            reg.only(h, (piece == 0)[:, None]), A, D, delta_bias2, u_ptr, stride_ul, delta_ptr,
            stride_deltal, B_ptr, stride_Bl, None, 0, None, 0, None, 0, None, start, length, seqlen,
            columns, offs, masks, dim, dstate, CONST_B, CONST_C, DELTA_SOFTPLUS, REVERSE, STEPS,
            BLOCK_N, LANES, SPLIT, EVEN_L, KEEP,
        )  # fmt: skip
        h = _state_before_piece(h, left, A, total, piece, SPLIT, LANES)
    h, _ = _walk(
        h, A, D, delta_bias2, u_ptr, stride_ul, delta_ptr, stride_deltal, B_ptr, stride_Bl, C_ptr,
        stride_Cl, z_ptr, stride_zl, y_ptr, stride_yl, states_ptr, start, length, seqlen, columns,
        offs, masks, dim, dstate, CONST_B, CONST_C, DELTA_SOFTPLUS, REVERSE, STEPS, BLOCK_N, LANES,
        SPLIT, EVEN_L, KEEP,
    )  # fmt: skip

    if last_state_ptr is not None:
        last_state_ptr += b * dim * dstate
        if SPLIT > 1:
            masks = _and(masks, piece == SPLIT - 1)
        reg.store_states(last_state_ptr, h, offs, masks, dstate, BLOCK_N)


@triton.jit(do_not_specialize=GENERIC)
def _scan_bwd_kernel(
    dy_ptr, stride_dyl: tl.constexpr,  # (batch, seqlen, dim)
    dlast_state_ptr,  # (batch, dim, dstate) or None
    u_ptr, stride_ul: tl.constexpr,  # (batch, seqlen, dim)
    delta_ptr, stride_deltal: tl.constexpr,  # (batch, seqlen, dim)
    A_ptr,  # (dim, dstate)
    B_ptr, stride_Bl: tl.constexpr, stride_Bg: tl.constexpr,  # (batch, seqlen, groups, dstate)
    C_ptr, stride_Cl: tl.constexpr, stride_Cg: tl.constexpr,  # or constant, as A
    D_ptr,  # (dim,) or None
    z_ptr, stride_zl: tl.constexpr,  # (batch, seqlen, dim) or None
    delta_bias_ptr,  # (dim,) or None
    states_ptr,  # (batch, chunks, dim, dstate), with AGAIN written here, of a scan from no state
    du_ptr,  # (batch, seqlen, dim)
    ddelta_ptr,  # (batch, seqlen, dim)
    partial_ptr,  # (batch, dim dstate + 2 dim): dA, dD, ddelta_bias
    dBC_ptr,  # (blocks, batch, seqlen, 2 dstate), None where B and C are constant
    dB_ptr,  # (batch, dim, dstate) for constant B, else None
    dC_ptr,  # (batch, dim, dstate) for constant C, else None
    dz_ptr,  # (batch, seqlen, dim) or None
    dinitial_state_ptr,  # (batch, dim, dstate) or None
    batch, seqlen, dim: tl.constexpr, group_dim: tl.constexpr,
    dstate: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr,
    DELTA_SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, AGAIN: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr,
    SPLIT: tl.constexpr, EVEN_L: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    b, block, group, columns, offs, masks = _owned_channels(
        dim, group_dim, BLOCK_D, LANES, SPLIT, EVEN_D
    )
    offs_d, mask_d = offs[0], masks[0]
    chunks = tl.cdiv(seqlen, STEPS)
    dy_ptr += b * seqlen * stride_dyl
    du_ptr += b * seqlen * dim
    ddelta_ptr += b * seqlen * dim
    if dBC_ptr is not None:
        dBC_ptr += (block * batch + b) * seqlen * 2 * dstate
    states_ptr += b * chunks * dim * dstate
    u_ptr += b * seqlen * stride_ul
    delta_ptr += b * seqlen * stride_deltal
    if z_ptr is not None:
        z_ptr += b * seqlen * stride_zl
        dz_ptr += b * seqlen * dim
    A = reg.load_states(A_ptr, offs, dstate, BLOCK_N)
    if CONST_B:
        B_t = reg.load_states(B_ptr, offs, dstate, BLOCK_N)
    else:
        B_ptr += b * seqlen * stride_Bl + group * stride_Bg
    if CONST_C:
        C_t = reg.load_states(C_ptr, offs, dstate, BLOCK_N)
    else:
        C_ptr += b * seqlen * stride_Cl + group * stride_Cg
    D = reg.load_vector(D_ptr, offs_d)
    delta_bias = reg.load_vector(delta_bias_ptr, offs_d)
    # Above step t, g is what the later steps leave of dL/dh_t: exp(dt_{t+1} A) g_{t+1}
    g = reg.load_first(dlast_state_ptr, b, A, offs, dim, dstate, BLOCK_N)
    EACH: tl.constexpr = len(A) // LANES
    dA, dB_sum, dC_sum = reg.zeros(A), reg.zeros(A), reg.zeros(A)
    dD, ddelta_bias = tl.zeros_like(D), tl.zeros_like(D)
    if AGAIN:
        # Of another program's channels, too, as this one reads their states: both write the same
        everywhere = ()
        for _ in tl.static_range(LANES):
            everywhere = everywhere + (tl.full((BLOCK_D,), True, tl.int1),)
        _walk(
            reg.zeros(A), A, D, delta_bias * LOG2E, u_ptr, stride_ul, delta_ptr, stride_deltal,
            B_ptr, stride_Bl, None, 0, None, 0, None, 0, states_ptr, 0, seqlen, seqlen, columns,
            offs, everywhere, dim, dstate, CONST_B, CONST_C, DELTA_SOFTPLUS, REVERSE, STEPS,
            BLOCK_N, LANES, 1, EVEN_L, STEPS,
        )  # fmt: skip
        # What a lane kept, another may read
        tl.debug_barrier()

    for k in tl.range(0, chunks, num_stages=STAGES):
        t0 = (chunks - 1 - k) * STEPS
        first = reg.row_of(t0, seqlen, REVERSE)
        at = states_ptr + tl.cast(chunks - 1 - k, tl.int64) * dim * dstate
        h = reg.load_states(at, offs, dstate, BLOCK_N)
        us = reg.load_rows(u_ptr, stride_ul, t0, seqlen, columns, STEPS, 1, REVERSE)
        deltas = reg.load_rows(delta_ptr, stride_deltal, t0, seqlen, columns, STEPS, 1, REVERSE)
        dys = reg.load_rows(dy_ptr, stride_dyl, t0, seqlen, columns, STEPS, 1, REVERSE)
        if z_ptr is not None:
            zs = reg.load_rows(z_ptr, stride_zl, t0, seqlen, columns, STEPS, 1, REVERSE)
        if not CONST_B:
            Bs = reg.load_states_by_step(
                B_ptr, stride_Bl, t0, seqlen, offs, dstate, BLOCK_N, STEPS, 1, REVERSE
            )
        if not CONST_C:
            Cs = reg.load_states_by_step(
                C_ptr, stride_Cl, t0, seqlen, offs, dstate, BLOCK_N, STEPS, 1, REVERSE
            )
        if not EVEN_D:
            us, dys = reg.only(us, mask_d), reg.only(dys, mask_d)

        # Forward again: dt_t, dt_t u_t and p_t of the chunk
        dts, dtus, ps = (), (), ()
        for i in tl.static_range(STEPS):
            dt = _step_size(deltas[i], delta_bias, t0 + i, seqlen, DELTA_SOFTPLUS, EVEN_L)
            dtu = dt * us[i]
            dt, dtu = reg.of_both(dt, LANES), reg.of_both(dtu, LANES)
            dts, dtus = dts + (dt,), dtus + (dtu,)
            if not CONST_B:
                B_t = reg.of_step(Bs, i, dstate, BLOCK_N, 1, LANES)
            p, h_next_t = (), ()
            for r in tl.static_range(len(A)):
                p = p + (tl.exp2((dt[r // EACH] * LOG2E)[:, None] * A[r]) * h[r],)
                h_next_t = h_next_t + (p[r] + dtu[r // EACH][:, None] * B_t[r % len(B_t)],)
            h = h_next_t
            ps = ps + (p,)

        sums, dus, ddeltas, dzs = (), (), (), ()
        for i in tl.static_range(STEPS - 1, -1, -1):
            if not CONST_B:
                B_t = reg.of_step(Bs, i, dstate, BLOCK_N, 1, LANES)
            if not CONST_C:
                C_t = reg.of_step(Cs, i, dstate, BLOCK_N, 1, LANES)
            u, dy, dt, dtu, p = us[i], dys[i], dts[i], dtus[i], ps[i]
            if not EVEN_L:
                dy = tl.where(t0 + i < seqlen, dy, 0.0)
            h_t = ()
            for r in tl.static_range(len(A)):
                h_t = h_t + (p[r] + dtu[r // EACH][:, None] * B_t[r % len(B_t)],)
            if z_ptr is not None:
                z = zs[i]
                y = reg.dot_states(h_t, C_t, D * u, LANES)
                dzs = (dy * y * dev.dsilu(z),) + dzs
                dy *= dev.silu(z)
            dD += dy * u

            dy_n = reg.of_both(dy, LANES)
            g_t, gp, g_next, dA_next = (), (), (), ()
            for r in tl.static_range(len(A)):
                dt_n = dt[r // EACH][:, None]
                g_t = g_t + (g[r] + dy_n[r // EACH][:, None] * C_t[r % len(C_t)],)
                gp = gp + (g_t[r] * p[r],)
                dA_next = dA_next + (dA[r] + gp[r] * dt_n,)
                g_next = g_next + (tl.exp2(dt_n * LOG2E * A[r]) * g_t[r],)
            g, dA = g_next, dA_next
            gB = reg.dot_states(g_t, B_t, tl.zeros_like(u), LANES)
            dus = (dt[0] * gB + D * dy,) + dus
            ddelta = reg.dot_states(gp, A, gB * u, LANES)
            if DELTA_SOFTPLUS:
                ddelta *= dev.dsoftplus(deltas[i] + delta_bias, dt[0])
            ddeltas = (ddelta,) + ddeltas
            if not EVEN_L:
                ddelta = tl.where(t0 + i < seqlen, ddelta, 0.0)
            ddelta_bias += ddelta

            # dB_t, dC_t: the sum over this program's channels; constant ones grow in registers
            if CONST_B:
                dB_sum = reg.add_product(dB_sum, g_t, dtu)
            if CONST_C:
                dC_sum = reg.add_product(dC_sum, h_t, dy_n)
            if dBC_ptr is not None:
                if BLOCK_D == 32:
                    sums = reg.halve(g_t, dtu, h_t, dy_n, dstate, BLOCK_N) + sums
                else:
                    at = dBC_ptr + first * 2 * dstate
                    at += (-i if REVERSE else i) * 2 * dstate
                    in_seq = t0 + i < seqlen
                    reg.store_sums_of_step(at, g_t, dtu[0], h_t, dy, in_seq, dstate, BLOCK_N)

        for i in tl.static_range(STEPS):
            at = first * dim + offs_d + (-i if REVERSE else i) * dim
            mask = mask_d
            if not EVEN_L:
                mask = mask_d & (t0 + i < seqlen)
            dev.store(du_ptr + at, dus[i], mask)
            dev.store(ddelta_ptr + at, ddeltas[i], mask)
            if z_ptr is not None:
                dev.store(dz_ptr + at, dzs[i], mask)
        if dBC_ptr is not None and BLOCK_D == 32:
            stride: tl.constexpr = -2 * dstate if REVERSE else 2 * dstate
            at = dBC_ptr + first * 2 * dstate
            steps = STEPS if EVEN_L else seqlen - t0
            reg.store_sums(at, stride, sums, steps, STEPS, dstate, LANES)

    entry = b * dim * dstate
    at = partial_ptr + b * dim * (dstate + 2)
    reg.store_states(at, dA, offs, masks, dstate, BLOCK_N)
    tl.store(at + dim * dstate + offs_d, dD, mask=mask_d)
    tl.store(at + dim * (dstate + 1) + offs_d, ddelta_bias, mask=mask_d)
    if CONST_B:
        reg.store_states(dB_ptr + entry, dB_sum, offs, masks, dstate, BLOCK_N)
    if CONST_C:
        reg.store_states(dC_ptr + entry, dC_sum, offs, masks, dstate, BLOCK_N)
    if dinitial_state_ptr is not None:
        dinitial_state_ptr += entry
        reg.store_states(dinitial_state_ptr, g, offs, masks, dstate, BLOCK_N)


@triton.jit
def sum_over_entries(
    partial_ptr, sum_ptr, pid, entries, columns: tl.constexpr, ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS sums of an (entries, columns) tensor, block pid of them."""
    c = pid * COLUMNS + tl.arange(0, COLUMNS)
    mask = c < columns
    total = tl.zeros((ENTRIES, COLUMNS), tl.float32)
    for first in range(0, entries, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)[:, None]
        at = partial_ptr + entry.to(tl.int64) * columns + c[None, :]
        total += tl.load(at, mask=(entry < entries) & mask[None, :], other=0.0)
    tl.store(sum_ptr + c, tl.sum(total, axis=0), mask=mask)


@triton.jit
def sum_over_blocks(
    dBC_ptr, row, n, mask, rows, blocks: tl.constexpr, dstate: tl.constexpr, AHEAD: tl.constexpr
):  # fmt: skip
    """Columns n of so many rows of a (blocks, rows, 2 dstate) tensor, summed over its blocks."""
    at = row * (2 * dstate) + n
    total = tl.zeros(at.shape, tl.float32)
    for k in range(0, blocks, AHEAD):
        for i in tl.static_range(min(AHEAD, blocks)):
            in_tensor = mask if blocks % AHEAD == 0 or blocks < AHEAD else mask & (k + i < blocks)
            block_ptr = dBC_ptr + tl.cast(k + i, tl.int64) * rows * (2 * dstate)
            total += tl.load(block_ptr + at, mask=in_tensor, other=0.0)
    return total


@triton.jit
def _sum_of_groups(
    dBC_ptr, sum_ptr, pid, rows, dstate: tl.constexpr, groups: tl.constexpr, blocks: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """dB or dC of ROWS rows and one group, whose channels are so many blocks."""
    N: tl.constexpr = triton.next_power_of_2(dstate)
    AHEAD: tl.constexpr = min(8, 64 // N)  # more do not fit the registers
    group = pid % groups
    row = pid // groups * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.arange(0, N)[None, :]
    mask = (row < rows) & (n < dstate)
    dBC_ptr += group * blocks * rows * (2 * dstate)
    total = sum_over_blocks(dBC_ptr, row, n, mask, rows, blocks, dstate, AHEAD)
    dev.store(sum_ptr + (row * groups + group) * dstate + n, total, mask)


@triton.jit(do_not_specialize=["entries", "rows"])
def _sums_kernel(
    partial_ptr,  # (entries, columns)
    dBC_ptr,  # (blocks, rows, 2 dstate) or None
    sum_ptr,  # (columns,)
    dB_ptr,  # (rows, groups_B, dstate) or None
    dC_ptr,  # (rows, groups_C, dstate) or None
    entries, rows, columns: tl.constexpr, blocks: tl.constexpr, dstate: tl.constexpr,
    groups_B: tl.constexpr, groups_C: tl.constexpr,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    over_entries: tl.constexpr = triton.cdiv(columns, COLUMNS)
    if pid < over_entries:
        sum_over_entries(partial_ptr, sum_ptr, pid, entries, columns, ENTRIES, COLUMNS)
    else:
        pid -= over_entries
        over_B = 0
        if dB_ptr is not None:
            over_B = tl.cdiv(rows, ROWS) * groups_B
            if pid < over_B:
                _sum_of_groups(
                    dBC_ptr, dB_ptr, pid, rows, dstate, groups_B, blocks // groups_B, ROWS
                )
        if dC_ptr is not None:
            if pid >= over_B:
                _sum_of_groups(
                    dBC_ptr + dstate, dC_ptr, pid - over_B, rows, dstate, groups_C,
                    blocks // groups_C, ROWS,
                )  # fmt: skip


def _by_step(B, seqlen):
    """B or C as the kernels read it, its strides over seqlen and groups, the number of groups.
    Rows at other than one distance from the first to the last of all batch entries are copied."""
    strides = B.stride()
    if len(strides) == 2:
        return B.contiguous(), (0, 0), 1
    if strides[-1] != 1 or strides[0] != seqlen * strides[1]:
        B = B.contiguous()
        strides = B.stride()
    if len(strides) == 3:
        return B, (strides[1], 0), 1
    return B, strides[1:3], B.shape[2]


@cache
def _blocks(dim, groups, width):
    """Blocks of so many channels; none has channels of two groups."""
    return groups * triton.cdiv(dim // groups, width)


def states_shape(batch, seqlen, dim, dstate):
    """What the forward pass keeps: the state before every run of steps that is run again."""
    # Sizes may be symbols
    return batch, -(-seqlen // _config(BACKWARD, dstate).STEPS[0]), dim, dstate


def selective_scan_fwd(
    u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, save_states,
    y=None, return_last_state=True,
):  # fmt: skip
    """(y, last_state, states), states empty unless `save_states`, last_state None where not asked.

    `y` receives the result where given, and may be u itself, since a program reads a row before it
    writes it. Of u and y, whose rows may be wider, the first channels count.
    """
    batch, seqlen, dim = delta.shape
    dstate = A.shape[1]
    u, stride_ul = dev.rows_of(u)
    delta, stride_deltal = dev.rows_of(delta)
    z, stride_zl = (None, 0) if z is None else dev.rows_of(z)
    B_, B_strides, groups_B = _by_step(B, seqlen)
    C_, C_strides, groups_C = _by_step(C, seqlen)
    groups = max(groups_B, groups_C)
    itemsize = max(B.element_size(), C.element_size())
    constants = _forward_constants(batch, seqlen, dim, groups, dstate, itemsize, save_states)
    y = u.new_empty(batch, seqlen, dim) if y is None else y
    last_state = None
    if return_last_state:
        last_state = u.new_empty(batch, dim, dstate, dtype=torch.float32)
    shape = states_shape(batch, seqlen, dim, dstate) if save_states else (0,)
    states = u.new_empty(shape, dtype=torch.float32)
    grid = (batch * _blocks(dim, groups, constants[1] // constants[4]),)
    if batch:
        args = (
            u, stride_ul,
            delta, stride_deltal,
            A.contiguous(),
            B_, *B_strides,
            C_, *C_strides,
            dev.packed(D),
            z, stride_zl,
            dev.packed(delta_bias),
            None if initial_state is None else initial_state.contiguous(),
            y, dev.rows_of(y)[1],
            last_state,
            states if save_states else None,
            seqlen, dim, dim // groups,
            dstate, B.dim() == 2, C.dim() == 2, delta_softplus, reverse, *constants,
        )  # fmt: skip
        dev.launch(_scan_fwd_kernel, grid, args, OPTIONS)
    return y, last_state, states


class Partial(NamedTuple):
    """What the programs of a backward pass leave to be summed."""

    over_entries: torch.Tensor  # (batch, dim dstate + 2 dim): dA, dD, ddelta_bias
    over_blocks: torch.Tensor | None  # (blocks, batch, seqlen, 2 dstate): dB, dC
    dB: torch.Tensor | None  # (batch, dim, dstate) for constant B
    dC: torch.Tensor | None


def partial_bwd(
    dy, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, states,
    delta_softplus, reverse,
):  # fmt: skip
    """(du, ddelta, dz, dinitial_state, Partial), None where an argument is.

    Of dy, whose rows may be wider, the first channels count. Without `states` they are computed
    again, which takes a scan from no state.
    """
    batch, seqlen, dim = delta.shape
    dstate = A.shape[1]
    dy, stride_dyl = dev.rows_of(dy)
    u, stride_ul = dev.rows_of(u)
    delta, stride_deltal = dev.rows_of(delta)
    z, stride_zl = (None, 0) if z is None else dev.rows_of(z)
    B_, B_strides, groups_B = _by_step(B, seqlen)
    C_, C_strides, groups_C = _by_step(C, seqlen)
    groups = max(groups_B, groups_C)
    constants = _backward_constants(seqlen, dim, groups, dstate)
    blocks = _blocks(dim, groups, constants[1])
    const_B, const_C = B.dim() == 2, C.dim() == 2

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=u.device)

    again = states is None
    if again:
        assert initial_state is None
        states = empty(*states_shape(batch, seqlen, dim, dstate))
    du = empty(batch, seqlen, dim, dtype=u.dtype)
    ddelta = empty(batch, seqlen, dim, dtype=delta.dtype)
    dz = None if z is None else empty(batch, seqlen, dim, dtype=z.dtype)
    dinitial_state = None if initial_state is None else empty(batch, dim, dstate)
    partial = Partial(
        empty(batch, dim * (dstate + 2)),
        None if const_B and const_C else empty(blocks, batch, seqlen, 2 * dstate),
        empty(batch, dim, dstate) if const_B else None,
        empty(batch, dim, dstate) if const_C else None,
    )
    if batch:
        args = (
            dy, stride_dyl,
            None if dlast_state is None else dlast_state.contiguous(),
            u, stride_ul,
            delta, stride_deltal,
            A.contiguous(),
            B_, *B_strides,
            C_, *C_strides,
            dev.packed(D),
            z, stride_zl,
            dev.packed(delta_bias),
            states,
            du,
            ddelta,
            *partial,
            dz,
            dinitial_state,
            batch, seqlen, dim, dim // groups,
            dstate, const_B, const_C, delta_softplus, reverse, again, *constants,
        )  # fmt: skip
        dev.launch(_scan_bwd_kernel, (batch * blocks,), args, OPTIONS)
    return du, ddelta, dz, dinitial_state, partial


def selective_scan_bwd(
    dy, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, states,
    delta_softplus, reverse,
):  # fmt: skip
    """(du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state), None where an argument is."""
    du, ddelta, dz, dinitial_state, partial = partial_bwd(
        dy, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, states,
        delta_softplus, reverse,
    )  # fmt: skip
    (batch, seqlen, dim), dstate = delta.shape, A.shape[1]
    const_B, const_C = B.dim() == 2, C.dim() == 2
    groups_B, groups_C = (x.shape[2] if x.dim() == 4 else 1 for x in (B, C))
    columns = dim * (dstate + 2)
    sums = u.new_empty(columns, dtype=torch.float32)
    dB = partial.dB.sum(0) if const_B else B.new_empty(B.shape)
    dC = partial.dC.sum(0) if const_C else C.new_empty(C.shape)
    args = (
        partial.over_entries,
        partial.over_blocks,
        sums,
        None if const_B else dB,
        None if const_C else dC,
        batch, batch * seqlen, columns,
        0 if const_B and const_C else partial.over_blocks.shape[0], dstate, groups_B, groups_C,
    )  # fmt: skip
    row_blocks = -(-batch * seqlen // SUMS["ROWS"])
    programs = -(-columns // SUMS["COLUMNS"])
    programs += row_blocks * ((not const_B) * groups_B + (not const_C) * groups_C)
    dev.launch(_sums_kernel, (programs,), args, SUMS)
    dA, dD, ddelta_bias = sums.split((A.numel(), dim, dim))
    return (
        du, ddelta, dev.cast(dA.view(A.shape), A), dev.cast(dB, B), dev.cast(dC, C),
        dev.cast(dD, D), dz, dev.cast(ddelta_bias, delta_bias),
        dev.cast(dinitial_state, initial_state),
    )  # fmt: skip


class SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *inputs, grad_enabled, return_last_state = arguments
        save_states = grad_enabled and any(ctx.needs_input_grad)
        y, last_state, states = selective_scan_fwd(
            *inputs, save_states, return_last_state=return_last_state
        )
        *tensors, ctx.delta_softplus, ctx.reverse = inputs
        ctx.save_for_backward(*tensors, states)
        ctx.set_materialize_grads(False)
        return y, last_state

    @staticmethod
    @dev.first_derivative_only
    def backward(ctx, dy, dlast_state):
        u = ctx.saved_tensors[0]
        dy = torch.zeros_like(u) if dy is None else dy
        flags = ctx.delta_softplus, ctx.reverse
        grads = selective_scan_bwd(dy, dlast_state, *ctx.saved_tensors, *flags)
        return *grads, None, None, None, None


def selective_scan(
    u, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False,
    initial_state=None, return_last_state=False, reverse=False,
):  # fmt: skip
    """y, or (y, last_state): the scan above on the Triton path, differentiable in every tensor.

    Arguments are those of `mambavision.ops.selective_scan`, which checks them.
    """
    y, last_state = SelectiveScan.apply(
        u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse,
        torch.is_grad_enabled(),  # always off within `forward`
        bool(return_last_state),
    )  # fmt: skip
    return (y, last_state) if return_last_state else y
