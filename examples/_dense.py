"""What `segmentation.py` and `detection.py` share: options, training, tables, pictures."""

import argparse
import colorsys
import csv
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mambavision.errors import CommandError

__all__ = [
    "Recipe", "add_setting", "at_least", "autocast", "board", "colour", "command_line", "fit",
    "missing", "open_picture", "pictures_in", "rate", "resolved", "run", "size_arguments", "tinted",
]  # fmt: skip

# Settings by name, each with its default without and with --small.
Recipe = Mapping[str, tuple[Any, Any]]
# A model that learns small pictures from nothing in minutes on a CPU.
SMALL = {
    "dim": 32, "in_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 1, 4, 8),
    "window_size": (8, 8, 6, 3), "mlp_ratio": 2.0,
}  # fmt: skip


# The command line


def at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be an integer >= {least}, got {text!r}")
        return value

    return parse


def rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number >= 0, got {text!r}")
    return value


def add_setting(
    parser: argparse.ArgumentParser,
    recipe: Recipe,
    flag: str,
    kind: Callable[[str], Any],
    text: str,
    *short: str,
) -> None:
    usual, small = recipe[flag.replace("-", "_")]
    text = f"{text} (default: {usual}; {small} with --small)"
    parser.add_argument(*short, f"--{flag}", type=kind, metavar="N", help=text)


def _add_training(parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    add = partial(add_setting, parser, recipe)
    parser.add_argument(
        "--small", action="store_true", help="a small model from scratch, to try things on a CPU"
    )
    parser.add_argument(
        "--model", default="mamba_vision_T", metavar="NAME",
        help="published variant (default: mamba_vision_T)",
    )  # fmt: skip
    parser.add_argument(
        "--pretrained", action="store_true",
        help="start from the published weights (non-commercial licence)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", metavar="PATH",
        help="start from these weights of the backbone: file, repository or URL",
    )  # fmt: skip
    parser.add_argument(
        "--windows", type=at_least(1), nargs=2, metavar="N",
        help="of stages 3 and 4, which are 1/16 and 1/32 of a picture (default: the variant's)",
    )  # fmt: skip
    add("drop-path", rate, "drop path of the last block")
    add("steps", at_least(1), "updates")
    add("batch-size", at_least(1), "pictures per update", "-b")
    add("lr", rate, "highest learning rate of AdamW")
    add("warmup", at_least(0), "updates in which it rises; then it falls in a line to 0")
    add("weight-decay", rate, "not of biases, norms, A_log and D")
    add("eval-every", at_least(1), "updates between evaluations; the best weights are kept")
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="of weights and order (default: 0)"
    )
    parser.add_argument(
        "-j", "--workers", type=at_least(0), default=0, metavar="N",
        help="processes that load pictures (default: 0)",
    )  # fmt: skip


SUMMARIES = {
    "train": "train, evaluate now and then, keep the best weights",
    "eval": "measure on the validation pictures, class by class",
    "predict": "draw what is found in pictures",
}


def command_line(
    about: str | None, task: str, recipe: Recipe, functions: Mapping[str, Callable[[Any], int]]
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of a script, and those of its commands: train, eval and predict."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    added = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands = {}
    for name, text in SUMMARIES.items():
        commands[name] = command = added.add_parser(name, help=text, description=text)
        command.set_defaults(run=functions[name])
        add = command.add_argument
        if name == "predict":
            add("pictures", type=Path, nargs="+", metavar="PICTURE", help="files, folders")
        else:
            add("data", type=Path, metavar="DATA", help="folder of pictures and annotations")
            add("--show", type=at_least(1), default=4, metavar="N",
                help="pictures that are drawn (default: 4)")  # fmt: skip
        if name == "train":
            _add_training(command, recipe)
        else:
            add("--weights", type=Path, required=True, metavar="DIR",
                help="output folder of a training")  # fmt: skip
        output = f"runs/{task}{'' if name == 'train' else f'-{name}'}"
        add("--output", type=Path, default=Path(output), metavar="DIR",
            help=f"folder of what is written (default: {output})")  # fmt: skip
        add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
            help="where to run (default: auto)")  # fmt: skip
        add("--amp", action="store_true", help="mixed precision, bfloat16")
    return parser, commands


