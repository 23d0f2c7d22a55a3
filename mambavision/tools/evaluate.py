"""`mambavision eval`: accuracy on labelled pictures, class by class, at one size or several."""

import argparse
import csv
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..demo import check_output
from ..errors import CommandError
from ..training import interrupts
from ..training.data import (
    VALIDATION_FOLDERS,
    Images,
    Seeded,
    _class_folders,
    _folder,
    collate,
    open_data,
    stop_workers,
)
from ..training.folder import whole
from ..training.options import Options, read_yaml
from . import draw
from .source import Source, open_source
from .text import percent, progress, table

__all__ = ["Setting", "run"]

TOP = 5
SHOWN = 20  # classes in the printed table


class Setting(NamedTuple):
    """How pictures become tensors."""

    img_size: int
    crop_pct: float
    crop_mode: str

    def __str__(self) -> str:
        return f"{self.img_size} pixels, crop {self.crop_pct:g} {self.crop_mode}"


class Result(NamedTuple):
    """Per picture: the true class, the likeliest ones (pictures, top), the first one's chance."""

    targets: np.ndarray
    classes: np.ndarray
    chances: np.ndarray
    images_per_second: float

    @property
    def right(self) -> np.ndarray:
        return self.classes[:, 0] == self.targets

    @property
    def among(self) -> np.ndarray:
        return (self.classes == self.targets[:, None]).any(1)


def _split_seed(options: argparse.Namespace) -> int:
    """Of the digits: with another one, pictures of the training would be among those held out."""
    if options.seed is not None:
        return options.seed
    folder = Path(options.checkpoint or "")
    run = (folder if folder.is_dir() else folder.parent) / "args.yaml"
    return read_yaml(run).get("seed", 0) if run.is_file() else 0


def _digits(options: argparse.Namespace, source: Source) -> Images:
    splits = open_data(Options(data="digits", seed=_split_seed(options)))
    if source.folders != splits.classes:
        raise CommandError("the checkpoint's labels are not the digits 0 to 9", 2)
    return splits.val


def _labelled(root: Path, source: Source) -> Images:
    root = next((root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()), root)
    if not root.is_dir():
        raise CommandError(f"{root}: no such folder, expected val/CLASS/*, CLASS/* or digits", 2)
    found, classes = _class_folders(root), source.folders
    if not found:
        raise CommandError(f"{root}: no class folders, expected val/CLASS/* or CLASS/*", 2)
    if not classes:
        if len(found) != source.model.num_classes:
            raise CommandError(
                f"{root}: {len(found)} class folders, the model has {source.model.num_classes} "
                "classes and no labels; --labels names them", 2,
            )  # fmt: skip
        classes = found
    unknown = [name for name in found if name not in set(classes)]
    if unknown:
        known = ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
        raise CommandError(
            f"{root}: {', '.join(unknown[:8])}: no class of the model, which knows {known}", 2
        )
    return _folder(root, classes)


def _evaluate(
    source: Source, images: Images, setting: Setting, batch_size: int, workers: int
) -> Result:
    loader = DataLoader(
        Seeded(images, source.transform(*setting), 0),
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=source.device.type == "cuda",
        collate_fn=collate,
        worker_init_fn=interrupts.ignore,
        sampler=[(0, index) for index in range(len(images))],
    )
    top = min(TOP, source.model.num_classes)
    targets, classes, chances = [], [], []
    # Kernels are compiled and memory is taken before the clock starts.
    first = min(batch_size, len(images))
    source.logits(torch.zeros(first, 3, setting.img_size, setting.img_size)).cpu()
    start = time.perf_counter()
    bar = progress(len(images), "images", str(setting))
    try:
        for batch in interrupts.started(loader):
            if isinstance(batch, str):
                raise CommandError(batch)
            likeliest = source.logits(batch[0]).softmax(1).topk(top)
            targets.append(batch[1].numpy())
            classes.append(likeliest.indices.cpu().numpy())
            chances.append(likeliest.values[:, 0].cpu().numpy())
            bar.update(len(batch[1]))
    finally:
        bar.close()
        stop_workers(loader)
    seconds = time.perf_counter() - start
    return Result(
        np.concatenate(targets),
        np.concatenate(classes),
        np.concatenate(chances),
        len(images) / seconds,
    )


