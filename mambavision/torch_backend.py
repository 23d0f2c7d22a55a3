"""The three operators in plain PyTorch: for a CPU, for MPS, and for whatever has no Triton.

    dt_t = softplus(delta_t + delta_bias)                     (or without softplus)
    h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t                  h_{-1} = initial state or 0
    y_t  = <C_t, h_t> + D u_t                                  (times silu(z_t) where a gate z is given)

PyTorch pays per call, and a loop over time is many calls on little data. So the scan has two levels:

    chunks   time is cut into chunks of `chunk_length` steps. The k-th steps of several chunks, and of
             several batch entries, are one call, `h_k += a_k h_{k-1}`.
    starts   side by side, the chunks first run from zero to find where each would end; walking over
             the chunks once, end + exp(A sum dt) start is the next chunk's start. The chunks then run
             again from their true starts. Enough batch entries fill a call by themselves; their
             chunks follow one another and run once.

Nothing is divided by a decay, so a decay that underflows to 0 gives the exact result. Work proceeds
in blocks of batch entries and chunks that stay in the processor's cache.

Backward, with g_t = dL/dh_t and p_t = exp(dt_t A) h_{t-1}, what is left of the old state:

    g_t  = C_t dy_t + exp(dt_{t+1} A) g_{t+1}                  the same recurrence, backwards in time
    du_t = dt_t <g_t, B_t> + D dy_t                            d(dt)_t = <g_t, A p_t + B_t u_t>
    dB_t = sum_dim g_t dt_t u_t                                dC_t = sum_dim dy_t h_t
    dA   = sum_{batch,t} g_t dt_t p_t                          dD = sum_{batch,t} dy_t u_t

Kept for it are the states at the chunks' starts; the rest is computed again, block by block. Complex
A: y = 2 Re <C, h>, and every factor above that multiplies a gradient is conjugated.

Shapes: u, delta, z, y (batch, seqlen, dim); A (dim, dstate); B, C (batch, seqlen, dstate), (batch,
seqlen, groups, dstate) or (dim, dstate). Arithmetic in float32, in float64 where an input is; the
functions take checked arguments (`mambavision.ops`) and are unmoved by autocast.

Source: Gu and Dao, arXiv 2312.00752, section 3; the mixer: arXiv 2407.08083, section 3.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements (batch entries x dim x dstate) that are worth a call of their own: with fewer, chunks run
# side by side.
STEP_ELEMENTS = 8192
# Elements of a block, of which about three are live at a time: they should stay in the cache.
BLOCK_ELEMENTS = 1 << 19


def chunk_length(seqlen: int) -> int:
    """Steps per chunk, near the square root of the length; 14 and 7 divide those of 14 x 14 and 7 x 7 windows."""
    if seqlen % 14 == 0:
        return 14
    if seqlen % 7 == 0:
        return 7
    return 8 if seqlen <= 128 else 16


def states_shape(batch: int, seqlen: int, dim: int, dstate: int) -> tuple[int, int, int, int]:
    """What the forward pass keeps for the backward pass: the state at each chunk's start."""
    return batch, -(-seqlen // chunk_length(seqlen)), dstate, dim


def work_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where a tensor is double, else float32."""
    double = (torch.float64, torch.complex128)
    return torch.float64 if any(x is not None and x.dtype in double for x in tensors) else torch.float32


def _plainly(function: Callable[..., Any]) -> Callable[..., Any]:
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


def _cast(x: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Gradient x in the dtype of its argument; the real part where that is real."""
    if x is None or like is None:
        return None
    if x.is_complex() and not like.is_complex():
        x = x.real
    return x.to(like.dtype)


def _silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(dy, x)


# Convolution


def _shifted(x: Tensor, shift: int) -> tuple[slice, slice]:
    """Positions t, and t + shift, that both lie inside the sequence."""
    seqlen = x.shape[1]
    return slice(max(0, -shift), max(0, seqlen - max(0, shift))), slice(max(0, shift), max(0, seqlen + min(0, shift)))


def _conv1d(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """a_t = bias + sum_k w_k x_{t + k - left}, w (width, dim), by one multiply-add per tap."""
    left = (w.shape[0] - 1) // 2
    a = x * w[left] if bias is None else torch.addcmul(bias, x, w[left])
    for k in range(w.shape[0]):
        if k != left:
            here, there = _shifted(x, k - left)
            a[:, here].addcmul_(x[:, there], w[k])
    return a


def _conv_inputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = work_dtype(x)
    w = weight.reshape(weight.shape[0], -1).t().to(dtype).contiguous()
    return x.to(dtype), w, None if bias is None else bias.to(dtype)


@_plainly
def conv1d_silu_fwd(x, weight, bias, activation, y=None):
    """y; written into `y` where given."""
    dtype = x.dtype
    a = _conv1d(*_conv_inputs(x, weight, bias))
    if activation:
        F.silu(a, inplace=True)
    return a.to(dtype) if y is None else y.copy_(a)


@_plainly
def conv1d_silu_bwd(dy, x, weight, bias, activation, dx=None):
    """(dx, dweight, dbias), dbias None without a bias; dx written into `dx` where given."""
    dtype = x.dtype
    x, w, bias_ = _conv_inputs(x, weight, bias)
    da = dy.to(x.dtype)
    if activation:
        da = _silu_backward(da, _conv1d(x, w, bias_))
    width = w.shape[0]
    left = (width - 1) // 2
    dx_ = da * w[left]
    dw = torch.zeros_like(w)
    for k in range(width):
        here, there = _shifted(x, k - left)
        if k != left:
            dx_[:, there].addcmul_(da[:, here], w[k])
        dw[k] = (da[:, here] * x[:, there]).sum((0, 1))
    return (
        dx_.to(dtype) if dx is None else dx.copy_(dx_),
        dw.t().reshape(weight.shape).to(weight.dtype),
        None if bias is None else da.sum((0, 1)).to(bias.dtype),
    )


# Scan: the recurrence


def _sweep(decays: list[Tensor], values: list[Tensor]) -> None:
    """values_k += decays_k values_{k-1}, in place, from the second step on."""
    for k in range(1, len(values)):
        values[k].addcmul_(decays[k], values[k - 1])


def _ends(decays: list[Tensor], values: list[Tensor]) -> Tensor:
    """Where `_sweep` would end, leaving the values alone."""
    end = values[0].clone()
    for k in range(1, len(values)):
        torch.addcmul(values[k], decays[k], end, out=end)
    return end


def _chain(decay: Tensor, end: Tensor, state: Tensor, order: range) -> Tensor:
    """The chunks' starts: state_{c+1} = end_c + decay_c state_c over axis 1, the first being `state`."""
    starts = torch.empty_like(end)
    for c in order:
        starts[:, c] = state
        state = torch.addcmul(end[:, c], decay[:, c], state)
    return starts


# Scan: one block of batch entries and chunks


class _Scan:
    """The inputs of a scan, read block by block: batch entries `rows`, chunks first .. first + count - 1."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse):
        self.real = work_dtype(u, delta, A, B, C, D, z, delta_bias, initial_state)
        self.dtype = self.real.to_complex() if A.is_complex() else self.real
        self.u, self.delta, self.z = u, delta, z
        self.A = A.t().to(self.dtype).contiguous()  # (dstate, dim)
        self.B, self.C = B, C
        self.D = None if D is None else D.to(self.real)
        self.delta_bias = None if delta_bias is None else delta_bias.to(self.real)
        self.delta_softplus, self.reverse = delta_softplus, reverse
        self.batch, self.seqlen, self.dim = u.shape
        self.dstate = A.shape[1]
        self.length = chunk_length(self.seqlen)
        self.chunks = -(-self.seqlen // self.length)
        state = self.dim * self.dstate
        self.entries = max(1, min(self.batch, BLOCK_ELEMENTS // (self.length * state)))
        side_by_side = math.ceil(STEP_ELEMENTS / (self.entries * state))
        self.group = 1 if side_by_side == 1 else min(self.chunks, 4 * side_by_side)
        self.buffers = [u.new_empty(self.entries * self.group * self.length * state, dtype=self.dtype) for _ in "ah"]

    def rows(self):
        for b in range(0, self.batch, self.entries):
            yield slice(b, min(self.batch, b + self.entries))

    def groups(self, backward: bool):
        """(first, count) of the chunks that run side by side, in the order of the recurrence."""
        firsts = range(0, self.chunks, self.group)
        for first in reversed(firsts) if self.reverse != backward else firsts:
            yield first, min(self.group, self.chunks - first)

    def load(self, x: Tensor, rows: slice, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """x (batch, seqlen, ...) over the block's steps; zeros behind the end of the sequence."""
        steps = count * self.length
        x = x[rows, first * self.length : first * self.length + steps].to(dtype)
        if x.shape[1] < steps:
            x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, steps - x.shape[1]])
        return x

    def coefficient(self, B: Tensor, *block) -> Tensor:
        """B or C over the block's steps, (rows | 1, steps | 1, dstate, groups, dim | 1)."""
        if B.dim() == 2:
            return B.t().to(self.dtype)[None, None, :, None, :]
        B = self.load(B, *block, self.dtype)
        return B[..., None, None] if B.dim() == 3 else B.transpose(2, 3).unsqueeze(-1)

    def buffer(self, index: int, *shape: int) -> Tensor:
        return self.buffers[index][: math.prod(shape)].view(shape)


