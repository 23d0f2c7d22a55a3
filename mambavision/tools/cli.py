"""`mambavision eval | predict | info | doctor`: their arguments. Torch is not imported here."""

import argparse
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import CommandError

__all__ = ["COMMANDS", "add_commands", "run"]

EVAL = """\
Measures a trained model on labelled pictures: DATA/val/CLASS/*, DATA/CLASS/*, or the held-out
digits. Prints top-1, top-5 and images/s, and writes summary.csv, classes.csv, predictions.csv and
confusion.png into the output folder.

examples:
  mambavision eval photos/ --checkpoint runs/photos
  mambavision eval photos/ --checkpoint runs/photos --img-size 192 224 256 --crop-pct 0.9 1.0
  mambavision eval digits --checkpoint runs/digits/model.safetensors --device cpu
  mambavision eval imagenet/ --model mamba_vision_T --pretrained --batch-size 256 --amp

Size, crop, mean and deviation are those the checkpoint names, or the published variant's. Folders
are matched to the checkpoint's labels by name; without labels, the n-th folder in natural order is
class n. images/s counts reading, the model and all between, after one batch to warm up.
"""
PREDICT = """\
Classifies pictures: files, folders (with all below) and quoted patterns such as 'holiday/**/*.jpg'.
Prints a table; --output also writes each picture with its classes drawn beside it, and
predictions.json.

examples:
  mambavision predict cat.jpg --checkpoint runs/photos
  mambavision predict holiday/ 'more/*.png' --checkpoint runs/photos --output runs/predict
  mambavision predict cat.jpg --checkpoint runs/photos --output runs/predict --features
  mambavision predict cat.jpg --model mamba_vision_T --pretrained --topk 3
  mambavision predict holiday/ --checkpoint runs/photos --json | jq '.[].classes[0]'

--features draws what the four stages make of a picture, at the size given with --features-size.
Labels are those in the checkpoint, in the config.json beside it, ImageNet's by the number of
classes, or those of --labels. A picture that cannot be read is named, the others are classified,
and the exit code is 1.
"""
INFO = """\
Parameters, operations and memory of a model, stage by stage, for any input size. Nothing is run:
operations are counted by torch's flop counter, with the fused operators registered there.

examples:
  mambavision info mamba_vision_T
  mambavision info mamba_vision_B --img-size 512 --batch-size 8 --dtype bfloat16
  mambavision info mamba_vision_S --img-size 480 640
  mambavision info runs/photos
  mambavision info all
"""
DOCTOR = """\
What this machine offers and what the operators will do with it: versions, GPU, Triton's compiler
and cache, the backend each operator takes and why, and a self-check of two seconds (more where
kernels are compiled for the first time). The exit code is 1 where the self-check fails.

examples:
  mambavision doctor
  mambavision doctor --device cpu
"""


def _number(kind: type, least: float, most: float = float("inf")) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            noun = "an integer" if kind is int else "a number"
            high = "" if most == float("inf") else f" and <= {most:g}"
            raise argparse.ArgumentTypeError(
                f"must be {noun} >= {least:g}{high}, got {text!r}"
            ) from None
        return value

    return parse