def resolved(options: argparse.Namespace, recipe: Recipe) -> None:
    """Puts in what was not given, and refuses what does not go together."""
    for name, values in recipe.items():
        if getattr(options, name) is None:
            setattr(options, name, values[options.small])
    if options.small and (options.pretrained or options.checkpoint or options.windows):
        raise CommandError("--small has no published weights and windows of its own", 2)
    if options.output.exists() and any(options.output.iterdir()):
        raise CommandError(f"--output {options.output} is not empty: name a new folder", 2)


def size_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the backbone that the options change."""
    changed: dict[str, Any] = dict(SMALL) if options.small else {}
    if options.windows:
        changed["window_size"] = (8, 8, *options.windows)
    return {**changed, "drop_path_rate": options.drop_path}


def missing(**packages: str) -> None:
    """Says which packages (module=package) are to be installed."""
    absent = [package for module, package in packages.items() if not find_spec(module)]
    if absent:
        text = f"{', '.join(absent)} missing: pip install 'mambavision-triton[dense]'"
        raise CommandError(text, 2)


def run(main: Callable[[], int]) -> int:
    """The exit code of `main`: 1 failed, 2 a bad argument, 130 interrupted, each with one line."""
    name = Path(sys.argv[0]).name
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return main()
    except CommandError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130


# Pictures in


def open_picture(path: Path, upright: bool = False) -> Any:
    """An RGB picture of Pillow; `upright` where the camera noted how it was held."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            return (ImageOps.exif_transpose(picture) if upright else picture).convert("RGB")
    except Exception as error:
        # Damaged files raise whatever the decoder stumbled over.
        reason = "no such file" if not path.exists() else str(error).splitlines()[0]
        raise CommandError(f"cannot read {path}: {reason}") from None


def pictures_in(paths: Iterable[Path]) -> list[Path]:
    """Files, and of folders the pictures in them."""
    endings = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found += [p for p in inside if p == path or p.suffix.lower() in endings]
    if not found:
        raise CommandError("no pictures there", 2)
    return found


# Training


def autocast(options: argparse.Namespace, device: Any) -> AbstractContextManager[Any]:
    import torch

    return torch.autocast(device.type, torch.bfloat16) if options.amp else nullcontext()


def _batches(loader: Iterable[Any], steps: int) -> Iterator[Any]:
    done = 0
    while True:
        for batch in loader:
            # A message stands for what could not be read.
            if isinstance(batch, str):
                raise CommandError(batch)
            yield batch
            if (done := done + 1) == steps:
                return


