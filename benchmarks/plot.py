"""Pictures of the measured rows; nothing is measured here.

    length_*       how many times as fast as mamba-ssm's scan, over the length, per direction
    roofline_*     share of the time that the hardware needs at least, per shape and direction
    accuracy_*     images per second against published top-1, the whole zoo
    training_*     training steps: images per second and memory
    cpu_*          milliseconds of each way on a CPU

One picture per machine, dtype and batch. Points are medians, bars reach from the 20th to the 80th
percentile, and a provider has the same colour in all pictures. A picture without rows is not drawn;
a line says so.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import matplotlib.pyplot as plt
from _draw import (
    INK,
    MUTED,
    PROVIDERS,
    STYLE,
    bars,
    by_rank,
    dots,
    legend,
    log_axis,
    look,
    panels,
    title,
    write_beside,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rows import DIRECTIONS, OPERATORS, Row, group, machine, measured, newest, read, times
from zoo import MODELS

__all__ = ["FIGURES", "PROVIDERS", "draw", "look"]

RESULTS = Path(__file__).resolve().parent / "results"


def _name(*parts: Any) -> str:
    return re.sub(r"[^a-z0-9]+", "_", "_".join(map(str, parts)).lower()).strip("_")


def _directions(rows: Iterable[Row]) -> list[str]:
    present = {row["direction"] for row in rows}
    return [d for d in DIRECTIONS if d in present]


def _shape(row: Row) -> str:
    return f"{row['label']}  {row['seqlen']} x {row['dim']}"


def _ratios(rows: Sequence[Row]) -> dict[tuple[str, str], list[tuple[int, float, float, float]]]:
    """{(direction, provider): (length, ratio to mamba-ssm, its low and high end), ...}."""

    def same(r: Row) -> tuple:
        return tuple(r[key] for key in ("direction", "label", "seqlen", "dim", "dstate"))

    base = {same(r): times(r) for r in rows if r["provider"] == "mamba_ssm"}
    found: dict[tuple[str, str], list[tuple[int, float, float, float]]] = {}
    for r in rows:
        theirs, ours = base.get(same(r)), times(r)
        if r["provider"] != "mamba_ssm" and theirs and ours:
            ratio = theirs[0] / ours[0], theirs[1] / ours[2], theirs[2] / ours[1]
            found.setdefault((r["direction"], r["provider"]), []).append((r["seqlen"], *ratio))
    return found


def length(rows: Sequence[Row]) -> dict[str, Figure]:
    """Ratio to mamba-ssm's scan over the sequence length; lines join the geometric means."""
    figures = {}
    groups = group(measured(rows, ["selective_scan"]), machine, "dtype", "batch")
    for (where, dtype, batch), here in groups.items():
        ratios = _ratios(here)
        if not ratios:
            continue
        directions = [d for d in DIRECTIONS if any(d == key[0] for key in ratios)]
        providers = by_rank(provider for _, provider in ratios)
        ticks = sorted({x for values in ratios.values() for x, *_ in values})
        figure, grid = panels(len(directions), 4.2)
        for axes, direction in zip(grid, directions, strict=True):
            for provider in providers:
                found = ratios.get((direction, provider), [])
                _, colour, mark = look(provider)
                for x, middle, low, high in found:
                    axes.errorbar(
                        x, middle, yerr=bars(middle, low, high), fmt=mark, color=colour, ms=5,
                        mec="white", mew=0.5, elinewidth=1.2,
                    )  # fmt: skip
                logs = group([{"x": x, "log": math.log(y)} for x, y, *_ in found], "x")
                means = sorted(
                    (x, math.exp(sum(r["log"] for r in some) / len(some)))
                    for (x,), some in logs.items()
                )
                axes.plot(
                    [x for x, _ in means], [y for _, y in means], color=colour, lw=1.5, alpha=0.7
                )
            axes.axhline(1, color=look("mamba_ssm")[1], lw=1.5)
            axes.set(title=DIRECTIONS[direction], xscale="log", xlabel="length")
            axes.set_xticks(ticks, [str(x) for x in ticks])
            axes.set_xticks([], minor=True)
        for axes in grid:
            log_axis(axes, "y", "x")
        grid[0].set_ylabel("times as fast as mamba-ssm")
        title(figure, "Selective scan against mamba-ssm", where, dtype, f"batch {batch}")
        legend(figure, ["mamba_ssm", *providers])
        figures[_name("length", where, dtype, f"b{batch}")] = figure
    return figures