def _outer(x: Tensor, coefficient: Tensor, out: Tensor | None = None) -> Tensor:
    """x_d B_n, (rows, steps, dstate, dim)."""
    groups = coefficient.shape[3]
    y = x.unflatten(-1, (groups, -1)).unsqueeze(2) * coefficient
    return y.flatten(3) if out is None else out.copy_(y.flatten(3))


def _contract(h: Tensor, coefficient: Tensor) -> Tensor:
    """<C, h> over the states, (rows, steps, dim)."""
    return (h.unflatten(-1, (coefficient.shape[3], -1)) * coefficient).sum(2).flatten(2)


def _coefficient_grad(g: Tensor, x: Tensor, coefficient: Tensor) -> Tensor:
    """Sum of g x over all that B does not tell apart, in B's shape as `coefficient` has it."""
    groups = coefficient.shape[3]
    product = g.unflatten(-1, (groups, -1)) * x.unflatten(-1, (groups, -1)).unsqueeze(2)
    return product.sum_to_size(coefficient.shape)


class _Block:
    """One block of a scan: dt, u, and the decays and states of all its steps."""

    def __init__(self, scan: _Scan, rows: slice, first: int, count: int):
        self.scan, self.at = scan, (rows, first, count)
        self.time = slice(first * scan.length, min(scan.seqlen, (first + count) * scan.length))
        self.u = scan.load(scan.u, *self.at, scan.real)
        pre = scan.load(scan.delta, *self.at, scan.real)
        if scan.delta_bias is not None:
            pre = pre + scan.delta_bias
        self.pre = pre
        # The threshold beyond which softplus(x) is x, in double precision too
        self.dt = F.softplus(pre, threshold=40.0) if scan.delta_softplus else pre
        valid = self.time.stop - self.time.start
        if valid < self.dt.shape[1]:
            # No time passes behind the end: the state stays
            self.dt = self.dt.clone()
            self.dt[:, valid:] = 0
        self.dtu = self.dt * self.u
        self.B = scan.coefficient(scan.B, *self.at)
        self.C = scan.coefficient(scan.C, *self.at)
        shape = (*self.dt.shape[:2], scan.dstate, scan.dim)
        self.a = torch.mul(self.dt.unsqueeze(2), scan.A, out=scan.buffer(0, *shape)).exp_()
        self.h = _outer(self.dtu, self.B, out=scan.buffer(1, *shape))
        self.count = count
        self.order = range(count - 1, -1, -1) if scan.reverse else range(count)

    def steps(self, x: Tensor) -> list[Tensor]:
        """The k-th steps of all chunks, (rows, chunks, dstate, dim), in the order of the recurrence."""
        steps = x.unflatten(1, (self.count, -1)).unbind(2)
        return list(steps[::-1] if self.scan.reverse else steps)

    def chunk_decay(self) -> Tensor:
        """What a chunk leaves of its starting state, exp(A sum dt), (rows, chunks, dstate, dim)."""
        dt = self.dt.unflatten(1, (self.count, -1)).sum(2)
        return (dt.unsqueeze(2) * self.scan.A).exp_()

    def run(self, starts: Tensor) -> None:
        """h of all steps from the chunks' starts."""
        decays, values = self.steps(self.a), self.steps(self.h)
        values[0].addcmul_(decays[0], starts)
        _sweep(decays, values)

    def starts(self, state: Tensor) -> Tensor:
        """The chunks' starts, (rows, chunks, dstate, dim), from the block's."""
        if self.count == 1:
            return state.unsqueeze(1)
        decays, values = self.steps(self.a), self.steps(self.h)
        chunk_decay = self.chunk_decay()
        if not bool(torch.isfinite(chunk_decay).all()):
            return _starts_in_turn(decays, values, state, self.order)
        return _chain(chunk_decay, _ends(decays, values), state, self.order)


