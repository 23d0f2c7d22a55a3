"""Selective scan in plain PyTorch, forward and backward, channel-last.

    dt_t = softplus(delta_t + delta_bias)                   (or without softplus)
    h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t                h_{-1} = initial state or 0
    y_t  = <C_t, h_t> + D u_t                                (times silu(z_t) with a gate z)

PyTorch pays for every call, and a loop over time is many calls on little data. So the scan has two
levels. Time is cut into chunks, and the k-th step of several chunks and batch entries is one call,
h_k += a_k h_{k-1}. Side by side, chunks first run from zero; then one walk over the chunks, end +
exp(A sum dt) start, gives each its true start; then they run again. Where the batch alone fills a
call, chunks follow one another and run once. Either way the work comes in blocks of batch entries
and chunks that stay in the cache, and nothing larger than a block is held.

Nothing divides by a decay, so a decay that underflows gives the exact result. If A grows states
until the decay of a whole chunk overflows, the chunks' starts are found step by step.

Backward, from the last step to the first, with g_t = dL/dh_t and p_t = exp(dt_t A) h_{t-1}:

    g_t  = C_t dy_t + exp(dt_{t+1} A) g_{t+1}                the same recurrence in two levels
    du_t = dt_t <g_t, B_t> + D dy_t                          d(dt)_t = <g_t, A p_t + B_t u_t>
    dB_t = sum_dim g_t dt_t u_t                              dC_t = sum_dim dy_t h_t
    dA   = sum_{batch,t} g_t dt_t p_t                        dD = sum_{batch,t} dy_t u_t
    ddelta_t = d(dt)_t sigmoid(delta_t + delta_bias)         ddelta_bias = sum_{batch,t} ddelta_t

Kept for it are the states at the chunks' starts (`states`); the rest is computed again, block by
block. With a gate, dy silu(z) takes the place of dy. With complex A, y = 2 Re <C, h> + D u, and
every factor that multiplies a gradient is conjugated.

Shapes: u, delta, z, y (batch, seqlen, dim); A (dim, dstate); B, C (batch, seqlen, dstate), or
(batch, seqlen, groups, dstate), or constant over time (dim, dstate); D, delta_bias (dim,); states
(batch, dim, dstate), inside this file (rows, chunks, dstate, dim), channels last.

Source: Gu and Dao, arXiv 2312.00752, section 3; the gradients are derived above.
"""

import cmath
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import cast, first_derivative_only, plainly, silu_backward, work_dtype

LOG2E = math.log2(math.e)
# Elements of a call (batch entries x chunks x dim x dstate). A step of ALONE_ELEMENTS is worth a
# call without other chunks beside it; below, chunks are added up to GROUP_ELEMENTS, from where on
# PyTorch uses several threads.
ALONE_ELEMENTS = 8192
GROUP_ELEMENTS = 32768
# Elements of a block, of which three buffers are live.
BLOCK_ELEMENTS = 1 << 20


def chunk_length(seqlen: int) -> int:
    """Steps per chunk: near the square root of the length, where the calls of both levels are
    fewest. 14 and 7 divide the lengths of 14 x 14 and 7 x 7 windows."""
    if seqlen % 14 == 0:
        return 14
    if seqlen % 7 == 0:
        return 7
    return 8 if seqlen <= 128 else 16


