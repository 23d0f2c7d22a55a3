"""What the pictures are drawn with: style, the look of providers, dots, legends, labels."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.transforms import Bbox  # noqa: E402

INK, MUTED, HAIRLINE = "#1d2b36", "#5c6a75", "#e3e8ec"
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#b4bfc7",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.dpi": 130,
    "font.size": 9,
    "grid.color": HAIRLINE,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}

# Okabe and Ito's colours, told apart with any colour vision, and a mark of its own for each.
PROVIDERS = {
    "triton": ("ours, Triton", "#0072B2", "o"),
    "torch": ("ours, PyTorch", "#56B4E9", "s"),
    "mamba_ssm": ("mamba-ssm", "#D55E00", "^"),
    "mamba_ssm_padded": ("mamba-ssm, padded", "#E69F00", "v"),
    "mamba_ssm_folded": ("mamba-ssm, folded (cost only)", "#CC79A7", "<"),
    "eager": ("eager PyTorch", "#009E73", "D"),
    "eager_loop": ("eager PyTorch, loop over time", "#B2DF8A", "d"),
    "compiled": ("compiled eager", "#8C6D00", "P"),
    "no_scan": ("ours without the scan (cost only)", "#332288", ">"),
    "reference": ("reference loop", "#7F7F7F", "X"),
    "timm": ("timm", "#9AA5AD", "h"),
}
OTHER_COLOUR, OTHER_MARK = "#4B4B4B", "*"


def look(provider: str) -> tuple[str, str, str]:
    """A provider's name in legends, its colour and its mark."""
    return PROVIDERS.get(provider, (provider, OTHER_COLOUR, OTHER_MARK))


def by_rank(providers: Iterable[str]) -> list[str]:
    """Each provider once, those of the table first and in its order."""
    known = list(PROVIDERS)
    return sorted(set(providers), key=lambda p: known.index(p) if p in known else len(known))


def title(figure: Figure, what: str, *where: Any) -> None:
    figure.suptitle(f"{what}\n{', '.join(map(str, where))}", x=0.01, ha="left", fontsize=11)


def legend(figure: Figure, providers: Iterable[str]) -> None:
    handles = []
    for provider in dict.fromkeys(providers):
        name, colour, mark = look(provider)
        handles.append(plt.Line2D([], [], color=colour, marker=mark, lw=0, ms=6, label=name))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))


def panels(count: int, height: float, width: float = 4.4) -> tuple[Figure, list[Axes]]:
    figure, grid = plt.subplots(
        1, count, figsize=(max(6.0, 1.6 + width * count), height), layout="constrained",
        squeeze=False, sharey=True,
    )  # fmt: skip
    return figure, list(grid[0])


def round_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 and their tenfolds, for a logarithmic axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5))
    return [x for x in steps if low <= x <= high]


def log_axis(axes: Axes, which: str, unit: str = "") -> None:
    """Makes an axis logarithmic, with round numbers at its ticks."""
    getattr(axes, f"set_{which}scale")("log")
    ticks = round_ticks(*getattr(axes, f"get_{which}lim")())
    if len(ticks) > 8:
        ticks = [x for x in ticks if f"{x:e}".startswith("1")]
    getattr(axes, f"set_{which}ticks")(ticks, [f"{x:g}{unit}" for x in ticks])
    getattr(axes, f"set_{which}ticks")([], minor=True)


def bars(middle: float, low: float, high: float) -> list[list[float]]:
    """Lengths of an error bar; a percentile on the wrong side of the median counts as 0."""
    return [[max(0.0, middle - low)], [max(0.0, high - middle)]]


def dots(
    axes: Axes,
    lines: Sequence[str],
    points: Iterable[tuple[str, str, Sequence[float]]],
    providers: Sequence[str],
) -> None:
    """One line per name; on it each provider's median with its bar, one below the other."""
    step = 0.7 / max(len(providers), 1)
    for line, provider, (middle, low, high) in points:
        shift = (providers.index(provider) - (len(providers) - 1) / 2) * step
        _, colour, mark = look(provider)
        axes.errorbar(
            middle, lines.index(line) + shift, xerr=bars(middle, low, high), fmt=mark,
            color=colour, ms=5.5, mec="white", mew=0.5, elinewidth=1.2,
        )  # fmt: skip
    axes.set_yticks(range(len(lines)), lines)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    for y in range(1, len(lines)):
        axes.axhline(y - 0.5, color=HAIRLINE, lw=0.8, zorder=0)


def write_beside(
    axes: Axes,
    texts: Sequence[tuple[float, float, str, str, str]],
    kept_free: Iterable[tuple[Sequence[float], Sequence[float]]],
) -> None:
    """Writes each (x, y, text, colour, weight) near its point where it covers nothing.

    `kept_free` are lines (xs, ys) that no text may cross. Tried are places round the point, nearest
    first; what fits nowhere is left out rather than written over something else.
    """
    axes.figure.canvas.draw()
    frame = axes.get_window_extent()
    points = axes.transData.transform([(x, y) for x, y, *_ in texts])
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in points]
    for xs, ys in kept_free:
        corners = axes.transData.transform(list(zip(xs, ys, strict=True)))
        for start, end in zip(corners, corners[1:], strict=False):
            for t in np.linspace(0, 1, 2 + int(np.abs(end - start).max() / 6)):
                x, y = start + t * (end - start)
                taken.append(Bbox.from_bounds(x - 2, y - 2, 4, 4))
    turns = [i * math.pi / 4 for i in (0, 4, 2, 6, 1, 7, 3, 5)]
    places = [(reach, turn) for reach in (8, 15, 24, 34, 46, 60) for turn in turns]
    for x, y, text, colour, weight in texts:
        for reach, turn in places if text else ():
            dx, dy = reach * math.cos(turn), reach * math.sin(turn)
            note = axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", color=colour, fontsize=8,
                weight=weight, va="center",
                ha="left" if dx > 1 else "right" if dx < -1 else "center",
            )  # fmt: skip
            box = note.get_window_extent().padded(1)
            inside = frame.x0 <= box.x0 <= box.x1 <= frame.x1
            inside = inside and frame.y0 <= box.y0 <= box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                if reach > 8:
                    thin = {"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.5}
                    axes.annotate(
                        "", (x, y), (dx, dy), textcoords="offset points", arrowprops=thin
                    )
                break
            note.remove()