def _starts_in_turn(decays, values, state, order) -> Tensor:
    """`_chain` where a product of decays overflows: growing states, taken step by step."""
    starts = torch.empty_like(values[0])
    for c in order:
        starts[:, c] = state
        for decay, value in zip(decays, values, strict=True):
            state = torch.addcmul(value[:, c], decay[:, c], state)
    return starts


@_plainly
def selective_scan_fwd(
    u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, save_states, y=None
):
    """(y, last_state, states); states is empty unless `save_states`. Writes into `y` where given."""
    scan = _Scan(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse)
    y = u.new_empty(u.shape) if y is None else y
    last_state = u.new_zeros(scan.batch, scan.dim, scan.dstate, dtype=scan.dtype)
    shape = states_shape(scan.batch, scan.seqlen, scan.dim, scan.dstate)
    states = u.new_empty(shape if save_states else 0, dtype=scan.dtype)
    for rows in scan.rows():
        state = last_state[rows].transpose(1, 2)
        if initial_state is not None:
            state = initial_state[rows].transpose(1, 2).to(scan.dtype)
        for first, count in scan.groups(backward=False):
            block = _Block(scan, rows, first, count)
            starts = block.starts(state)
            if save_states:
                states[rows, first : first + count] = starts
            block.run(starts)
            state = block.steps(block.h)[-1][:, block.order[-1]].clone()
            out = _contract(block.h, block.C)
            if A.is_complex():
                out = 2 * out.real
            if D is not None:
                out.addcmul_(block.u, scan.D)
            if z is not None:
                out *= F.silu(scan.load(z, *block.at, scan.real))
            y[rows, block.time] = out[:, : block.time.stop - block.time.start]
        last_state[rows] = state.transpose(1, 2)
    return y, last_state, states


