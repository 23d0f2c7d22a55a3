"""The folder of a run. Every file appears whole or not at all, so a kill leaves the last one.

    args.yaml           every setting, to read and to start again from
    last.pt             the whole state, after the last epoch or --recovery-interval
    best.pt             the same, of the epoch with the highest top-1 on the validation images
    model.safetensors   the weights of that epoch (the moving average's, where there is one)
    results.csv         a line per epoch
    curves.png          the same to look at

`last.pt` is written last, after what was derived from the same state: a run killed in between
repeats the epoch and writes the same again.
"""

import csv
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import CommandError
from ..files import replacing
from .options import Options

__all__ = ["RunFolder", "whole"]

Row = dict[str, float]
REDRAWN = 10.0  # seconds between drawings


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """`replacing`; raises `CommandError`, in the system's words, where it cannot write."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except Exception as error:
        kept = f"; {path} is as it was" if path.exists() else ""
        raise CommandError(f"cannot write {path}: {_reason(error)}{kept}") from error


def _reason(error: BaseException) -> str:
    """In the system's words where it refused: torch.save hides them behind an error of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)
    return (text or type(error).__name__).splitlines()[0]


def _save(state: Mapping[str, Any], path: Path) -> None:
    # Given a path, torch writes by itself and does not tell why it could not.
    with open(path, "wb") as file:
        torch.save(state, file)


class RunFolder:
    """The files of a run. Only the first process writes; for the others every call does nothing."""

    def __init__(self, path: Path, main: bool = True):
        self.path, self.main = path, main
        self.last, self.best = path / "last.pt", path / "best.pt"
        self.drawn = -REDRAWN

    def create(self, options: Options, command: str, resuming: bool) -> None:
        """Makes the folder, or takes over one whose run is resumed."""
        if not self.main:
            return
        taken = (self.path / "args.yaml").exists() or self.last.exists()
        if taken and not resuming:
            raise CommandError(
                f"{self.path} holds a run: continue it with --resume {self.path}, or name another "
                "--output", 2,
            )  # fmt: skip
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Left by a process that was killed while it wrote.
            for left in self.path.glob(".*.tmp"):
                left.unlink()
        except OSError as error:
            raise CommandError(f"--output {self.path}: {error}", 2) from None
        import yaml

        with whole(self.path / "args.yaml") as temporary:
            head = f"# mambavision-triton {__version__}: {command}".rstrip()
            content = yaml.safe_dump(options.as_dict(), sort_keys=False)
            temporary.write_text(f"{' '.join(head.split())}\n{content}", encoding="utf-8")

    def load(self, path: Path) -> dict[str, Any]:
        """A checkpoint; raises `CommandError` for a damaged one."""
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            # Damaged bytes raise whatever the reader stumbled over.
            reason = type(error).__name__
            raise CommandError(f"{path} is damaged or no checkpoint ({reason})") from None

    def write(
        self, state: Mapping[str, Any], improved: bool = False, finished: bool = False
    ) -> None:
        """Writes a checkpoint; with `improved`, as the best so far, too."""
        if not self.main:
            return
        if improved:
            self._write_weights(state)
            with whole(self.best) as temporary:
                _save(state, temporary)
        if state["history"]:
            self._write_results(state["history"], finished)
        with whole(self.last) as temporary:
            # A second name for the same bytes: checkpoints are replaced, never changed.
            if improved:
                _link(self.best, temporary)
            else:
                _save(state, temporary)

    def _write_weights(self, state: Mapping[str, Any]) -> None:
        from safetensors.torch import save

        weights: Mapping[str, Tensor] = state.get("state_dict_ema", state["state_dict"])
        about = {"format": "pt", "config": json.dumps(state["config"])}
        with whole(self.path / "model.safetensors") as temporary:
            # save_file would make a file that only its owner may read.
            tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
            temporary.write_bytes(save(tensors, about))

    def _write_results(self, history: list[Row], finished: bool) -> None:
        with whole(self.path / "results.csv") as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(history[0]))
                writer.writeheader()
                writer.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in history)
        # A drawing takes a quarter of a second, which an epoch of a small run does not.
        if finished or time.monotonic() - self.drawn > REDRAWN:
            with whole(self.path / "curves.png") as temporary:
                _draw(history, temporary)
            self.drawn = time.monotonic()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Not every file system has links.
        shutil.copyfile(source, target)


def _draw(history: list[Row], path: Path) -> None:
    """Loss, accuracy and learning rate over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2))
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.15, top=0.9, wspace=0.3)
    panels: Any = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history]
    curves = [
        ("loss", [("train_loss", "training"), ("val_loss", "validation")]),
        ("accuracy", [("train_top1", "training"), ("val_top1", "validation"),
                      ("val_top5", "validation, top 5")]),
        ("learning rate", [("lr", "")]),
    ]  # fmt: skip
    for panel, (title, lines) in zip(panels, curves, strict=True):
        for key, label in lines:
            mark = "o" if len(epochs) == 1 else None
            panel.plot(epochs, [row[key] for row in history], label=label, marker=mark)
        panel.set(title=title, xlabel="epoch")
        panel.grid(alpha=0.3)
        if len(lines) > 1:
            panel.legend(frameon=False)
    figure.savefig(path, format="png", dpi=110)
