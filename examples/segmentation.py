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
from _dense import (
    Recipe,
    add_data,
    add_output,
    add_running,
    add_setting,
    add_training,
    at_least,
    autocast,
    board,
    colour,
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

IGNORED = 255
# Without and with --small. The first are those of the published configuration for T: 16 crops of
# 512 pixels, 160,000 updates of AdamW at 5e-5 after 1,500 to warm up, then down in a line.
RECIPE: Recipe = {
    "steps": (160_000, 1000), "batch_size": (16, 12), "lr": (5e-5, 4e-3), "warmup": (1500, 50),
    "weight_decay": (0.01, 0.01), "drop_path": (0.3, 0.0), "eval_every": (8000, 250),
    "size": (512, 120), "crop": (512, 96), "vary": (2.0, 1.25),
}  # fmt: skip


# Data


def read_labels(data: Path) -> list[str]:
    """Names of the classes, that of pixel value 1 first."""
    if (data / "labels.txt").is_file():
        lines = (data / "labels.txt").read_text(encoding="utf-8").splitlines()
        names = [line.strip() for line in lines if line.strip()]
    elif (data / "objectInfo150.txt").is_file():
        # Columns: number, share of pixels, pictures of training and validation, names.
        lines = (data / "objectInfo150.txt").read_text(encoding="utf-8").splitlines()
        names = [line.split("\t")[-1].strip() for line in lines if line.split("\t")[0].isdigit()]
    else:
        raise CommandError(f"{data}: neither labels.txt nor objectInfo150.txt there", 2)
    if not 2 <= len(names) < IGNORED:
        raise CommandError(f"{data}: 2 to 254 classes are needed, found {len(names)}", 2)
    return names


class Scenes:
    """A split of an ADE20K-style folder: (picture, classes), classes from 0 and 255 for none."""

    def __init__(self, data: Path, split: str, classes: int):
        folder, annotations = data / "images" / split, data / "annotations" / split
        if not folder.is_dir():
            raise CommandError(f"no folder {folder}", 2)
        self.classes = classes
        self.paths = pictures_in([folder])
        self.annotations = [annotations / f"{path.stem}.png" for path in self.paths]
        for path in self.annotations:
            if not path.is_file():
                raise CommandError(f"no annotation {path}", 2)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Any, np.ndarray]:
        from PIL import Image

        picture, path = open_picture(self.paths[index]), self.annotations[index]
        try:
            with Image.open(path) as image:
                mode, values = image.mode, np.array(image)
        except Exception as error:
            # Damaged files raise whatever the decoder stumbled over.
            raise CommandError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
        if values.ndim != 2 or values.dtype != np.uint8:
            raise CommandError(f"{path}: one byte per pixel is needed, got mode {mode}")
        if values.shape != picture.size[::-1]:
            height, width = values.shape
            raise CommandError(
                f"{path}: {width} x {height}, but its picture is {picture.width} x {picture.height}"
            )
        # 0, no class, becomes 255, and 255 becomes 254 before it is put back.
        truth = np.where((values == 0) | (values == IGNORED), IGNORED, values - 1).astype(np.uint8)
        if ((truth >= self.classes) & (truth != IGNORED)).any():
            most = int(values[values != IGNORED].max())
            raise CommandError(f"{path}: class {most}, but there are {self.classes}")
        return picture, truth


