"""The operators: checked, differentiable, and the one place where a backend is chosen.

    selective_scan      y_t = <C_t, h_t> + D u_t,  h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t
    selective_scan_fn   the same, called as mamba-ssm's function of that name
    conv1d_silu         depthwise 'same' convolution over the sequence, then SiLU
    mixer               all of a MambaVision mixer that lies between in_proj and out_proj
    attention           softmax(q k^T / sqrt(head_dim)) v over the tokens of a short window
    add_layer_norm      x + gamma y and the layer norm of that
    norm_act            all that stands behind a convolution: bias, norm, activation, residual sum
    stem_conv           the first convolution of an image, with norm and ReLU

Two backends hold the same functions: `kernels` (Triton, imported when first used) and
`mambavision.torch_backend` (plain PyTorch). `backend="auto"` takes Triton for tensors on a GPU
where it can run, otherwise PyTorch; a backend asked for by name runs or raises RuntimeError.

Eager calls go straight to the backend's autograd function. Whatever traces instead of computing
(torch.compile, torch.export, fake and meta tensors) goes through the custom operators
`torch.ops.mambavision.{conv1d_silu,selective_scan,mixer}_{fwd,bwd}`, which call the same forward
and backward functions.

The last four have kernels for inference alone. Where something has to be differentiated, under
autocast, and in whatever traces, they are PyTorch's operations.

What holds for each of the others: the output has the first argument's dtype, each gradient its
argument's; softplus, exp, states and sums are float32, float64 where the first argument is, unmoved
by autocast. Any strides are accepted; a Triton kernel copies what is not contiguous along its last
axis. Inputs are never modified, the bits are the same in every run, a second derivative raises.
ValueError for wrong shapes, sizes, devices and names, TypeError for wrong types and dtypes, before
any work.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import torch_backend
from .checks import (
    check_add_layer_norm,
    check_attention,
    check_conv1d_silu,
    check_mixer,
    check_norm_act,
    check_selective_scan,
    check_stem_conv,
)
from .torch_backend import work_dtype

__all__ = [
    "add_layer_norm", "attention", "conv1d_silu", "infers", "mixer", "norm_act", "selective_scan",
    "selective_scan_fn", "stem_conv",
]  # fmt: skip

BACKENDS = ("auto", "triton", "torch")


@cache
def _kernels() -> ModuleType | str:
    """The Triton kernels, or why they cannot be imported."""
    try:
        return import_module("mambavision.kernels")
    except ImportError as error:
        return f"it cannot be imported ({error})"


# Facts of the process, which torch.compile takes as constants instead of tracing an import.


@torch.compiler.assume_constant_result
def _triton_missing() -> str | None:
    kernels = _kernels()
    return kernels if isinstance(kernels, str) else None


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return bool(import_module("triton").knobs.runtime.interpret)


@torch.compiler.assume_constant_result
def _largest_dstate() -> int:
    return import_module("mambavision.kernels").MAX_DSTATE


@torch.compiler.assume_constant_result
def exporting() -> bool:
    """Whether torch.export is tracing."""
    # Asked while tracing, PyTorch 2.11 says yes within torch.compile, too
    return torch.compiler.is_exporting()


def _triton_refusal(device: torch.device, dstate: int, *tensors: Tensor | None) -> str | None:
    """Why the Triton kernels cannot serve this call, if so."""
    if (missing := _triton_missing()) is not None:
        return missing
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return (
            f"the tensors are on {device}, not on a GPU "
            "(on a CPU, kernels are interpreted where TRITON_INTERPRET=1 is set before the import)"
        )
    for x in tensors:
        if x is not None and (x.is_complex() or x.dtype == torch.float64):
            return f"the kernels compute in float32, got {str(x.dtype).removeprefix('torch.')}"
    if dstate > (largest := _largest_dstate()):
        return f"the kernels hold at most {largest} states per channel, got dstate = {dstate}"
    return None


def _choose(op: str, backend: str, dstate: int, *tensors: Tensor | None) -> str:
    """'triton' or 'torch'."""
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    first = tensors[0]
    assert first is not None
    device = first.device
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    refusal = _triton_refusal(device, dstate, *tensors)
    if refusal is None:
        return "triton"
    if backend == "auto":
        return "torch"
    raise RuntimeError(f"{op}: backend='triton' cannot run: {refusal}")


def _module(backend: str) -> ModuleType:
    return cast(ModuleType, _kernels()) if backend == "triton" else torch_backend


def _call(tensors: Sequence[Any], backend: str) -> tuple[Any, ...] | None:
    """All that checks and the choice of a backend depend on, where tensors are plain ones."""
    key: list[Any] = [backend]
    for x in tensors:
        if x is None:
            key.append(None)
        elif type(x) is Tensor or type(x) is torch.nn.Parameter:
            key.append(x.shape)
            key.append(x.dtype)
            key.append(x.device)
        else:
            return None
    return tuple(key)


# The backend of calls that passed the checks. To ask again costs more than all else that Python
# does for a call, and a model asks the same few questions in every step.
_settled: dict[tuple[Any, ...], ModuleType] = {}


def _traced(x: Tensor) -> bool:
    """Whether operators are being recorded, or run without values, instead of computed."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or x.is_meta
        or is_in_torch_dispatch_mode()
    )


