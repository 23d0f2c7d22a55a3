"""The demo's report: charts and one page that holds them all.

Takes numbers, gives bytes: `{file name: content}`, which `write_files` puts in place one whole file
at a time. The page has its pictures inside it, so it can be moved and mailed alone.
"""

import base64
import html
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from .selfcheck import OpCheck  # noqa: E402

__all__ = ["DemoResult", "Epoch", "render", "write_files"]

INK, MUTED, HAIRLINE, PAPER = "#1d2b36", "#6a7883", "#e3e8ec", "#ffffff"
TEAL, CORAL, SAND = "#0e7c86", "#d8573c", "#c9d3d9"
STYLE: Any = {
    "axes.edgecolor": HAIRLINE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "figure.facecolor": PAPER,
    "font.size": 10,
    "grid.color": HAIRLINE,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images; accuracies between 0 and 1."""

    loss: float
    train_accuracy: float
    test_accuracy: float


@dataclass(frozen=True)
class DemoResult:
    """All that the report shows. `images` (n, height, width) in 0..1, with one entry per image of
    `labels`, `predicted` and `confidence`."""

    checks: list[OpCheck]
    history: list[Epoch]
    images: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    training_seconds: float
    parameters: int
    facts: dict[str, str]

    @property
    def accuracy(self) -> float:
        return float((self.labels == self.predicted).mean())


def curves_chart(history: Sequence[Epoch]) -> Figure:
    epochs = np.arange(1, len(history) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    marker = "o" if len(history) == 1 else None

    left.set_title("Training loss")
    left.plot(epochs, [e.loss for e in history], color=TEAL, lw=2, marker=marker)
    left.set(xlabel="epoch", ylabel="cross-entropy, log scale", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")

    right.set_title("Accuracy")
    train = [100 * e.train_accuracy for e in history]
    test = [100 * e.test_accuracy for e in history]
    right.plot(epochs, train, color=MUTED, lw=1.5, marker=marker, label="training, augmented")
    right.plot(epochs, test, color=CORAL, lw=2, marker=marker, label="test, held out")
    right.set(xlabel="epoch", ylabel="%", ylim=(min(80, min(train + test) - 2), 100.5))
    right.legend(loc="lower right", frameon=False)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.02)
    return figure


def predictions_chart(result: DemoResult, columns: int = 10) -> Figure:
    """Up to a row of misread images, the surest leading; a row of right ones, the least sure
    leading; then the first of the rest."""
    good = result.labels == result.predicted
    wrong = np.flatnonzero(~good)
    wrong = wrong[np.argsort(-result.confidence[wrong])][:columns]
    right = np.flatnonzero(good)
    unsure = right[np.argsort(result.confidence[right])][:columns]
    rest = np.setdiff1d(right, unsure)
    shown = np.concatenate([wrong, unsure, rest])[: 4 * columns]
    rows = -(-len(shown) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(columns, 1.32 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, i in zip(grid.flat, shown, strict=False):
        axes.imshow(result.images[i], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        good = result.labels[i] == result.predicted[i]
        # Never rounded up to a certainty that the model did not state.
        sure = f"{min(99, int(100 * result.confidence[i]))} %"
        text = f"{result.predicted[i]}   {sure}"
        text = text if good else f"{text}\nis {result.labels[i]}"
        axes.set_title(
            text, loc="center", fontsize=9, pad=4, color=INK if good else CORAL,
            fontweight="normal" if good else "bold",
        )  # fmt: skip
        if not good:
            height, width = result.images[i].shape
            axes.add_patch(
                plt.Rectangle(
                    (-0.5, -0.5), width, height, fill=False, ec=CORAL, lw=2.5, clip_on=False
                )
            )
    return figure


def speed_chart(checks: Sequence[OpCheck]) -> Figure:
    """One panel per operator and dtype: three bars, shorter is better."""
    dtypes = sorted({c.dtype for c in checks}, reverse=True)
    names = list(dict.fromkeys(c.op for c in checks))
    figure, grid = plt.subplots(
        len(dtypes), len(names), figsize=(10, 2.3 * len(dtypes)), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    figure.set_layout_engine("constrained", hspace=0.15)
    for check in checks:
        axes = grid[dtypes.index(check.dtype), names.index(check.op)]
        times = 1e3 * np.array([check.seconds, check.seconds_eager, check.seconds_reference])
        bars = axes.barh([2, 1, 0], times, color=[TEAL, SAND, SAND], height=0.62)
        gains = ["", f"   {times[1] / times[0]:.1f}x", f"   {times[2] / times[0]:.1f}x"]
        axes.bar_label(
            bars, [f"{t:.3g} ms{gain}" for t, gain in zip(times, gains, strict=True)],
            padding=5, color=INK,
        )  # fmt: skip
        axes.set_title(f"{check.op}, {check.dtype}")
        axes.set_xlim(0, 1.7 * times.max())
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        if axes is grid[dtypes.index(check.dtype), 0]:
            fused = f"fused ({check.backend})"
            axes.set_yticks([2, 1, 0], [fused, "eager PyTorch", "reference"])
    return figure


def confusion_chart(labels: np.ndarray, predicted: np.ndarray, classes: int = 10) -> Figure:
    counts = np.zeros((classes, classes), dtype=int)
    np.add.at(counts, (labels, predicted), 1)
    figure, axes = plt.subplots(figsize=(4.6, 4.6), layout="constrained")
    axes.grid(False)
    for i in range(classes):
        for j in range(classes):
            if counts[i, j]:
                shade = TEAL if i == j else CORAL
                axes.add_patch(
                    plt.Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fc=shade, alpha=0.16, ec="none")
                )
                weight = "normal" if i == j else "bold"
                axes.text(
                    j, i, counts[i, j], ha="center", va="center", color=shade, weight=weight
                )
            else:
                axes.text(j, i, "·", ha="center", va="center", color=SAND)
    axes.set(xlim=(-0.5, classes - 0.5), ylim=(classes - 0.5, -0.5), aspect="equal")
    axes.set_xticks(range(classes))
    axes.set_yticks(range(classes))
    axes.set(xlabel="predicted", ylabel="written")
    axes.spines["bottom"].set_visible(False)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    plt.close(figure)
    return buffer.getvalue()


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MambaVision demo</title>
<style>
:root {{ color-scheme: light; }}
body {{ margin: 0; background: #f4f6f7; color: {ink};
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }}
main {{ max-width: 980px; margin: 0 auto; padding: 40px 20px 60px; }}
h1 {{ font-size: 30px; margin: 0 0 4px; letter-spacing: -.01em; }}
h2 {{ font-size: 20px; margin: 0 0 2px; }}
p {{ margin: 0 0 12px; color: {muted}; }}
section {{ background: #fff; border-radius: 12px; padding: 24px 28px; margin-top: 20px;
  box-shadow: 0 1px 3px rgb(29 43 54 / .09); }}
.figures {{ display: grid; gap: 16px; margin-top: 24px;
  grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }}
.figures div {{ background: #fff; border-radius: 12px; padding: 18px 22px;
  box-shadow: 0 1px 3px rgb(29 43 54 / .09); }}
.figures b {{ display: block; font-size: 30px; line-height: 1.2; color: {teal};
  font-variant-numeric: tabular-nums; }}
.figures span {{ color: {muted}; font-size: 14px; }}
img {{ display: block; width: 100%; height: auto; margin-top: 12px; }}
img.narrow {{ max-width: 470px; margin-inline: auto; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; margin-top: 8px;
  font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 7px 14px 7px 0; border-bottom: 1px solid {hairline}; }}
th {{ color: {muted}; font-weight: 500; white-space: nowrap; }}
td.number, th.number {{ text-align: right; }}
tr:last-child td, tr:last-child th {{ border-bottom: 0; }}
.bad {{ color: {coral}; font-weight: 600; }}
code {{ font-size: 13px; overflow-wrap: anywhere; }}
</style>
<main>
<h1>MambaVision reads handwritten digits</h1>
<p>{intro}</p>
<div class="figures">{figures}</div>
{sections}
</main>
</html>
"""


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{body}</section>"


def _image(png: bytes, alt: str, css: str = "") -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img class="{css}" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _check_table(checks: Sequence[OpCheck]) -> str:
    head = ["operator", "backend", "dtype", "largest error", "allowed", "of", "result"]
    cells = "".join(f"<th>{name}</th>" for name in head)
    rows = [f"<tr>{cells}</tr>"]
    for check in checks:
        result = "agrees" if check.ok else '<span class="bad">DISAGREES</span>'
        row = (
            check.op, check.backend, check.dtype, f"{check.error:.1e}", f"{check.allowed:.1e}",
            check.tensor, result,
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _page(result: DemoResult, charts: dict[str, bytes]) -> str:
    wrong = int((result.labels != result.predicted).sum())
    figures = {
        "test accuracy": f"{100 * result.accuracy:.1f} %",
        f"of {len(result.labels)} test images misread": str(wrong),
        f"of training, {len(result.history)} epochs": f"{result.training_seconds:.0f} s",
        "parameters": f"{result.parameters:,}",
    }
    facts = "".join(
        f"<tr><th>{html.escape(k)}</th><td><code>{html.escape(v)}</code></td></tr>"
        for k, v in result.facts.items()
    )
    shape = result.checks[0].shape if result.checks else ""
    sections = [
        _section(
            "What it reads",
            f"Test images with the prediction and its confidence. First those misread, framed "
            f"({wrong or 'none'} of {len(result.labels)}); then the ones it was least sure of.",
            _image(charts["predictions.png"], "test images with predictions"),
        ),
        _section(
            "How it learned",
            "Reported are the last epoch's weights: nothing was chosen on the test images.",
            _image(charts["curves.png"], "loss and accuracy per epoch"),
        ),
        _section(
            "What it confuses",
            "Test images by written and predicted digit; those off the diagonal are misread.",
            _image(charts["confusion.png"], "confusion matrix", "narrow"),
        ),
        _section(
            "Are the fused operators right here?",
            "Outputs and every gradient against the reference in float64, relative to the largest "
            "value. Allowed is twice the reference's own error in the same dtype, plus eight "
            "roundings. Shown is the tensor nearest its limit.",
            _check_table(result.checks),
        ),
        _section(
            "And how fast?",
            f"Forward and backward together, median; {shape}. Shorter is better; behind each time "
            "stands how many times as long as the fused operator it takes.",
            _image(charts["speed.png"], "time per operator"),
        ),
        _section(
            "How to get this page again",
            "Same seed, same machine, same versions.",
            f"<table>{facts}</table>",
        ),
    ]
    return PAGE.format(
        ink=INK, muted=MUTED, teal=TEAL, coral=CORAL, hairline=HAIRLINE,
        intro=html.escape(
            "A small MambaVision, trained here from random weights on the 1,797 handwritten digits "
            "that ship inside scikit-learn. The digits carry no writer ids, so the same writer may "
            "be in the training and in the test images."
        ),
        figures="".join(f"<div><b>{v}</b><span>{k}</span></div>" for k, v in figures.items()),
        sections="\n".join(sections),
    )  # fmt: skip


def render(result: DemoResult) -> dict[str, bytes]:
    """Every file of the report by name; the page, `report.html`, is the last."""
    with plt.rc_context(STYLE):
        charts = {
            "curves.png": _png(curves_chart(result.history)),
            "predictions.png": _png(predictions_chart(result)),
            "confusion.png": _png(confusion_chart(result.labels, result.predicted)),
            "speed.png": _png(speed_chart(result.checks)),
        }
    numbers = {
        "accuracy": result.accuracy,
        "test_images": len(result.labels),
        "training_seconds": result.training_seconds,
        "parameters": result.parameters,
        "history": [asdict(epoch) for epoch in result.history],
        "checks": [asdict(check) | {"ok": check.ok} for check in result.checks],
        "facts": result.facts,
    }
    return {
        **charts,
        "results.json": (json.dumps(numbers, indent=2) + "\n").encode(),
        "report.html": _page(result, charts).encode(),
    }


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Each file appears whole or not at all; a file of that name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            # mkstemp makes files that only their owner can read.
            os.chmod(temporary, 0o644)
            os.replace(temporary, folder / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
