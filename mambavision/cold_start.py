"""The first call, paid ahead: compiling every Triton kernel that a model needs.

Triton compiles a kernel when it first meets a set of types, sizes and constants, some seconds for
each, in the middle of whatever runs then. Which sets a model needs is found by passing images
without memory through it and noting what each mixer is given. Then one mixer of each kind runs on
such input, kinds side by side in threads: compiling lets other threads run.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .blocks import batch_statistics_kept
from .inference import PreparedMixer
from .mixer import MambaVisionMixer

__all__ = ["MixerCall", "mixer_calls", "warmup"]


@dataclass(frozen=True)
class MixerCall:
    """One kind of mixer in a model and what it is given, (batch x windows, seqlen, d_model)."""

    mixer: nn.Module
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        batch, seqlen, d_model = self.shape
        return f"d_model {d_model}, seqlen {seqlen}, batch {batch}"


def _own_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _kind(mixer: nn.Module) -> tuple[Any, ...]:
    """Mixers that agree in this run the same kernels."""
    held = (*mixer.named_parameters(), *mixer.named_buffers())
    tensors = [(name, x.shape, x.dtype, x.requires_grad) for name, x in held]
    return type(mixer), mixer.training, *tensors


def mixer_calls(
    model: nn.Module, input_size: int | tuple[int, int] = 224, batch_size: int = 1
) -> list[MixerCall]:
    """The different calls of mixers when a model sees images of that size; nothing is computed.

    >>> for call in mixer_calls(create_model("mamba_vision_T"), 224):  # doctest: +SKIP
    ...     print(call)
    d_model 320, seqlen 196, batch 1
    d_model 640, seqlen 49, batch 1
    """
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    found: dict[tuple[Any, ...], MixerCall] = {}

    def note(mixer: nn.Module, inputs: tuple[Any, ...]) -> None:
        batch, seqlen, d_model = inputs[0].shape
        call = MixerCall(mixer, (batch, seqlen, d_model), inputs[0].dtype)
        found.setdefault((call.shape, call.dtype, _kind(mixer)), call)

    mixers = [m for m in model.modules() if isinstance(m, MambaVisionMixer | PreparedMixer)]
    hooks = [m.register_forward_pre_hook(note) for m in mixers]
    like = next(p for p in model.parameters() if p.is_floating_point())
    # Without the head, whose CUDA graph or compiled form has no use for images without memory.
    run = getattr(model, "forward_stages", model)
    try:
        with (
            # They are numbers of their own also there, and written to.
            batch_statistics_kept(model),
            FakeTensorMode(allow_non_fake_inputs=True),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            channels = getattr(getattr(model, "model", model), "in_chans", 3)
            shape = (batch_size, channels, height, width)
            run(torch.empty(shape, dtype=like.dtype, device=like.device))
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def _run(call: MixerCall, device: torch.device, dtype: torch.dtype) -> None:
    """The mixer forward and, in training mode, backward; no gradient is added to a parameter."""
    mixer = call.mixer
    x = torch.zeros(call.shape, dtype=call.dtype, device=device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != call.dtype)
    # Threads begin with the defaults of all these.
    with torch.cuda.device_of(x), torch.set_grad_enabled(mixer.training), autocast:
        x.requires_grad_(mixer.training)
        out = mixer.forward(x)
        if mixer.training:
            trained = [x, *(p for p in mixer.parameters() if p.requires_grad)]
            torch.autograd.grad(out, trained, torch.zeros_like(out))


@contextmanager
def _compilations(done: Callable[[str, float], None]) -> Iterator[None]:
    """Inside, `done` is told each kernel that was compiled, and the seconds it took."""
    runtime = import_module("triton").knobs.runtime
    before, after = runtime.jit_cache_hook, runtime.jit_post_compile_hook
    begun = threading.local()

    def begin(**facts: Any) -> Any:
        begun.at = time.perf_counter()
        return before(**facts) if before else None

    def end(**facts: Any) -> Any:
        done(facts["fn"].name.rpartition(".")[2].strip("_"), time.perf_counter() - begun.at)
        return after(**facts) if after else None

    runtime.jit_cache_hook, runtime.jit_post_compile_hook = begin, end
    try:
        yield
    finally:
        runtime.jit_cache_hook, runtime.jit_post_compile_hook = before, after


class _Line:
    """What is going on, in one line of the terminal, or at the end where there is none."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()

    def show(self, text: str, end: bool = False) -> None:
        if self.live:
            print(f"\r\x1b[Kwarmup: {text}", end="\n" if end else "", file=sys.stderr, flush=True)
        elif end:
            print(f"warmup: {text}", file=sys.stderr)