def _groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """The rule of `MambaVision.param_groups`, for head and backbone."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    still = {name for name, p in named if p.dim() <= 1 or name.endswith(".A_log")}
    return [
        {"params": [p for n, p in named if n not in still], "weight_decay": weight_decay},
        {"params": [p for n, p in named if n in still], "weight_decay": 0.0},
    ]


def fit(
    model: Any,
    loader: Any,
    loss_of: Callable[[Any], Any],
    evaluate: Callable[[], float],
    save: Callable[[], None],
    options: argparse.Namespace,
    metric: str,
    fixed: Sequence[Any] = (),
) -> float:
    """Trains, evaluates now and then, and saves whenever `evaluate` finds more than ever before.

    `loss_of` takes a batch; modules of `fixed` stay in evaluation mode. Writes results.csv and
    curves.png into the output folder. Returns the best of the metric.
    """
    import torch
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(_groups(model, options.weight_decay), lr=options.lr)
    rising, steps = min(options.warmup, options.steps - 1), options.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / (rising + 1), (steps - i) / (steps - rising))
    )
    device = next(model.parameters()).device
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} updates of "
        f"{options.batch_size} pictures on {device}, into {options.output}",
        flush=True,
    )
    history: list[dict[str, float]] = []
    total, best = 0.0, -1.0
    model.train()
    bar = tqdm(total=steps, unit=" steps", mininterval=0.2 if sys.stderr.isatty() else 30)
    with bar:
        for step, batch in enumerate(_batches(loader, steps), 1):
            for module in fixed:
                module.eval()
            with autocast(options, device):
                loss = loss_of(batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                kept = f"; {options.output} keeps the best weights so far" if history else ""
                raise CommandError(f"the loss is {value} at step {step}: lower --lr{kept}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += value
            bar.update()
            bar.set_postfix_str(f"loss {value:.3f}", refresh=False)
            if step % options.eval_every == 0 or step == steps:
                count = step - (int(history[-1]["step"]) if history else 0)
                bar.clear()
                found = evaluate()
                model.train()
                history.append({"step": step, "loss": total / count, metric: found})
                total = 0.0
                if found > best:
                    best = found
                    save()
                _write_history(options.output, history, metric)
                print(
                    f"step {step}/{steps}: loss {history[-1]['loss']:.4f}, {metric} {found:.4f}"
                    f"{' (best)' if found == best else ''}",
                    flush=True,
                )
    return best


def _write_history(folder: Path, history: list[dict[str, float]], metric: str) -> None:
    from matplotlib.figure import Figure

    from mambavision.report import CORAL, TEAL
    from mambavision.training.folder import whole

    with whole(folder / "results.csv") as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(history[0]))
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in history)
    figure = Figure(figsize=(8, 3), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    for panel, name, tint in zip(panels, ("loss", metric), (CORAL, TEAL), strict=True):
        panel.plot([row["step"] for row in history], [row[name] for row in history], "o-",
                   color=tint, markersize=3)  # fmt: skip
        panel.set(title=name, xlabel="step")
        panel.grid(alpha=0.3)
    with whole(folder / "curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=100)


# Pictures out


def colour(index: int) -> tuple[float, float, float]:
    """Red, green and blue of a class, in 0..1; neighbours are far apart."""
    return colorsys.hsv_to_rgb((0.03 + index * 0.618034) % 1, 0.75, 0.95)


def tinted(picture: Any, mask: np.ndarray, tint: Sequence[float], share: float = 0.6) -> np.ndarray:
    """(height, width, 3) in 0..1 with a colour over the pixels of the mask."""
    pixels = np.array(picture, dtype=np.float64)
    pixels = pixels / 255 if pixels.max() > 1 else pixels
    pixels[mask] = (1 - share) * pixels[mask] + share * np.array(tint)
    return pixels


def board(
    path: Path,
    rows: Sequence[Sequence[tuple[str, np.ndarray, Sequence[tuple[Sequence[float], str, Any]]]]],
    legend: Mapping[str, Sequence[float]],
) -> None:
    """Rows of pictures with titles, and in them boxes: (x1, y1, x2, y2), text, colour."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    from mambavision.training.folder import whole

    first = rows[0][0][1]
    wide = 9.6 / len(rows[0])
    tall = wide * first.shape[0] / first.shape[1] + 0.25
    figure = Figure(
        figsize=(9.6, tall * len(rows) + (0.4 if legend else 0)), layout="constrained"
    )
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        for axes, (title, pixels, boxes) in zip(line, row, strict=True):
            small = pixels.shape[1] < 320
            axes.imshow(pixels, interpolation="nearest" if small else "antialiased")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_title(title, fontsize=9)
            for (x1, y1, x2, y2), text, tint in boxes:
                axes.add_patch(
                    Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=tint)
                )
                axes.text(
                    x1, y1 - 1, text, fontsize=7, va="bottom", color="black",
                    bbox={"facecolor": tint, "edgecolor": "none", "pad": 1, "alpha": 0.85},
                )  # fmt: skip
    if legend:
        patches = [Patch(color=tint, label=name) for name, tint in legend.items()]
        figure.legend(
            handles=patches, loc="outside lower center", ncols=min(len(patches), 8), frameon=False
        )
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
