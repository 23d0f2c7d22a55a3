"""What a training run can be told, and where each value comes from: CLI > YAML > preset > default.

A field of `Options` is at once a command-line flag, a YAML key and a Python argument. The flags
have timm's names. Torch is not imported here, so that `--help` need not wait for it.
"""

import argparse
import ast
import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import CommandError

__all__ = ["Options", "PRESETS", "add_options", "read_yaml", "resolve"]


def _number(kind: type, least: float, most: float = float("inf"), above: bool = False) -> Any:
    """A parser of int or float from `least` (excluded if `above`) to `most`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (least < value if above else least <= value) or value > most:
            raise ValueError
        return value

    low = f"> {least:g}" if above else f">= {least:g}"
    high = "" if most == float("inf") else f" and <= {most:g}"
    noun = "an integer" if kind is int else "a number"
    parse.__doc__ = f"{noun} {low}{high}"
    return parse


def _text(text: str) -> str:
    """a text"""
    return text


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _turned(value: Any, kind: type, other: type) -> Any:
    """The sequences of one kind as the other: YAML has lists only."""
    return other(value) if isinstance(value, kind) else value


COUNT, SIZE = _number(int, 0), _number(int, 1)
AMOUNT, RATE = _number(float, 0), _number(float, 0, above=True)
SHARE = _number(float, 0, 1)


def option(
    default: Any,
    help: str,
    kind: Callable[[str], Any] = _text,
    *,
    group: str,
    choices: tuple[str, ...] = (),
    short: str | None = None,
) -> Any:
    about = {"help": help, "kind": kind, "group": group, "choices": choices, "short": short}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=about)
    return field(default=default, metadata=about)


_RUN, _MODEL, _OPT, _SCHED = "run", "model", "optimizer", "schedule"
_AUG, _SPEED = "augmentation", "devices and speed"


@dataclass
class Options:
    """Every setting of a run. `resolve` makes one from presets, a file and the command line."""

    data: str = option("", "digits, or a folder with train/CLASS/* and val/CLASS/*", group=_RUN)
    output: str = option("runs/train", "run folder", group=_RUN)
    preset: str = option("", "named settings that the others override", group=_RUN,
                         choices=("paper", "finetune", "digits"))  # fmt: skip
    seed: int = option(0, "of weights, order, augmentation and mixing", COUNT, group=_RUN)
    recovery_interval: int = option(
        0, "updates between checkpoints within an epoch; 0: at its end only", COUNT, group=_RUN
    )
    log_tensorboard: bool = option(False, "also log to TensorBoard, in the run folder", group=_RUN)
    log_wandb: bool = option(False, "also log to Weights & Biases", group=_RUN)

    model: str = option("mamba_vision_T", "name of a published variant", group=_MODEL)
    model_kwargs: dict[str, Any] = option(
        {}, "arguments of MambaVision that shall differ, e.g. dim=64 depths=1,1,2,2", group=_MODEL
    )
    pretrained: bool = option(False, "start from the published weights (non-commercial)",
                              group=_MODEL)  # fmt: skip
    initial_checkpoint: str = option("", "start from the weights in this file", group=_MODEL)
    num_classes: int | None = option(None, "only checked: the data decide", SIZE, group=_MODEL)
    img_size: int = option(224, "height and width of training and validation images",
                           _number(int, 32), group=_MODEL)  # fmt: skip
    drop: float = option(0.0, "dropout", SHARE, group=_MODEL)
    drop_path: float | None = option(
        None, "drop path of the last block; the variant's", SHARE, group=_MODEL
    )
    grad_checkpointing: bool = option(False, "recompute each block in the backward pass",
                                      group=_MODEL)  # fmt: skip
    model_ema: bool = option(False, "keep, validate and export a moving average of the weights",
                             group=_MODEL)  # fmt: skip
    model_ema_decay: float = option(0.9998, "of the moving average, after a warm-up", SHARE,
                                    group=_MODEL)  # fmt: skip

    batch_size: int = option(64, "images per process and step", _number(int, 2),
                             group=_OPT, short="b")  # fmt: skip
    grad_accum_steps: int = option(1, "steps whose gradients make one update", SIZE, group=_OPT)
    opt: str = option("adamw", "any optimizer of timm, such as adamw, lamb, sgd", group=_OPT)
    opt_eps: float | None = option(None, "the optimizer's epsilon", RATE, group=_OPT)
    momentum: float = option(0.9, "of optimizers that have one", SHARE, group=_OPT)
    weight_decay: float = option(
        0.05, "not of A_log, D, norms, biases and layer scales", AMOUNT, group=_OPT
    )
    layer_decay: float | None = option(None, "factor of the learning rate from layer to layer",
                                       SHARE, group=_OPT)  # fmt: skip
    clip_grad: float | None = option(None, "largest norm of all gradients", RATE, group=_OPT)

    lr: float | None = option(None, "learning rate; overrides --lr-base", RATE, group=_SCHED)
    lr_base: float = option(
        1e-3,
        "learning rate for --lr-base-size images per update; scaled to the real number, by its "
        "square root for adam- and lamb-like optimizers",
        RATE, group=_SCHED,
    )  # fmt: skip
    lr_base_size: int = option(1024, "see --lr-base", SIZE, group=_SCHED)
    sched: str = option("cosine", "course of the learning rate", group=_SCHED,
                        choices=("cosine", "tanh", "poly", "step", "constant"))  # fmt: skip
    epochs: int = option(300, "passes over the training images", SIZE, group=_SCHED)
    warmup_epochs: int = option(5, "at the start, from --warmup-lr", COUNT, group=_SCHED)
    cooldown_epochs: int = option(0, "after --epochs, at --min-lr", COUNT, group=_SCHED)
    warmup_lr: float = option(1e-6, "first learning rate", AMOUNT, group=_SCHED)
    min_lr: float = option(1e-5, "last learning rate", AMOUNT, group=_SCHED)

    scale: tuple[float, float] = option((0.08, 1.0), "share of the area that a crop takes", RATE,
                                        group=_AUG)  # fmt: skip
    ratio: tuple[float, float] = option((3 / 4, 4 / 3), "width to height of a crop", RATE,
                                        group=_AUG)  # fmt: skip
    hflip: float = option(0.5, "probability of a mirrored image", SHARE, group=_AUG)
    color_jitter: float = option(0.4, "where --aa is off", AMOUNT, group=_AUG)
    aa: str = option("", "timm's auto-augmentation, such as rand-m9-mstd0.5-inc1", group=_AUG)
    reprob: float = option(0.0, "probability of random erasing", SHARE, group=_AUG)
    mixup: float = option(0.0, "alpha of mixup; 0: off", AMOUNT, group=_AUG)
    cutmix: float = option(0.0, "alpha of cutmix; 0: off", AMOUNT, group=_AUG)
    mixup_prob: float = option(1.0, "probability of either, per step", SHARE, group=_AUG)
    smoothing: float = option(0.1, "label smoothing", SHARE, group=_AUG)
    crop_pct: float | None = option(
        None, "share of a validation image that is seen; the variant's", RATE, group=_AUG
    )

    device: str = option("auto", "where to run", group=_SPEED,
                         choices=("auto", "cuda", "mps", "cpu"))  # fmt: skip
    workers: int = option(4, "processes that load images, per training process; 0: none", COUNT,
                          group=_SPEED, short="j")  # fmt: skip
    amp: bool = option(False, "automatic mixed precision", group=_SPEED)
    amp_dtype: str = option("bfloat16", "of --amp", group=_SPEED,
                            choices=("bfloat16", "float16"))  # fmt: skip
    channels_last: bool = option(False, "memory format of images and weights", group=_SPEED)
    torchcompile: bool = option(False, "torch.compile the model", group=_SPEED)
    fsdp: bool = option(
        False, "shard weights over the processes (FSDP) instead of copying them (DDP)", group=_SPEED
    )

    def __post_init__(self) -> None:
        self.model_kwargs = {k: _turned(v, list, tuple) for k, v in self.model_kwargs.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as args.yaml and checkpoints hold them."""
        plain = {k: _turned(v, tuple, list) for k, v in asdict(self).items()}
        kwargs = {k: _turned(v, tuple, list) for k, v in self.model_kwargs.items()}
        return {**plain, "model_kwargs": kwargs}


