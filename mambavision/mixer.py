"""MambaVisionMixer: the token mixer of MambaVision as a module.

    xz    = W_in hidden                            (batch, seqlen, 2 dim), 2 dim = expand d_model
    x, z  = halves of xz                           (batch, seqlen, dim) each
    x, z  = silu(conv_x(x)), silu(conv_z(z))       depthwise, 'same' padding, not causal
    dt_low, B, C = split(W_x x)                    dt_rank, d_state, d_state wide
    delta = W_dt dt_low + b_dt                     (batch, seqlen, dim)
    y     = selective_scan(x, delta, A, B, C, D)   A = -exp(A_log), steps softplus(delta + b_dt)
    out   = W_out [y, z]                           (batch, seqlen, d_model)

W_in and W_out are plain linear layers; all that lies between them is `ops.mixer`. A Mamba mixer
gates y with z. Here z is a second, scan-free branch beside y, and neither branch is causal.

Source: Hatamizadeh and Kautz, arXiv 2407.08083, section 3.
"""

import math
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ops import mixer

__all__ = ["MambaVisionMixer"]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _initial_dt(
    dim: int, dt_min: float, dt_max: float, dt_init_floor: float, device: Any
) -> Tensor:
    """A bias whose softplus is log-uniform in dt_min .. dt_max and at least dt_init_floor."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(torch.rand(dim, device=device) * (high - low) + low).clamp(min=dt_init_floor)
    # softplus inverted: log(e^dt - 1) = dt + log(1 - e^-dt), which loses nothing for a small dt.
    return dt + torch.log(-torch.expm1(-dt))


def _stamp(sources: Sequence[Tensor]) -> tuple[Any, ...] | None:
    """Differs once these tensors were written to or lie elsewhere; None where that is not known.

    Inference tensors do not count writes, and traced or batched ones have no address. What a
    captured graph reads must not be replaced behind its back, nor another stream read too early.
    """
    first = sources[0]
    if torch.compiler.is_compiling() or first.is_meta:
        return None
    if any(type(x) not in (Tensor, nn.Parameter) for x in sources):
        return None
    stream = None
    if first.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(first.device)
    try:
        return stream, *((x._version, x.data_ptr()) for x in sources)
    except RuntimeError:
        return None


class _Kept(NamedTuple):
    """What was computed from some parameters, and from which state of which tensors."""

    stamp: tuple[Any, ...]
    sources: Sequence[Tensor]
    # Their memory is held, or other parameters might come to lie at the same addresses.
    memory: Sequence[Tensor]
    values: tuple[Tensor, Tensor, Tensor]


class MambaVisionMixer(nn.Module):
    """Mixes the tokens of a sequence: (batch, seqlen, d_model) to the same shape.

        out = W_out [selective_scan(silu(conv_x(x)), ...), silu(conv_z(z))]
        x, z = halves of W_in hidden

    The arguments are the published ones, in their order. `dt_rank="auto"` is ceil(d_model / 16).
    `conv_bias`, `use_fast_path` and `layer_idx` are accepted and change nothing: the published
    convolutions have no bias whatever `conv_bias` says. `bias` gives in_proj and out_proj one.
    `backend` is passed to `ops.mixer`: "auto", "triton" or "torch". The operator reads the
    parameters of conv1d_x, conv1d_z, x_proj and dt_proj; forward hooks on these do not run.

    Initialisation of the steps is Mamba's: W_dt uniform in +-dt_scale / sqrt(dt_rank) (or constant,
    `dt_init="constant"`), and a bias whose softplus is log-uniform in dt_min .. dt_max. The
    published module adds that bias twice, so the first steps are smaller than that.

    Activations may be float32, float16, bfloat16 or float64, with or without autocast; `out` is in
    the dtype of a linear layer's output. -exp(A_log), D and the bias enter the scan in float32
    (float64 for float64 parameters) even after `.half()`. Raises ValueError for a wrong shape,
    TypeError for what is no floating-point tensor.

    >>> MambaVisionMixer(320, d_state=8, d_conv=3, expand=1)(torch.randn(2, 196, 320)).shape
    torch.Size([2, 196, 320])
    """

    _kept: _Kept | None = None

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ):
        super().__init__()
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "dt_rank": dt_rank}
        for name, size in sizes.items():
            if name == "dt_rank" and size == "auto":
                continue
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"MambaVisionMixer: {name} must be an integer >= 1, got {size!r}")
        inner = int(expand * d_model)
        if isinstance(dt_rank, str):
            dt_rank = math.ceil(d_model / 16)
        if inner < 2 or inner % 2:
            raise ValueError(
                "MambaVisionMixer: expand * d_model must be even, its halves being the two "
                f"branches, got {expand} * {d_model} = {inner}"
            )
        if dt_init not in ("random", "constant"):
            raise ValueError(
                f"MambaVisionMixer: dt_init must be 'random' or 'constant', got {dt_init!r}"
            )
        if not 0 < dt_min <= dt_max:
            raise ValueError(
                f"MambaVisionMixer: 0 < dt_min <= dt_max must hold, got {dt_min} and {dt_max}"
            )
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.dt_rank, self.backend = dt_rank, backend
        dim = inner // 2
        made: dict[str, Any] = {"device": device, "dtype": dtype}

        self.in_proj = nn.Linear(d_model, inner, bias=bias, **made)
        self.x_proj = nn.Linear(dim, dt_rank + 2 * d_state, bias=False, **made)
        self.dt_proj = nn.Linear(dt_rank, dim, bias=True, **made)
        # Modules for the sake of their parameters' names; the operator convolves.
        self.conv1d_x = nn.Conv1d(dim, dim, d_conv, groups=dim, bias=False, **made)
        self.conv1d_z = nn.Conv1d(dim, dim, d_conv, groups=dim, bias=False, **made)
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **made)

        with torch.no_grad():
            scale = dt_scale / math.sqrt(dt_rank)
            if dt_init == "constant":
                self.dt_proj.weight.fill_(scale)
            else:
                self.dt_proj.weight.uniform_(-scale, scale)
            self.dt_proj.bias.copy_(_initial_dt(dim, dt_min, dt_max, dt_init_floor, device))
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        states = torch.arange(1, d_state + 1, device=device, dtype=wide)
        self.A_log = nn.Parameter(states.log().repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim, device=device, dtype=wide))

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not isinstance(hidden_states, Tensor) or not hidden_states.is_floating_point():
            got = getattr(hidden_states, "dtype", type(hidden_states).__name__)
            raise TypeError(
                f"MambaVisionMixer: hidden_states must be a floating-point tensor, got {got}"
            )
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.d_model:
            raise ValueError(
                "MambaVisionMixer: hidden_states must have shape (batch, seqlen, d_model) = "
                f"(batch, seqlen, {self.d_model}), got {tuple(hidden_states.shape)}"
            )
        yz = mixer(
            self.in_proj(hidden_states),
            self.conv1d_x.weight,
            self.conv1d_z.weight,
            self.x_proj.weight,
            self.dt_proj.weight,
            *self.scan_parameters(),
            backend=self.backend,
        )
        return self.out_proj(yz)

    def scan_parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """(A, D, delta_bias) as the scan takes them, in at least float32.

        In evaluation mode without gradients they are computed once, and again when a parameter has
        become another tensor, lies elsewhere or was written to. A write through `.data`, which
        PyTorch does not count, is seen at the next `eval()`.
        """
        if self.training or torch.is_grad_enabled():
            return self._compute_scan_parameters()
        sources = (self.A_log, self.D, self.dt_proj.bias)
        stamp = _stamp(sources)
        if stamp is None:
            return self._compute_scan_parameters()
        kept = self._kept
        if kept and kept.stamp == stamp and all(map(is_, kept.sources, sources)):
            return kept.values
        # As ordinary tensors also under inference_mode, outside which they may be used next.
        with torch.inference_mode(False), torch.no_grad():
            values = self._compute_scan_parameters()
            # Tensors without memory are no result.
            if type(values[0]) is Tensor:
                self._kept = _Kept(stamp, sources, [x.detach() for x in sources], values)
        return values

    def _compute_scan_parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        A_log, D, bias = map(_at_least_float32, (self.A_log, self.D, self.dt_proj.bias))
        # The published models add the bias twice: in dt_proj, and again inside the softplus.
        return -torch.exp(A_log), D, 2 * bias

    def train(self, mode: bool = True) -> "MambaVisionMixer":
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None}

    def extra_repr(self) -> str:
        names = ("d_model", "d_state", "d_conv", "expand")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
