"""Images: folders and the digits, and what makes their order and augmentation repeatable.

Every random number is a function of a position. Before a sample is augmented, all generators are
seeded with (seed, epoch, sample); before a step mixes and runs, with (seed, epoch, step, rank). So
neither the number of workers nor a restart in the middle of an epoch changes a bit, and no
generator's state needs to be kept.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, get_img_extensions
from timm.data.auto_augment import posterize
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ..errors import CommandError
from ..published import VARIANTS, Variant
from . import interrupts
from .options import Options

__all__ = [
    "Images",
    "Splits",
    "evaluation_loader",
    "open_data",
    "read_picture",
    "seed_all",
    "stop_workers",
    "training_loader",
]

# First entry of every position, so that no two purposes share numbers.
WEIGHTS, SAMPLE, STEP = range(3)
VALIDATION_FOLDERS = ("val", "validation")


def seed_all(*position: int) -> None:
    """Seeds Python's, NumPy's and torch's generators as a function of a position."""
    first, second, third = np.random.SeedSequence(position).generate_state(3, np.uint64)
    random.seed(int(first))
    np.random.seed(int(second) % 2**32)
    torch.manual_seed(int(third))


def read_picture(path: str) -> Image.Image:
    """In RGB, and upright where the camera noted how it was held."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


class Images(Protocol):
    """Labelled pictures, opened one by one."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def open(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass
class Folder:
    """Files and the positions of their classes."""

    samples: list[tuple[str, int]]

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return self.samples[index][0]

    def open(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        return read_picture(path), target


@dataclass
class Arrays:
    """Grey images (n, height, width) of 8 bits."""

    images: np.ndarray
    targets: list[int]

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        return f"image {index}"

    def open(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), self.targets[index]


@dataclass
class Splits:
    classes: list[str]
    train: Images
    val: Images


def _folder(root: Path, classes: Sequence[str]) -> Folder:
    """All images below root/CLASS, in natural order."""
    endings = get_img_extensions(as_set=True)
    samples, empty = [], []
    for target, name in enumerate(classes):
        files = [str(p) for p in (root / name).rglob("*") if p.suffix.lower() in endings]
        samples += [(path, target) for path in sorted(files, key=natural_key)]
        if not files and (root / name).is_dir():
            empty.append(name)
    if empty:
        raise CommandError(f"{root}: no image in the class folder {', '.join(empty[:8])}", 2)
    return Folder(samples)


def _class_folders(root: Path) -> list[str]:
    names = [p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    return sorted(names, key=natural_key)


def _open_folder(root: Path) -> Splits:
    train = root / "train"
    val = next((root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()), None)
    if not train.is_dir() or val is None:
        raise CommandError(
            f"{root}: expected a folder with train/CLASS/* and val/CLASS/*, or the name digits", 2
        )
    classes, validated = _class_folders(train), _class_folders(val)
    if len(classes) < 2:
        raise CommandError(f"{train}: at least two class folders are needed, got {classes}", 2)
    unknown = [name for name in validated if name not in classes]
    if unknown:
        raise CommandError(
            f"{val}: {len(validated)} classes, {train} has {len(classes)}; only the former has "
            f"{', '.join(unknown[:8])}", 2,
        )  # fmt: skip
    splits = Splits(classes, _folder(train, classes), _folder(val, classes))
    if not len(splits.val):
        raise CommandError(f"{val}: no image", 2)
    return splits


def _open_digits(seed: int) -> Splits:
    """scikit-learn's 1,797 handwritten digits, split as by the demo.

    They carry no writer ids: the same writer may be in both parts.
    """
    from ..demo import load_digits

    digits = load_digits(seed, torch.device("cpu"))

    def part(images: Tensor, labels: Tensor) -> Arrays:
        return Arrays((images[:, 0] * 255).round().byte().numpy(), labels.tolist())

    return Splits(
        [str(digit) for digit in range(10)],
        part(digits.train_images, digits.train_labels),
        part(digits.test_images, digits.test_labels),
    )


def open_data(options: Options) -> Splits:
    """The training and validation images that `options.data` names; raises `CommandError`."""
    if not options.data:
        raise CommandError("no data: name a folder with train/ and val/, or digits", 2)
    if options.data == "digits":
        splits = _open_digits(options.seed)
    else:
        splits = _open_folder(Path(options.data))
    if options.num_classes not in (None, len(splits.classes)):
        raise CommandError(
            f"--num-classes {options.num_classes}: {options.data} has {len(splits.classes)} "
            "classes", 2,
        )  # fmt: skip
    return splits


class Seeded(Dataset):
    """Transformed images under keys (epoch, index), each a function of seed and key alone.

    A negative index -1 - i is image i with target -1: filling, which no metric counts. An image
    that cannot be read comes back as a line that says so: a worker's exception would arrive as a
    page of traceback.
    """

    def __init__(self, images: Images, transform: Any, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | str:
        epoch, index = key
        filling = index < 0
        index = -1 - index if filling else index
        try:
            image, target = self.images.open(index)
        except Exception as error:
            # Damaged files raise whatever the decoder stumbled over.
            reason = str(error) or type(error).__name__
            return f"cannot read {self.images.name(index)}: {reason.splitlines()[0]}"
        seed_all(SAMPLE, self.seed, epoch, index)
        return self.transform(image), -1 if filling else target


def collate(items: list[Any]) -> tuple[Tensor, Tensor] | str:
    for item in items:
        if isinstance(item, str):
            return item
    images, targets = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(targets)


class TrainingSampler(DistributedSampler):
    """Keys of this process's share of a shuffled epoch, from its `start`-th image on."""

    epoch, start = 0, 0

    def __iter__(self) -> Iterator[Any]:
        return ((self.epoch, index) for index in islice(super().__iter__(), self.start, None))

    def __len__(self) -> int:
        return super().__len__() - self.start


def _mean_and_deviation() -> dict[str, Any]:
    return {"mean": Variant.mean, "std": Variant.std, "interpolation": "bicubic"}


def _loader(dataset: Seeded, options: Options, device: torch.device, **more: Any) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=options.batch_size,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=device.type == "cuda",
        collate_fn=collate,
        worker_init_fn=interrupts.ignore,
        **more,
    )


def _posterize(image: Image.Image, bits: int, **more: Any) -> Image.Image:
    return posterize(image, max(bits, 1), **more)


def _with_a_bit(transform: Any) -> Any:
    """Lets timm's augmentations keep one bit of the colours where they ask for none.

    At the end of its scale posterizing does, and Pillow 13 raises.
    """
    for step in transform.transforms:
        for augmentation in chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
            if augmentation.aug_fn is posterize:
                augmentation.aug_fn = _posterize
    return transform


def training_loader(
    images: Images, options: Options, rank: int, ranks: int, device: torch.device
) -> tuple[DataLoader, TrainingSampler]:
    """Batches of this process; images that fill no batch of all processes wait for another epoch.

    Raises `CommandError` where there are fewer images than one step takes.
    """
    step = options.batch_size * ranks
    if len(images) < step:
        raise CommandError(
            f"{len(images)} training images are fewer than a step takes: --batch-size "
            f"{options.batch_size} in {ranks} process(es)", 2,
        )  # fmt: skip
    if options.batch_size % 2 and (options.mixup or options.cutmix):
        raise CommandError("--mixup and --cutmix need an even --batch-size", 2)
    transform = create_transform(
        options.img_size,
        is_training=True,
        scale=options.scale,
        ratio=options.ratio,
        hflip=options.hflip,
        color_jitter=options.color_jitter or None,
        auto_augment=options.aa or None,
        re_prob=options.reprob,
        re_mode="pixel",
        **_mean_and_deviation(),
    )
    sampler = TrainingSampler(
        Sized(len(images)), ranks, rank, shuffle=True, seed=options.seed, drop_last=True
    )
    dataset = Seeded(images, _with_a_bit(transform), options.seed)
    return _loader(dataset, options, device, sampler=sampler, drop_last=True), sampler


def stop_workers(loader: DataLoader) -> None:
    """Ends a loader's processes now; a garbage collector would wait five seconds for each."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()


class Sized(Dataset):
    """What a sampler wants to know of a data set."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length


def evaluation_loader(
    images: Images, options: Options, rank: int, ranks: int, device: torch.device
) -> DataLoader:
    """This process's share of the images, in order; every process gets as many batches."""
    variant = VARIANTS[options.model]
    transform = create_transform(
        options.img_size,
        crop_pct=options.crop_pct or variant.crop_pct,
        crop_mode=variant.crop_mode,
        **_mean_and_deviation(),
    )
    own = range(rank, len(images), ranks)
    most = -(-len(images) // ranks)
    keys = [(0, index) for index in own] + [(0, -1)] * (most - len(own))
    return _loader(Seeded(images, transform, options.seed), options, device, sampler=keys)