def _save_states(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow. An exported graph computes no states for one."""
    if exporting() or not torch.is_grad_enabled():
        return False
    return any(x is not None and x.requires_grad for x in tensors)


# The operators as the compiler sees them: opaque, with the shapes of what they return. Each output
# is contiguous, and what would be None is left out of the list of gradients.


def _op(name: str) -> Callable[..., Any]:
    return torch.library.custom_op(f"mambavision::{name}", mutates_args=())


def _given(results: tuple[Tensor | None, ...]) -> list[Tensor]:
    """In memory of their own, as an operator's results have to be."""
    given = [x.contiguous() for x in results if x is not None]
    seen: set[int] = set()
    for i, x in enumerate(given):
        memory = x.untyped_storage().data_ptr()
        if memory in seen:
            given[i] = x.clone()
        seen.add(memory)
    return given


def _back(grads: list[Tensor], arguments: Sequence[Any]) -> list[Tensor | None]:
    """The gradients under the arguments they belong to."""
    rest = iter(grads)
    return [next(rest) if isinstance(x, Tensor) else None for x in arguments]


def _like(*arguments: Tensor | None) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in arguments if x is not None]


def _state_dtype(u: Tensor, A: Tensor) -> torch.dtype:
    dtype = work_dtype(u)
    return dtype.to_complex() if A.is_complex() else dtype


@_op("conv1d_silu_fwd")
def _conv1d_silu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: bool, backend: str
) -> Tensor:
    return _module(backend).conv1d_silu_fwd(x, weight, bias, activation)


@_conv1d_silu_fwd.register_fake
def _(x, weight, bias, activation, backend):
    return x.new_empty(x.shape)


@_op("conv1d_silu_bwd")
def _conv1d_silu_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: bool, backend: str
) -> list[Tensor]:
    return _given(_module(backend).conv1d_silu_bwd(dy, x, weight, bias, activation))


@_conv1d_silu_bwd.register_fake
def _(dy, x, weight, bias, activation, backend):
    return _like(x, weight, bias)


def _conv1d_silu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _conv1d_silu_autograd(ctx, dy):
    inputs = ctx.saved_tensors
    return *_back(_conv1d_silu_bwd(dy, *inputs, *ctx.options), inputs), None, None


_conv1d_silu_fwd.register_autograd(_conv1d_silu_autograd, setup_context=_conv1d_silu_setup)


@_op("selective_scan_fwd")
def _selective_scan_fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, delta_softplus: bool, reverse: bool,
    save_states: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _module(backend).selective_scan_fwd(
        u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, save_states
    )


@_selective_scan_fwd.register_fake
def _(
    u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, save_states,
    backend,
):  # fmt: skip
    (batch, seqlen, dim), dstate = u.shape, A.shape[1]
    dtype = _state_dtype(u, A)
    shape = _module(backend).states_shape(batch, seqlen, dim, dstate) if save_states else (0,)
    last_state = u.new_empty(batch, dim, dstate, dtype=dtype)
    return u.new_empty(u.shape), last_state, u.new_empty(shape, dtype=dtype)