def _write(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with whole(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


CLASS_COLUMNS = ("class", "images", "top1", "top5", "precision", "taken_for", "times")


def _by_class(result: Result, names: Sequence[str]) -> list[tuple[Any, ...]]:
    """Rows under CLASS_COLUMNS for the classes that have pictures."""
    first = result.classes[:, 0]
    predicted, hits = Counter(first.tolist()), Counter(first[result.right].tolist())
    rows = []
    for index in np.unique(result.targets).tolist():
        here = result.targets == index
        count = int(here.sum())
        wrong = Counter(first[here & ~result.right].tolist()).most_common(1)
        rows.append(
            (
                names[index],
                count,
                hits[index] / count,
                float(result.among[here].mean()),
                hits[index] / predicted[index] if predicted[index] else float("nan"),
                names[wrong[0][0]] if wrong else "",
                wrong[0][1] if wrong else 0,
            )
        )
    return rows


def _class_table(rows: list[tuple[Any, ...]], top: int) -> str:
    shown = rows if len(rows) <= SHOWN else sorted(rows, key=lambda row: row[2])[:SHOWN]
    head = ("class", "images", "top-1", f"top-{top}", "precision", "most often taken for")
    cells = [
        (
            name,
            str(count),
            percent(top1),
            percent(among),
            percent(precision) if precision == precision else "never predicted",
            f"{other}, {times}x" if times else "",
        )
        for name, count, top1, among, precision, other, times in shown
    ]
    rest = "" if shown is rows else f"\nThe {SHOWN} lowest of {len(rows)} classes."
    return table([head, *cells], "lrrrrl") + rest


def _confusion(result: Result, names: Sequence[str], path: Path, setting: Setting) -> None:
    """Over the classes that occur, as truth or as prediction."""
    first = result.classes[:, 0]
    present, places = np.unique(np.concatenate([result.targets, first]), return_inverse=True)
    true, predicted = places.reshape(2, -1)
    counts = np.zeros((len(present), len(present)), dtype=np.int64)
    np.add.at(counts, (true, predicted), 1)
    title = f"top-1 {percent(result.right.mean())} of {len(first)} pictures\n{setting}"
    draw.confusion(path, counts, [names[i] for i in present], title)


def run(options: argparse.Namespace) -> int:
    output = options.output
    check_output(output)
    source = open_source(options)
    is_digits = options.data == "digits" and not Path("digits").is_dir()
    images = _digits(options, source) if is_digits else _labelled(Path(options.data), source)
    output.mkdir(parents=True, exist_ok=True)
    names = source.labels or [str(i) for i in range(source.model.num_classes)]
    settings = [
        Setting(*values)
        for values in product(
            options.img_size or [source.input_size],
            options.crop_pct or [source.crop_pct],
            [options.crop_mode or source.crop_mode],
        )
    ]
    top = min(TOP, source.model.num_classes)
    summary = []
    print(f"{source.name} on {len(images)} pictures of {options.data}, {source.device}", flush=True)
    for setting in settings:
        result = _evaluate(source, images, setting, options.batch_size, options.workers)
        top1, among = float(result.right.mean()), float(result.among.mean())
        summary.append((*setting, len(images), top1, among, result.images_per_second))
        suffix = f"-{setting.img_size}-{setting.crop_pct:g}" if len(settings) > 1 else ""
        rows = _by_class(result, names)
        _write(output / f"classes{suffix}.csv", [CLASS_COLUMNS, *rows])
        _write(
            output / f"predictions{suffix}.csv",
            [
                ("picture", "class", "predicted", "probability"),
                *(
                    (images.name(i), names[target], names[best], f"{chance:.6f}")
                    for i, (target, best, chance) in enumerate(
                        zip(result.targets, result.classes[:, 0], result.chances, strict=True)
                    )
                ),
            ],
        )
        _confusion(result, names, output / f"confusion{suffix}.png", setting)
        if len(settings) == 1:
            print(f"\n{_class_table(rows, top)}")
    columns = ("img_size", "crop_pct", "crop_mode", "images", "top1", "top5", "images_per_second")
    _write(output / "summary.csv", [columns, *summary])
    head = ("size", "crop", "mode", "images", "top-1", f"top-{top}", "images/s")
    cells = [
        (str(size), f"{crop:g}", mode, str(count), f"{a:.2%}", f"{b:.2%}", f"{rate:.0f}")
        for size, crop, mode, count, a, b, rate in summary
    ]
    print(f"\n{table([head, *cells], 'rrlrrrr')}\n\ntables and pictures: {output}")
    return 0
