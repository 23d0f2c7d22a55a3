"""`mambavision demo`: from nothing to a trained model and a report to look at.

First the operators are held against their references on this machine; where one disagrees, nothing
is trained. Then a small MambaVision learns the 1,797 handwritten digits of scikit-learn, 8x8 each,
enlarged to 64x64 so that the mixers of stage 3 see 16 tokens. A fifth of the images, the same share
of every digit, is held out. Last the report is written, in a second, when all of it is known: an
interrupted run leaves nothing behind.
"""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import __version__
from .errors import CommandError
from .model import MambaVision
from .selfcheck import OpCheck, check_ops

__all__ = ["demo", "small_model"]

EXTRAS = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}
SIZE = 64
HELD_OUT = 0.2
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05


def small_model() -> MambaVision:
    """For one-channel images of 64x64: its stages see 16x16, 8x8, 4x4 and 2x2 positions."""
    return MambaVision(
        dim=16,
        in_dim=16,
        depths=(1, 1, 4, 2),
        window_size=(8, 8, 4, 2),
        mlp_ratio=2,
        num_heads=(1, 1, 2, 4),
        drop_path_rate=0.0,
        in_chans=1,
        num_classes=10,
    )


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 64, 64) in 0..1 and their digits."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int, device: torch.device) -> Digits:
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    data = load()
    train, test = train_test_split(
        range(len(data.target)), test_size=HELD_OUT, stratify=data.target, random_state=seed
    )
    images = torch.as_tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1).to(device)
    labels = torch.as_tensor(data.target, dtype=torch.long).to(device)
    return Digits(images[train], labels[train], images[test], labels[test])


def augmented(images: Tensor, draw: torch.Generator) -> Tensor:
    """Every image turned, scaled and shifted a little, each by its own amount."""
    n = len(images)

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(n, generator=draw) - 1) * limit

    angle, scale = uniform(0.2), 1 + uniform(0.1)  # radians, factor
    shift = torch.stack([uniform(0.15), uniform(0.15)], dim=-1)  # of half the width
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], dim=1)
    affine = torch.cat([turn, shift[..., None]], dim=-1).to(images.device)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@torch.no_grad()
def predict(model: MambaVision, images: Tensor) -> Tensor:
    """Probabilities (n, classes)."""
    model.eval()
    return torch.cat([model(part).softmax(-1) for part in images.split(256)])


def batch_sizes(count: int, batch_size: int) -> list[int]:
    """`count` images in batches; the last takes the rest. Batch norm forbids a batch of one."""
    full, rest = divmod(count, batch_size)
    sizes = [batch_size] * full
    if rest > 1 or not full:
        return [*sizes, rest]
    return [*sizes[:-1], sizes[-1] + rest]


def train(
    model: MambaVision,
    digits: Digits,
    epochs: int,
    batch_size: int,
    seed: int,
    after_step: Callable[[float], None],
    after_epoch: Callable[[float, float, float], None],
) -> None:
    """AdamW under a one-cycle schedule; the mixers' A and D and the norms carry no weight decay.

    Calls `after_step(loss)`, and `after_epoch(loss, train accuracy, test accuracy)`.
    """
    count = len(digits.train_images)
    sizes = batch_sizes(count, batch_size)
    optimizer = torch.optim.AdamW(model.param_groups(WEIGHT_DECAY), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=epochs * len(sizes), pct_start=0.2
    )
    draw = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        model.train()
        total, right = 0.0, 0
        for chosen in torch.randperm(count, generator=draw).split(sizes):
            chosen = chosen.to(digits.train_images.device)
            labels = digits.train_labels[chosen]
            logits = model(augmented(digits.train_images[chosen], draw))
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(chosen)
            right += int((logits.argmax(-1) == labels).sum())
            after_step(float(loss.detach()))
        predicted = predict(model, digits.test_images).argmax(-1)
        accuracy = float((predicted == digits.test_labels).float().mean())
        after_epoch(total / count, right / count, accuracy)