def states_shape(batch: int, seqlen: int, dim: int, dstate: int) -> tuple[int, int, int, int]:
    """What the forward pass keeps for the backward pass: the state at each chunk's start."""
    return batch, -(-seqlen // chunk_length(seqlen)), dstate, dim


def _conj(x: Tensor) -> Tensor:
    """The conjugate, in memory of its own where x is complex."""
    return x.conj().resolve_conj()


# The recurrence. A list holds one tensor (rows, chunks, dstate, dim) per step of a chunk, in the
# order in which the recurrence runs; `order` is that of the chunks.


def _sweep(decays: list[Tensor], values: list[Tensor]) -> None:
    """values_k += decays_k values_{k-1}, in place, from the second step on."""
    for k in range(1, len(values)):
        values[k].addcmul_(decays[k], values[k - 1])


def _ends(decays: list[Tensor], values: list[Tensor]) -> Tensor:
    """Where `_sweep` would end, with `values` left alone."""
    end = values[0].clone()
    for k in range(1, len(values)):
        torch.addcmul(values[k], decays[k], end, out=end)
    return end


def _chain(decay: Tensor, end: Tensor, state: Tensor, order: range) -> Tensor:
    """What enters each chunk: `state` the first, end_c + decay_c state_c the one after chunk c."""
    entering = torch.empty_like(end)
    decays, ends, states = decay.unbind(1), end.unbind(1), entering.unbind(1)
    states[order[0]].copy_(state)
    for c, after in zip(order, order[1:], strict=False):
        torch.addcmul(ends[c], decays[c], states[c], out=states[after])
    return entering


def _step_by_step(
    decays: list[Tensor], values: list[Tensor], state: Tensor, order: range, last: Tensor | None
) -> Tensor:
    """What enters each chunk where a chunk's decay overflows; `last` decays what leaves a chunk."""
    entering = torch.empty_like(values[0])
    for c in order:
        entering[:, c] = state
        for decay, value in zip(decays, values, strict=True):
            state = torch.addcmul(value[:, c], decay[:, c], state)
        if last is not None:
            state = last[:, c] * state
    return entering


def _finite(x: Tensor) -> bool:
    return cmath.isfinite(x.sum().item())


# B and C


class _Coefficient:
    """B or C, (rows, steps, dstate, groups, channels), with 1 where it does not vary.

    plain: without groups and channels, the usual one; its sums are small matrix products.
    constant: over rows and steps.
    """

    def __init__(self, B: Tensor, plain: bool, constant: bool):
        self.B, self.plain, self.constant = B, plain, constant

    def at(self, time: slice) -> "_Coefficient":
        return self if self.constant else _Coefficient(self.B[:, time], self.plain, False)

    def conj(self) -> "_Coefficient":
        if not self.B.is_complex():
            return self
        return _Coefficient(_conj(self.B), self.plain, self.constant)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.B.shape[3], -1)

    def outer(self, x: Tensor, out: Tensor) -> Tensor:
        """B_n x_d, (rows, steps, dstate, dim)."""
        torch.mul(self.split(x).unsqueeze(2), self.B, out=self.split(out))
        return out

    def contract(self, h: Tensor) -> Tensor:
        """<B, h> over the states, (rows, steps, dim)."""
        if self.plain:
            B = self.B[..., 0].flatten(0, 1).mT
            return torch.bmm(B, h.flatten(0, 1)).view(h[:, :, 0].shape)
        return (self.split(h) * self.B).sum(2).flatten(2)

    def grad(self, g: Tensor, x: Tensor) -> Tensor:
        """Sum of g_n,d x_d over whatever B does not tell apart, in B's shape."""
        if self.plain:
            x = x.flatten(0, 1).unsqueeze(1).to(g.dtype)
            return torch.bmm(x, g.flatten(0, 1).mT).view(self.B.shape)
        return (self.split(g) * self.split(x).unsqueeze(2)).sum_to_size(self.B.shape)


# How the work is cut: the batch into slices, time into chunks, slice and chunks into blocks


