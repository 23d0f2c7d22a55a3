"""Semantic segmentation: UperNet of transformers on a MambaVision backbone.

DATA is laid out as ADE20K is:

    DATA/images/training/*.jpg        DATA/annotations/training/*.png
    DATA/images/validation/*.jpg      DATA/annotations/validation/*.png
    DATA/objectInfo150.txt            or DATA/labels.txt, the name of a class in each line

Annotations hold a class per pixel, 1 for the first one; 0 and 255 are no class and do not count.

examples:
  python examples/make_shapes.py runs/shapes
  python examples/segmentation.py train runs/shapes --small --output runs/segmentation
  python examples/segmentation.py eval runs/shapes --weights runs/segmentation
  python examples/segmentation.py predict photo.jpg --weights runs/segmentation
  python examples/segmentation.py train ADEChallengeData2016 --pretrained --amp --workers 8

What `train` leaves is a transformers folder: after `import mambavision.transformers`,
`AutoModelForSemanticSegmentation.from_pretrained("runs/segmentation")` reads it.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _ade20k import IGNORED, Crops, Scenes, collate, normalised, read_labels, scaled
from _dense import (
    Recipe,
    add_setting,
    at_least,
    autocast,
    board,
    colour,
    command_line,
    fit,
    missing,
    open_picture,
    pictures_in,
    rate,
    resolved,
    run,
    size_arguments,
    tinted,
)

from mambavision.errors import CommandError

# Without and with --small. The first are those of the published configuration for T: 16 crops of
# 512 pixels, 160,000 updates of AdamW at 5e-5 after 1,500 to warm up, then down in a line.
RECIPE: Recipe = {
    "steps": (160_000, 1200), "batch_size": (16, 12), "lr": (5e-5, 4e-3), "warmup": (1500, 50),
    "weight_decay": (0.01, 0.01), "drop_path": (0.3, 0.0), "eval_every": (8000, 300),
    "size": (512, 120), "crop": (512, 96), "vary": (2.0, 1.25),
}  # fmt: skip


# Model


def build(options: argparse.Namespace, labels: Sequence[str]) -> Any:
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    from mambavision import features
    from mambavision.transformers import MambaVisionConfig

    changed = size_arguments(options)
    try:
        config = UperNetConfig(
            backbone_config=MambaVisionConfig.from_variant(options.model, num_labels=0, **changed),
            id2label=dict(enumerate(labels)),
            label2id={name: index for index, name in enumerate(labels)},
            hidden_size=32 if options.small else 512,
            auxiliary_channels=32 if options.small else 256,
            loss_ignore_index=IGNORED,
        )
        # What pictures are scaled to, kept with the weights.
        config.backbone_config.resolution = options.size
        model = UperNetForSemanticSegmentation(config)
        if options.pretrained or options.checkpoint:
            start = features(
                options.model, pretrained=options.pretrained, checkpoint=options.checkpoint,
                **changed,
            )  # fmt: skip
            model.backbone.model = start.model
    except (ValueError, RuntimeError, OSError) as error:
        raise CommandError(str(error), 2) from None
    return model


def load(folder: Path) -> Any:
    from transformers import UperNetForSemanticSegmentation

    import mambavision.transformers  # noqa: F401

    if not (folder / "config.json").is_file():
        raise CommandError(f"--weights {folder}: no trained model there", 2)
    try:
        return UperNetForSemanticSegmentation.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # Damaged files raise whatever the reader stumbled over.
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise CommandError(f"--weights {folder} cannot be read: {reason}") from None


def save(model: Any, folder: Path) -> None:
    """Each file is replaced as a whole."""
    from mambavision.training.folder import whole

    temporary = folder / ".saving"
    try:
        model.save_pretrained(temporary)
        for path in sorted(temporary.iterdir()):
            # Copied, since of what transformers writes only the owner may read the weights.
            with whole(folder / path.name) as copy:
                shutil.copyfile(path, copy)
    except OSError as error:
        raise CommandError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def classes_of(model: Any, picture: Any, options: argparse.Namespace) -> np.ndarray:
    """(height, width) of class indices, of the picture's own size; its shorter side is scaled."""
    import torch

    resized, _ = scaled(picture, None, model.config.backbone_config.resolution)
    pixels = normalised(np.array(resized), model.config).to(model.device)
    training = model.training
    model.eval()
    with torch.inference_mode(), autocast(options, model.device):
        logits = model(pixel_values=pixels[None]).logits.float()
        logits = torch.nn.functional.interpolate(logits, picture.size[::-1], mode="bilinear")
    model.train(training)
    return logits[0].argmax(0).cpu().numpy()


# Evaluation


