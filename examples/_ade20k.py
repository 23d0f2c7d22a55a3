"""Pictures and their classes, pixel by pixel, from a folder laid out as ADE20K is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _dense import open_picture, pictures_in

from mambavision.errors import CommandError

__all__ = ["IGNORED", "Crops", "Scenes", "collate", "normalised", "read_labels", "scaled"]

IGNORED = 255


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
        picture, truth = scaled(picture, truth, self.size * self.vary ** (2 * scale - 1))
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


def scaled(picture: Any, truth: np.ndarray | None, shorter: float) -> tuple[Any, Any]:
    """Both with a shorter side of so many pixels, no side below 32."""
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
    values = (pixels / 255 - np.array(about.mean)) / np.array(about.std)
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1).contiguous()


def collate(batch: Sequence[Any]) -> Any:
    from torch.utils.data import default_collate

    return next((item for item in batch if isinstance(item, str)), None) or default_collate(batch)