class _Scan:
    """The arguments, and the sizes of what they are cut into."""

    def __init__(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
        delta_bias: Tensor | None, delta_softplus: bool, reverse: bool,
    ):  # fmt: skip
        self.real = work_dtype(u)
        self.dtype = self.real.to_complex() if A.is_complex() else self.real
        self.u, self.delta, self.B, self.C = u, delta, B, C
        self.A = A.t().to(self.dtype).contiguous()  # (dstate, dim)
        self.D = None if D is None else D.to(self.real)
        self.delta_bias = None if delta_bias is None else delta_bias.to(self.real)
        self.delta_softplus, self.reverse = delta_softplus, reverse
        self.batch, self.seqlen, self.dim = u.shape
        self.dstate = A.shape[1]
        self.steps = chunk_length(self.seqlen)
        self.chunks = -(-self.seqlen // self.steps)
        self.padding = self.chunks * self.steps - self.seqlen
        state = self.dim * self.dstate
        slices = max(1, math.ceil(self.batch * self.steps * state / BLOCK_ELEMENTS))
        self.entries = max(1, math.ceil(self.batch / slices))
        step = self.entries * state
        beside = 1 if step >= ALONE_ELEMENTS else math.ceil(GROUP_ELEMENTS / step)
        self.group = min(self.chunks, beside)
        self.memory: dict[str, Tensor] = {}

    def slices(self) -> Iterator["_Slice"]:
        for b in range(0, self.batch, self.entries):
            yield _Slice(self, slice(b, min(b + self.entries, self.batch)))

    def buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised; every block takes the same memory, which is then in the cache."""
        if name not in self.memory:
            size = self.entries * self.group * self.steps * self.dstate * self.dim
            self.memory[name] = self.u.new_empty(size, dtype=self.dtype)
        return self.memory[name][: math.prod(shape)].view(shape)


class _Slice:
    """Some batch entries over all time: everything that has no axis of states."""

    def __init__(self, scan: _Scan, rows: slice):
        self.scan, self.rows = scan, rows
        self.u, self.x = self.load(scan.u), self.load(scan.delta)
        if scan.delta_bias is not None:
            self.x = self.x + scan.delta_bias
        # Beyond 40, softplus(x) is x in double precision too
        self.dt = F.softplus(self.x, threshold=40.0) if scan.delta_softplus else self.x
        if scan.padding:
            # No time passes behind the end of the sequence, and so the state stays
            self.dt = F.pad(self.dt[:, : scan.seqlen], (0, 0, 0, scan.padding))
        self.dtu = self.dt * self.u
        self.B, self.C = self.coefficient(scan.B), self.coefficient(scan.C)

    def load(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x (batch, seqlen, ...) of the slice; zeros behind the end, up to that of the chunks."""
        x = x[self.rows].to(dtype or self.scan.real)
        padding = [0, 0] * (x.dim() - 2) + [0, self.scan.padding]
        return F.pad(x, padding) if self.scan.padding else x

    def store(self, target: Tensor, x: Tensor) -> None:
        target[self.rows] = x[:, : self.scan.seqlen]

    def coefficient(self, B: Tensor) -> _Coefficient:
        if B.dim() == 2:
            return _Coefficient(B.t().to(self.scan.dtype)[None, None, :, None], False, True)
        B = self.load(B, self.scan.dtype)
        if B.dim() == 3:
            return _Coefficient(B[..., None, None], True, False)
        return _Coefficient(B.transpose(2, 3).unsqueeze(-1), False, False)

    def blocks(self, backward: bool) -> Iterator["_Block"]:
        """In the order of the recurrence."""
        firsts = range(0, self.scan.chunks, self.scan.group)
        for first in reversed(firsts) if self.scan.reverse != backward else firsts:
            yield _Block(self, first, min(self.scan.group, self.scan.chunks - first))

    def gather(self, blocks: dict[int, Tensor]) -> Tensor:
        """Results of the blocks, by first chunk, as one (rows, steps, ...)."""
        parts = [blocks[first] for first in sorted(blocks)]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return x.real if x.is_complex() else x

    def output(self, y: Tensor) -> Tensor:
        """y before the gate, from <C, h>; overwrites it."""
        if self.scan.dtype.is_complex:
            y = 2 * y
        return y if self.scan.D is None else y.addcmul_(self.u, self.scan.D)


class _Block:
    """Some chunks of a slice: the decays a = exp(dt A), and h, which is dt B u until `run`."""

    def __init__(self, part: _Slice, first: int, count: int):
        scan = self.scan = part.scan
        self.first, self.count = first, count
        self.chunks = slice(first, first + count)
        self.time = slice(first * scan.steps, (first + count) * scan.steps)
        self.dt, self.dtu = part.dt[:, self.time], part.dtu[:, self.time]
        self.B, self.C = part.B.at(self.time), part.C.at(self.time)
        self.order = range(count)[::-1] if scan.reverse else range(count)
        self.shape = (*self.dt.shape[:2], scan.dstate, scan.dim)
        self.a = scan.buffer("a", self.shape)
        self.decay(self.dt, out=self.a)
        self.h = self.B.outer(self.dtu, out=scan.buffer("h", self.shape))
        self.decays, self.values = self.steps(self.a), self.steps(self.h)

    def by_chunk(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], self.count, self.scan.steps, *x.shape[2:])

    def decay(self, dt: Tensor, out: Tensor | None = None) -> Tensor:
        """exp(dt A), (rows, steps, dstate, dim)."""
        if self.scan.dtype != torch.float32:
            return torch.mul(dt.unsqueeze(2), self.scan.A, out=out).exp_()
        # As a power of 2, since PyTorch may leave exp to a library that takes four times as long on
        # processors not of its maker. The factor goes to dt: an error of A's would be the same in
        # every step, and add up.
        return torch.mul((dt * LOG2E).unsqueeze(2), self.scan.A, out=out).exp2_()

    def steps(self, x: Tensor) -> list[Tensor]:
        steps = self.by_chunk(x).unbind(2)
        return list(steps[::-1] if self.scan.reverse else steps)

    def chunk_decay(self) -> Tensor:
        """What a chunk leaves of the state that enters it, exp(A sum dt)."""
        return self.decay(self.by_chunk(self.dt).sum(2))

    def starts(self, state: Tensor) -> Tensor:
        """What enters each chunk, (rows, chunks, dstate, dim); `state` enters the first."""
        if self.count == 1:
            return state.unsqueeze(1)
        decay = self.chunk_decay()
        if _finite(decay):
            return _chain(decay, _ends(self.decays, self.values), state, self.order)
        return _step_by_step(self.decays, self.values, state, self.order, None)

    def run(self, starts: Tensor) -> Tensor:
        """h of every step; returns that of the last."""
        self.values[0].addcmul_(self.decays[0], starts)
        _sweep(self.decays, self.values)
        return self.values[-1][:, self.order[-1]].clone()

    def run_back(self, g: Tensor, carry: Tensor) -> Tensor:
        """C dy in `g` becomes the gradient of every h. `carry` is what the steps after the block
        hand back to it; returned is what it hands to those before."""
        decays = self.steps(_conj(self.a))[::-1] if g.is_complex() else self.decays[::-1]
        values = self.steps(g)[::-1]
        # A gradient passes a step's decay on leaving the step: the list is shifted by one
        first, decays, order = decays[-1], [decays[0], *decays[:-1]], self.order[::-1]
        if self.count == 1:
            carries = carry.unsqueeze(1)
        else:
            decay = _conj(self.chunk_decay())
            if _finite(decay):
                carries = _chain(decay, first * _ends(decays, values), carry, order)
            else:
                decays[0] = torch.ones_like(first)
                carries = _step_by_step(decays, values, carry, order, first)
        values[0].add_(carries)
        _sweep(decays, values)
        return (first * values[-1])[:, order[-1]]

    def what_is_left(self, starts: Tensor) -> Tensor:
        """p = a h_{t-1}, in the memory of a."""
        a, h = self.by_chunk(self.a), self.by_chunk(self.h)
        self.decays[0].mul_(starts)
        if self.scan.reverse:
            a[:, :, :-1].mul_(h[:, :, 1:])
        else:
            a[:, :, 1:].mul_(h[:, :, :-1])
        return self.a

    def add_coefficient_grad(self, dB: Tensor, coefficient: _Coefficient, grad: Tensor) -> None:
        """A gradient from `_Coefficient.grad` to that of the slice's rows of an argument."""
        if coefficient.constant:
            dB += grad[0, 0, :, 0].t()
        else:
            target = dB[:, self.time]
            grad = grad[:, : target.shape[1], :, :, 0].transpose(2, 3)
            target.copy_(grad.view(target.shape))


