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

Split: one program owns one batch entry and BLOCK_D channels of one group and walks the sequence,
STEPS time steps per iteration: the loads of all steps first, so that they are in flight together,
then the arithmetic, then the stores, because a store in between pins the loads behind it. A state
is a register of its own (BLOCK_N = 1), so that a forward step exchanges nothing between lanes;
above dstate 16 a register holds BLOCK_N states, side by side over lanes. In training the forward
pass keeps the state before every chunk of STEPS steps (`states`); the backward pass re-runs a
chunk in registers and sweeps it in reverse. Sums over programs have two stages, partials and one
torch sum, hence the same bits in every run.

Source: Gu and Dao, arXiv 2312.00752, section 3; the gradients follow from the equations above.
"""

import torch
import triton
import triton.language as tl

from . import _device as dev
from ._device import LOG2E

MAX_DSTATE = 64

# By the largest dstate served. One warp per program: a channel's work is sequential, more warps
# help only by number. STEPS is what registers hold without spilling: in "bwd", p of a chunk and
# the gradients; in "fwd", where nothing is kept, the loads in flight. `make static-report` counts.
CONFIGS = {
    8: {
        "fwd": {"STEPS": 8, "BLOCK_D": 64, "BLOCK_N": 1},
        "bwd": {"STEPS": 4, "BLOCK_D": 32, "BLOCK_N": 1},
    },
    16: {
        "fwd": {"STEPS": 8, "BLOCK_D": 64, "BLOCK_N": 1},
        "bwd": {"STEPS": 2, "BLOCK_D": 32, "BLOCK_N": 1},
    },
    64: {
        "fwd": {"STEPS": 2, "BLOCK_D": 16, "BLOCK_N": 16},
        "bwd": {"STEPS": 2, "BLOCK_D": 4, "BLOCK_N": 16},
    },
}
# Fusing a * b + c is a quarter of the arithmetic, and Triton releases differ in their default.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


def _steps(pass_, seqlen, dstate):
    # 7 divides 14 x 14 and 7 x 7 windows: no masks
    if seqlen % 7 == 0 and dstate <= 8:
        return 7
    return next(c[pass_]["STEPS"] for largest, c in CONFIGS.items() if dstate <= largest)


def _launch_parameters(pass_, steps, seqlen, group_dim, dstate):
    config = dict(next(c[pass_] for largest, c in CONFIGS.items() if dstate <= largest))
    # A block of which more than an eighth is mask costs more than two narrow ones
    if config["BLOCK_D"] == 64 and triton.cdiv(group_dim, 64) * 64 * 7 > group_dim * 8:
        config["BLOCK_D"] = 32
    even = {"EVEN_L": seqlen % steps == 0, "EVEN_D": group_dim % config["BLOCK_D"] == 0}
    return {**config, "STEPS": steps, **even, **OPTIONS}


@triton.jit
def _owned_channels(dim, group_dim, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """Batch entry, channel block, group, channels and their mask. Everything lies on grid axis 0,
    and the program id is 64 bits wide before it meets a stride: neither 65,535 batch entries nor
    2^31 elements are a limit."""
    pid = tl.program_id(0).to(tl.int64)
    blocks_per_group = tl.cdiv(group_dim, BLOCK_D)
    blocks = (dim // group_dim) * blocks_per_group
    block = pid % blocks
    group = block // blocks_per_group
    offs_in_group = (block % blocks_per_group) * BLOCK_D + tl.arange(0, BLOCK_D)
    if EVEN_D:
        mask_d = tl.full((BLOCK_D,), True, tl.int1)
    else:
        mask_d = offs_in_group < group_dim
    return pid // blocks, block, group, group * group_dim + offs_in_group, mask_d


@triton.jit
def _step_size(x, in_seq, DELTA_SOFTPLUS: tl.constexpr):
    """dt of x = delta + delta_bias; 0 behind the end, where the state then passes unchanged."""
    if DELTA_SOFTPLUS:
        x = dev.softplus(x)
    return tl.where(in_seq, x, 0.0)


# Not compiled anew for each: sizes, and strides that no wide load follows
GENERIC = ["batch", "seqlen", "stride_Bb", "stride_Bg", "stride_Cb", "stride_Cg"]


@triton.jit(do_not_specialize=GENERIC)
def _scan_fwd_kernel(
    u_ptr, stride_ub, stride_ul: tl.constexpr,  # (batch, seqlen, dim)
    delta_ptr, stride_deltab, stride_deltal: tl.constexpr,  # (batch, seqlen, dim)
    A_ptr,  # (dim, dstate)
    B_ptr, stride_Bb, stride_Bl: tl.constexpr, stride_Bg,  # (batch, seqlen, groups, dstate)
    C_ptr, stride_Cb, stride_Cl: tl.constexpr, stride_Cg,  # or constant, as A
    D_ptr,  # (dim,) or None
    z_ptr, stride_zb, stride_zl: tl.constexpr,  # (batch, seqlen, dim) or None
    delta_bias_ptr,  # (dim,) or None
    initial_state_ptr,  # (batch, dim, dstate) or None
    y_ptr, stride_yb, stride_yl: tl.constexpr,  # (batch, seqlen, dim)
    last_state_ptr,  # (batch, dim, dstate)
    states_ptr,  # (batch, chunks, dstate, dim) or None
    seqlen, dim: tl.constexpr, group_dim: tl.constexpr,
    dstate: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr,
    DELTA_SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_L: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    b, _, group, offs_d, mask_d = _owned_channels(dim, group_dim, BLOCK_D, EVEN_D)
    u_ptr += b * stride_ub
    delta_ptr += b * stride_deltab
    B_ptr += b * stride_Bb + group * stride_Bg
    C_ptr += b * stride_Cb + group * stride_Cg
    A = dev.load_states(A_ptr, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)
    if CONST_B:
        B = dev.load_states(B_ptr, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)
    if CONST_C:
        C = dev.load_states(C_ptr, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)
    D = dev.load_vector(D_ptr, offs_d, mask_d)
    delta_bias = dev.load_vector(delta_bias_ptr, offs_d, mask_d)
    h = dev.load_first(initial_state_ptr, b, A, offs_d, mask_d, dim, dstate, BLOCK_N)

    for t0 in range(0, seqlen, STEPS):
        rows = dev.rows_from(t0, seqlen, STEPS, REVERSE)
        masks = dev.masks_from(t0, seqlen, STEPS, EVEN_L)
        us = dev.load_rows(u_ptr, stride_ul, rows, masks, offs_d, mask_d)
        deltas = dev.load_rows(delta_ptr, stride_deltal, rows, masks, offs_d, mask_d)
        if z_ptr is not None:
            zs = dev.load_rows(z_ptr + b * stride_zb, stride_zl, rows, masks, offs_d, mask_d)
        if states_ptr is not None:
            chunk = b * tl.cdiv(seqlen, STEPS) + t0 // STEPS
            at = states_ptr + chunk * dstate * dim
            dev.store_states(at, h, offs_d, mask_d, 1, dim, dstate, BLOCK_N)
        ys = ()
        for i in tl.static_range(STEPS):
            if CONST_B:
                B_t = B
            else:
                B_t = dev.load_row(B_ptr + rows[i] * stride_Bl, masks[i], dstate, BLOCK_N)
            if CONST_C:
                C_t = C
            else:
                C_t = dev.load_row(C_ptr + rows[i] * stride_Cl, masks[i], dstate, BLOCK_N)
            dt = _step_size(deltas[i] + delta_bias, masks[i], DELTA_SOFTPLUS)
            dtu = dev.over_states(dt * us[i], BLOCK_N)
            dt = dev.over_states(dt * LOG2E, BLOCK_N)
            h_next, y = (), 0.0
            for r in tl.static_range(len(A)):
                h_next = h_next + (tl.exp2(dt * A[r]) * h[r] + dtu * B_t[r],)
                y += h_next[r] * C_t[r]
            h = h_next
            y = dev.sum_states(y, BLOCK_N) + D * us[i]
            if z_ptr is not None:
                y *= dev.silu(zs[i])
            ys = ys + (y,)
        dev.store_rows(y_ptr + b * stride_yb, stride_yl, ys, rows, masks, offs_d, mask_d)

    last_state_ptr += b * dim * dstate
    dev.store_states(last_state_ptr, h, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)


@triton.jit(do_not_specialize=GENERIC)
def _scan_bwd_kernel(
    dy_ptr, stride_dyb, stride_dyl: tl.constexpr,  # (batch, seqlen, dim)
    dlast_state_ptr,  # (batch, dim, dstate) or None
    u_ptr, stride_ub, stride_ul: tl.constexpr,  # (batch, seqlen, dim)
    delta_ptr, stride_deltab, stride_deltal: tl.constexpr,  # (batch, seqlen, dim)
    A_ptr,  # (dim, dstate)
    B_ptr, stride_Bb, stride_Bl: tl.constexpr, stride_Bg,  # (batch, seqlen, groups, dstate)
    C_ptr, stride_Cb, stride_Cl: tl.constexpr, stride_Cg,  # or constant, as A
    D_ptr,  # (dim,) or None
    z_ptr, stride_zb, stride_zl: tl.constexpr,  # (batch, seqlen, dim) or None
    delta_bias_ptr,  # (dim,) or None
    states_ptr,  # (batch, chunks, dstate, dim)
    du_ptr,  # (batch, seqlen, dim)
    ddelta_ptr,  # (batch, seqlen, dim)
    dA_ptr,  # (batch, dstate, dim)
    dBC_ptr, stride_dBCl: tl.constexpr,  # (blocks, batch, seqlen, what of dB, dC is not constant)
    dB_ptr,  # (batch, dstate, dim) for constant B, else None
    dC_ptr,  # (batch, dstate, dim) for constant C, else None
    dD_ptr,  # (batch, dim)
    dz_ptr,  # (batch, seqlen, dim) or None
    ddelta_bias_ptr,  # (batch, dim)
    dinitial_state_ptr,  # (batch, dim, dstate) or None
    batch, seqlen, dim: tl.constexpr, group_dim: tl.constexpr,
    dstate: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr,
    DELTA_SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_L: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    b, block, group, offs_d, mask_d = _owned_channels(dim, group_dim, BLOCK_D, EVEN_D)
    dy_ptr += b * stride_dyb
    du_ptr += b * seqlen * dim
    ddelta_ptr += b * seqlen * dim
    dBC_ptr += (block * batch + b) * seqlen * stride_dBCl
    states_ptr += b * tl.cdiv(seqlen, STEPS) * dstate * dim
    u_ptr += b * stride_ub
    delta_ptr += b * stride_deltab
    B_ptr += b * stride_Bb + group * stride_Bg
    C_ptr += b * stride_Cb + group * stride_Cg
    A = dev.load_states(A_ptr, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)
    if CONST_B:
        B = dev.load_states(B_ptr, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)
    if CONST_C:
        C = dev.load_states(C_ptr, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)
    D = dev.load_vector(D_ptr, offs_d, mask_d)
    delta_bias = dev.load_vector(delta_bias_ptr, offs_d, mask_d)
    # Above step t, g is what the later steps leave of dL/dh_t: exp(dt_{t+1} A) g_{t+1}
    g = dev.load_first(dlast_state_ptr, b, A, offs_d, mask_d, dim, dstate, BLOCK_N)
    dA, dB_sum, dC_sum = dev.zeros(A), dev.zeros(A), dev.zeros(A)
    dD, ddelta_bias = tl.zeros_like(D), tl.zeros_like(D)

    chunks = tl.cdiv(seqlen, STEPS)
    for k in range(chunks):
        t0 = (chunks - 1 - k) * STEPS
        rows = dev.rows_from(t0, seqlen, STEPS, REVERSE)
        masks = dev.masks_from(t0, seqlen, STEPS, EVEN_L)
        us = dev.load_rows(u_ptr, stride_ul, rows, masks, offs_d, mask_d)
        deltas = dev.load_rows(delta_ptr, stride_deltal, rows, masks, offs_d, mask_d)
        dys = dev.load_rows(dy_ptr, stride_dyl, rows, masks, offs_d, mask_d)
        if z_ptr is not None:
            zs = dev.load_rows(z_ptr + b * stride_zb, stride_zl, rows, masks, offs_d, mask_d)
        at = states_ptr + tl.cast(chunks - 1 - k, tl.int64) * dstate * dim
        h = dev.load_states(at, offs_d, mask_d, 1, dim, dstate, BLOCK_N)

        # Forward again: dt_t and p_t of the chunk
        dts, ps = (), ()
        for i in tl.static_range(STEPS):
            if CONST_B:
                B_t = B
            else:
                B_t = dev.load_row(B_ptr + rows[i] * stride_Bl, masks[i], dstate, BLOCK_N)
            dts = dts + (_step_size(deltas[i] + delta_bias, masks[i], DELTA_SOFTPLUS),)
            dtu = dev.over_states(dts[i] * us[i], BLOCK_N)
            dt = dev.over_states(dts[i] * LOG2E, BLOCK_N)
            p, h_next = (), ()
            for r in tl.static_range(len(A)):
                p = p + (tl.exp2(dt * A[r]) * h[r],)
                h_next = h_next + (p[r] + dtu * B_t[r],)
            h = h_next
            ps = ps + (p,)

        for i in tl.static_range(STEPS - 1, -1, -1):
            if CONST_B:
                B_t = B
            else:
                B_t = dev.load_row(B_ptr + rows[i] * stride_Bl, masks[i], dstate, BLOCK_N)
            if CONST_C:
                C_t = C
            else:
                C_t = dev.load_row(C_ptr + rows[i] * stride_Cl, masks[i], dstate, BLOCK_N)
            u, dy, p = us[i], dys[i], ps[i]
            dt = dev.over_states(dts[i], BLOCK_N)
            dtu = dev.over_states(dts[i] * u, BLOCK_N)
            h, y = (), 0.0
            for r in tl.static_range(len(A)):
                h = h + (p[r] + dtu * B_t[r],)
                y += h[r] * C_t[r]
            at = rows[i] * dim + offs_d
            if z_ptr is not None:
                dz = dy * (dev.sum_states(y, BLOCK_N) + D * u) * dev.dsilu(zs[i])
                dev.store(dz_ptr + b * seqlen * dim + at, dz, mask_d & masks[i])
                dy *= dev.silu(zs[i])
            dD += dy * u

            dy_n = dev.over_states(dy, BLOCK_N)
            g_next, dA_next, dB, dC = (), (), (), ()
            gB, gpA = 0.0, 0.0
            for r in tl.static_range(len(A)):
                g_r = g[r] + dy_n * C_t[r]
                gp = g_r * p[r]
                gB += g_r * B_t[r]
                gpA += gp * A[r]
                dA_next = dA_next + (dA[r] + gp * dt,)
                dB = dB + (g_r * dtu,)
                dC = dC + (dy_n * h[r],)
                g_next = g_next + (tl.exp2(dt * LOG2E * A[r]) * g_r,)
            g, dA = g_next, dA_next
            gB = dev.sum_states(gB, BLOCK_N)
            dev.store(du_ptr + at, dts[i] * gB + D * dy, mask_d & masks[i])
            ddelta = dev.sum_states(gpA, BLOCK_N) + gB * u
            if DELTA_SOFTPLUS:
                ddelta *= dev.sigmoid(deltas[i] + delta_bias)
            dev.store(ddelta_ptr + at, ddelta, mask_d & masks[i])
            ddelta_bias += tl.where(masks[i], ddelta, 0.0)

            # dB, dC: one row per step, the sum over this program's channels; constant ones grow
            # in registers, as dA does
            sums = ()
            if CONST_B:
                dB_sum = dev.add(dB_sum, dB)
            else:
                sums = sums + dB
            if CONST_C:
                dC_sum = dev.add(dC_sum, dC)
            else:
                sums = sums + dC
            if not (CONST_B and CONST_C):
                at = dBC_ptr + rows[i] * stride_dBCl
                dev.store_channel_sums(at, sums, masks[i], dstate, BLOCK_D, BLOCK_N)

    entry = b * dim * dstate
    dev.store_states(dA_ptr + entry, dA, offs_d, mask_d, 1, dim, dstate, BLOCK_N)
    if CONST_B:
        dev.store_states(dB_ptr + entry, dB_sum, offs_d, mask_d, 1, dim, dstate, BLOCK_N)
    if CONST_C:
        dev.store_states(dC_ptr + entry, dC_sum, offs_d, mask_d, 1, dim, dstate, BLOCK_N)
    tl.store(dD_ptr + b * dim + offs_d, dD, mask=mask_d)
    tl.store(ddelta_bias_ptr + b * dim + offs_d, ddelta_bias, mask=mask_d)
    if dinitial_state_ptr is not None:
        dinitial_state_ptr += entry
        dev.store_states(dinitial_state_ptr, g, offs_d, mask_d, dstate, 1, dstate, BLOCK_N)


def _rows(B):
    """B or C, its strides over batch, seqlen and groups, and the number of groups."""
    if B.dim() == 2:
        return B.contiguous(), (0, 0, 0), 1
    B = B if B.stride(-1) == 1 else B.contiguous()
    B = B.unsqueeze(2) if B.dim() == 3 else B
    return B, B.stride()[:3], B.shape[2]


def states_shape(batch, seqlen, dim, dstate):
    """What the forward pass keeps: the state before every chunk that the backward pass re-runs."""
    return batch, triton.cdiv(seqlen, _steps("bwd", seqlen, dstate)), dstate, dim


def selective_scan_fwd(
    u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, save_states, y=None
):
    """(y, last_state, states), states empty unless `save_states`.

    `y` receives the result where given: rows of a wider buffer, or u itself, since a program reads
    a row before it writes it.
    """
    batch, seqlen, dim = u.shape
    dstate = A.shape[1]
    u, delta = dev.channel_last(u), dev.channel_last(delta)
    z = None if z is None else dev.channel_last(z)
    (B, B_strides, groups_B), (C, C_strides, groups_C) = _rows(B), _rows(C)
    groups = max(groups_B, groups_C)
    steps = _steps("bwd" if save_states else "fwd", seqlen, dstate)
    launch = _launch_parameters("fwd", steps, seqlen, dim // groups, dstate)
    y = u.new_empty(u.shape) if y is None else y
    last_state = u.new_empty(batch, dim, dstate, dtype=torch.float32)
    shape = states_shape(batch, seqlen, dim, dstate) if save_states else (0,)
    states = u.new_empty(shape, dtype=torch.float32)
    grid = (batch * groups * triton.cdiv(dim // groups, launch["BLOCK_D"]),)
    if batch:
        with torch.cuda.device_of(u):
            _scan_fwd_kernel[grid](
                u, u.stride(0), u.stride(1),
                delta, delta.stride(0), delta.stride(1),
                A.contiguous(),
                B, *B_strides,
                C, *C_strides,
                D,
                z, *((0, 0) if z is None else z.stride()[:2]),
                delta_bias,
                None if initial_state is None else initial_state.contiguous(),
                y, y.stride(0), y.stride(1),
                last_state,
                states if save_states else None,
                seqlen, dim, dim // groups,
                dstate, B.dim() == 2, C.dim() == 2, delta_softplus, reverse, **launch,
            )  # fmt: skip
    return y, last_state, states


def selective_scan_bwd(
    dy, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, states,
    delta_softplus, reverse,
):  # fmt: skip
    """(du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state), None where an argument is."""
    batch, seqlen, dim = u.shape
    dstate = A.shape[1]
    dy, u, delta = dev.channel_last(dy), dev.channel_last(u), dev.channel_last(delta)
    z = None if z is None else dev.channel_last(z)
    (B_, B_strides, groups_B), (C_, C_strides, groups_C) = _rows(B), _rows(C)
    groups = max(groups_B, groups_C)
    steps = _steps("bwd", seqlen, dstate)
    launch = _launch_parameters("bwd", steps, seqlen, dim // groups, dstate)
    blocks = groups * triton.cdiv(dim // groups, launch["BLOCK_D"])
    const_B, const_C = B.dim() == 2, C.dim() == 2

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=u.device)

    du, ddelta = empty(*u.shape, dtype=u.dtype), empty(*u.shape, dtype=delta.dtype)
    dz = None if z is None else empty(*u.shape, dtype=z.dtype)
    dA, dD, ddelta_bias = empty(batch, dstate, dim), empty(batch, dim), empty(batch, dim)
    dBC = empty(blocks, batch, seqlen, (2 - const_B - const_C) * dstate)
    dB = empty(batch, dstate, dim) if const_B else None
    dC = empty(batch, dstate, dim) if const_C else None
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
                dA,
                dBC, dBC.shape[-1],
                dB,
                dC,
                dD,
                dz,
                ddelta_bias,
                dinitial_state,
                batch, seqlen, dim, dim // groups,
                dstate, const_B, const_C, delta_softplus, reverse, **launch,
            )  # fmt: skip

    def over_owners(partial, like):
        """Sum over the blocks that share a row of B or C: all of them, or those of its group."""
        partial = partial.unflatten(0, (1 if like.dim() == 3 else groups, -1)).sum(1)
        return partial.permute(1, 2, 0, 3).reshape(like.shape).to(like.dtype)

    return (
        du,
        ddelta,
        dA.sum(0).t().to(A.dtype),
        dB.sum(0).t().to(B.dtype) if const_B else over_owners(dBC[..., :dstate], B),
        dC.sum(0).t().to(C.dtype) if const_C else over_owners(dBC[..., -dstate:], C),
        None if D is None else dD.sum(0).to(D.dtype),
        dz,
        None if delta_bias is None else ddelta_bias.sum(0).to(delta_bias.dtype),
        None if initial_state is None else dinitial_state.to(initial_state.dtype),
    )


class SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        save_states = any(ctx.needs_input_grad)
        y, last_state, states = selective_scan_fwd(*inputs, save_states)
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
        return *selective_scan_bwd(dy, dlast_state, *ctx.saved_tensors, *flags), None, None


def selective_scan(
    u, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False,
    initial_state=None, return_last_state=False, reverse=False,
):  # fmt: skip
    """y, or (y, last_state): the scan above on the Triton path, differentiable in every tensor.

    Arguments are those of `mambavision.ops.selective_scan`, which checks them.
    """
    y, last_state = SelectiveScan.apply(
        u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse
    )
    return (y, last_state) if return_last_state else y
