"""The command line: `mambavision demo` and others, also as `python -m mambavision demo`.

Exit codes: 0 done, 1 the job failed, 2 a bad argument or something missing, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from . import __version__
from .errors import CommandError
from .tools import cli as tools
from .training import cli as training

__all__ = ["main"]


EXAMPLES = """\
examples:
  mambavision doctor                              # does this machine have what it takes?
  mambavision demo                                # operators, a small training, a report
  mambavision train photos/ --preset finetune     # photos/train/CLASS/*, photos/val/CLASS/*
  mambavision eval photos/ --checkpoint runs/train
  mambavision predict cat.jpg --checkpoint runs/train --output runs/predict
  mambavision info mamba_vision_T

`mambavision COMMAND --help` has more.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _integer(name: str, least: int, most: int | None = None) -> Callable[[str], int]:
    expected = f">= {least}" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{name} must be an integer {expected}, got {text!r}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mambavision",
        description="MambaVision with a fused mixer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mambavision-triton {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="check the operators on this machine, train on handwritten digits, write a report",
        description="Checks each fused operator against its reference on this machine, trains a "
        "small MambaVision on handwritten digits and writes a report to look at.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to run"
    )
    demo.add_argument(
        "--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder of the report"
    )
    demo.add_argument(
        "--epochs", type=_integer("epochs", 1), default=30, metavar="N",
        help="passes over the training images",
    )  # fmt: skip
    demo.add_argument(
        "--batch-size", type=_integer("batch-size", 2), default=64, metavar="N",
        help="images per step",
    )  # fmt: skip
    demo.add_argument(
        "--seed", type=_integer("seed", 0, 2**32 - 1), default=0, metavar="N",
        help="of the split, the weights and the augmentation",
    )  # fmt: skip
    training.add_arguments(commands.add_parser("train", help=training.SUMMARY))
    tools.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    # Set by the shell that wants to know what could come next.
    if "_ARGCOMPLETE" in os.environ and find_spec("argcomplete"):
        import_module("argcomplete").autocomplete(parser)
    options = parser.parse_args(arguments)
    name, command = f"mambavision {options.command}", " ".join(["mambavision", *arguments])
    # Threads that wait asleep, not spinning. Read when torch is loaded. Small tensors meet many
    # barriers: with 5 busy processes on 2 cores, an epoch of the demo takes 4 s instead of 35 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if options.command == "train":
            training.run(vars(options), command)
            return 0
        if options.command in tools.COMMANDS:
            return tools.run(options)
        # Imported here, so that `--help` need not wait for torch.
        from .demo import demo

        demo(
            device=options.device,
            output=options.output,
            epochs=options.epochs,
            batch_size=options.batch_size,
            seed=options.seed,
            command=command,
        )
    except CommandError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    return 0
