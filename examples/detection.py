"""Object detection with masks: Mask R-CNN with FPN of torchvision on a MambaVision backbone.

DATA is laid out as COCO is, the words after "instances_" naming the folder of the pictures:

    DATA/annotations/instances_train2017.json      DATA/train2017/*.jpg
    DATA/annotations/instances_val2017.json        DATA/val2017/*.jpg

Folders of pictures may also lie in DATA/images. Needs the torchvision that belongs to your torch.

examples:
  python examples/make_shapes.py runs/shapes
  python examples/detection.py train runs/shapes --small --output runs/detection
  python examples/detection.py eval runs/shapes --weights runs/detection
  python examples/detection.py predict photo.jpg --weights runs/detection --score 0.7
  python examples/detection.py train coco --pretrained --amp --workers 8
"""

import argparse
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _coco import CocoPictures, as_tensor, average_precision, collate, mean, results_of
from _dense import (
    Recipe,
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
from torch import Tensor, nn

from mambavision.errors import CommandError

# Without and with --small. The first are those of the published configuration for T: 36 epochs of
# COCO with 16 pictures per update, AdamW at 1e-4, 1,000 updates to warm up.
RECIPE: Recipe = {
    "steps": (264_000, 1000), "batch_size": (16, 4), "lr": (1e-4, 1e-3), "warmup": (1000, 50),
    "weight_decay": (0.05, 0.05), "drop_path": (0.2, 0.0), "eval_every": (7330, 250),
}  # fmt: skip
SIZES = ((480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800), 1333), ((120,), 160)


# Model


class Pyramid(nn.Module):
    """The backbone's maps through a feature pyramid: "0" to "3" at strides 4 to 32, "pool" at 64.

    The pyramid's convolutions have group norms, since a batch holds few pictures.
    """

    def __init__(self, body: Any, out_channels: int):
        from torchvision.ops import FeaturePyramidNetwork
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

        super().__init__()
        self.body, self.out_channels = body, out_channels
        self.fpn = FeaturePyramidNetwork(
            body.channels, out_channels, LastLevelMaxPool(), partial(nn.GroupNorm, 32)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), y) for i, y in enumerate(self.body(x))))


def build(config: dict[str, Any], **weights: Any) -> Any:
    """A Mask R-CNN from what is kept with its weights; `weights` are for `features`."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    from mambavision import features
    from mambavision.published import VARIANTS

    body = features(config["model"], **weights, **config["arguments"])
    variant, classes = VARIANTS[config["model"]], len(config["labels"]) + 1
    channels, heads = 256, {"num_classes": classes}
    if config["small"]:
        channels = 64
        # Small pictures have small objects, and few of them.
        anchors = AnchorGenerator(tuple((16 * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
        heads = {
            "rpn_anchor_generator": anchors,
            "rpn_batch_size_per_image": 64, "box_batch_size_per_image": 64,
            "rpn_pre_nms_top_n_train": 200, "rpn_pre_nms_top_n_test": 200,
            "rpn_post_nms_top_n_train": 100, "rpn_post_nms_top_n_test": 100,
            "box_head": TwoMLPHead(channels * 7 * 7, 128),
            "box_predictor": FastRCNNPredictor(128, classes),
            "mask_head": MaskRCNNHeads(channels, (64, 64), 1),
            "mask_predictor": MaskRCNNPredictor(64, 64, classes),
        }  # fmt: skip
    return MaskRCNN(
        Pyramid(body, channels), min_size=config["min_size"], max_size=config["max_size"],
        image_mean=list(variant.mean), image_std=list(variant.std), **heads,
    )  # fmt: skip


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A trained model and what is kept with it."""
    from mambavision import load_checkpoint, read_config

    path = folder / "model.safetensors"
    try:
        config = read_config(path)
        if "min_size" not in config:
            raise ValueError("holds no detector of this script")
        model = build(config)
        load_checkpoint(model, path)
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(f"--weights {folder}: {error}", 2) from None
    return model.eval(), config


