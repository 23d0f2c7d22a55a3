"""Training steps of whole models: forward, backward, AdamW.

Ours against the same model, weights and all, with the mixer as published. Weights stay float32;
float16 and bfloat16 run under autocast, float16 with a gradient scaler. Drop path is off, so that
every step computes the same. A way's gradients pass the gate of `ways.py` before it gets a time.
Besides times: memory at the peak, and what autograd keeps between forward and backward, parameters
not counted.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import _measure
import torch
import torch.nn.functional as F
from _whole import Benchmark, Case, Found, Options, Prepared, by_model, results
from models import ours
from torch import Tensor, nn
from ways import TRAINING_WAYS, TrainingGate


def cases(options: Options) -> list[Case]:
    """What will be measured, in that order."""
    return [
        Case(model, way, dtype, batch)
        for model in options.models
        if model.library != "timm"
        for way in TRAINING_WAYS
        if way.option in (options.providers or ("ours", "eager"))
        for dtype in options.dtypes
        for batch in options.batches
    ]


def forward(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    device = images.device.type
    with torch.autocast(device, dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
        return F.cross_entropy(model(images), labels)


def step_of(
    model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype
) -> Callable[[], None]:
    """One training step as a function."""
    device = next(model.parameters()).device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss()).backward()
        scaler.step(optimizer)
        scaler.update()

    return run


class _Models:
    """Prepares the cases of one model."""

    def __init__(self, name: str, options: Options):
        self.name, self.options = name, options
        self.source: nn.Module | None = None
        self.gate: TrainingGate | None = None

    def prepare(self, case: Case) -> Prepared:
        device = self.options.device
        if self.source is None or self.gate is None:
            self.source = ours(self.name, device, drop_path_rate=0.0).train()
            self.gate = TrainingGate(self.source, self.options.images(case, 2).float())
        model = case.way.make(self.source, torch.float32).train()
        self.gate.check(model, case.way, case.dtype)
        images = self.options.images(case, case.batch).float()
        labels = torch.arange(case.batch, device=device) % 10
        loss = partial(forward, model, images, labels, case.dtype)
        kept = _measure.saved_bytes(loss, model.parameters())
        # A gradient scaler asks the GPU whether to step: no graph holds that.
        return Prepared(case, step_of(model, loss, case.dtype), graph=False, saved_bytes=kept)


def measure(todo: Sequence[Case], options: Options) -> Iterator[Found]:
    """Every case with the measured part of its row."""
    for model, own in by_model(todo).items():
        models = _Models(model.name, options)
        yield from results(((case, partial(models.prepare, case)) for case in own), options)


BENCHMARK = Benchmark(
    op="train_step",
    direction="both",
    doc=__doc__,
    providers=list(dict.fromkeys(way.option for way in TRAINING_WAYS)),
    gpu_models=["mamba_vision_T", "mamba_vision_B", "mamba_vision_L"],
    gpu_batches=[128],
    gpu_dtype="bfloat16",
    cpu_models=["mamba_vision_T"],
    cpu_batches=[4],
    cases=cases,
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