class Crops:
    """Random crops of scenes to train on: ((3, crop, crop) normalised, (crop, crop) classes).

    A scene's shorter side is scaled to `size` times 1 / `vary` to `vary`; then it is cropped, and
    half of the time mirrored, and its brightness, contrast and saturation vary. Where it is too
    small it is padded with no class. What cannot be read is a message.
    """

    def __init__(self, scenes: Scenes, size: int, crop: int, vary: float, config: Any):
        self.scenes, self.config = scenes, config
        self.size, self.crop, self.vary = size, crop, vary

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Any:
        import torch

        try:
            picture, truth = self.scenes.read(index)
        except CommandError as error:
            return str(error)
        x, y, scale, mirror, *jitter = torch.rand(7).tolist()
        picture, truth = _scaled(picture, truth, self.size * self.vary ** (2 * scale - 1))
        picture = _jittered(picture, [0.6 + 0.8 * share for share in jitter])
        height, width = truth.shape
        left = int(x * (max(width - self.crop, 0) + 1))
        top = int(y * (max(height - self.crop, 0) + 1))
        part = slice(top, top + self.crop), slice(left, left + self.crop)
        pixels = normalised(np.array(picture)[part], self.config)
        here = torch.from_numpy(truth[part].astype(np.int64))
        pad = (0, self.crop - here.shape[1], 0, self.crop - here.shape[0])
        pixels = torch.nn.functional.pad(pixels, pad)
        here = torch.nn.functional.pad(here, pad, value=IGNORED)
        return (pixels.flip(2), here.flip(1)) if mirror < 0.5 else (pixels, here)


def _scaled(picture: Any, truth: np.ndarray | None, shorter: float) -> tuple[Any, Any]:
    from PIL import Image

    ratio = shorter / min(picture.size)
    size = tuple(max(round(side * ratio), 32) for side in picture.size)
    if truth is not None:
        truth = np.array(Image.fromarray(truth).resize(size, Image.Resampling.NEAREST))
    return picture.resize(size, Image.Resampling.BILINEAR), truth


def _jittered(picture: Any, factors: Sequence[float]) -> Any:
    from PIL import ImageEnhance

    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind, factor in zip(kinds, factors, strict=True):
        picture = kind(picture).enhance(factor)
    return picture


def normalised(pixels: np.ndarray, config: Any) -> Any:
    """(height, width, 3) bytes to (3, height, width), as the backbone's weights expect them."""
    import torch

    about = config.backbone_config
    scaled = (pixels / 255 - np.array(about.mean)) / np.array(about.std)
    return torch.from_numpy(scaled.astype(np.float32)).permute(2, 0, 1).contiguous()


def collate(batch: Sequence[Any]) -> Any:
    from torch.utils.data import default_collate

    return next((item for item in batch if isinstance(item, str)), None) or default_collate(batch)


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
    temporary = folder / ".saving"
    try:
        model.save_pretrained(temporary)
        for path in sorted(temporary.iterdir()):
            path.replace(folder / path.name)
    except OSError as error:
        raise CommandError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def classes_of(model: Any, picture: Any, options: argparse.Namespace) -> np.ndarray:
    """(height, width) of class indices, of the picture's own size; its shorter side is scaled."""
    import torch

    scaled, _ = _scaled(picture, None, model.config.backbone_config.resolution)
    pixels = normalised(np.array(scaled), model.config).to(model.device)
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
    print(f"{len(paths)} pictures: {options.output}")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=function)
        if name != "predict":
            add_data(added)
            added.add_argument("--show", type=at_least(1), default=4, metavar="N",
                               help="pictures that are drawn (default: 4)")  # fmt: skip
        if name != "train":
            added.add_argument("--weights", type=Path, required=True, metavar="DIR",
                               help="output folder of a training")  # fmt: skip
        add_output(added, f"runs/segmentation{'' if name == 'train' else f'-{name}'}")
        return added

    added = command("train", train, "train, evaluate now and then, keep the best weights")
    add = partial(add_setting, added, RECIPE)
    add("size", at_least(32), "shorter side of a picture, in pixels")
    add("crop", at_least(32), "side of the squares trained on")
    add("vary", rate, "in training, the shorter side is 1 / N to N times --size")
    add_training(added, RECIPE)
    add_running(added)
    add_running(command("eval", evaluation, "mIoU on the validation pictures, class by class"))
    added = command("predict", predict, "segment pictures and draw what was found")
    added.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE", help="files, folders")
    add_running(added)
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
