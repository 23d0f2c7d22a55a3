"""A model, its labels and its preprocessing, from what the command line names.

What a checkpoint says of itself goes first: the config that training keeps with the weights, or the
config.json that transformers writes beside them. Then the published variant named by --model.
"""

import argparse
import difflib
import inspect
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..demo import choose_device
from ..errors import CommandError
from ..hub import locate
from ..model import MambaVision
from ..published import VARIANTS
from ..weights import load_checkpoint, read_config

__all__ = ["Source", "open_source", "read_model"]

Config = dict[str, Any]
_ARGUMENTS = [n for n, p in inspect.signature(MambaVision).parameters.items() if p.kind < 2]


@dataclass
class Source:
    """A model in evaluation mode on its device, and what it takes pictures for.

    `labels` are the classes' names to show and `folders` those of their folders in a data set; both
    are empty where nothing names the classes.
    """

    model: MambaVision
    name: str
    labels: list[str]
    folders: list[str]
    input_size: int
    crop_pct: float
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]

    def transform(self, size: int, crop_pct: float, crop_mode: str) -> Callable[[Any], Tensor]:
        """Pictures to normalised tensors, resized bicubically, as validated in training."""
        from timm.data import create_transform

        return create_transform(
            size, crop_pct=crop_pct, crop_mode=crop_mode, mean=self.mean, std=self.std,
            interpolation="bicubic",
        )  # fmt: skip

    def logits(self, images: Tensor) -> Tensor:
        """float32, on the model's device."""
        return self._run(self.model, images).float()

    def maps(self, images: Tensor) -> list[Tensor]:
        """Of the first image, the map of each stage."""
        return [x[0] for x in self._run(self.model.forward_stages, images)]

    @torch.no_grad()
    def _run(self, function: Callable[[Tensor], Any], images: Tensor) -> Any:
        try:
            with self.autocast():
                return function(images.to(self.device, non_blocking=True))
        except torch.OutOfMemoryError:
            shape = " x ".join(map(str, images.shape))
            raise CommandError(
                f"not enough memory on {self.device} for images {shape}: a smaller --batch-size "
                "or --img-size needs less"
            ) from None


def variant_named(name: str) -> Any:
    if name in VARIANTS:
        return VARIANTS[name]
    near = difflib.get_close_matches(name, VARIANTS, n=1, cutoff=0.0)[0]
    raise CommandError(f"no model {name!r}; did you mean {near}? Known: {', '.join(VARIANTS)}", 2)


def _plainly(error: Exception) -> CommandError:
    """What `weights` raised, for the terminal: 1 where a fetch failed, 2 for the user's file."""
    message = str(error).removeprefix("load_checkpoint: ").removeprefix("read_config: ")
    return CommandError(message, 1 if isinstance(error, RuntimeError) else 2)


def _beside(checkpoint: str) -> Config:
    """The config.json beside a checkpoint, in the names of ours."""
    path = locate(checkpoint).path.parent / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict) or not isinstance(names := config.get("id2label"), dict):
        return {}
    labels = [str(names.get(str(i), i)) for i in range(len(names))]
    named = {} if labels[:1] == ["LABEL_0"] else {"labels": labels}
    sizes = {"num_classes": len(labels), "input_size": config.get("resolution")}
    return {**config, **named, **{k: v for k, v in sizes.items() if v}}


def _config(checkpoint: str) -> Config:
    try:
        config = read_config(checkpoint)
        return config if "dim" in config else {**_beside(checkpoint), **config}
    except (ValueError, OSError, RuntimeError) as error:
        raise _plainly(error) from None


def _build(config: Config, name: str | None, num_classes: int | None, source: str) -> MambaVision:
    """A model with random weights; `config` goes before the variant."""
    arguments = {key: config[key] for key in _ARGUMENTS if key in config}
    if "dim" not in arguments:
        if name is None:
            raise CommandError(
                f"{source} does not say of what model it is: name it with --model, one of "
                f"{', '.join(VARIANTS)}", 2,
            )  # fmt: skip
        arguments = {**variant_named(name).arguments, **arguments}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    try:
        return MambaVision(**arguments)
    except (TypeError, ValueError) as error:
        raise CommandError(f"{source}: its config makes no model: {error}", 2) from None


def read_model(source: str) -> tuple[MambaVision, str, int]:
    """A model without weights or memory, its name and input size, of a variant or a checkpoint."""
    with torch.device("meta"):
        if source in VARIANTS:
            return _build({}, source, None, source), source, VARIANTS[source].input_size
        if not Path(source).exists() and "/" not in source:
            variant_named(source)
        config = _config(source)
        name = config.get("model")
        return _build(config, name, None, source), source, config.get("input_size", 224)


def _read_labels(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"--labels {path}: {reason}", 2) from None
    return [line.strip() for line in lines if line.strip()]


def _imagenet(num_classes: int) -> tuple[list[str], list[str]]:
    """ImageNet's names and folders, where the number of classes is that of one of its sets."""
    from timm.data import ImageNetInfo

    sets = {1000: "imagenet-1k", 21841: "imagenet-22k", 21843: "imagenet-21k"}
    if num_classes not in sets:
        return [], []
    about = ImageNetInfo(sets[num_classes])
    return [about.index_to_description(i) for i in range(num_classes)], about.label_names()


def _labels(
    options: argparse.Namespace, config: Config, classes: int
) -> tuple[list[str], list[str]]:
    origin, labels = "the checkpoint", config.get("labels")
    if options.labels is not None:
        origin, labels = f"--labels {options.labels}", _read_labels(options.labels)
    if not labels:
        return _imagenet(classes)
    if len(labels) != classes:
        raise CommandError(f"{origin}: {len(labels)} labels, the model has {classes} classes", 2)
    return [str(label) for label in labels], [str(label) for label in labels]


def open_source(options: argparse.Namespace) -> Source:
    """The model that --checkpoint, --model and --pretrained name; raises `CommandError`."""
    device = choose_device(options.device)
    checkpoint, name = options.checkpoint, options.model
    if options.pretrained:
        if checkpoint or not name:
            raise CommandError("--pretrained goes with --model NAME and without --checkpoint", 2)
        checkpoint = variant_named(name).repository
    if not checkpoint:
        raise CommandError("no weights: name --checkpoint PATH, or --model NAME --pretrained", 2)
    config = _config(checkpoint)
    name = name or config.get("model")
    model = _build(config, name, options.num_classes, checkpoint)
    try:
        load_checkpoint(model, checkpoint)
    except (ValueError, OSError, RuntimeError) as error:
        raise _plainly(error) from None
    if model.in_chans != 3 or not model.num_classes:
        raise CommandError(
            f"{checkpoint}: {model.in_chans} input channels and {model.num_classes} classes, "
            "expected 3 and at least one", 2,
        )  # fmt: skip
    variant = VARIANTS[name if name in VARIANTS else "mamba_vision_T"]
    about = {
        key: config.get(key) or getattr(variant, key)
        for key in ("input_size", "crop_pct", "crop_mode", "mean", "std")
    }

    labels, folders = _labels(options, config, model.num_classes)

    def autocast() -> AbstractContextManager[Any]:
        if not options.amp:
            return nullcontext()
        return torch.autocast(device.type, getattr(torch, options.amp_dtype))

    return Source(
        model=model.to(device).eval(),
        name=str(options.checkpoint or name),
        labels=labels,
        folders=folders,
        device=device,
        autocast=autocast,
        **{**about, "mean": tuple(about["mean"]), "std": tuple(about["std"])},
    )