def confusion(truth: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """counts[i, j]: pixels of class i taken for j; those without a class are left out."""
    counted = truth != IGNORED
    pairs = truth[counted].astype(np.int64) * classes + found[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def ious(counts: np.ndarray) -> np.ndarray:
    """Per class intersection / union = hits / (true + found - hits); NaN where it never occurs."""
    hits = np.diag(counts).astype(np.float64)
    union = counts.sum(0) + counts.sum(1) - hits
    return np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)


def evaluate(
    model: Any, scenes: Scenes, options: argparse.Namespace, bar: Any = None
) -> np.ndarray:
    """The confusion of all scenes."""
    counts = np.zeros((scenes.classes, scenes.classes), dtype=np.int64)
    for index in range(len(scenes)):
        picture, truth = scenes.read(index)
        counts += confusion(truth, classes_of(model, picture, options), scenes.classes)
        if bar is not None:
            bar.update()
    return counts


def report(counts: np.ndarray, labels: Sequence[str]) -> str:
    from mambavision.tools.text import table

    found, shares = ious(counts), counts.sum(1) / max(counts.sum(), 1)
    rows = [("class", "of pixels", "IoU")]
    rows += [
        (name, f"{share:.1%}", "" if np.isnan(iou) else f"{iou:.4f}")
        for name, share, iou in zip(labels, shares, found, strict=True)
    ]
    accuracy = np.diag(counts).sum() / max(counts.sum(), 1)
    mean = np.nanmean(found) if counts.any() else np.nan
    return f"{table(rows, 'lrr')}\n\nmIoU {mean:.4f}, pixel accuracy {accuracy:.2%}"


# Pictures out


def painted(picture: Any, classes: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    pixels = np.array(picture) / 255
    for index in np.unique(classes):
        if index != IGNORED and labels[index] != "background":
            pixels = tinted(pixels, classes == index, colour(index))
    return pixels


def draw(
    path: Path,
    model: Any,
    scenes: Sequence[tuple[Any, np.ndarray | None]],
    options: argparse.Namespace,
) -> None:
    """Each picture, its truth where there is one, and what the model finds."""
    labels = list(model.config.id2label.values())
    rows, shown = [], set()
    for picture, truth in scenes:
        kinds = [("truth", truth), ("prediction", classes_of(model, picture, options))]
        panels = [("picture", np.array(picture) / 255, ())]
        for title, classes in kinds:
            if classes is not None:
                panels.append((title, painted(picture, classes, labels), ()))
                shown |= set(np.unique(classes).tolist()) - {IGNORED}
        rows.append(panels)
    named = {labels[i]: colour(i) for i in sorted(shown) if labels[i] != "background"}
    board(path, rows, named)


# Commands


def train(options: argparse.Namespace) -> int:
    resolved(options, RECIPE)
    import torch
    from torch.utils.data import DataLoader

    from mambavision.demo import check_output, choose_device

    check_output(options.output)
    labels = read_labels(options.data)
    training, validation = (
        Scenes(options.data, split, len(labels)) for split in ("training", "validation")
    )
    if len(training) < options.batch_size:
        raise CommandError(f"{len(training)} training pictures, --batch-size {options.batch_size}")
    torch.manual_seed(options.seed)
    model = build(options, labels).to(choose_device(options.device))
    options.output.mkdir(parents=True, exist_ok=True)
    loader = DataLoader(
        Crops(training, options.size, options.crop, options.vary, model.config), options.batch_size,
        shuffle=True, drop_last=True, num_workers=options.workers, collate_fn=collate,
        persistent_workers=options.workers > 0,
    )  # fmt: skip

    def loss_of(batch: Any) -> Any:
        pixels, truth = (x.to(model.device, non_blocking=True) for x in batch)
        return model(pixel_values=pixels, labels=truth).loss

    best = fit(
        model, loader, loss_of, options=options, metric="mIoU",
        evaluate=lambda: float(np.nanmean(ious(evaluate(model, validation, options)))),
        save=lambda: save(model, options.output),
    )  # fmt: skip
    model = load(options.output).to(model.device)
    shown = [validation.read(i) for i in range(min(options.show, len(validation)))]
    draw(options.output / "predictions.png", model, shown, options)
    print(f"best mIoU {best:.4f}; model and pictures: {options.output}")
    return 0


def evaluation(options: argparse.Namespace) -> int:
    from mambavision.demo import check_output, choose_device
    from mambavision.tools.text import progress

    check_output(options.output)
    labels = read_labels(options.data)
    model = load(options.weights).to(choose_device(options.device))
    if list(model.config.id2label.values()) != labels:
        raise CommandError(f"{options.weights} was trained on other classes than {options.data}", 2)
    scenes = Scenes(options.data, "validation", len(labels))
    start = time.perf_counter()
    with progress(len(scenes), "pictures") as bar:
        counts = evaluate(model, scenes, options, bar)
    speed = len(scenes) / (time.perf_counter() - start)
    print(f"{report(counts, labels)}, {len(scenes)} pictures, {speed:.1f} pictures/s")
    options.output.mkdir(parents=True, exist_ok=True)
    shown = [scenes.read(i) for i in range(min(options.show, len(scenes)))]
    draw(options.output / "predictions.png", model, shown, options)
    print(f"pictures: {options.output / 'predictions.png'}")
    return 0


def predict(options: argparse.Namespace) -> int:
    from mambavision.demo import check_output, choose_device
    from mambavision.tools.text import progress

    check_output(options.output)
    paths = pictures_in(options.pictures)
    model = load(options.weights).to(choose_device(options.device))
    options.output.mkdir(parents=True, exist_ok=True)
    with progress(len(paths), "pictures") as bar:
        for path in paths:
            picture = open_picture(path, upright=True)
            draw(options.output / f"{path.stem}.png", model, [(picture, None)], options)
            bar.update()
    print(f"pictures: {options.output}")
    return 0


def parser() -> argparse.ArgumentParser:
    parser, commands = command_line(
        __doc__, "segmentation", RECIPE, {"train": train, "eval": evaluation, "predict": predict}
    )
    add = partial(add_setting, commands["train"], RECIPE)
    add("size", at_least(32), "shorter side of a picture, in pixels")
    add("crop", at_least(32), "side of the squares trained on")
    add("vary", rate, "in training, the shorter side is 1 / N to N times --size")
    return parser


def main() -> int:
    options = parser().parse_args()
    missing(transformers="transformers", matplotlib="matplotlib", tqdm="tqdm", PIL="pillow")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return options.run(options)


if __name__ == "__main__":
    sys.exit(run(main))