def roofline(rows: Sequence[Row]) -> dict[str, Figure]:
    """Floor over time, in percent, for every operator, shape and direction."""
    timed = [r for r in measured(rows, OPERATORS) if r.get("share_of_floor") and times(r)]
    figures = {}
    groups = group(timed, "op", machine, "dtype", "batch")
    for (op, where, dtype, batch), here in groups.items():
        directions = _directions(here)
        lines = list(dict.fromkeys(_shape(r) for r in here))
        providers = by_rank(r["provider"] for r in here)
        figure, grid = panels(len(directions), _height(lines, providers))
        for axes, direction in zip(grid, directions, strict=True):
            points = []
            for r in here:
                if r["direction"] == direction:
                    middle, low, high = times(r)
                    share = 100 * r["share_of_floor"]
                    bar = (share, share * middle / high, share * middle / low)
                    points.append((_shape(r), r["provider"], bar))
            dots(axes, lines, points, providers)
            axes.set(title=DIRECTIONS[direction], xlabel="% of the roofline", xlim=(0, 105))
        grid[0].set_ylabel("variant and stage, length x channels")
        title(figure, f"{op}: share of the roofline", where, dtype, f"batch {batch}")
        legend(figure, providers)
        figures[_name("roofline", op, where, dtype, f"b{batch}")] = figure
    return figures


def _height(lines: Sequence[str], providers: Sequence[str]) -> float:
    return 1.7 + len(lines) * max(0.32, 0.13 * len(providers))


def _way(row: Row) -> tuple[str, str]:
    return row["provider"], row.get("setting") or ""


def _trace(axes: Axes, way: tuple[str, str], turn: int, rows: Sequence[Row]) -> Line2D:
    """One line per family, its models as marks; the legend's entry for it."""
    provider, setting = way
    name, colour, mark = look(provider)
    peer = provider == "timm"
    # Settings of one provider: a whole line with full marks, then broken lines with hollow ones.
    style: Any = {
        "color": colour,
        "ls": ("-", "--", ":", "-.")[turn % 4],
        "lw": 1 if peer else 2,
        "marker": mark,
        "ms": 5 if peer else 7,
        "mfc": "white" if turn else colour,
        "mec": colour if turn else "white",
    }
    for line in group(rows, lambda r: MODELS[r["label"]].family).values():
        line.sort(key=lambda r: MODELS[r["label"]].params)
        xs = [r["images_per_s"][0] for r in line]
        ys = [MODELS[r["label"]].top1 for r in line]
        axes.plot(xs, ys, **{**style, "alpha": 0.5 if peer else 1, "marker": ""})
        for x, y, r in zip(xs, ys, line, strict=True):
            axes.plot(r["images_per_s"][1:], [y, y], color=colour, lw=1.2)
            axes.plot(x, y, **style)
    return Line2D([], [], **style, label=f"{name}, {setting}" if setting else name)


def _write_names(axes: Axes, rows: Sequence[Row]) -> None:
    """Each model's name once, at the first of the ways in which it was run; ours by size alone."""
    texts, kept_free, named = [], [], set()
    for r in rows:
        model, (x, low, high) = MODELS[r["label"]], r["images_per_s"]
        kept_free.append(([low, high], [model.top1, model.top1]))
        ours = model.library != "timm"
        look_of_text = (INK, "bold") if ours else (MUTED, "normal")
        text = model.size if ours else model.label
        texts.append((x, model.top1, "" if model.label in named else text, *look_of_text))
        named.add(model.label)
    for line in group([r for r in rows if r["provider"] != "timm"], _way).values():
        line.sort(key=lambda r: MODELS[r["label"]].params)
        xs = [r["images_per_s"][0] for r in line]
        kept_free.append((xs, [MODELS[r["label"]].top1 for r in line]))
    write_beside(axes, texts, kept_free)


def accuracy(rows: Sequence[Row]) -> dict[str, Figure]:
    """Images per second against the published top-1 of every model."""
    figures = {}
    shown = [
        r for r in measured(rows, ["backbone"]) if r.get("images_per_s") and r["label"] in MODELS
    ]
    groups = group(shown, machine, "dtype", "batch", "resolution")
    for (where, dtype, batch, px), here in groups.items():
        figure, axes = plt.subplots(figsize=(9.5, 6.4), layout="constrained")
        ranks = by_rank(r["provider"] for r in here)
        here.sort(key=lambda r: ranks.index(r["provider"]))
        handles = []
        for provider in ranks:
            ways = group([r for r in here if r["provider"] == provider], _way)
            for turn, ((way,), some) in enumerate(ways.items()):
                handles.append(_trace(axes, way, turn, some))
        axes.set(xlabel="images per second, log scale", ylabel="published top-1, %")
        axes.margins(x=0.1, y=0.08)
        log_axis(axes, "x")
        what = f"ImageNet-1K accuracy over throughput at {px} px"
        title(figure, what, where, dtype, f"batch {batch}; bold: sizes of MambaVision")
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
        _write_names(axes, here)
        figures[_name("accuracy", where, dtype, f"b{batch}", f"{px}px")] = figure
    return figures