# "paper" holds the values of the published configuration for ImageNet-1k; the paper itself (arXiv
# 2407.08083) states optimizer, rate, batch, decay and length. Three things differ: crops are
# resized bicubically, not by a kernel drawn at random; mixed precision is bfloat16; the penalty on
# sharp minima (MESA) that the configuration adds is not offered.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "opt": "lamb", "opt_eps": 1e-8, "lr_base": 0.005, "lr_base_size": 4096,
        "weight_decay": 0.05, "epochs": 310, "warmup_epochs": 20, "cooldown_epochs": 10,
        "min_lr": 5e-6, "batch_size": 128, "clip_grad": 5.0, "aa": "rand-m9-mstd0.5-inc1",
        "reprob": 0.25, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "model_ema": True,
        "model_ema_decay": 0.9998, "amp": True, "channels_last": True,
    },
    "finetune": {
        "opt": "adamw", "lr_base": 2e-4, "lr_base_size": 256, "weight_decay": 0.05, "epochs": 20,
        "warmup_epochs": 1, "min_lr": 1e-6, "batch_size": 32, "layer_decay": 0.85,
        "clip_grad": 1.0, "scale": (0.3, 1.0), "aa": "rand-m5-mstd0.5-inc1", "reprob": 0.1,
        "smoothing": 0.1, "drop_path": 0.1, "model_ema": True, "model_ema_decay": 0.999,
    },
    "digits": {
        "data": "digits", "img_size": 64, "epochs": 10, "warmup_epochs": 1, "batch_size": 64,
        "lr": 3e-3, "min_lr": 3e-5, "scale": (0.7, 1.0), "hflip": 0.0, "color_jitter": 0.0,
        "smoothing": 0.0, "drop_path": 0.0, "workers": 0,
        "model_kwargs": {
            "dim": 16, "in_dim": 16, "depths": (1, 1, 4, 2), "num_heads": (1, 1, 2, 4),
            "window_size": (8, 8, 4, 2), "mlp_ratio": 2,
        },
    },
}  # fmt: skip


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{v:.3g}" for v in value)
    return "" if value is None or isinstance(value, dict) else str(value)


