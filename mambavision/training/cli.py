"""`mambavision train`: its arguments and what it does with them."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import Any

from ..errors import CommandError
from .options import PRESETS, add_options, resolve

__all__ = ["add_arguments", "run"]

SUMMARY = "train on an image folder or on the bundled digits"
DESCRIPTION = """\
Trains a MambaVision on a folder with train/CLASS/* and val/CLASS/*, or on scikit-learn's digits,
and leaves checkpoints, weights, results.csv and curves.png in a run folder.

examples:
  mambavision train digits --preset digits
  mambavision train photos/ --preset finetune --pretrained --output runs/photos
  mambavision train --resume runs/photos
  torchrun --nproc-per-node 8 -m mambavision train imagenet/ --preset paper -b 512

Settings come from the command line, then from --config, then from --preset, then the defaults
below. The names are timm's; a YAML file has the same, such as `batch_size: 64`. A killed run goes
on with --resume: with the same threads on one CPU process it ends with the very same weights.
"""


def _shown(value: Any) -> str:
    """As the command line takes it."""
    if isinstance(value, dict):
        return " ".join(f"{k}={_shown(v).replace(' ', ',')}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _presets() -> str:
    lines = ["presets:"]
    for name, values in PRESETS.items():
        # A setting and its value stay in one line.
        pairs = [f"{k} {_shown(v)}".replace(" ", "\0") for k, v in values.items()]
        indents: Any = {"initial_indent": f"  {name}: ", "subsequent_indent": "    "}
        lines += [line.replace("\0", " ") for line in wrap(", ".join(pairs), 100, **indents)]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "mambavision train [DATA] [--preset NAME] [options]"
    parser.description, parser.epilog = DESCRIPTION, _presets()
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="settings in YAML")
    parser.add_argument("--resume", metavar="PATH", help="continue the run of this folder or file")
    add_options(parser)


def run(given: dict[str, Any], command: str) -> None:
    """Trains as the parsed arguments say; raises `CommandError`."""
    given = {name: value for name, value in given.items() if name != "command"}
    config, resume = given.pop("config"), given.pop("resume")
    extras = {"timm": "timm", "yaml": "pyyaml", "matplotlib": "matplotlib", "tqdm": "tqdm",
              "safetensors": "safetensors", "sklearn": "scikit-learn"}  # fmt: skip
    missing = [package for module, package in extras.items() if not find_spec(module)]
    if missing:
        raise CommandError(
            f"{', '.join(missing)} missing: pip install 'mambavision-triton[train]'", 2
        )
    if "model_kwargs" in given:
        given["model_kwargs"] = dict(given["model_kwargs"])
    if resume:
        folder = Path(resume) if Path(resume).is_dir() else Path(resume).parent
        if config or "preset" in given:
            raise CommandError("--resume takes its settings from the run: no --config, --preset", 2)
        if not (folder / "args.yaml").is_file():
            raise CommandError(f"--resume {resume}: no run there, args.yaml is missing", 2)
        config = folder / "args.yaml"
        given.setdefault("output", str(folder))
    options = resolve(given, config)
    # Imported here: torch and timm take seconds, bad settings are told at once.
    from .loop import train

    train(options, resume=resume, command=command)
