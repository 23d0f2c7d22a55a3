"""Whole models: images to logits.

Ours as it is and optimized for inference; the same model, weights and all, with the mixer as
published, eager and compiled; and peers of like size from timm. Ways and gate are in `ways.py`, the
models in `zoo.py`. Every way of ours passes the gate before it gets a time; a peer's logits have to
be finite.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _whole import Benchmark, Case, Found, Options, Prepared, by_model, results
from models import ours, peer
from torch import Tensor, nn
from ways import WAYS, Gate, Way, Wrong
from zoo import Model

PEER = Way("timm", "channels_last", lambda model, dtype: model, torch.channels_last)
# Compiling takes longer than all the rest: unless asked for, one model only, and on a GPU.
COMPILED = ("mamba_vision_T",)


def _wanted(model: Model, way: Way, options: Options) -> bool:
    if options.providers:
        return way.option in options.providers
    if way.option == "compiled":
        return options.device == "cuda" and model.name in COMPILED
    return way.default


def cases(options: Options) -> list[Case]:
    """What will be measured, in that order."""
    return [
        Case(model, way, dtype, batch)
        for model in options.models
        for way in ([PEER] if model.library == "timm" else WAYS)
        if _wanted(model, way, options)
        for dtype in options.dtypes
        for batch in options.batches
    ]


class _Peer:
    """A model of timm, brought to each case's dtype and layout."""

    def __init__(self, name: str, options: Options):
        self.model = peer(name, options.device, options.resolution).eval()

    def ready(self, case: Case) -> nn.Module:
        # LeViT keeps attention biases in the first dtype until it is trained again.
        return self.model.train().eval().to(dtype=case.dtype, memory_format=case.way.layout)

    def check(self, made: nn.Module, case: Case, options: Options) -> None:
        with torch.inference_mode():
            if not made(options.images(case, 2)).isfinite().all():
                raise Wrong("logits are not finite")


class _Ours:
    """One of our models, in the ways of the cases, each of which passes the gate."""

    def __init__(self, name: str, options: Options):
        self.model = ours(name, options.device).eval()
        self.gate: Gate | None = None

    def ready(self, case: Case) -> nn.Module:
        return case.way.make(self.model, case.dtype).eval()

    def check(self, made: nn.Module, case: Case, options: Options) -> None:
        if case.way.gated:
            if self.gate is None:
                self.gate = Gate(self.model, options.images(case, 2).float())
            self.gate.check(made, case.way, case.dtype, case.batch)


def _call(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return run


class _Models:
    """Prepares the cases of one model; neighbours that differ in the batch alone share a copy."""

    def __init__(self, model: Model, options: Options):
        self.model, self.options = model, options
        self.source: _Peer | _Ours | None = None
        self.made: nn.Module | None = None
        self.made_for: tuple[Way, torch.dtype] | None = None

    def prepare(self, case: Case) -> Prepared:
        if self.source is None:
            kind = _Peer if self.model.library == "timm" else _Ours
            self.source = kind(self.model.name, self.options)
        if self.made is None or self.made_for != (case.way, case.dtype):
            self.made = None
            self.made = self.source.ready(case)
            self.made_for = case.way, case.dtype
        self.source.check(self.made, case, self.options)
        run = _call(self.made, self.options.images(case, case.batch))
        return Prepared(case, run, graph=case.way.graph)


def measure(todo: Sequence[Case], options: Options) -> Iterator[Found]:
    """Every case with the measured part of its row."""
    for model, own in by_model(todo).items():
        models = _Models(model, options)
        yield from results(((case, partial(models.prepare, case)) for case in own), options)


BENCHMARK = Benchmark(
    op="backbone",
    direction="forward",
    doc=__doc__,
    providers=list(dict.fromkeys(way.option for way in (*WAYS, PEER))),
    gpu_models=["default"],
    gpu_batches=[128],
    gpu_dtype="float16",
    cpu_models=["mamba_vision_T", "swin_tiny_patch4_window7_224", "convnext_tiny"],
    cpu_batches=[1, 8],
    cases=cases,
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