def add_options(parser: argparse.ArgumentParser) -> None:
    """A flag for every field. What the command line leaves out stays out of the namespace."""
    groups: dict[str, Any] = {}
    for spec in fields(Options):
        about = spec.metadata
        group = groups.setdefault(about["group"], parser.add_argument_group(about["group"]))
        default = {} if spec.name == "model_kwargs" else spec.default
        shown = _shown(default)
        text = about["help"] + (f" (default: {shown})" if shown and spec.name != "data" else "")
        more: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        names = [_flag(spec.name)]
        if about["short"]:
            names.insert(0, f"-{about['short']}")
        if spec.name == "data":
            names = ["data"]
            more["nargs"] = "?"
        elif isinstance(default, bool):
            more["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, dict):
            more |= {"nargs": "+", "metavar": "NAME=VALUE", "type": _pair}
        else:
            more |= {"type": _argument(about["kind"]), "metavar": "X"}
            if isinstance(default, tuple):
                more |= {"nargs": len(default)}
            if about["choices"]:
                more |= {"choices": about["choices"], "metavar": None}
        group.add_argument(*names, **more)


def _argument(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {kind.__doc__}, got {text!r}") from None

    return parse


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, _literal(value)


def read_yaml(path: Path) -> dict[str, Any]:
    """Fields from a YAML file, checked as the command line's are; raises `CommandError`."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"{path}: {reason}", 2) from None
    if not isinstance(content, Mapping):
        raise CommandError(f"{path}: expected lines of `name: value`", 2)
    known = {spec.name: spec for spec in fields(Options)}
    found = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise CommandError(f"{path}: no setting {key!r}{hint}", 2)
        found[name] = _from_yaml(path, known[name], value)
    return found


def _from_yaml(path: Path, spec: Any, value: Any) -> Any:
    kind, choices = spec.metadata["kind"], spec.metadata["choices"]
    expected = kind.__doc__
    try:
        if value is None and spec.default is None:
            return None
        if spec.name == "model_kwargs":
            expected = "a mapping"
            return {str(k): v for k, v in value.items()}
        if isinstance(spec.default, bool):
            expected = "true or false"
            if isinstance(value, bool):
                return value
        elif isinstance(spec.default, tuple):
            expected = f"a list of {len(spec.default)}, each {kind.__doc__}"
            if len(value) == len(spec.default):
                return tuple(kind(str(v)) for v in value)
        elif not isinstance(value, (bool, list, dict)) and value is not None:
            parsed = kind(str(value))
            if not choices or parsed in (*choices, spec.default):
                return parsed
            expected = "one of " + ", ".join(choices)
    except (AttributeError, TypeError, ValueError):
        pass
    raise CommandError(f"{path}: {spec.name} must be {expected}, got {value!r}", 2)


def resolve(given: Mapping[str, Any], config: Path | None = None) -> Options:
    """The options of a run from those given on the command line and a YAML file.

    >>> resolve({"preset": "finetune", "epochs": 3}).epochs
    3
    """
    given = {k: _turned(v, list, tuple) for k, v in given.items()}
    file = read_yaml(config) if config else {}
    preset = given.get("preset", file.get("preset", ""))
    return Options(**{**PRESETS.get(preset, {}), **file, **given})