@_plainly
def selective_scan_bwd(
    dy, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, states, delta_softplus, reverse
):
    """(du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state), None where the argument is None."""
    scan = _Scan(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse)
    du, ddelta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    dz = None if z is None else z.new_empty(z.shape)
    dA = torch.zeros_like(scan.A)
    dB, dC = (x.new_zeros(x.shape, dtype=scan.dtype) for x in (B, C))
    dD, ddelta_bias = (u.new_zeros(scan.dim, dtype=scan.real) for _ in "Db")
    dinitial_state = u.new_zeros(scan.batch, scan.dim, scan.dstate, dtype=scan.dtype)
    for rows in scan.rows():
        carry = dinitial_state[rows].transpose(1, 2)
        if dlast_state is not None:
            carry = dlast_state[rows].transpose(1, 2).to(scan.dtype)
        for first, count in scan.groups(backward=True):
            block = _Block(scan, rows, first, count)
            valid = block.time.stop - block.time.start
            starts = states[rows, first : first + count]
            block.run(starts)
            dout = scan.load(dy, *block.at, scan.real)
            if z is not None:
                gate = scan.load(z, *block.at, scan.real)
                out = _contract(block.h, block.C)
                if A.is_complex():
                    out = 2 * out.real
                if D is not None:
                    out.addcmul_(block.u, scan.D)
                dz[rows, block.time] = _silu_backward(dout * out, gate)[:, :valid]
                dout = dout * F.silu(gate)
            if D is not None:
                dD += (dout * block.u).sum((0, 1))
            dh = 2 * dout if A.is_complex() else dout
            _add_coefficient_grad(dC, _coefficient_grad(block.h.conj(), dh, block.C), rows, block.time)
            # g, the gradient of the states
            g = _outer(dh, block.C.conj())
            a = block.a.conj().resolve_conj()
            decays, values = block.steps(a), block.steps(g)
            last, order = decays[0], block.order[::-1]
            decays, values = [last, *decays[:0:-1]], values[::-1]
            if count == 1:
                carries = carry.unsqueeze(1)
            else:
                chunk_decay = block.chunk_decay().conj()
                if bool(torch.isfinite(chunk_decay).all()):
                    carries = _chain(chunk_decay, last * _ends(decays, values), carry, order)
                else:
                    carries = torch.empty_like(starts)
                    for c in order:
                        carries[:, c] = carry
                        carry = values[0][:, c] + carry
                        for decay, value in zip(decays[1:], values[1:], strict=True):
                            carry = torch.addcmul(value[:, c], decay[:, c], carry)
                        carry = carry * last[:, c]
            values[0].add_(carries)
            _sweep(decays, values)
            carry = (last * values[-1])[:, order[-1]]
            # p = a h_{t-1}
            p = block.steps(block.a)
            h = block.steps(block.h)
            p[0].mul_(starts)
            for k in range(1, len(p)):
                p[k].mul_(h[k - 1])
            q = block.a.conj() * g
            gB = _contract(g, block.B.conj())
            dtA = (q * scan.A.conj()).sum(2)
            if A.is_complex():
                gB, dtA = gB.real, dtA.real
            dA += (q * block.dt.unsqueeze(2)).sum((0, 1))
            _add_coefficient_grad(dB, _coefficient_grad(g, block.dtu, block.B), rows, block.time)
            ddt = torch.addcmul(dtA, block.u, gB)
            dub = block.dt * gB
            if D is not None:
                dub.addcmul_(dout, scan.D)
            du[rows, block.time] = dub[:, :valid]
            if delta_softplus:
                ddt = ddt * torch.sigmoid(block.pre)
            ddt = ddt[:, :valid]
            ddelta[rows, block.time] = ddt.to(delta.dtype)
            ddelta_bias += ddt.sum((0, 1))
        dinitial_state[rows] = carry.transpose(1, 2)
    return (
        du,
        ddelta,
        _cast(dA.t(), A),
        _cast(dB, B),
        _cast(dC, C),
        _cast(dD if D is not None else None, D),
        dz,
        _cast(ddelta_bias if delta_bias is not None else None, delta_bias),
        _cast(dinitial_state if initial_state is not None else None, initial_state),
    )