@torch.inference_mode()
def detect(model: Any, picture: Any, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """boxes (n, 4), labels (n,) from 1, scores (n,), masks (n, height, width), best first."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with autocast(options, device):
        (found,) = model([as_tensor(picture).to(device)])
    model.train(training)
    found["masks"] = found["masks"][:, 0] > 0.5
    return {name: x.cpu().float().numpy() for name, x in found.items()}


# Evaluation


def evaluate(
    model: Any, data: CocoPictures, options: argparse.Namespace, bar: Any = None
) -> dict[str, np.ndarray]:
    """`average_precision` of boxes and of masks."""
    results = []
    for index, image in enumerate(data.ids):
        found = detect(model, data.read(index)[0], options)
        results += results_of(found, image, data.categories)
        if bar is not None:
            bar.update()
    return {kind: average_precision(data, results, kind) for kind in ("bbox", "segm")}


def report(found: dict[str, np.ndarray], labels: Sequence[str]) -> str:
    from mambavision.tools.text import table

    rows = [("", "box AP", "AP50", "AP75", "mask AP", "AP50", "AP75")]
    both = np.concatenate([found["bbox"], found["segm"]], 1)
    for name, values in zip([*labels, "mean"], [*both, mean(both)], strict=True):
        rows.append((name, *("" if np.isnan(v) else f"{v:.3f}" for v in values)))
    return table(rows, "lrrrrrr")


# Pictures out


def panel(title: str, picture: Any, found: dict[str, Any], labels: Sequence[str]) -> Any:
    pixels, boxes = np.array(picture) / 255, []
    for i, (box, label) in enumerate(zip(found["boxes"], found["labels"], strict=True)):
        kind = int(label) - 1
        pixels = tinted(pixels, np.asarray(found["masks"][i]).astype(bool), colour(kind), 0.5)
        score = f" {found['scores'][i]:.2f}" if "scores" in found else ""
        boxes.append((box, f"{labels[kind]}{score}", colour(kind)))
    return title, pixels, boxes


def draw(
    path: Path, model: Any, pictures: Sequence[tuple[Any, Any]], labels: Sequence[str],
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """Each picture with its truth, where there is one, and with what the model finds."""
    rows = []
    for picture, truth in pictures:
        found = detect(model, picture, options)
        sure = found["scores"] >= options.score
        found = {name: x[sure] for name, x in found.items()}
        row = [] if truth is None else [panel("truth", picture, truth, labels)]
        rows.append([*row, panel("detections", picture, found, labels)])
    board(path, rows, {})


# Commands


def train(options: argparse.Namespace) -> int:
    from torch.utils.data import DataLoader

    from mambavision import save_checkpoint
    from mambavision.demo import check_output, choose_device

    resolved(options, RECIPE)
    check_output(options.output)
    training = CocoPictures(options.data, "train", training=True)
    validation = CocoPictures(options.data, "val")
    if training.labels != validation.labels:
        raise CommandError(f"{options.data}: training and validation have other classes", 2)
    if len(training) < options.batch_size:
        raise CommandError(f"{len(training)} training pictures, --batch-size {options.batch_size}")
    usual, largest = SIZES[options.small]
    config = {
        "model": options.model, "small": options.small, "arguments": size_arguments(options),
        "labels": training.labels, "min_size": options.min_size or usual,
        "max_size": options.max_size or largest,
    }  # fmt: skip
    torch.manual_seed(options.seed)
    device = choose_device(options.device)
    try:
        weights = {"pretrained": options.pretrained, "checkpoint": options.checkpoint}
        model = build(config, **weights).to(device)
    except (ValueError, RuntimeError, OSError) as error:
        raise CommandError(str(error), 2) from None
    # Batches are too small for statistics of their own where there are good ones.
    trained = bool(options.pretrained or options.checkpoint)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] if trained else []
    loader = DataLoader(
        training, options.batch_size, shuffle=True, drop_last=True, collate_fn=collate,
        num_workers=options.workers, persistent_workers=options.workers > 0,
    )  # fmt: skip

    def loss_of(batch: Any) -> Tensor:
        pictures, targets = batch
        moved = [{name: x.to(device) for name, x in target.items()} for target in targets]
        return sum(model([x.to(device) for x in pictures], moved).values())

    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "model.safetensors"
    best = fit(
        model, loader, loss_of, options=options, metric="box AP", fixed=norms,
        evaluate=lambda: float(mean(evaluate(model, validation, options)["bbox"])[0]),
        save=lambda: save_checkpoint(model, path, config=config),
    )  # fmt: skip
    model = load(options.output)[0].to(device)
    shown = [validation.read(i) for i in range(min(options.show, len(validation)))]
    draw(options.output / "predictions.png", model, shown, config["labels"], options)
    print(f"best box AP {best:.3f}; model and pictures: {options.output}")
    return 0


def evaluation(options: argparse.Namespace) -> int:
    from mambavision.demo import check_output, choose_device
    from mambavision.tools.text import progress

    check_output(options.output)
    data = CocoPictures(options.data, "val")
    model, config = load(options.weights)
    if config["labels"] != data.labels:
        raise CommandError(f"{options.weights} was trained on other classes than {options.data}", 2)
    model.to(choose_device(options.device))
    start = time.perf_counter()
    with progress(len(data), "pictures") as bar:
        found = evaluate(model, data, options, bar)
    speed = len(data) / (time.perf_counter() - start)
    print(f"{report(found, data.labels)}\n\n{len(data)} pictures, {speed:.1f} pictures/s")
    options.output.mkdir(parents=True, exist_ok=True)
    shown = [data.read(i) for i in range(min(options.show, len(data)))]
    draw(options.output / "predictions.png", model, shown, data.labels, options)
    print(f"pictures: {options.output / 'predictions.png'}")
    return 0


def predict(options: argparse.Namespace) -> int:
    from mambavision.demo import check_output, choose_device
    from mambavision.tools.text import progress

    check_output(options.output)
    paths = pictures_in(options.pictures)
    model, config = load(options.weights)
    model.to(choose_device(options.device))
    options.output.mkdir(parents=True, exist_ok=True)
    with progress(len(paths), "pictures") as bar:
        for path in paths:
            shown = [(open_picture(path, upright=True), None)]
            draw(options.output / f"{path.stem}.png", model, shown, config["labels"], options)
            bar.update()
    print(f"pictures: {options.output}")
    return 0


def parser() -> argparse.ArgumentParser:
    parser, commands = command_line(
        __doc__, "detection", RECIPE, {"train": train, "eval": evaluation, "predict": predict}
    )
    for added in commands.values():
        added.add_argument("--score", type=rate, default=0.5, metavar="X",
                           help="least score of what is drawn (default: 0.5)")  # fmt: skip
    added = commands["train"]
    added.add_argument("--min-size", type=at_least(32), nargs="+", metavar="N",
                       help="shorter side of a picture, in training one of these at random "
                       "(default: 480 to 800; 120 with --small)")  # fmt: skip
    added.add_argument("--max-size", type=at_least(32), metavar="N",
                       help="most of the longer side (default: 1333; 160 with --small)"
                       )  # fmt: skip
    return parser


def check_torchvision() -> None:
    try:
        from torchvision.ops import boxes

        boxes.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise CommandError(
            f"torchvision's operators do not work ({reason}): install the torchvision that "
            f"belongs to torch {torch.__version__}", 2
        ) from None  # fmt: skip


def main() -> int:
    options = parser().parse_args()
    missing(
        torchvision="torchvision", pycocotools="pycocotools", matplotlib="matplotlib", tqdm="tqdm",
        PIL="pillow",
    )  # fmt: skip
    check_torchvision()
    return options.run(options)


if __name__ == "__main__":
    sys.exit(run(main))