@_op("selective_scan_bwd")
def _selective_scan_bwd(
    dy: Tensor, dlast_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
    initial_state: Tensor | None, states: Tensor, delta_softplus: bool, reverse: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    module = _module(backend)
    if not states.numel():
        states = module.selective_scan_fwd(*inputs, delta_softplus, reverse, True)[2]
    return _given(
        module.selective_scan_bwd(dy, dlast_state, *inputs, states, delta_softplus, reverse)
    )


@_selective_scan_bwd.register_fake
def _(
    dy, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, states, delta_softplus,
    reverse, backend,
):  # fmt: skip
    return _like(u, delta, A, B, C, D, z, delta_bias, initial_state)


def _selective_scan_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9], output[2])
    ctx.options = (*inputs[9:11], inputs[12])
    ctx.set_materialize_grads(False)


def _selective_scan_autograd(ctx, dy, dlast_state, _):
    *inputs, states = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    grads = _selective_scan_bwd(dy, dlast_state, *inputs, states, *ctx.options)
    return *_back(grads, inputs), None, None, None, None


_selective_scan_fwd.register_autograd(_selective_scan_autograd, setup_context=_selective_scan_setup)


@_op("mixer_fwd")
def _mixer_fwd(
    xz: Tensor, conv_x_weight: Tensor, conv_z_weight: Tensor, x_proj_weight: Tensor,
    dt_proj_weight: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor, conv_x_bias: Tensor | None,
    conv_z_bias: Tensor | None, save_states: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _module(backend).mixer_fwd(
        xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
        conv_x_bias, conv_z_bias, save_states,
    )  # fmt: skip


@_mixer_fwd.register_fake
def _(
    xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
    conv_x_bias, conv_z_bias, save_states, backend,
):  # fmt: skip
    (batch, seqlen, _), (dim, dt_rank), dstate = xz.shape, dt_proj_weight.shape, A.shape[1]
    keeps = save_states and backend == "torch"  # the kernels compute the states again
    shape = torch_backend.states_shape(batch, seqlen, dim, dstate) if keeps else (0,)
    dtype = work_dtype(xz)
    BC = xz.new_empty(batch, seqlen, 2 * dstate, dtype=dtype)
    dt_low = xz.new_empty(batch, seqlen, dt_rank)
    return xz.new_empty(xz.shape), dt_low, BC, xz.new_empty(shape, dtype=dtype)


@_op("mixer_bwd")
def _mixer_bwd(
    dyz: Tensor, xz: Tensor, conv_x_weight: Tensor, conv_z_weight: Tensor, x_proj_weight: Tensor,
    dt_proj_weight: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor, conv_x_bias: Tensor | None,
    conv_z_bias: Tensor | None, dt_low: Tensor, BC: Tensor, states: Tensor, backend: str,
) -> list[Tensor]:  # fmt: skip
    inputs = (
        xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
        conv_x_bias, conv_z_bias,
    )  # fmt: skip
    module = _module(backend)
    if backend == "torch" and not states.numel():
        states = module.mixer_fwd(*inputs, True)[3]
    return _given(module.mixer_bwd(dyz, *inputs, dt_low, BC, states))


@_mixer_bwd.register_fake
def _(
    dyz, xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
    conv_x_bias, conv_z_bias, dt_low, BC, states, backend,
):  # fmt: skip
    return _like(
        xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
        conv_x_bias, conv_z_bias,
    )  # fmt: skip


def _mixer_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:10], *output[1:])
    ctx.backend = inputs[11]
    ctx.set_materialize_grads(False)


def _mixer_autograd(ctx, dyz, *_):
    if dyz is None:
        return (None,) * 12
    grads = _mixer_bwd(dyz, *ctx.saved_tensors, ctx.backend)
    return *_back(grads, ctx.saved_tensors[:10]), None, None


_mixer_fwd.register_autograd(_mixer_autograd, setup_context=_mixer_setup)


# The public operators


