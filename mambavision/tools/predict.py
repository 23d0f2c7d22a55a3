"""`mambavision predict`: the classes of pictures, and what the stages make of them."""

import argparse
import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from timm.data import get_img_extensions
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..demo import check_output
from ..errors import CommandError
from ..training import interrupts
from ..training.data import read_picture
from ..training.folder import whole
from . import draw
from .source import Source, open_source
from .text import percent, progress, table

__all__ = ["Pictures", "find_pictures", "run"]


def find_pictures(patterns: Sequence[str]) -> list[str]:
    """Files, in the order given and each once; folders with all below; patterns with ** as well.

    Raises `CommandError` where one leads to no picture.
    """
    endings = get_img_extensions(as_set=True)
    found: dict[str, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            names = [pattern]
        else:
            names = [str(p) for p in path.rglob("*")] if path.is_dir() else []
            names = names or glob.glob(pattern, recursive=True)
            names = [n for n in names if Path(n).suffix.lower() in endings and os.path.isfile(n)]
        if not names:
            what = "no picture in that folder" if path.is_dir() else "no such picture"
            raise CommandError(f"{pattern}: {what}", 2)
        found |= dict.fromkeys(sorted(names, key=natural_key))
    return list(found)


class Pictures(Dataset):
    """(tensor, (width, height)) of each file, or why it cannot be read."""

    def __init__(self, paths: Sequence[str], transform: Callable[[Any], Tensor]):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[int, int]] | str:
        try:
            image = read_picture(self.paths[index])
        except Exception as error:
            # Damaged files raise whatever the decoder stumbled over.
            return (str(error) or type(error).__name__).splitlines()[0]
        return self.transform(image), image.size


def _seen(mode: str, crop_pct: float, size: tuple[int, int]) -> tuple[float, float]:
    """The shares of width and height that the model is given."""
    share = min(crop_pct, 1.0)
    if mode == "center":
        return share * min(size) / size[0], share * min(size) / size[1]
    return (share, share) if mode == "squash" else (1.0, 1.0)


def _names(paths: Sequence[str]) -> list[str]:
    """A file name for each picture's drawings: its path below the folder that all share."""
    shared = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in paths])
    taken: dict[str, None] = {}
    for path in paths:
        below = Path(os.path.abspath(path)).relative_to(shared).with_suffix("")
        plain = "-".join(below.parts)
        numbered = (f"{plain}-{number}" for number in count(2))
        taken[plain if plain not in taken else next(n for n in numbered if n not in taken)] = None
    return list(taken)


def _batches(source: Source, pictures: Pictures, options: argparse.Namespace) -> Iterator[Any]:
    """(path, probabilities and size, or why it cannot be read) of each picture."""
    loader = DataLoader(
        pictures,
        batch_size=options.batch_size,
        num_workers=options.workers,
        collate_fn=list,
        worker_init_fn=interrupts.ignore,
    )
    paths = iter(pictures.paths)
    for items in interrupts.started(loader):
        read = [item[0] for item in items if not isinstance(item, str)]
        chances = iter(source.logits(torch.stack(read)).softmax(1).cpu() if read else ())
        for item in items:
            yield next(paths), item if isinstance(item, str) else (next(chances), item[1])


def _row(path: str, found: Any, source: Source, topk: int) -> dict[str, Any]:
    """A picture as JSON has it."""
    if isinstance(found, str):
        return {"picture": path, "error": found}
    chances, size = found
    top = chances.topk(min(topk, len(chances)))
    classes = [
        {
            "label": source.labels[index] if source.labels else f"class {index}",
            "index": index,
            "probability": round(chance, 6),
        }
        for index, chance in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    return {"picture": path, "size": list(size), "classes": classes}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [("picture", "class", "probability")]
    for row in rows:
        name = row["picture"]
        for entry in row.get("classes", ()):
            lines.append((name, entry["label"], percent(entry["probability"])))
            name = ""
    return table(lines, "llr")


def _draw_features(source: Source, path: str, size: int, crop_pct: float, target: Path) -> None:
    x = source.transform(size, crop_pct, source.crop_mode)(read_picture(path))
    shown = x * torch.tensor(source.std)[:, None, None] + torch.tensor(source.mean)[:, None, None]
    draw.features(target, shown.clamp(0, 1).permute(1, 2, 0).numpy(), source.maps(x[None]))


def run(options: argparse.Namespace) -> int:
    output = options.output
    if output is None and options.features:
        raise CommandError("--features needs --output DIR, where its pictures go", 2)
    paths = find_pictures(options.pictures)
    if output is not None:
        check_output(output)
    source = open_source(options)
    size = options.img_size or source.input_size
    crop_pct = options.crop_pct or source.crop_pct
    pictures = Pictures(paths, source.transform(size, crop_pct, source.crop_mode))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    rows = []
    with progress(len(paths), "pictures") as bar:
        for (path, found), name in zip(
            _batches(source, pictures, options), _names(paths), strict=True
        ):
            rows.append(row := _row(path, found, source, options.topk))
            if output is not None and "error" not in row:
                classes = [(entry["label"], entry["probability"]) for entry in row["classes"]]
                seen = _seen(source.crop_mode, crop_pct, row["size"])
                draw.prediction(output / f"{name}.png", read_picture(path), classes, seen)
                if options.features:
                    wide = options.features_size or size
                    target = output / f"{name}-features.png"
                    _draw_features(source, path, wide, crop_pct, target)
            bar.update()
    text = json.dumps(rows, indent=2, ensure_ascii=False)
    if output is not None:
        with whole(output / "predictions.json") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    print(text if options.json else _table(rows))
    if output is not None and not options.json:
        print(f"\npictures and predictions.json: {output}")
    unread = [row for row in rows if "error" in row]
    for row in unread:
        print(f"mambavision predict: cannot read {row['picture']}: {row['error']}", file=sys.stderr)
    return 1 if unread else 0
