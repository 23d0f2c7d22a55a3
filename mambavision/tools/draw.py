"""Pictures: a prediction, what the stages see, a confusion matrix. Figures in, PNG files out."""

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from textwrap import shorten
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from ..report import CORAL, INK, MUTED, PAPER, SAND, STYLE, TEAL
from ..training.folder import whole
from .text import percent

__all__ = ["confusion", "features", "prediction"]

LARGEST = 640  # pixels of a picture's longer side in a drawing


def _drawn(draw: Callable[..., Figure]) -> Callable[..., None]:
    """`draw` in the style of our reports, into the file of its first argument."""
    margins = {f"figure.constrained_layout.{side}_pad": 0.1 for side in "wh"}
    style = {**STYLE, **margins, "axes.grid": False}

    @wraps(draw)
    def write(path: Path, *arguments: Any) -> None:
        with matplotlib.rc_context(style), whole(path) as temporary:
            draw(*arguments).savefig(temporary, format="png", dpi=100)

    return write


def _bare(axes: Any, title: str = "") -> Any:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10, fontweight="normal", pad=6)
    return axes


def _interpolation(pixels: int) -> str:
    """Few pixels are shown as such."""
    return "nearest" if pixels < 200 else "antialiased"


@_drawn
def prediction(
    picture: Image.Image, classes: Sequence[tuple[str, float]], seen: tuple[float, float]
) -> Figure:
    """A picture beside its likeliest classes; what the model does not see of it is pale.

    `seen` are the shares of width and height in the middle that the model is given.
    """
    picture = picture.copy()
    picture.thumbnail((LARGEST, LARGEST))
    width, height = picture.size
    rows = max(len(classes), 5)
    tall = max(min(4.4 * height / width, 5.6), 0.42 * rows + 0.4)
    figure = Figure(figsize=(8.6, tall), facecolor=PAPER, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _bare(left).imshow(picture, interpolation=_interpolation(width))
    x, y = ((1 - share) / 2 for share in seen)
    pale: Any = {"facecolor": PAPER, "alpha": 0.65, "linewidth": 0, "transform": left.transAxes}
    for corner, across, down in (
        ((0, 0), x, 1), ((1 - x, 0), x, 1), ((x, 0), 1 - 2 * x, y), ((x, 1 - y), 1 - 2 * x, y),
    ):  # fmt: skip
        left.add_patch(Rectangle(corner, across, down, **pale))

    _bare(right)
    chances = [chance for _, chance in classes]
    places = range(len(classes))
    right.barh(places, [1] * len(classes), height=0.16, color=SAND, alpha=0.45)
    right.barh(places, chances, height=0.16, color=[TEAL, *[MUTED] * (len(classes) - 1)])
    for place, (label, chance) in enumerate(classes):
        weight = "normal" if place else "bold"
        text = shorten(label, 38, placeholder=" …")
        right.text(0, place - 0.2, text, color=INK, fontsize=11, fontweight=weight)
        right.text(1, place - 0.2, percent(chance), color=INK, ha="right", fontweight=weight)
    # Rows of one height, whatever the number of classes.
    right.set(xlim=(-0.02, 1.02), ylim=(rows - 0.6, -0.8))
    return figure


def _principal(x: Tensor) -> np.ndarray:
    """(channels, height, width) to (height, width, 3): three principal components as colours."""
    channels, height, width = x.shape
    points = x.reshape(channels, -1).t().double()
    points = points - points.mean(0)
    axes = torch.linalg.svd(points, full_matrices=False).Vh[:3]
    # An axis has no sign of its own: its largest entry is positive.
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    found = torch.zeros(len(points), 3, dtype=points.dtype)
    found[:, : len(axes)] = points @ axes.t()
    low, high = (found.quantile(q, 0) for q in (0.01, 0.99))
    scaled = ((found - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return scaled.reshape(height, width, 3).numpy()


@_drawn
def features(picture: np.ndarray, maps: Sequence[Tensor]) -> Figure:
    """What the stages make of a picture: how strongly each position responds, and in what way.

    `picture` is (height, width, 3) in 0..1 as the model got it; maps are (channels, height, width).
    """
    figure = Figure(figsize=(12, 5.3), facecolor=PAPER, layout="constrained")
    grid = figure.subplots(2, 1 + len(maps))
    rows = picture.shape[0]
    title = f"picture, {picture.shape[1]} x {rows}"
    _bare(grid[0, 0], title).imshow(picture, interpolation=_interpolation(rows))
    note = _bare(grid[1, 0])
    note.text(
        0.5, 0.5,
        "above: strength, the norm\nover all channels\n\nbelow: kind, the first three\nprincipal "
        "components of the\nchannels as red, green, blue;\nlike colours, like features",
        ha="center", va="center", color=MUTED, fontsize=9.5, transform=note.transAxes,
    )  # fmt: skip
    for stage, x in enumerate(maps, 1):
        x = x.float().cpu()
        channels, height, width = x.shape
        above, below = grid[:, stage]
        _bare(above, f"stage {stage}, {channels} x {height} x {width}")
        above.imshow(x.norm(dim=0).numpy(), cmap="magma", interpolation="nearest")
        _bare(below).imshow(_principal(x), interpolation="nearest")
    return figure


@_drawn
def confusion(counts: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Rows are true classes, columns predicted ones; right in one colour, wrong in another.

    `counts` is (classes, classes). Colours are shares of a row, on a root scale: rare mistakes are
    to be seen.
    """
    size = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right, wrong, paper = (np.array(matplotlib.colors.to_rgb(c)) for c in (TEAL, CORAL, PAPER))
    target = np.where(np.eye(size, dtype=bool)[..., None], right, wrong)
    colours = paper + (target - paper) * np.sqrt(shares)[..., None]
    inches = min(max(3.4 + 0.34 * size, 5), 12)
    figure = Figure(figsize=(inches, inches), facecolor=PAPER, layout="constrained")
    axes = figure.subplots()
    axes.imshow(colours, interpolation="nearest" if size <= 200 else "antialiased")
    axes.set_title(title)
    axes.set(xlabel="predicted", ylabel="true")
    axes.spines[:].set_visible(False)
    if size <= 60:
        labels = [shorten(name, 24, placeholder=" …") for name in names]
        steep = max(map(len, labels)) > 2
        axes.set_xticks(range(size), labels, rotation=90 if steep else 0)
        axes.set_yticks(range(size), labels)
        axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="#eef1f3", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
    if size <= 25:
        for row, column in np.argwhere(counts):
            dark = shares[row, column] > 0.3
            axes.text(
                column, row, str(counts[row, column]), ha="center", va="center", fontsize=9,
                color=PAPER if dark else INK,
            )  # fmt: skip
    return figure
