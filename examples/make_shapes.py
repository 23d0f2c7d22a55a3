"""Small data to try segmentation and detection on: shapes drawn into photographs.

    OUT/images/training/*.jpg           photographs with rings, squares and stars in them
    OUT/annotations/training/*.png      the class of each pixel: 1 background, 2 ring, ...
    OUT/annotations/instances_training.json      the same in COCO's format: boxes and masks
    OUT/labels.txt                      the classes' names, a line each, the first is pixel value 1
    (and the same for validation)

A shape has a white rim and any colour: only its form tells its class. Masks are exact, since shape
and mask are drawn by the same call. The photographs come with scikit-image and are free of rights
(CC0 or public domain); those of the validation are others than those of the training.
"""

import argparse
import colorsys
import json
import math
import os
import random
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from mambavision.errors import CommandError

# Names of functions of skimage.data whose pictures lie in its wheel.
PHOTOGRAPHS = {
    "training": ("rocket", "coffee", "camera", "retina", "immunohistochemistry", "clock",
                 "hubble_deep_field", "brick", "grass", "gravel"),
    "validation": ("astronaut", "chelsea"),
}  # fmt: skip
SHAPES = ("ring", "square", "star")
LABELS = ("background", *SHAPES)
TRIES = 30


def photographs(split: str) -> list[Image.Image]:
    from skimage import data

    return [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOGRAPHS[split]]


def background(photo: Image.Image, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """A part of a photograph, of the proportions of `size`, perhaps mirrored."""
    width, height = size
    most = min(photo.width / width, photo.height / height)
    scale = most * rng.uniform(0.4, 1)
    left = rng.uniform(0, photo.width - scale * width)
    top = rng.uniform(0, photo.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    part = photo.resize(size, Image.Resampling.BICUBIC, box)
    return ImageOps.mirror(part) if rng.random() < 0.5 else part


def outline(shape: str, size: tuple[int, int], rng: random.Random) -> np.ndarray:
    """Where a shape of random place, size and turn lies: (height, width) of booleans."""
    width, height = size
    radius = rng.uniform(0.15, 0.3) * min(size)
    x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
    turn = rng.uniform(0, 2 * math.pi)
    picture = Image.new("1", size)
    draw = ImageDraw.Draw(picture)
    if shape == "ring":
        for fill, r in ((1, radius), (0, 0.5 * radius)):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    else:
        # Distances of the corners from the middle, by turns.
        count, inner = {"square": (4, 1.0), "star": (10, 0.45)}[shape]
        corners = []
        for corner in range(count):
            r = radius * (inner if corner % 2 else 1)
            angle = turn + 2 * math.pi * corner / count
            corners.append((x + r * math.cos(angle), y + r * math.sin(angle)))
        draw.polygon(corners, fill=1)
    return np.array(picture)


def paint(pixels: np.ndarray, mask: np.ndarray, rng: random.Random) -> None:
    """A colour, brighter towards one side, with a white rim inside the shape's edge."""
    colour = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.3, 1), rng.uniform(0.3, 1)))
    height, width = mask.shape
    rows, columns = np.mgrid[:height, :width]
    turn = rng.uniform(0, 2 * math.pi)
    across = (math.cos(turn) * columns + math.sin(turn) * rows) / max(mask.shape)
    light = 1 + 0.5 * (across - across[mask].mean())
    shaded = np.clip(255 * colour * light[..., None], 0, 255)
    inner = np.array(Image.fromarray(mask).convert("L").filter(ImageFilter.MinFilter(5))) > 0
    shaded[~inner] = 255
    pixels[mask] = shaded[mask]


def compose(
    photo: Image.Image, size: tuple[int, int], rng: random.Random
) -> tuple[Image.Image, list[tuple[str, np.ndarray]]]:
    """A picture, and class and visible pixels of each shape in it, of which there are 1 to 4."""
    pixels = np.array(background(photo, size, rng), dtype=np.float64)
    found: list[tuple[str, np.ndarray]] = []
    wanted = rng.randint(1, 4)
    for _ in range(TRIES):
        if len(found) == wanted:
            break
        shape = rng.choice(SHAPES)
        mask = outline(shape, size, rng)
        # A little of a shape may lie behind a later one, so little that its form still shows.
        if any((mask & other).sum() > 0.1 * other.sum() for _, other in found):
            continue
        paint(pixels, mask, rng)
        found = [(name, other & ~mask) for name, other in found] + [(shape, mask)]
    return Image.fromarray(pixels.round().astype(np.uint8)), found


def coco_annotation(shape: str, mask: np.ndarray, image_id: int, number: int) -> dict[str, Any]:
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": SHAPES.index(shape) + 1,
        "bbox": [float(value) for value in coco.toBbox(code)],
        "area": float(coco.area(code)),
        "iscrowd": 0,
        "segmentation": {"size": code["size"], "counts": code["counts"].decode("ascii")},
    }


def write_split(out: Path, split: str, count: int, size: tuple[int, int], seed: int) -> None:
    rng = random.Random(f"{seed} {split}")
    photos = photographs(split)
    pictures, annotations = out / "images" / split, out / "annotations" / split
    pictures.mkdir(parents=True)
    annotations.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    for number in range(count):
        picture, shapes = compose(rng.choice(photos), size, rng)
        name = f"shapes_{number:05}"
        picture.save(pictures / f"{name}.jpg", quality=92)
        classes = np.ones((size[1], size[0]), dtype=np.uint8)
        for shape, mask in shapes:
            classes[mask] = LABELS.index(shape) + 1
            instances.append(coco_annotation(shape, mask, number, len(instances) + 1))
        Image.fromarray(classes).save(annotations / f"{name}.png")
        about = {"id": number, "file_name": f"{name}.jpg", "width": size[0], "height": size[1]}
        images.append(about)
    categories = [{"id": number, "name": name} for number, name in enumerate(SHAPES, 1)]
    content = {"images": images, "annotations": instances, "categories": categories}
    path = out / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content), encoding="utf-8")


def make_shapes(
    out: Path, training: int, validation: int, size: tuple[int, int] = (160, 120), seed: int = 0
) -> None:
    """Writes the whole folder or nothing; the same arguments give the same pictures."""
    for module, package in {"skimage": "scikit-image", "pycocotools": "pycocotools"}.items():
        if not find_spec(module):
            raise CommandError(f"{package} missing: pip install 'mambavision-triton[dense]'", 2)
    if out.exists():
        raise CommandError(f"{out} exists: name a new folder", 2)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write_split(temporary, "training", training, size, seed)
        write_split(temporary, "validation", validation, size, seed)
        (temporary / "labels.txt").write_text("\n".join(LABELS) + "\n", encoding="utf-8")
        temporary.rename(out)
    except OSError as error:
        raise CommandError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> int:
    from _dense import at_least

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python examples/make_shapes.py runs/shapes",
    )  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--training", type=at_least(1), default=1000, metavar="N",
                        help="pictures to train on (default: 1000)")  # fmt: skip
    parser.add_argument("--validation", type=at_least(1), default=60, metavar="N",
                        help="pictures held out (default: 60)")  # fmt: skip
    parser.add_argument("--size", type=at_least(32), nargs=2, default=(160, 120),
                        metavar=("W", "H"), help="of each picture (default: 160 120)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    options = parser.parse_args()
    make_shapes(
        options.out, options.training, options.validation, tuple(options.size), options.seed
    )
    print(f"{options.training} + {options.validation} pictures: {options.out}")
    return 0


if __name__ == "__main__":
    from _dense import run

    sys.exit(run(main))