def _add_coefficient_grad(dB: Tensor, grad: Tensor, rows: slice, time: slice) -> None:
    if dB.dim() == 2:
        dB += grad[0, 0, :, 0].t()
        return
    grad = grad[:, : time.stop - time.start, :, :, 0]
    dB[rows, time] = grad[..., 0] if dB.dim() == 3 else grad.transpose(2, 3)


# Mixer


def _mixer_weights(dtype, *weights):
    return [w.to(dtype) for w in weights]


@_plainly
def mixer_fwd(
    xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
    conv_x_bias, conv_z_bias, save_states,
):  # fmt: skip
    """(yz, dt_low, BC, states): the output, and what the backward pass keeps; states empty unless `save_states`."""
    dtype, dim, dt_rank = work_dtype(xz), xz.shape[2] // 2, dt_proj_weight.shape[1]
    W_x, W_dt = _mixer_weights(dtype, x_proj_weight, dt_proj_weight)
    x, z = xz.to(dtype).chunk(2, dim=-1)
    yz = xz.new_empty(xz.shape)
    x = conv1d_silu_fwd(x, conv_x_weight, conv_x_bias, True)
    conv1d_silu_fwd(z, conv_z_weight, conv_z_bias, True, y=yz[..., dim:])
    projected = F.linear(x, W_x)
    dt_low = projected[..., :dt_rank].to(xz.dtype, copy=True, memory_format=torch.contiguous_format)
    BC = projected[..., dt_rank:].contiguous()
    delta = F.linear(dt_low.to(dtype), W_dt)
    B, C = BC.chunk(2, dim=-1)
    _, _, states = selective_scan_fwd(
        x, delta, A, B, C, D, None, delta_bias, None, True, False, save_states, y=yz[..., :dim]
    )
    return yz, dt_low, BC, states