SIZE, COUNT = _number(int, 32), _number(int, 1)
PERCENT = _number(float, 0.01, 10)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint", metavar="PATH",
        help="run folder, .safetensors, .pth, .pt, Hugging Face repository or URL",
    )  # fmt: skip
    group.add_argument(
        "--model", metavar="NAME", help="published variant, where the checkpoint does not name it"
    )
    group.add_argument(
        "--pretrained", action="store_true",
        help="the published weights of --model (non-commercial licence)",
    )  # fmt: skip
    group.add_argument(
        "--num-classes", type=COUNT, metavar="N", help="of a checkpoint that does not say it"
    )
    group.add_argument("--labels", type=Path, metavar="FILE", help="names of classes, a line each")
    group.add_argument(
        "--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
        help="where to run (default: auto)",
    )  # fmt: skip
    group.add_argument("--amp", action="store_true", help="mixed precision")
    group.add_argument(
        "--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16",
        help="of --amp (default: bfloat16)",
    )  # fmt: skip
    group.add_argument(
        "-b", "--batch-size", type=COUNT, default=64, metavar="N",
        help="images per step (default: 64)",
    )  # fmt: skip
    group.add_argument(
        "-j", "--workers", type=_number(int, 0), default=0, metavar="N",
        help="processes that load images (default: 0)",
    )  # fmt: skip


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mambavision eval DATA --checkpoint PATH [options]"
    parser.add_argument("data", help="digits, or a folder with val/CLASS/* or CLASS/*")
    _add_model(parser)
    group = parser.add_argument_group("preprocessing; several values: every combination")
    group.add_argument("--img-size", type=SIZE, nargs="+", metavar="N", help="height and width")
    group.add_argument(
        "--crop-pct", type=PERCENT, nargs="+", metavar="X", help="share of a picture that is seen"
    )
    group.add_argument(
        "--crop-mode", choices=("center", "squash", "border"), help="how a picture becomes a square"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/eval"), metavar="DIR",
        help="folder of tables and pictures (default: runs/eval)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=_number(int, 0), metavar="N",
        help="of the digits' split; the training run's, or 0",
    )  # fmt: skip


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mambavision predict PICTURE [PICTURE ...] --checkpoint PATH [options]"
    parser.add_argument("pictures", nargs="+", help="files, folders, patterns")
    _add_model(parser)
    parser.add_argument("--img-size", type=SIZE, metavar="N", help="height and width")
    parser.add_argument("--crop-pct", type=PERCENT, metavar="X", help="share of a picture seen")
    parser.add_argument(
        "--topk", type=COUNT, default=5, metavar="N", help="classes shown (default: 5)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of annotated pictures and JSON"
    )
    parser.add_argument(
        "--features", action="store_true", help="also draw the maps of the four stages"
    )
    parser.add_argument(
        "--features-size", type=SIZE, metavar="N", help="height and width there (default: img-size)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="published variant, checkpoint, run folder, or all")
    parser.add_argument(
        "--img-size", type=SIZE, nargs="+", metavar="N",
        help="height and width, or both apart (default: the model's)",
    )  # fmt: skip
    parser.add_argument(
        "-b", "--batch-size", type=COUNT, default=1, metavar="N", help="images (default: 1)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of weights and activations (default: float32)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
        help="the device to look at (default: auto)",
    )  # fmt: skip


# Name: (module, summary, description, its arguments).
COMMANDS: dict[str, tuple[str, str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "eval": ("evaluate", "accuracy of a trained model on labelled pictures", EVAL, _add_eval),
    "predict": ("predict", "classify pictures and draw what the model sees", PREDICT, _add_predict),
    "info": ("info", "parameters, operations and memory of a model", INFO, _add_info),
    "doctor": ("doctor", "versions, backends, a self-check of this machine", DOCTOR, _add_doctor),
}
_EXTRAS = {"timm": "timm", "matplotlib": "matplotlib", "tqdm": "tqdm", "safetensors": "safetensors"}


def add_commands(commands: Any) -> None:
    for name, (_, summary, description, add) in COMMANDS.items():
        add(
            commands.add_parser(
                name,
                help=summary,
                description=description,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )


def run(options: argparse.Namespace) -> int:
    """Runs one of the commands and returns its exit code; raises `CommandError`."""
    if options.command in ("eval", "predict"):
        missing = [package for module, package in _EXTRAS.items() if not find_spec(module)]
        if missing:
            raise CommandError(
                f"{', '.join(missing)} missing: pip install 'mambavision-triton[train]'", 2
            )
    home = COMMANDS[options.command][0]
    # Imported here: torch and timm take seconds.
    return import_module(f"{__package__}.{home}").run(options)
