"""Selective scan, forward and backward, channel-last and sequential over the sequence.

    dt_t = softplus(delta_t + delta_bias)                     (or without softplus)
    h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t                  h_{-1} = initial state or 0
    y_t  = <C_t, h_t> + D u_t                                  (times silu(z_t) where a gate z is given)

Backward, from the last step to the first, with g_t = dL/dh_t:

    g_t  = C_t dy_t + exp(dt_{t+1} A) g_{t+1}                  g starts as the gradient of the last state or 0
    du_t = dt_t <g_t, B_t> + D dy_t                            d(dt)_t = <g_t, A p_t + B_t u_t>
    dB_t = sum_dim g_t dt_t u_t                                dC_t = sum_dim dy_t h_t
    dA   = sum_{batch,t} g_t dt_t p_t                          dD = sum_{batch,t} dy_t u_t
    ddelta_t = d(dt)_t sigmoid(delta_t + delta_bias)           ddelta_bias = sum_{batch,t} ddelta_t

with p_t = exp(dt_t A) h_{t-1}, what is left of the old state. Nothing divides by a decay, so decays may underflow.

Shapes: u, delta, z, y (batch, seqlen, dim); A (dim, dstate); B, C (batch, seqlen, groups, dstate) or, constant over
time, (dim, dstate); D, delta_bias (dim,); states (batch, dim, dstate). Any float dtype in, float32 inside.

How it is split: one program owns one batch entry and BLOCK_D channels (of one group) and walks the sequence, STEPS
time steps per iteration: the loads of all STEPS first, so that they are in flight together, then the arithmetic, then
the stores, because a store between would pin the loads behind it. The states of a channel are separate registers
(BLOCK_N = 1), so that the forward step needs no exchange between lanes; above dstate 16 they are BLOCK_N lanes wide.
The forward pass for training stores the state before every STEPS steps (`states`); the backward pass re-runs STEPS
steps from there in registers and sweeps them in reverse. Sums over programs are two-stage: partials, then one torch
sum, hence bit-identical from run to run.

Source: Gu and Dao, arXiv 2312.00752, section 3; the gradients are derived above.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ._device import (
    LOG2E,
    add,
    channel_last,
    dsilu,
    first_states,
    load_block,
    load_row,
    load_states,
    load_vector,
    over_states,
    row_of,
    sigmoid,
    silu,
    softplus,
    store_block,
    store_row_sums,
    store_states,
    sum_states,
    zeros,
)

MAX_DSTATE = 64

# Launch parameters by the largest dstate they serve. One warp per program: a channel's work is sequential, so more
# warps only help by number. Registers and issue slots per element: `python benchmarks/static_report.py`.
CONFIGS = {
    16: {"fwd": {"BLOCK_D": 64, "BLOCK_N": 1}, "bwd": {"BLOCK_D": 32, "BLOCK_N": 1}},
    64: {"fwd": {"BLOCK_D": 16, "BLOCK_N": 16}, "bwd": {"BLOCK_D": 16, "BLOCK_N": 16}},
}
# Fusing a * b + c is a quarter of the arithmetic; Triton's default for it differs between releases, so it is stated.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


def steps_per_chunk(seqlen):
    """Time steps per iteration and between kept states: 7 divides the lengths of 14 x 14 and 7 x 7 windows."""
    return 7 if seqlen % 7 == 0 else 8


@triton.jit
def _owned_channels(dim, group_dim, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """Batch entry, channel block, group and channels of this program. The large axis, batch, lies on grid axis 0, and
    the program id is widened before it meets a stride, so neither 65,535 entries nor 2^31 elements are a limit."""
    pid = tl.program_id(0).to(tl.int64)
    blocks_per_group = tl.cdiv(group_dim, BLOCK_D)
    blocks = (dim // group_dim) * blocks_per_group
    b = pid // blocks
    block = pid % blocks
    group = block // blocks_per_group
    offs_in_group = (block % blocks_per_group) * BLOCK_D + tl.arange(0, BLOCK_D)
    if EVEN_D:
        mask_d = tl.full((BLOCK_D,), True, tl.int1)
    else:
        mask_d = offs_in_group < group_dim
    return b, block, group, group * group_dim + offs_in_group, mask_d


@triton.jit
def _step_size(x, in_seq, DELTA_SOFTPLUS: tl.constexpr):
    """dt of x = delta + delta_bias; 0 behind the end of the sequence, where the state then passes unchanged."""
    if DELTA_SOFTPLUS:
        x = softplus(x)
    return tl.where(in_seq, x, 0.0)


@triton.jit
def _scan_fwd_kernel(
    u_ptr, stride_ub, stride_ul: tl.constexpr,  # (batch, seqlen, dim)
    delta_ptr, stride_deltab, stride_deltal: tl.constexpr,  # (batch, seqlen, dim)
    A_ptr,  # (dim, dstate)
    B_ptr, stride_Bb, stride_Bl: tl.constexpr, stride_Bg,  # (batch, seqlen, groups, dstate) or (dim, dstate)
    C_ptr, stride_Cb, stride_Cl: tl.constexpr, stride_Cg,  # (batch, seqlen, groups, dstate) or (dim, dstate)
    D_ptr,  # (dim,) or None
    z_ptr, stride_zb, stride_zl: tl.constexpr,  # (batch, seqlen, dim) or None
    delta_bias_ptr,  # (dim,) or None
    initial_state_ptr,  # (batch, dim, dstate) or None
    y_ptr, stride_yb, stride_yl: tl.constexpr,  # (batch, seqlen, dim)
    last_state_ptr,  # (batch, dim, dstate)
    states_ptr,  # (batch, chunks, dstate, dim) or None
    seqlen, dim, group_dim,
    dstate: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr,
    DELTA_SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    STEPS: tl.constexpr, EVEN_L: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, _, group, offs_d, mask_d = _owned_channels(dim, group_dim, BLOCK_D, EVEN_D)
    A = load_states(A_ptr, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)
    if CONST_B:
        B = load_states(B_ptr, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)
    if CONST_C:
        C = load_states(C_ptr, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)
    D = load_vector(D_ptr, offs_d, mask_d)
    delta_bias = load_vector(delta_bias_ptr, offs_d, mask_d)
    h = first_states(initial_state_ptr, b, A, offs_d, mask_d, dim, dstate, BLOCK_N)

    for t0 in range(0, seqlen, STEPS):
        us = load_block(u_ptr + b * stride_ub, stride_ul, offs_d, mask_d, t0, seqlen, STEPS, EVEN_L, REVERSE)
        deltas = load_block(
            delta_ptr + b * stride_deltab, stride_deltal, offs_d, mask_d, t0, seqlen, STEPS, EVEN_L, REVERSE
        )
        if z_ptr is not None:
            zs = load_block(z_ptr + b * stride_zb, stride_zl, offs_d, mask_d, t0, seqlen, STEPS, EVEN_L, REVERSE)
        if states_ptr is not None:
            chunk = b * tl.cdiv(seqlen, STEPS) + t0 // STEPS
            store_states(states_ptr + chunk * dstate * dim, h, offs_d, mask_d, 1, dim, dstate, BLOCK_N)

        ys = ()
        for i in tl.static_range(STEPS):
            in_seq = True if EVEN_L else t0 + i < seqlen
            row = row_of(t0, i, seqlen, REVERSE)
            if CONST_B:
                B_t = B
            else:
                B_t = load_row(B_ptr + b * stride_Bb + row * stride_Bl + group * stride_Bg, in_seq, dstate, BLOCK_N)
            if CONST_C:
                C_t = C
            else:
                C_t = load_row(C_ptr + b * stride_Cb + row * stride_Cl + group * stride_Cg, in_seq, dstate, BLOCK_N)
            dt = _step_size(deltas[i] + delta_bias, in_seq, DELTA_SOFTPLUS)
            dtu = over_states(dt * us[i], BLOCK_N)
            dt = over_states(dt * LOG2E, BLOCK_N)
            h_next = ()
            y = 0.0
            for r in tl.static_range((dstate + BLOCK_N - 1) // BLOCK_N):
                h_next = h_next + (tl.exp2(dt * A[r]) * h[r] + dtu * B_t[r],)
                y += h_next[r] * C_t[r]
            h = h_next
            y = sum_states(y, BLOCK_N) + D * us[i]
            if z_ptr is not None:
                y *= silu(zs[i])
            ys = ys + (y,)
        store_block(y_ptr + b * stride_yb, stride_yl, ys, offs_d, mask_d, t0, seqlen, STEPS, EVEN_L, REVERSE)

    store_states(last_state_ptr + b * dim * dstate, h, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)


@triton.jit
def _scan_bwd_kernel(
    dy_ptr, stride_dyb, stride_dyl: tl.constexpr,  # (batch, seqlen, dim)
    dlast_state_ptr,  # (batch, dim, dstate) or None
    u_ptr, stride_ub, stride_ul: tl.constexpr,  # (batch, seqlen, dim)
    delta_ptr, stride_deltab, stride_deltal: tl.constexpr,  # (batch, seqlen, dim)
    A_ptr,  # (dim, dstate)
    B_ptr, stride_Bb, stride_Bl: tl.constexpr, stride_Bg,  # (batch, seqlen, groups, dstate) or (dim, dstate)
    C_ptr, stride_Cb, stride_Cl: tl.constexpr, stride_Cg,  # (batch, seqlen, groups, dstate) or (dim, dstate)
    D_ptr,  # (dim,) or None
    z_ptr, stride_zb, stride_zl: tl.constexpr,  # (batch, seqlen, dim) or None
    delta_bias_ptr,  # (dim,) or None
    states_ptr,  # (batch, chunks, dstate, dim)
    du_ptr,  # (batch, seqlen, dim)
    ddelta_ptr,  # (batch, seqlen, dim)
    dz_ptr,  # (batch, seqlen, dim) or None
    dA_ptr,  # (batch, dstate, dim)
    dBC_ptr, stride_dBCl: tl.constexpr,  # (blocks, batch, seqlen, those of [dB, dC] that vary over time)
    dB_ptr,  # (batch, dstate, dim) for constant B, else None
    dC_ptr,  # (batch, dstate, dim) for constant C, else None
    dD_ptr,  # (batch, dim)
    ddelta_bias_ptr,  # (batch, dim)
    dinitial_state_ptr,  # (batch, dim, dstate) or None
    batch, seqlen, dim, group_dim,
    dstate: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr,
    DELTA_SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    STEPS: tl.constexpr, EVEN_L: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, block, group, offs_d, mask_d = _owned_channels(dim, group_dim, BLOCK_D, EVEN_D)
    A = load_states(A_ptr, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)
    if CONST_B:
        B = load_states(B_ptr, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)
    if CONST_C:
        C = load_states(C_ptr, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)
    D = load_vector(D_ptr, offs_d, mask_d)
    delta_bias = load_vector(delta_bias_ptr, offs_d, mask_d)
    # g: on top of a step, what the later steps leave of dL/dh_t, that is exp(dt_{t+1} A) g_{t+1}
    g = first_states(dlast_state_ptr, b, A, offs_d, mask_d, dim, dstate, BLOCK_N)
    dA, dB_const, dC_const = zeros(A), zeros(A), zeros(A)
    dD, ddelta_bias = tl.zeros_like(D), tl.zeros_like(D)

    chunks = tl.cdiv(seqlen, STEPS)
    for k in range(chunks):
        t0 = (chunks - 1 - k) * STEPS
        us = load_block(u_ptr + b * stride_ub, stride_ul, offs_d, mask_d, t0, seqlen, STEPS, EVEN_L, REVERSE)
        deltas = load_block(
            delta_ptr + b * stride_deltab, stride_deltal, offs_d, mask_d, t0, seqlen, STEPS, EVEN_L, REVERSE
        )
        dys = load_block(dy_ptr + b * stride_dyb, stride_dyl, offs_d, mask_d, t0, seqlen, STEPS, EVEN_L, REVERSE)
        if z_ptr is not None:
            zs = load_block(z_ptr + b * stride_zb, stride_zl, offs_d, mask_d, t0, seqlen, STEPS, EVEN_L, REVERSE)
        chunk = b * chunks + chunks - 1 - k
        h = load_states(states_ptr + chunk * dstate * dim, offs_d, mask_d, 1, dim, dstate, BLOCK_N)

        # Forward again: dt_t and p_t of the chunk, in registers
        dts, ps = (), ()
        for i in tl.static_range(STEPS):
            in_seq = True if EVEN_L else t0 + i < seqlen
            row = row_of(t0, i, seqlen, REVERSE)
            if CONST_B:
                B_t = B
            else:
                B_t = load_row(B_ptr + b * stride_Bb + row * stride_Bl + group * stride_Bg, in_seq, dstate, BLOCK_N)
            dt = _step_size(deltas[i] + delta_bias, in_seq, DELTA_SOFTPLUS)
            dts = dts + (dt,)
            dtu = over_states(dt * us[i], BLOCK_N)
            dt = over_states(dt * LOG2E, BLOCK_N)
            p, h_next = (), ()
            for r in tl.static_range(len(A)):
                p = p + (tl.exp2(dt * A[r]) * h[r],)
                h_next = h_next + (p[r] + dtu * B_t[r],)
            h = h_next
            ps = ps + (p,)

        dus, ddeltas, dzs = (), (), ()
        for i in tl.static_range(STEPS - 1, -1, -1):
            in_seq = True if EVEN_L else t0 + i < seqlen
            row = row_of(t0, i, seqlen, REVERSE)
            if CONST_B:
                B_t = B
            else:
                B_t = load_row(B_ptr + b * stride_Bb + row * stride_Bl + group * stride_Bg, in_seq, dstate, BLOCK_N)
            if CONST_C:
                C_t = C
            else:
                C_t = load_row(C_ptr + b * stride_Cb + row * stride_Cl + group * stride_Cg, in_seq, dstate, BLOCK_N)
            u, dy, p = us[i], dys[i], ps[i]
            dt = over_states(dts[i], BLOCK_N)
            dtu = over_states(dts[i] * u, BLOCK_N)
            h = ()
            for r in tl.static_range(len(A)):
                h = h + (p[r] + dtu * B_t[r],)
            if z_ptr is not None:
                y = 0.0
                for r in tl.static_range(len(A)):
                    y += h[r] * C_t[r]
                y = sum_states(y, BLOCK_N) + D * u
                dzs = (dy * y * dsilu(zs[i]),) + dzs
                dy *= silu(zs[i])
            dD += dy * u
            dy_ = over_states(dy, BLOCK_N)

            dB, dC, g_next, dA_next = (), (), (), ()
            gB, gpA = 0.0, 0.0
            for r in tl.static_range(len(A)):
                g_r = g[r] + dy_ * C_t[r]
                dC = dC + (dy_ * h[r],)
                dB = dB + (g_r * dtu,)
                gB += g_r * B_t[r]
                gp = g_r * p[r]
                gpA += gp * A[r]
                dA_next = dA_next + (dA[r] + gp * dt,)
                g_next = g_next + (tl.exp2(dt * LOG2E * A[r]) * g_r,)
            g, dA = g_next, dA_next
            gB = sum_states(gB, BLOCK_N)
            ddt = sum_states(gpA, BLOCK_N) + gB * u
            if DELTA_SOFTPLUS:
                ddt *= sigmoid(deltas[i] + delta_bias)
            ddt = tl.where(in_seq, ddt, 0.0)
            ddelta_bias += ddt
            ddeltas = (ddt,) + ddeltas
            dus = (dts[i] * gB + D * dy,) + dus

            # Over channels, one row per program and step; over time for constant B or C, in registers
            rows = ()
            if CONST_B:
                dB_const = add(dB_const, dB)
            else:
                rows = rows + dB
            if CONST_C:
                dC_const = add(dC_const, dC)
            else:
                rows = rows + dC
            if not (CONST_B and CONST_C):
                at = ((block * batch + b) * seqlen + row) * stride_dBCl
                store_row_sums(dBC_ptr + at, rows, in_seq, dstate, BLOCK_D, BLOCK_N)

        entry = b * seqlen * dim
        store_block(du_ptr + entry, dim, dus, offs_d, mask_d, t0, seqlen, STEPS, EVEN_L, REVERSE)
        store_block(ddelta_ptr + entry, dim, ddeltas, offs_d, mask_d, t0, seqlen, STEPS, EVEN_L, REVERSE)
        if z_ptr is not None:
            store_block(dz_ptr + entry, dim, dzs, offs_d, mask_d, t0, seqlen, STEPS, EVEN_L, REVERSE)

    store_states(dA_ptr + b * dim * dstate, dA, offs_d, mask_d, 1, dim, dstate, BLOCK_N)
    if CONST_B:
        store_states(dB_ptr + b * dim * dstate, dB_const, offs_d, mask_d, 1, dim, dstate, BLOCK_N)
    if CONST_C:
        store_states(dC_ptr + b * dim * dstate, dC_const, offs_d, mask_d, 1, dim, dstate, BLOCK_N)
    tl.store(dD_ptr + b * dim + offs_d, dD, mask=mask_d)
    tl.store(ddelta_bias_ptr + b * dim + offs_d, ddelta_bias, mask=mask_d)
    if dinitial_state_ptr is not None:
        store_states(dinitial_state_ptr + b * dim * dstate, g, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)


def _coefficients(B):
    """B or C as the kernels read it, with its strides over batch, seqlen and groups: rows of dstate adjacent values."""
    if B.dim() == 2:
        return B.contiguous(), (0, 0, 0)
    if B.dim() == 3:
        B = B.unsqueeze(2)
    if B.stride(-1) != 1:
        B = B.contiguous()
    return B, B.stride()[:3]


def _groups(B, C):
    return max(1 if B.dim() < 4 else B.shape[2], 1 if C.dim() < 4 else C.shape[2])


def states_shape(batch, seqlen, dim, dstate):
    """What the forward pass keeps for the backward pass: the state before every chunk of steps."""
    return batch, triton.cdiv(seqlen, steps_per_chunk(seqlen)), dstate, dim


def _launch_parameters(pass_, seqlen, group_dim, dstate):
    config = next(config[pass_] for largest, config in CONFIGS.items() if dstate <= largest)
    steps = steps_per_chunk(seqlen)
    return {
        "STEPS": steps,
        "EVEN_L": seqlen % steps == 0,
        "EVEN_D": group_dim % config["BLOCK_D"] == 0,
        **config,
        **OPTIONS,
    }


def selective_scan_fwd(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, save_states, y=None):
    """(y, last_state, states); states is empty unless `save_states`. Writes into `y` where given (its rows may be
    those of a wider buffer, and u itself may be it: each program reads a row before it writes it)."""
    batch, seqlen, dim = u.shape
    dstate = A.shape[1]
    u, delta = channel_last(u), channel_last(delta)
    z = None if z is None else channel_last(z)
    (B_, B_strides), (C_, C_strides) = _coefficients(B), _coefficients(C)
    if y is None:
        y = torch.empty(batch, seqlen, dim, dtype=u.dtype, device=u.device)
    last_state = u.new_empty(batch, dim, dstate, dtype=torch.float32)
    states = u.new_empty(states_shape(batch, seqlen, dim, dstate) if save_states else 0, dtype=torch.float32)
    group_dim = dim // _groups(B, C)
    launch = _launch_parameters("fwd", seqlen, group_dim, dstate)
    grid = (batch * (dim // group_dim) * triton.cdiv(group_dim, launch["BLOCK_D"]),)
    if batch:
        with torch.cuda.device_of(u):
            _scan_fwd_kernel[grid](
                u, u.stride(0), u.stride(1),
                delta, delta.stride(0), delta.stride(1),
                A.contiguous(),
                B_, *B_strides,
                C_, *C_strides,
                D,
                z, *((0, 0) if z is None else z.stride()[:2]),
                delta_bias,
                None if initial_state is None else initial_state.contiguous(),
                y, y.stride(0), y.stride(1),
                last_state,
                states if save_states else None,
                seqlen, dim, group_dim,
                dstate, B.dim() == 2, C.dim() == 2, delta_softplus, reverse, **launch,
            )  # fmt: skip
    return y, last_state, states


def selective_scan_bwd(
    dy, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, states, delta_softplus, reverse
):
    """(du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state), None where the argument is None."""
    batch, seqlen, dim = u.shape
    dstate = A.shape[1]
    dy, u, delta = channel_last(dy), channel_last(u), channel_last(delta)
    z = None if z is None else channel_last(z)
    (B_, B_strides), (C_, C_strides) = _coefficients(B), _coefficients(C)
    groups = _groups(B, C)
    launch = _launch_parameters("bwd", seqlen, dim // groups, dstate)
    blocks = groups * triton.cdiv(dim // groups, launch["BLOCK_D"])

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=u.device)

    du, ddelta = empty(*u.shape, dtype=u.dtype), empty(*u.shape, dtype=delta.dtype)
    dz = None if z is None else empty(*u.shape, dtype=z.dtype)
    dA = empty(batch, dstate, dim)
    const_B, const_C = B.dim() == 2, C.dim() == 2
    dBC = empty(blocks, batch, seqlen, (2 - const_B - const_C) * dstate)
    dB = empty(batch, dstate, dim) if const_B else None
    dC = empty(batch, dstate, dim) if const_C else None
    dD, ddelta_bias = empty(batch, dim), empty(batch, dim)
    dinitial_state = None if initial_state is None else empty(batch, dim, dstate)
    if batch:
        with torch.cuda.device_of(u):
            _scan_bwd_kernel[(batch * blocks,)](
                dy, dy.stride(0), dy.stride(1),
                None if dlast_state is None else dlast_state.contiguous(),
                u, u.stride(0), u.stride(1),
                delta, delta.stride(0), delta.stride(1),
                A.contiguous(),
                B_, *B_strides,
                C_, *C_strides,
                D,
                z, *((0, 0) if z is None else z.stride()[:2]),
                delta_bias,
                states,
                du,
                ddelta,
                dz,
                dA,
                dBC, dBC.shape[-1],
                dB,
                dC,
                dD,
                ddelta_bias,
                dinitial_state,
                batch, seqlen, dim, dim // groups,
                dstate, const_B, const_C, delta_softplus, reverse, **launch,
            )  # fmt: skip

    def over_owners(partial, like):
        """Sum over the blocks that share a row of B or C: all of them, or those of its group."""
        owners = 1 if like.dim() == 3 else like.shape[2]
        partial = partial.unflatten(0, (owners, -1)).sum(1)
        return partial.permute(1, 2, 0, 3).reshape(like.shape).to(like.dtype)

    dB = dB.sum(0).t().to(B.dtype) if const_B else over_owners(dBC[..., :dstate], B)
    dC = dC.sum(0).t().to(C.dtype) if const_C else over_owners(dBC[..., -dstate:], C)
    return (
        du,
        ddelta,
        dA.sum(0).t().to(A.dtype),
        dB,
        dC,
        None if D is None else dD.sum(0).to(D.dtype),
        dz,
        None if delta_bias is None else ddelta_bias.sum(0).to(delta_bias.dtype),
        None if initial_state is None else dinitial_state.to(initial_state.dtype),
    )


class SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse):
        inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
        save_states = any(ctx.needs_input_grad)
        y, last_state, states = selective_scan_fwd(*inputs, delta_softplus, reverse, save_states)
        ctx.save_for_backward(*inputs, states)
        ctx.delta_softplus, ctx.reverse = delta_softplus, reverse
        ctx.set_materialize_grads(False)
        return y, last_state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast_state):
        *inputs, states = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(inputs[0])
        grads = selective_scan_bwd(dy, dlast_state, *inputs, states, ctx.delta_softplus, ctx.reverse)
        return *grads, None, None


def selective_scan(
    u, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False,
    initial_state=None, return_last_state=False, reverse=False,
):  # fmt: skip
    """y, or (y, last_state): the scan of the module docstring on the Triton path, differentiable in every tensor.

    Arguments are those of `mambavision.ops.selective_scan`, which checks them.
    """
    y, last_state = SelectiveScan.apply(
        u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse
    )
    return (y, last_state) if return_last_state else y