@_plainly
def mixer_bwd(
    dyz, xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
    conv_x_bias, conv_z_bias, dt_low, BC, states,
):  # fmt: skip
    """(dxz, dconv_x_weight, dconv_z_weight, dx_proj_weight, ddt_proj_weight, dA, dD, ddelta_bias, dconv_x_bias,
    dconv_z_bias), None where the argument is None."""
    dtype, dim = work_dtype(xz), xz.shape[2] // 2
    W_x, W_dt = _mixer_weights(dtype, x_proj_weight, dt_proj_weight)
    (x, z), (B, C) = xz.to(dtype).chunk(2, dim=-1), BC.chunk(2, dim=-1)
    dt_low = dt_low.to(dtype)
    x_ = conv1d_silu_fwd(x, conv_x_weight, conv_x_bias, True)
    delta = F.linear(dt_low, W_dt)
    dx, ddelta, dA, dB, dC, dD, _, ddelta_bias, _ = selective_scan_bwd(
        dyz[..., :dim], None, x_, delta, A, B, C, D, None, delta_bias, None, states, True, False
    )
    dprojected = torch.cat([ddelta @ W_dt, dB, dC], dim=-1).flatten(0, 1)
    ddt_proj_weight = ddelta.flatten(0, 1).t() @ dt_low.flatten(0, 1)
    dx_proj_weight = dprojected.t() @ x_.flatten(0, 1)
    dx = torch.addmm(dx.flatten(0, 1), dprojected, W_x).view(x_.shape)
    dxz = xz.new_empty(xz.shape)
    _, dconv_x_weight, dconv_x_bias = conv1d_silu_bwd(dx, x, conv_x_weight, conv_x_bias, True, dx=dxz[..., :dim])
    _, dconv_z_weight, dconv_z_bias = conv1d_silu_bwd(
        dyz[..., dim:], z, conv_z_weight, conv_z_bias, True, dx=dxz[..., dim:]
    )
    return (
        dxz, dconv_x_weight, dconv_z_weight, _cast(dx_proj_weight, x_proj_weight),
        _cast(ddt_proj_weight, dt_proj_weight), dA, dD, ddelta_bias, dconv_x_bias, dconv_z_bias,
    )  # fmt: skip


# The differentiable functions


class Conv1dSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        ctx.save_for_backward(x, weight, bias)
        ctx.activation = activation
        return conv1d_silu_fwd(x, weight, bias, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *conv1d_silu_bwd(dy, *ctx.saved_tensors, ctx.activation), None


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
            dy = inputs[0].new_zeros(()).expand(inputs[0].shape)
        return *selective_scan_bwd(dy, dlast_state, *inputs, states, ctx.delta_softplus, ctx.reverse), None, None


class Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        yz, dt_low, BC, states = mixer_fwd(*inputs, any(ctx.needs_input_grad))
        ctx.save_for_backward(*inputs, dt_low, BC, states)
        return yz

    @staticmethod
    @once_differentiable
    def backward(ctx, dyz):
        return mixer_bwd(dyz, *ctx.saved_tensors)


def conv1d_silu(x, weight, bias=None, *, activation=True):
    """silu(conv1d(x)), differentiable in every tensor; arguments as in `mambavision.ops.conv1d_silu`."""
    return Conv1dSilu.apply(x, weight, bias, activation)


def selective_scan(
    u, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False,
    initial_state=None, return_last_state=False, reverse=False,
):  # fmt: skip
    """y, or (y, last_state), differentiable in every tensor; arguments as in `mambavision.ops.selective_scan`."""
    y, last_state = SelectiveScan.apply(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse)
    return (y, last_state) if return_last_state else y


def mixer(
    xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias, *,
    conv_x_bias=None, conv_z_bias=None,
):  # fmt: skip
    """yz, differentiable in every tensor; arguments as in `mambavision.ops.mixer`."""
    return Mixer.apply(
        xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias, conv_x_bias, conv_z_bias
    )
