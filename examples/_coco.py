"""Pictures and their objects from a folder laid out as COCO is, and COCO's average precision."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _dense import open_picture
from torch import Tensor

from mambavision.errors import CommandError

__all__ = [
    "KEYS", "CocoPictures", "as_tensor", "average_precision", "collate", "mean", "mirrored",
    "results_of",
]  # fmt: skip

KEYS = ("boxes", "labels", "scores", "masks")


class CocoPictures:
    """A split of a COCO-style folder: (picture, target) with boxes, labels from 1, masks.

    `training` leaves out pictures without objects, as is usual, and mirrors half of the others.
    Objects marked as crowds are not trained on. What cannot be read is a message.
    """

    def __init__(self, data: Path, split: str, training: bool = False):
        from pycocotools.coco import COCO

        found = sorted((data / "annotations").glob(f"instances_{split}*.json"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise CommandError(
                f"one annotations/instances_{split}*.json is needed in {data}, found {names}", 2
            )
        name = found[0].stem.removeprefix("instances_")
        self.folder = data / name if (data / name).is_dir() else data / "images" / name
        if not self.folder.is_dir():
            raise CommandError(f"no folder {data / name} or {self.folder}", 2)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco = COCO(found[0])
            categories = self.coco.loadCats(sorted(self.coco.getCatIds()))
            self.ids = sorted(self.coco.getImgIds())
        except (OSError, ValueError, KeyError, AssertionError, TypeError) as error:
            raise CommandError(f"{found[0]} is no COCO file: {error}", 2) from None
        self.labels = [category["name"] for category in categories]
        # COCO's numbers have gaps; a model counts 1, 2, 3, ..., and 0 is the background.
        self.categories = [category["id"] for category in categories]
        self.training = training
        if training:
            self.ids = [i for i in self.ids if self.coco.getAnnIds(i, iscrowd=False)]
        if not self.ids:
            raise CommandError(f"{found[0]} has no pictures{' with objects' * training}", 2)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> tuple[Any, dict[str, Tensor]]:
        about = self.coco.loadImgs(self.ids[index])[0]
        picture = open_picture(self.folder / about["file_name"])
        size = about.get("width", picture.width), about.get("height", picture.height)
        if picture.size != size:
            raise CommandError(
                f"{self.folder / about['file_name']} is {picture.width} x {picture.height}, but "
                f"its annotation says {size[0]} x {size[1]}"
            )
        wanted = self.coco.getAnnIds(self.ids[index], iscrowd=False)
        boxes, labels, masks = [], [], []
        for annotation in self.coco.loadAnns(wanted):
            x, y, width, height = annotation["bbox"]
            # A box of no width is an error in the data that would give an infinite loss.
            if width >= 1 and height >= 1:
                boxes.append([x, y, x + width, y + height])
                labels.append(self.categories.index(annotation["category_id"]) + 1)
                masks.append(self.coco.annToMask(annotation))
        return picture, {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": torch.from_numpy(np.array(masks, np.uint8).reshape(-1, *picture.size[::-1])),
        }

    def __getitem__(self, index: int) -> Any:
        try:
            picture, target = self.read(index)
        except CommandError as error:
            return str(error)
        pixels = as_tensor(picture)
        if self.training and torch.rand(()) < 0.5:
            pixels, target = mirrored(pixels, target)
        return pixels, target


def as_tensor(picture: Any) -> Tensor:
    """(3, height, width) in 0..1."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def mirrored(pixels: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    width = pixels.shape[-1]
    boxes = torch.stack([width - x2, y1, width - x1, y2], 1)
    return pixels.flip(-1), {**target, "boxes": boxes, "masks": target["masks"].flip(-1)}


def collate(batch: Sequence[Any]) -> Any:
    return next((item for item in batch if isinstance(item, str)), None) or list(
        zip(*batch, strict=True)
    )


def results_of(found: dict[str, np.ndarray], image: int, categories: Sequence[int]) -> list[Any]:
    """Detections of a picture as COCO has them."""
    from pycocotools import mask as coco

    results = []
    for box, label, score, mask in zip(*(found[k] for k in KEYS), strict=True):
        x1, y1, x2, y2 = box.tolist()
        code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        results.append(
            {
                "image_id": image,
                "category_id": categories[int(label) - 1],
                "score": float(score),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "segmentation": {**code, "counts": code["counts"].decode("ascii")},
            }
        )
    return results


def average_precision(data: CocoPictures, results: list[Any], kind: str) -> np.ndarray:
    """(categories, 3): AP over IoU 0.50 to 0.95, at 0.50, at 0.75, of "bbox" or "segm"; NaN for
    categories without objects."""
    from pycocotools.cocoeval import COCOeval

    if not results:
        there = [bool(data.coco.getAnnIds(data.ids, [c], iscrowd=False)) for c in data.categories]
        return np.where(np.array(there)[:, None], np.zeros((1, 3)), np.nan)
    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(data.coco, data.coco.loadRes(results), kind)
        run.params.imgIds, run.params.catIds = data.ids, data.categories
        run.evaluate()
        run.accumulate()
    # (IoUs, recalls, categories) of all sizes and up to 100 detections; -1 where there is nothing.
    precision = run.eval["precision"][:, :, :, 0, -1]
    precision = np.where(precision < 0, np.nan, precision)
    at = [slice(None), [0], [5]]
    return np.stack([precision[i].mean((0, 1)) for i in at], 1)


def mean(values: np.ndarray) -> np.ndarray:
    """Over the categories that occur."""
    return values[~np.isnan(values[:, 0])].mean(0)
