"""From options to a finished run: epochs, checkpoints, resuming, and what is shown meanwhile.

A checkpoint says how many updates of which epoch are done. Since everything else is a function of
seed, epoch and step (see `data`), a run that is killed and resumed ends with the bits of one that
was not, on one CPU process with the same number of threads.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import CommandError
from ..published import VARIANTS
from . import parallel
from .data import TrainingSampler, evaluation_loader, open_data, stop_workers, training_loader
from .engine import Metrics, Trainer
from .folder import Row, RunFolder
from .interrupts import held_back, started
from .loggers import Loggers, check_extras
from .options import Options
from .parallel import Ranks

__all__ = ["Result", "train"]

# Seconds between readings of the loss: each waits for the device.
READING = 0.5


@dataclass
class Result:
    """What a finished run found."""

    folder: Path
    best_top1: float
    history: list[Row] = field(default_factory=list)


def _readable(batches: Iterator[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        if isinstance(batch, str):
            raise CommandError(batch)
        yield batch


class _Display:
    """A bar on the first process's terminal: images, time left, loss, accuracy, images/s."""

    def __init__(self, ranks: Ranks, total: int, done: int):
        from tqdm import tqdm

        self.bar: Any = tqdm(
            total=total,
            initial=done,
            unit=" images",
            disable=ranks.rank > 0,
            # In a log file a bar is a line each time.
            mininterval=0.2 if sys.stderr.isatty() else 30,
            bar_format="{percentage:3.0f}% |{bar:24}| {elapsed} gone, {remaining} left, "
            "{rate_fmt}{postfix}",
        )

    def show(self, epoch: int, epochs: int, metrics: Metrics) -> None:
        loss, first, _ = metrics.means()
        self.bar.set_postfix_str(
            f"epoch {epoch + 1}/{epochs}, loss {loss:.3f}, accuracy {first:.1%}", refresh=False
        )

    def line(self, row: Row, epochs: int, improved: bool) -> None:
        self.bar.clear()
        if not self.bar.disable:
            print(
                f"epoch {row['epoch']:.0f}/{epochs}: loss {row['train_loss']:.4f}, accuracy "
                f"{row['train_top1']:.2%}; validation loss {row['val_loss']:.4f}, accuracy "
                f"{row['val_top1']:.2%}{' (best)' if improved else ''}; "
                f"{row['images_per_second']:.0f} images/s",
                flush=True,
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


class _Run:
    """A run in progress: counters beside the trainer's, and the loaders."""

    def __init__(self, options: Options, ranks: Ranks, folder: RunFolder):
        self.options, self.ranks, self.folder = options, ranks, folder
        splits = open_data(options)
        self.classes = splits.classes
        self.batches: DataLoader
        self.sampler: TrainingSampler
        self.batches, self.sampler = training_loader(
            splits.train, options, ranks.rank, ranks.count, ranks.device
        )
        self.trainer = Trainer(options, len(self.classes), len(self.batches), ranks)
        self.validation = evaluation_loader(
            splits.val, options, ranks.rank, ranks.count, ranks.device
        )
        self.images_per_step = options.batch_size * ranks.count
        self.history: list[Row] = []
        self.epoch = 0
        self.updates = 0  # of this epoch

    @property
    def best(self) -> float:
        return max((row["val_top1"] for row in self.history), default=-1.0)

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.trainer.state_dict(),
            "epoch": self.epoch,
            "epoch_updates": self.updates,
            "history": self.history,
            "config": self.config(),
            "images_per_update": self.images_per_step * self.options.grad_accum_steps,
            "args": self.options.as_dict(),
        }

    def config(self) -> dict[str, Any]:
        """What a reader of the weights needs: the model's arguments, labels, preprocessing."""
        options = self.options
        variant = VARIANTS[options.model]
        about = {
            **self.trainer.model.arguments,
            "model": options.model,
            "labels": self.classes,
            "input_size": options.img_size,
            "crop_pct": options.crop_pct or variant.crop_pct,
            "crop_mode": variant.crop_mode,
            "mean": variant.mean,
            "std": variant.std,
        }
        return json.loads(json.dumps(about))

    def resume(self, path: Path) -> None:
        state = self.folder.load(path)
        if not isinstance(state, dict) or not {"optimizer", "epoch", "config"} <= state.keys():
            raise CommandError(f"{path} is no checkpoint of a run", 2)
        labels = state["config"]["labels"]
        if labels != self.classes:
            raise CommandError(
                f"{path} was trained on {len(labels)} classes ({_some(labels)}), "
                f"{self.options.data} has {len(self.classes)} ({_some(self.classes)})", 2,
            )  # fmt: skip
        images = self.images_per_step * self.options.grad_accum_steps
        if state["epoch_updates"] and state["images_per_update"] != images:
            raise CommandError(
                f"{path} lies within an epoch with {state['images_per_update']} images per update; "
                f"now they are {images}: resume with the same number", 2,
            )  # fmt: skip
        try:
            self.trainer.load_state_dict(state)
        except (ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CommandError(f"{path} does not fit these options: {reason[:300]}", 2) from None
        self.epoch, self.updates = state["epoch"], state["epoch_updates"]
        self.history = state["history"]

    def save(self, improved: bool = False) -> None:
        """Writes a checkpoint."""
        finished = self.epoch == self.trainer.epochs
        state = self.state_dict()
        with held_back():
            self.folder.write(state, improved, finished)

    def _finite(self, check: Any) -> None:
        try:
            check()
        except FloatingPointError as error:
            last = self.folder.last
            kept = f"; the last good checkpoint is {last}" if last.exists() else ""
            raise CommandError(
                f"{error} in epoch {self.epoch + 1}, before update {self.updates + 1}{kept}. A "
                "lower --lr, --clip-grad or --amp-dtype bfloat16 may help"
            ) from None

    def train_epoch(self, display: _Display) -> None:
        options, trainer = self.options, self.trainer
        step = self.updates * options.grad_accum_steps
        self.sampler.epoch, self.sampler.start = self.epoch, step * options.batch_size
        batches = _readable(started(self.batches))
        read = time.perf_counter()
        while self.updates < trainer.updates_per_epoch:
            count = min(options.grad_accum_steps, trainer.steps - step)
            trainer.update(islice(batches, count), count, self.epoch, step)
            self.updates += 1
            step += count
            display.bar.update(count * self.images_per_step)
            if time.perf_counter() - read > READING:
                self._finite(trainer.check_finite)
                display.show(self.epoch, trainer.epochs, trainer.train_metrics)
                read = time.perf_counter()
            last = self.updates == trainer.updates_per_epoch
            if options.recovery_interval and not last:
                if self.updates % options.recovery_interval == 0:
                    self._finite(trainer.check_weights)
                    self.save()
        display.show(self.epoch, trainer.epochs, trainer.train_metrics)

    def finish_epoch(self, images_per_second: float) -> tuple[Row, bool]:
        """Validates, and writes the row, the checkpoint and, where it is, the best."""
        trainer, epoch = self.trainer, self.epoch
        rate = trainer.rate
        train_loss, train_top1, _ = trainer.train_metrics.means(self.ranks)
        val_loss, val_top1, val_top5 = trainer.evaluate(_readable(started(self.validation)))
        row = {
            "epoch": epoch + 1, "lr": rate, "train_loss": train_loss, "train_top1": train_top1,
            "val_loss": val_loss, "val_top1": val_top1, "val_top5": val_top5,
            "images_per_second": images_per_second,
        }  # fmt: skip
        improved = val_top1 > self.best
        self._finite(trainer.check_weights)
        self.history.append(row)
        trainer.train_metrics = Metrics(self.ranks.device)
        self.epoch, self.updates = epoch + 1, 0
        self.save(improved)
        return row, improved


def train(options: Options, *, resume: str | None = None, command: str = "") -> Result:
    """Trains, and returns what the run found; its files are in `options.output`.

    `resume` is a checkpoint of a run, or its folder, whose last one is then taken, if there is one
    already. Raises `CommandError` for what stops it: the last checkpoint stays as it is.

    >>> train(Options(data="digits", img_size=32, epochs=2, warmup_epochs=0))  # doctest: +SKIP
    """
    check_extras(options)
    ranks = parallel.start(options.device, options.fsdp)
    try:
        return _train(options, ranks, resume, command)
    finally:
        parallel.stop()


def _train(options: Options, ranks: Ranks, resume: str | None, command: str) -> Result:
    folder = RunFolder(Path(options.output), main=ranks.rank == 0)
    run = _Run(options, ranks, folder)
    trainer = run.trainer
    checkpoint = Path(resume) if resume else folder.last
    if resume and checkpoint.is_dir():
        checkpoint = checkpoint / "last.pt"
    if resume and (checkpoint.exists() or checkpoint.suffix != ".pt"):
        run.resume(checkpoint)
    folder.create(options, command, resuming=resume is not None)
    if folder.main:
        parameters = sum(p.numel() for p in trainer.model.parameters())
        print(
            f"{parameters:,} parameters, {len(run.classes)} classes; {trainer.epochs} epochs of "
            f"{trainer.updates_per_epoch} updates on {ranks.count} x {ranks.device.type}, into "
            f"{folder.path}" + (f", from epoch {run.epoch + 1}" if resume else "")
        )
    per_epoch = trainer.steps * run.images_per_step
    done = run.epoch * per_epoch + run.updates * options.grad_accum_steps * run.images_per_step
    try:
        with Loggers(options, folder, run.epoch) as loggers:
            display = _Display(ranks, trainer.epochs * per_epoch, done)
            with display.bar:
                while run.epoch < trainer.epochs:
                    steps = trainer.steps - run.updates * options.grad_accum_steps
                    start = time.perf_counter()
                    run.train_epoch(display)
                    seconds = time.perf_counter() - start
                    row, improved = run.finish_epoch(steps * run.images_per_step / seconds)
                    loggers.log(row)
                    display.line(row, trainer.epochs, improved)
    finally:
        stop_workers(run.batches)
        stop_workers(run.validation)
    if folder.main:
        print(f"best validation accuracy {run.best:.2%}; weights: {folder.path}/model.safetensors")
    return Result(folder.path, run.best, run.history)