def _scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, return_last_state, reverse,
    backend,
):  # fmt: skip
    """y, or (y, last_state), of checked arguments."""
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if _traced(u):
        save_states = _save_states(*inputs)
        options = (delta_softplus, reverse, save_states, backend)
        y, last_state, _ = _selective_scan_fwd(*inputs, *options)
        return (y, last_state) if return_last_state else y
    return _module(backend).selective_scan(
        u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
        initial_state=initial_state, return_last_state=return_last_state, reverse=reverse,
    )  # fmt: skip


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    initial_state: Tensor | None = None, return_last_state: bool | None = False,
    reverse: bool = False, backend: str = "auto",
) -> Any:  # fmt: skip
    """The selective scan, channel-last: y, or (y, last_state) with `return_last_state`.

        dt_t = softplus(delta_t + delta_bias)           (or without softplus)
        h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t       h_{-1} = initial_state or 0
        y_t  = <C_t, h_t> + D u_t                       (times silu(z_t) where z is given)

    u, delta, z, y are (batch, seqlen, dim); A is (dim, dstate); B and C are (batch, seqlen,
    dstate), (batch, seqlen, groups, dstate), where channel i uses group i // (dim // groups), or
    constant, (dim, dstate); D and delta_bias are (dim,); states are (batch, dim, dstate).
    `reverse` scans from the end: initial_state enters at the last position, and last_state is the
    state after position 0.

    Any float dtypes, mixed as they come. y has u's dtype; last_state is float32, or float64 where
    u is. A complex A takes complex B and C, y = 2 Re <C, h> without conjugation, and has
    a complex last_state. Triton serves real float32, float16, bfloat16 and dstate up to 64.
    Gradients reach every tensor argument, initial_state included, also through last_state.

    Raises ValueError for shapes, sizes, devices and an unknown backend, TypeError for types and
    dtypes, RuntimeError where backend="triton" cannot run.

    Source: Gu and Dao, arXiv 2312.00752.

    >>> u, delta = torch.randn(2, 196, 160), torch.randn(2, 196, 160)
    >>> A, B, C = -torch.rand(160, 8), torch.randn(2, 196, 8), torch.randn(2, 196, 8)
    >>> selective_scan(u, delta, A, B, C, delta_softplus=True).shape
    torch.Size([2, 196, 160])
    """
    check_selective_scan(
        "selective_scan", False, u, delta, A, B, C, D, z, delta_bias, initial_state,
        delta_softplus=delta_softplus, return_last_state=return_last_state, reverse=reverse,
    )  # fmt: skip
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    backend = _choose("selective_scan", backend, A.shape[1], *tensors)
    return _scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, return_last_state,
        reverse, backend,
    )  # fmt: skip


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    return_last_state: bool | None = False,
) -> Any:  # fmt: skip
    """`selective_scan` as mamba-ssm's function of this name is called: time on the last axis.

    u, delta, z, y are (batch, dim, seqlen); B and C are (batch, dstate, seqlen), (batch, groups,
    dstate, seqlen) or constant, (dim, dstate); A, D, delta_bias, last_state (batch, dim, dstate)
    and everything else as in `selective_scan`. With a complex A, B and C over time are real with a
    last axis of 2 * seqlen, real and imaginary parts interleaved; constant ones are complex.

    The layout costs copies: the scan itself is channel-last, and y is a transposed view.

    Source: Gu and Dao, arXiv 2312.00752; the interface: github.com/state-spaces/mamba.

    >>> u, delta = torch.randn(2, 160, 196), torch.rand(2, 160, 196)
    >>> A, B, C = -torch.rand(160, 8), torch.randn(2, 8, 196), torch.randn(2, 8, 196)
    >>> selective_scan_fn(u, delta, A, B, C, return_last_state=True)[1].shape
    torch.Size([2, 160, 8])
    """
    op = "selective_scan_fn"
    check_selective_scan(
        op, True, u, delta, A, B, C, D, z, delta_bias, None,
        delta_softplus=delta_softplus, return_last_state=return_last_state,
    )  # fmt: skip

    def channel_last(x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x
        if A.is_complex() and x is not u and x is not delta and x is not z:
            dtype = work_dtype(u)
            x = torch.complex(x[..., 0::2].to(dtype), x[..., 1::2].to(dtype))
        return x.transpose(1, 2) if x.dim() == 3 else x.permute(0, 3, 1, 2)

    backend = _choose(op, "auto", A.shape[1], u, delta, A, B, C, D, z, delta_bias)
    results = _scan(
        channel_last(u), channel_last(delta), A, channel_last(B), channel_last(C), D,
        None if z is None else channel_last(z), delta_bias, delta_softplus, None,
        return_last_state, False, backend,
    )  # fmt: skip
    if return_last_state:
        y, last_state = results
        return y.transpose(1, 2), last_state
    return results.transpose(1, 2)


def conv1d_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    activation: bool = True, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Depthwise convolution over the sequence with 'same' padding, then SiLU.

        y_t = silu(bias + sum_k weight_k x_{t + k - left})      left = (width - 1) // 2

    x, y are (batch, seqlen, dim), and x is 0 outside the sequence; weight is (dim, width) or
    (dim, 1, width), of any width; bias is (dim,). `activation=False` leaves SiLU out.

    Any float dtypes; y has x's. Triton serves float32, float16 and bfloat16. Raises as
    `selective_scan` does. Source: the convolution of the mixer, arXiv 2407.08083, section 3.

    >>> conv1d_silu(torch.randn(2, 196, 160), torch.randn(160, 3)).shape
    torch.Size([2, 196, 160])
    """
    check_conv1d_silu(x, weight, bias, activation)
    backend = _choose("conv1d_silu", backend, 1, x, weight, bias)
    if _traced(x):
        return _conv1d_silu_fwd(x, weight, bias, activation, backend)
    return _module(backend).conv1d_silu(x, weight, bias, activation=activation)


def mixer(
    xz: Tensor, conv_x_weight: Tensor, conv_z_weight: Tensor, x_proj_weight: Tensor,
    dt_proj_weight: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor, *,
    conv_x_bias: Tensor | None = None, conv_z_bias: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Everything in a MambaVision mixer between in_proj and out_proj.

        x, z  = halves of xz, each through its conv1d_silu
        dt_low, B, C = split(x x_proj_weight^T, [dt_rank, dstate, dstate])
        yz    = [selective_scan(x, dt_low dt_proj_weight^T, A, B, C, D, delta_bias, softplus), z]

    xz, yz are (batch, seqlen, 2 dim); the convolutions' weights (dim, width) or (dim, 1, width), of
    one width, and biases (dim,); x_proj_weight (dt_rank + 2 dstate, dim); dt_proj_weight
    (dim, dt_rank); A (dim, dstate), negative; D (dim,); delta_bias (dim,) is all that is added
    inside the softplus.

    Any float dtypes; yz has xz's. Kept for the backward pass are xz, dt_low, B, C and, by the
    PyTorch backend, a few states.
    Triton serves float32, float16, bfloat16 and dstate up to 64. Raises as `selective_scan` does.
    Source: Hatamizadeh and Kautz, arXiv 2407.08083, section 3.

    >>> w, p, q = torch.randn(160, 3), torch.randn(36, 160), torch.randn(160, 20)
    >>> A, D, bias = -torch.rand(160, 8), torch.ones(160), torch.zeros(160)
    >>> mixer(torch.randn(2, 196, 320), w, w, p, q, A, D, bias).shape
    torch.Size([2, 196, 320])
    """
    inputs = (
        xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
        conv_x_bias, conv_z_bias,
    )  # fmt: skip
    traced = isinstance(xz, Tensor) and _traced(xz)
    call = None if traced else _call(inputs, backend)
    module = None if call is None else _settled.get(call)
    if module is None:
        check_mixer(*inputs)
        backend = _choose("mixer", backend, A.shape[1], *inputs)
        if traced:
            return _mixer_fwd(*inputs, _save_states(*inputs), backend)[0]
        module = _module(backend)
        if call is not None:
            if len(_settled) > 4096:
                _settled.clear()
            _settled[call] = module
    return module.mixer(*inputs[:8], conv_x_bias=conv_x_bias, conv_z_bias=conv_z_bias)


# The operators of inference


@cache
def _inference_kernels(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    like = torch.empty(0, dtype=dtype, device=device)
    return _module("triton") if _choose("infers", backend, 1, like) == "triton" else None


def infers(backend: str, *tensors: Tensor | None) -> Any:
    """The kernels of inference where they serve, None elsewhere: tensors that are computed with at
    once, without autocast, none of which has to be differentiated, the first one of a device and
    dtype that Triton takes."""
    x = tensors[0]
    assert x is not None
    if backend == "torch" or _traced(x):
        return None
    if (backend == "auto" and x.device.type != "cuda") or torch.is_autocast_enabled(x.device.type):
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return None
    return _inference_kernels(backend, x.device, x.dtype)


def attention(qkv: Tensor, num_heads: int, *, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, head by head, over all tokens of a window.

    qkv is (batch, seqlen, 3 dim), columns in the order (q | k | v, head, head_dim), as one linear
    layer gives them; y is (batch, seqlen, dim), columns (head, head_dim).

    Any float dtype; y has qkv's. Without gradients Triton serves float16 and bfloat16, seqlen up to
    256 and head_dim up to 128 where the GPU has shared memory for such a window; everything else is
    PyTorch's scaled_dot_product_attention. Raises as `selective_scan` does.
    Source: Vaswani et al., arXiv 1706.03762.

    >>> attention(torch.randn(2, 49, 3 * 320), 8).shape
    torch.Size([2, 49, 320])
    """
    check_attention(qkv, num_heads)
    kernels = infers(backend, qkv)
    if kernels and kernels.attention_serves(qkv, num_heads):
        return kernels.attention(qkv, num_heads)
    return torch_backend.attention(qkv, num_heads)


def add_layer_norm(
    x: Tensor, y: Tensor | None, gamma: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float = 1e-5, *, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A residual sum and its layer norm: (s, n).

        s = x + gamma y                                        s = x where there is no y
        n = (s - mean(s)) / sqrt(var(s) + eps) weight + bias   mean and variance over dim

    x, y, s, n are (..., dim); gamma, which may be None, weight and bias (dim,).

    Any float dtypes; s and n have x's. Without gradients Triton serves float32, float16 and
    bfloat16. Raises as `selective_scan` does. Source: Ba et al., arXiv 1607.06450.

    >>> x, y, w = torch.randn(2, 49, 320), torch.randn(2, 49, 320), torch.ones(320)
    >>> s, n = add_layer_norm(x, y, None, w, torch.zeros(320))
    >>> torch.equal(s, x + y), n.shape
    (True, torch.Size([2, 49, 320]))
    """
    check_add_layer_norm(x, y, gamma, weight, bias)
    module = infers(backend, x, y, gamma, weight, bias) or torch_backend
    return module.add_layer_norm(x, y, gamma, weight, bias, eps)


def norm_act(
    x: Tensor, bias: Tensor | None = None, norm: Sequence[Any] | None = None, act: str = "none",
    gamma: Tensor | None = None, residual: Tensor | None = None, *, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """All that stands behind a convolution, in one pass over the map.

        a = (x + bias - mean) / sqrt(var + eps) weight + shift    a = x + bias without a norm
        y = residual + gamma act(a)

    x, residual and y are (batch, dim, height, width), channels-last where Triton serves; bias,
    gamma and the norm's statistics (dim,). `norm` is (mean, var, weight, shift, eps), of which
    weight and shift may be None; `act` is "none", "relu" or "gelu", the last in its tanh form.

    Any float dtypes; y has x's. Without gradients Triton serves float32, float16 and bfloat16.
    Raises as `selective_scan` does.

    >>> x = torch.randn(2, 80, 56, 56).to(memory_format=torch.channels_last)
    >>> norm_act(x, torch.zeros(80), None, "gelu", residual=x).shape
    torch.Size([2, 80, 56, 56])
    """
    check_norm_act(x, bias, norm, act, gamma, residual)
    statistics = () if norm is None else norm[:4]
    kernels = infers(backend, x, bias, *statistics, gamma, residual)
    if kernels and x.is_contiguous(memory_format=torch.channels_last):
        return kernels.norm_act(x, bias, norm, act, gamma, residual)
    return torch_backend.norm_act(x, bias, norm, act, gamma, residual)


def stem_conv(
    x: Tensor, W: Tensor, bias: Tensor | None = None, norm: Sequence[Any] | None = None, *,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The first convolution of an image, 3 x 3 with stride 2, with norm and ReLU.

        y = relu((conv(x) + bias - mean) / sqrt(var + eps) weight + shift)

    x is (batch, in_chans, height, width) of any strides, W (dim, in_chans, 3, 3), bias (dim,); y is
    (batch, dim, height / 2, width / 2), rounded up. `norm` is that of `norm_act`.

    Any float dtypes; y has x's. Without gradients Triton serves float16 and bfloat16, in_chans up
    to 7 and dim up to 128, y channels-last; everything else is PyTorch's conv2d. Raises as
    `selective_scan` does. Source: the stem of MambaVision, arXiv 2407.08083, section 3.

    >>> stem_conv(torch.randn(2, 3, 224, 224), torch.randn(32, 3, 3, 3)).shape
    torch.Size([2, 32, 112, 112])
    """
    check_stem_conv(x, W, bias, norm)
    statistics = () if norm is None else norm[:4]
    kernels = infers(backend, x, W, bias, *statistics)
    if kernels and kernels.stem_conv_serves(x, W):
        return kernels.stem_conv(x, W, bias, norm)
    return torch_backend.stem_conv(x, W, bias, norm)