def _nothing(device: torch.device, calls: Sequence[MixerCall]) -> str | None:
    """Why there is nothing to compile, if so."""
    if not calls:
        return "the model has no mixers of this package"
    if device.type != "cuda":
        return f"on {device.type} mixers run in plain PyTorch"
    if find_spec("triton") is None:
        return "Triton is not installed, mixers run in plain PyTorch"
    if all(getattr(call.mixer, "backend", "auto") == "torch" for call in calls):
        return "its mixers have backend='torch'"
    return None


def warmup(
    model: nn.Module,
    input_size: int | tuple[int, int] = 224,
    dtype: torch.dtype | None = None,
    *,
    batch_size: int = 1,
) -> dict[str, float]:
    """Compiles the kernels that a model needs for images of that size; seconds by kernel.

    `input_size` is (height, width), or one number for both. `dtype` is that of the activations: the
    model's own by default, float16 or bfloat16 for a float32 model under autocast. A model in
    training mode has its backward pass compiled too, one in evaluation mode runs without gradients.
    Kernels are chosen by size, so `batch_size` should be the one that follows, give or take; it
    takes memory for one mixer's activations, and parameters, their gradients and statistics are
    left alone. What Triton finds in its cache on disk takes no time and is listed all the same.

    A line on stderr says what is being compiled. On a CPU, or without Triton, it says that there is
    nothing to compile, and the result is empty. Raises ValueError for sizes and a dtype that the
    model cannot have.

    >>> warmup(create_model("mamba_vision_T").cuda(), 224, torch.float16)  # doctest: +SKIP
    """
    sizes = (input_size,) if isinstance(input_size, int) else tuple(input_size)
    if len(sizes) > 2 or not all(isinstance(size, int) and size >= 32 for size in sizes):
        raise ValueError(
            f"warmup: input_size must be one or two integers of at least 32, got {input_size!r}"
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"warmup: batch_size must be an integer >= 1, got {batch_size!r}")
    own, line = _own_dtype(model), _Line()
    dtype = own if dtype is None else dtype
    if dtype != own and dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"warmup: dtype must be the model's {own} or, for autocast, torch.float16 or "
            f"torch.bfloat16, got {dtype}"
        )
    device = next(model.parameters()).device
    calls = mixer_calls(model, input_size, batch_size)
    if reason := _nothing(device, calls):
        line.show(f"nothing to compile: {reason}", end=True)
        return {}
    seconds: dict[str, float] = {}
    begun = time.perf_counter()

    def done(kernel: str, took: float) -> None:
        seconds[kernel] = seconds.get(kernel, 0.0) + took
        line.show(f"{kernel}, {took:.1f} s")

    line.show(f"{len(calls)} mixers")
    with _compilations(done), ThreadPoolExecutor(os.cpu_count()) as threads:
        for finished in [threads.submit(_run, call, device, dtype) for call in calls]:
            finished.result()
    torch.cuda.synchronize(device)
    elapsed = time.perf_counter() - begun
    line.show(f"{len(seconds)} kernels for {len(calls)} mixers in {elapsed:.1f} s", end=True)
    return seconds