def training(rows: Sequence[Row]) -> dict[str, Figure]:
    """Training steps: images per second, peak memory, what is kept for the backward pass."""
    gigabytes = {
        "peak_bytes": "GB at the peak, less is better",
        "saved_bytes": "GB kept for the backward pass, less is better",
    }
    figures = {}
    groups = group(measured(rows, ["train_step"]), machine, "dtype", "batch", "resolution")
    for (where, dtype, batch, px), here in groups.items():
        lines = list(dict.fromkeys(_model(r) for r in here))
        providers = by_rank(r["provider"] for r in here)
        shown = {
            "images per second, more is better": [
                (_model(r), r["provider"], r["images_per_s"]) for r in here if r.get("images_per_s")
            ]
        }
        for key, label in gigabytes.items():
            having = [r for r in here if r.get(key)]
            shown[label] = [(_model(r), r["provider"], [r[key] / 1e9] * 3) for r in having]
        shown = {label: points for label, points in shown.items() if points}
        if not shown:
            continue
        figure, grid = panels(len(shown), _height(lines, providers), width=3.4)
        for axes, (label, points) in zip(grid, shown.items(), strict=True):
            dots(axes, lines, points, providers)
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
        title(figure, f"Training step at {px} px", where, dtype, f"batch {batch}")
        legend(figure, providers)
        figures[_name("training", where, dtype, f"b{batch}", f"{px}px")] = figure
    return figures


def _model(row: Row) -> str:
    return MODELS[row["label"]].label if row["label"] in MODELS else row["label"]


def cpu(rows: Sequence[Row]) -> dict[str, Figure]:
    """Milliseconds of every way to compute an operator or a model on a CPU."""
    timed = [r for r in measured(rows, (*OPERATORS, "backbone"), gpu=False) if times(r)]
    timed = [r for r in timed if r["provider"] != "timm"]

    def line_of(r: Row) -> str:
        size = f"{_model(r)} {r['resolution']} px" if r["op"] == "backbone" else _shape(r)
        return f"{size}, batch {r['batch']}"

    figures = {}
    for (op, where, dtype), here in group(timed, "op", machine, "dtype").items():
        directions = _directions(here)
        lines = list(dict.fromkeys(map(line_of, here)))
        providers = by_rank(r["provider"] for r in here)
        figure, grid = panels(len(directions), _height(lines, providers))
        for axes, direction in zip(grid, directions, strict=True):
            # Of several settings of one provider the fastest.
            best: dict[tuple[str, str], list[float]] = {}
            for r in here:
                key, ms = (line_of(r), r["provider"]), [x / 1e3 for x in times(r)]
                if r["direction"] == direction and ms < best.get(key, [math.inf]):
                    best[key] = ms
            dots(axes, lines, [(*key, ms) for key, ms in best.items()], providers)
            axes.set(title=DIRECTIONS[direction], xlabel="ms, log scale, less is better")
            log_axis(axes, "x")
        batches = sorted({r["batch"] for r in here})
        title(figure, f"{op} on a CPU", where, dtype, f"batch {', '.join(map(str, batches))}")
        legend(figure, providers)
        figures[_name("cpu", op, where, dtype)] = figure
    return figures


FIGURES = {
    "length": length,
    "roofline": roofline,
    "accuracy": accuracy,
    "training": training,
    "cpu": cpu,
}
NEEDS = {
    "length": "scans of mamba_ssm and of another provider",
    "roofline": "operators with a share of the floor",
    "accuracy": "whole models",
    "training": "training steps",
    "cpu": "a machine without a GPU",
}


def draw(rows: Sequence[Row], folder: Path) -> tuple[list[Path], list[str]]:
    """Every picture that the rows allow, as PNG files; and a line for each kind without rows."""
    folder.mkdir(parents=True, exist_ok=True)
    written, missing = [], []
    rows = newest(rows)
    for kind, figures_of in FIGURES.items():
        with plt.rc_context(STYLE):
            figures = figures_of(rows)
            for name, figure in figures.items():
                path, temporary = folder / f"{name}.png", folder / f".{name}.{os.getpid()}.png"
                figure.savefig(temporary)
                os.replace(temporary, path)
                plt.close(figure)
                written.append(path)
        if not figures:
            missing.append(f"{kind}: not drawn, there are no rows of {NEEDS[kind]}")
    return written, missing


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", type=Path, default=[RESULTS], help="files or folders")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the pictures")
    options = parser.parse_args()
    try:
        written, missing = draw(read(options.rows), options.output)
    except (OSError, ValueError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    for line in (*map(str, written), *missing):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