# Forward and backward


def _entering(state: Tensor | None, like: Tensor, rows: slice) -> Tensor:
    """A state or its gradient, (rows, dstate, dim); zeros for None."""
    return torch.zeros_like(like[rows].mT) if state is None else state[rows].mT.to(like.dtype)


@plainly
def selective_scan_fwd(
    u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, save_states, y=None
):
    """(y, last_state, states); states is empty unless `save_states`. y goes into `y`, if given."""
    scan = _Scan(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    y = u.new_empty(u.shape) if y is None else y
    last_state = u.new_empty(scan.batch, scan.dim, scan.dstate, dtype=scan.dtype)
    shape = states_shape(scan.batch, scan.seqlen, scan.dim, scan.dstate)
    states = u.new_empty(shape if save_states else 0, dtype=scan.dtype)
    for part in scan.slices():
        state = _entering(initial_state, last_state, part.rows)
        Ch = {}
        for block in part.blocks(backward=False):
            starts = block.starts(state)
            if save_states:
                states[part.rows, block.chunks] = starts
            state = block.run(starts)
            Ch[block.first] = block.C.contract(block.h)
        out = part.output(part.gather(Ch))
        if z is not None:
            out *= F.silu(part.load(z))
        part.store(y, out)
        last_state[part.rows] = state.mT
    return y, last_state, states


@plainly
def selective_scan_bwd(
    dy, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, states, delta_softplus,
    reverse,
):  # fmt: skip
    """(du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state), None where the argument is."""
    scan = _Scan(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    du, ddelta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    dz = None if z is None else z.new_empty(z.shape)
    dA, A_conj = torch.zeros_like(scan.A), _conj(scan.A)
    dB, dC = (x.new_zeros(x.shape, dtype=scan.dtype) for x in (B, C))
    dD, ddelta_bias = (u.new_zeros(scan.dim, dtype=scan.real) for _ in range(2))
    dinitial_state = u.new_empty(scan.batch, scan.dim, scan.dstate, dtype=scan.dtype)
    for part in scan.slices():
        rows = part.rows
        dout = dgated = part.load(dy)
        if z is not None:
            gate = part.load(z)
            dout = dgated * F.silu(gate)
        dh = 2 * dout if A.is_complex() else dout
        dB_rows, dC_rows = (x if x.dim() == 2 else x[rows] for x in (dB, dC))
        carry = _entering(dlast_state, dinitial_state, rows)
        Ch, Ap, Bg = {}, {}, {}
        for block in part.blocks(backward=True):
            starts = states[rows, block.chunks]
            block.run(starts)
            if z is not None:
                Ch[block.first] = block.C.contract(block.h)
            dh_block = dh[:, block.time]
            block.add_coefficient_grad(dC_rows, part.C, block.C.grad(_conj(block.h), dh_block))
            g = block.C.conj().outer(dh_block, out=scan.buffer("g", block.shape))
            carry = block.run_back(g, carry)
            block.add_coefficient_grad(dB_rows, part.B, block.B.grad(g, block.dtu))
            Bg[block.first] = block.B.conj().contract(g)
            pg = _conj(block.what_is_left(starts)).mul_(g)
            # h has served: its memory takes the products
            Ap[block.first] = torch.mul(pg, A_conj, out=block.h).sum(2)
            dA += torch.mul(pg, block.dt.unsqueeze(2), out=block.h).sum((0, 1))
        dinitial_state[rows] = carry.mT
        gB = part.gather(Bg)
        ddt = part.gather(Ap).addcmul_(part.u, gB)
        if delta_softplus:
            ddt *= torch.sigmoid(part.x)
        part.store(ddelta, ddt)
        ddelta_bias += ddt[:, : scan.seqlen].sum((0, 1))
        gu = part.dt * gB
        if scan.D is not None:
            gu.addcmul_(dout, scan.D)
            dD += (dout * part.u).sum((0, 1))
        part.store(du, gu)
        if dz is not None:
            part.store(dz, silu_backward(dgated * part.output(part.gather(Ch)), gate))
    return (
        du,
        ddelta,
        cast(dA.t(), A),
        cast(dB, B),
        cast(dC, C),
        cast(dD, D),
        dz,
        cast(ddelta_bias, delta_bias),
        cast(dinitial_state, initial_state),
    )


class SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse,
        grad_enabled,
    ):  # fmt: skip
        inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
        save_states = grad_enabled and any(ctx.needs_input_grad)
        y, last_state, states = selective_scan_fwd(*inputs, delta_softplus, reverse, save_states)
        ctx.save_for_backward(*inputs, states)
        ctx.delta_softplus, ctx.reverse = delta_softplus, reverse
        ctx.set_materialize_grads(False)
        return y, last_state

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy, dlast_state):
        *inputs, states = ctx.saved_tensors
        if dy is None:
            dy = inputs[0].new_zeros(()).expand(inputs[0].shape)
        grads = selective_scan_bwd(
            dy, dlast_state, *inputs, states, ctx.delta_softplus, ctx.reverse
        )
        return *grads, None, None, None


def selective_scan(
    u, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False,
    initial_state=None, return_last_state=False, reverse=False,
):  # fmt: skip
    """y, or (y, last_state), differentiable in every tensor.

    Arguments are those of `mambavision.ops.selective_scan`, which checks them.
    """
    y, last_state = SelectiveScan.apply(
        u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse,
        torch.is_grad_enabled(),  # always off within `forward`
    )  # fmt: skip
    return (y, last_state) if return_last_state else y
