"""Selective scan in plain PyTorch: one loop over time forward, one backward.

    dt_t = softplus(delta_t + delta_bias)                  (or without softplus)
    h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t               h_{-1} = initial state or 0
    y_t  = <C_t, h_t> + D u_t                               (times silu(z_t) with a gate z)

Backward, from the last step to the first, with g_t = dL/dh_t and p_t = exp(dt_t A) h_{t-1}:

    g_t  = C_t dy_t + exp(dt_{t+1} A) g_{t+1}               begins as the last state's gradient
    du_t = dt_t <g_t, B_t> + D dy_t                         d(dt)_t = <g_t, A p_t + B_t u_t>
    dB_t = sum_dim g_t dt_t u_t                             dC_t = sum_dim dy_t h_t
    dA   = sum_{batch,t} g_t dt_t p_t                       dD = sum_{batch,t} dy_t u_t
    ddelta_t = d(dt)_t sigmoid(delta_t + delta_bias)        ddelta_bias = sum_{batch,t} ddelta_t

With a gate, y = s silu(z): dz = dy s silu'(z), and dy silu(z) takes the place of dy.

With complex A (then B, C and the states are complex, too) y_t = 2 Re <C_t, h_t> + D u_t, without a
conjugate. Gradients follow PyTorch's convention, dL/dRe + i dL/dIm: each factor above that
multiplies g or dy then stands conjugated, and gradients of real arguments are real parts. On real
numbers conj and real do nothing, so one text serves both.

Shapes: u, delta, z, y (batch, seqlen, dim); A (dim, dstate); B, C (batch, seqlen, dstate), or
(batch, seqlen, groups, dstate), or constant over time (dim, dstate); D, delta_bias (dim,); states
(batch, dim, dstate). Channel i reads group i // (dim // groups).

With reverse, time runs from the last position to the first: the initial state enters at the last
position and the last state is that after position 0.

The recurrence is that of Mamba, arXiv 2312.00752, with the zero-order hold of A and Euler's of B.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .conv1d_silu import accumulation_dtype


class SelectiveScanGrads(NamedTuple):
    du: Tensor
    ddelta: Tensor
    dA: Tensor
    dB: Tensor
    dC: Tensor
    dD: Tensor | None
    dz: Tensor | None
    ddelta_bias: Tensor | None
    dinitial_state: Tensor | None


def softplus(x: Tensor) -> Tensor:
    """log(exp(x) + exp(0)), exact at both ends and in its derivative."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _at(B: Tensor, t: int, dim: int) -> Tensor:
    """B or C of step t for every channel, broadcastable to (batch, dim, dstate)."""
    if B.dim() == 2:
        return B
    if B.dim() == 3:
        return B[:, t, None]
    return B[:, t].repeat_interleave(dim // B.shape[2], dim=1)


def _add_at(dB: Tensor, t: int, grad: Tensor) -> None:
    """The reverse of `_at`: adds a gradient (batch, dim, dstate) to that of B or C."""
    if dB.dim() == 2:
        dB += grad.sum(0)
    elif dB.dim() == 3:
        dB[:, t] += grad.sum(1)
    else:
        dB[:, t] += grad.unflatten(1, (dB.shape[2], -1)).sum(2)


def _scan(u, dt, A, B, C, D, initial_state, times):
    """y before the gate, and the states h_{-1}, h_0, ... in the order of `times`."""
    dim = u.shape[2]
    twice = 2 if A.is_complex() else 1
    h = initial_state
    states, y = [h], torch.zeros_like(u)
    for t in times:
        decay = torch.exp(dt[:, t, :, None] * A)
        h = decay * h + (dt[:, t] * u[:, t])[..., None] * _at(B, t, dim)
        y[:, t] = twice * (_at(C, t, dim) * h).sum(-1).real
        if D is not None:
            y[:, t] += D * u[:, t]
        states.append(h)
    return y, states


def _prepare(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reverse):
    """Arguments in the dtype of accumulation, dt with what it came from, and the order of time."""
    real = accumulation_dtype(u)
    state = real.to_complex() if A.is_complex() else real
    x = delta.to(real) if delta_bias is None else delta.to(real) + delta_bias.to(real)
    dt = softplus(x) if delta_softplus else x
    A, B, C = A.to(state), B.to(state), C.to(state)
    D, z = (None if v is None else v.to(real) for v in (D, z))
    if initial_state is None:
        initial_state = torch.zeros(u.shape[0], *A.shape, dtype=state, device=u.device)
    times = range(u.shape[1])[::-1] if reverse else range(u.shape[1])
    return (u.to(real), dt, A, B, C, D, initial_state.to(state), times), x, z


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    reverse: bool = False,
):
    """y in u's dtype, or (y, last_state), last_state in the dtype of accumulation."""
    scan, _, z = _prepare(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reverse
    )
    y, states = _scan(*scan)
    if z is not None:
        y = y * (z * torch.sigmoid(z))
    return (y.to(u.dtype), states[-1]) if return_last_state else y.to(u.dtype)


def selective_scan_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    dlast_state: Tensor | None = None,
    reverse: bool = False,
) -> SelectiveScanGrads:
    """Gradients of sum(dy * y) + <dlast_state, last_state>, each in its argument's dtype."""
    scan, x, z_ = _prepare(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reverse
    )
    u_, dt, A_, B_, C_, D_, h0, times = scan
    dim = u.shape[2]
    twice = 2 if A.is_complex() else 1
    y, states = _scan(*scan)
    dy = dy.to(u_.dtype)
    dz = None
    if z_ is not None:
        s = torch.sigmoid(z_)
        dz = (dy * y * (s + z_ * s * (1 - s))).to(z.dtype)
        dy = dy * (z_ * s)

    g = torch.zeros_like(h0) if dlast_state is None else dlast_state.to(h0.dtype)
    du, ddt = torch.zeros_like(u_), torch.zeros_like(u_)
    dA, dB, dC = torch.zeros_like(A_), torch.zeros_like(B_), torch.zeros_like(C_)
    for k in reversed(range(len(times))):
        t, h, h_before = times[k], states[k + 1], states[k]
        B_t, C_t = _at(B_, t, dim), _at(C_, t, dim)
        dt_t, u_t, dy_t = dt[:, t, :, None], u_[:, t, :, None], dy[:, t, :, None]
        decay = torch.exp(dt_t * A_)
        p = decay * h_before
        g = g + twice * C_t.conj() * dy_t
        gB = (g * B_t.conj()).sum(-1).real
        du[:, t] = dt[:, t] * gB
        ddt[:, t] = (g * (A_ * p).conj()).sum(-1).real + u_[:, t] * gB
        dA += (g * dt_t * p.conj()).sum(0)
        _add_at(dB, t, g * dt_t * u_t)
        _add_at(dC, t, twice * dy_t * h.conj())
        g = decay.conj() * g
    if D_ is not None:
        du = du + D_ * dy
    ddelta = ddt * torch.sigmoid(x) if delta_softplus else ddt
    return SelectiveScanGrads(
        du.to(u.dtype),
        ddelta.to(delta.dtype),
        dA.to(A.dtype),
        dB.to(B.dtype),
        dC.to(C.dtype),
        None if D is None else (dy * u_).sum((0, 1)).to(D.dtype),
        dz,
        None if delta_bias is None else ddelta.sum((0, 1)).to(delta_bias.dtype),
        None if initial_state is None else g.to(initial_state.dtype),
    )
