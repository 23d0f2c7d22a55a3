"""The first call, paid ahead: compiling every Triton kernel that a model needs.

Triton compiles a kernel when it first meets a set of types, sizes and constants, some seconds for
each, in the middle of whatever runs then. Which sets a model needs is found by passing images
without memory through it and noting what each mixer is given, in evaluation mode each other part
that has kernels, too. Then one of each kind runs on such input, kinds side by side in threads:
compiling lets other threads run.
"""

import copy
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

from .blocks import Attention, Block, ConvBlock, Stem, batch_statistics_kept
from .inference import PreparedMixer
from .mixer import MambaVisionMixer

__all__ = ["Call", "inference_calls", "mixer_calls", "warmup"]

MIXERS = (MambaVisionMixer, PreparedMixer)


@dataclass(frozen=True)
class Call:
    """One kind of mixer, or of another part, in a model and what it is given: tokens (batch x
    windows, seqlen, d_model), or maps."""

    module: nn.Module
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False

    def __str__(self) -> str:
        kind = "" if isinstance(self.module, MIXERS) else f"{type(self.module).__name__}: "
        if len(self.shape) != 3:
            return f"{kind}{tuple(self.shape)}"
        batch, seqlen, d_model = self.shape
        return f"{kind}d_model {d_model}, seqlen {seqlen}, batch {batch}"


def _own_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Parts that agree in this run the same kernels."""
    held = (*module.named_parameters(), *module.named_buffers())
    tensors = [(name, x.shape, x.dtype, x.requires_grad) for name, x in held]
    return type(module), module.training, *tensors


def _around(block: Block) -> Block:
    """What a block does around its mixer and its MLP, which are other parts or have no kernels."""
    shell = copy.copy(block)
    shell._modules = {**block._modules, "mixer": nn.Identity(), "mlp": nn.Identity()}
    return shell


def _calls(
    model: nn.Module, kinds: tuple[type, ...], input_size: int | tuple[int, int], batch_size: int
) -> list[Call]:
    """The different calls of parts of these kinds; nothing is computed."""
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    found: dict[tuple[Any, ...], Call] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        (x,) = inputs
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        part = _around(module) if isinstance(module, Block) else module
        call = Call(part, tuple(x.shape), x.dtype, channels_last)
        found.setdefault((call.shape, call.dtype, call.channels_last, _kind(part)), call)

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, kinds)]
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


def mixer_calls(
    model: nn.Module, input_size: int | tuple[int, int] = 224, batch_size: int = 1
) -> list[Call]:
    """The different calls of mixers when a model sees images of that size; nothing is computed.

    >>> for call in mixer_calls(create_model("mamba_vision_T"), 224):  # doctest: +SKIP
    ...     print(call)
    d_model 320, seqlen 196, batch 1
    d_model 640, seqlen 49, batch 1
    """
    return _calls(model, MIXERS, input_size, batch_size)


def inference_calls(
    model: nn.Module, input_size: int | tuple[int, int] = 224, batch_size: int = 1
) -> list[Call]:
    """The same of the other parts that have kernels: stem, convolution blocks, attention and, of
    token blocks, the norms."""
    return _calls(model, (Stem, ConvBlock, Block, Attention), input_size, batch_size)


def _run(call: Call, device: torch.device, dtype: torch.dtype) -> None:
    """The part forward and, in training mode, backward; no gradient is added to a parameter."""
    module = call.module
    layout = torch.channels_last if call.channels_last else torch.contiguous_format
    x = torch.zeros(call.shape, dtype=call.dtype, device=device).to(memory_format=layout)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != call.dtype)
    # Threads begin with the defaults of all these.
    with torch.cuda.device_of(x), torch.set_grad_enabled(module.training), autocast:
        x.requires_grad_(module.training)
        out = module.forward(x)
        if module.training:
            trained = [x, *(p for p in module.parameters() if p.requires_grad)]
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


def _nothing(device: torch.device, calls: Sequence[Call]) -> str | None:
    """Why there is nothing to compile, if so."""
    if not calls:
        return "the model has no mixers of this package"
    if device.type != "cuda":
        return f"on {device.type} mixers run in plain PyTorch"
    if find_spec("triton") is None:
        return "Triton is not installed, mixers run in plain PyTorch"
    if all(getattr(call.module, "backend", "auto") == "torch" for call in calls):
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
    if not model.training:
        calls += inference_calls(model, input_size, batch_size)
    seconds: dict[str, float] = {}
    begun = time.perf_counter()

    def done(kernel: str, took: float) -> None:
        seconds[kernel] = seconds.get(kernel, 0.0) + took
        line.show(f"{kernel}, {took:.1f} s")

    line.show(f"{len(calls)} parts")
    with _compilations(done), ThreadPoolExecutor(os.cpu_count()) as threads:
        for finished in [threads.submit(_run, call, device, dtype) for call in calls]:
            finished.result()
    torch.cuda.synchronize(device)
    elapsed = time.perf_counter() - begun
    line.show(f"{len(seconds)} kernels for {len(calls)} parts in {elapsed:.1f} s", end=True)
    return seconds