def table(checks: Iterable[OpCheck]) -> Iterable[str]:
    """The lines of the operators' table, each as soon as its row is known."""
    yield (
        f"{'operator':15}{'backend':9}{'dtype':9}{'largest error':>14}{'allowed':>10}"
        f"{'fused':>11}{'reference':>19}{'eager PyTorch':>19}"
    )
    for check in checks:
        times = f"{1e3 * check.seconds:8.2f} ms"
        for other in (check.seconds_reference, check.seconds_eager):
            times += f"{1e3 * other:8.2f} ms {other / check.seconds:6.1f}x"
        verdict = "" if check.ok else f"   DISAGREES in {check.tensor}"
        yield (
            f"{check.op:15}{check.backend:9}{check.dtype:9}{check.error:14.1e}"
            f"{check.allowed:10.1e}{times}{verdict}"
        )


def choose_device(name: str) -> torch.device:
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise CommandError(f"--device {name}: PyTorch sees no such device on this machine", 2)
    return torch.device(name)


def check_output(folder: Path) -> None:
    """Says before the work, not after it, that the report could not be written."""
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--output {folder}: is a file, a folder is needed", 2)
    parent = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CommandError(f"--output {folder}: cannot write into {parent}", 2)


def facts(device: torch.device, seed: int, command: str) -> dict[str, str]:
    """What another person needs to get the same numbers."""
    versions = {"mambavision-triton": __version__, "torch": torch.__version__}
    if find_spec("triton"):
        versions["triton"] = metadata.version("triton")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}; host {machine}"
    return {
        "command": command,
        "seed": str(seed),
        "device": f"{device.type} ({machine})",
        "system": f"{platform.system()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def demo(
    device: str, output: Path, epochs: int, batch_size: int, seed: int, command: str
) -> None:
    """Checks, trains, writes the report into `output` and prints its path last.

    Raises `CommandError` for what stops it.
    """
    missing = [package for module, package in EXTRAS.items() if not find_spec(module)]
    if missing:
        raise CommandError(
            f"{', '.join(missing)} missing: pip install 'mambavision-triton[demo]'", 2
        )
    from tqdm import tqdm

    from .report import DemoResult, Epoch, render, write_files

    chosen = choose_device(device)
    check_output(output)

    print(f"Operators on {chosen.type}, forward and backward, against the reference in float64")
    checks: list[OpCheck] = []

    def kept() -> Iterable[OpCheck]:
        for check in check_ops(chosen):
            checks.append(check)
            yield check

    for line in table(kept()):
        print(line, flush=True)
    disagreeing = [f"{check.op} ({check.dtype})" for check in checks if not check.ok]
    if disagreeing:
        raise CommandError(f"disagrees with the reference: {', '.join(disagreeing)}")

    torch.manual_seed(seed)
    digits = load_digits(seed, chosen)
    model = small_model().to(chosen)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"\nTraining {parameters:,} parameters on {len(digits.train_images)} digits, "
        f"{len(digits.test_images)} held out"
    )
    history: list[Epoch] = []
    bar: Any = tqdm(
        total=epochs * len(batch_sizes(len(digits.train_images), batch_size)),
        unit="step",
        # In a log file a bar is a line each time.
        mininterval=0.2 if sys.stderr.isatty() else 20,
        bar_format="{percentage:3.0f}% |{bar:30}| {elapsed} gone, {remaining} left{postfix}",
    )

    def after_epoch(loss: float, train_accuracy: float, test_accuracy: float) -> None:
        history.append(Epoch(loss, train_accuracy, test_accuracy))
        bar.set_postfix_str(
            f"epoch {len(history)}/{epochs}, loss {loss:.3f}, test accuracy {test_accuracy:.1%}",
            refresh=False,
        )

    start = time.perf_counter()
    with bar:
        train(model, digits, epochs, batch_size, seed, lambda loss: bar.update(1), after_epoch)
    seconds = time.perf_counter() - start

    confidence, predicted = predict(model, digits.test_images).max(dim=-1)
    result = DemoResult(
        checks=checks,
        history=history,
        images=digits.test_images[:, 0].cpu().numpy(),
        labels=digits.test_labels.cpu().numpy(),
        predicted=predicted.cpu().numpy(),
        confidence=confidence.cpu().numpy(),
        training_seconds=seconds,
        parameters=parameters,
        facts=facts(chosen, seed, command),
    )
    print(
        f"\nTest accuracy {result.accuracy:.1%} on {len(result.labels)} held-out images after "
        f"{seconds:.0f} s\n(the digits carry no writer ids: training and test may share writers)"
    )
    try:
        write_files(output, render(result))
    except OSError as error:
        raise CommandError(f"--output {output}: {error}") from None
    print(f"\nReport: {output / 'report.html'}")
