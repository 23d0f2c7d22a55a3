"""Markdown tables of the measured rows; nothing is measured here."""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _draw import by_rank, look
from rows import DIRECTIONS, OPERATORS, Row, group, machine, newest, read

__all__ = ["tables"]

RESULTS = Path(__file__).resolve().parent / "results"


def _time(value: Sequence[float] | None) -> str:
    """Median (p20 to p80), in microseconds or, from 10,000 on, milliseconds."""
    if not value:
        return ""
    unit, scale = ("ms", 1e3) if value[0] >= 1e4 else ("us", 1.0)
    digits = [x / scale for x in value]
    middle, low, high = (f"{x:.3g}" if x < 1e3 else f"{x:.0f}" for x in digits)
    return f"{middle} {unit} ({low}-{high})"


def _number(value: float | None, scale: float, digits: int = 3) -> str:
    return "" if value is None else f"{value / scale:.{digits}g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _status(row: Row) -> str:
    return "" if row["status"] == "ok" else f"{row['status']}: {row.get('reason') or ''}"


def _speed(row: Row) -> str:
    value = row.get("images_per_s")
    return "" if not value else f"{value[0]:.4g} ({value[1]:.4g}-{value[2]:.4g})"


# Heading: cell. Columns that are empty throughout are left out.
_COMMON: dict[str, Any] = {
    "direction": lambda r: DIRECTIONS.get(r["direction"], r["direction"]),
    "provider": lambda r: look(r["provider"])[0],
    "setting": lambda r: r.get("setting") or "",
}
_TIMES: dict[str, Any] = {
    "kernels": lambda r: _time(r.get("kernel_us")),
    "call": lambda r: _time(r.get("eager_us")),
    "CUDA graph": lambda r: _time(r.get("graph_us")),
}
_MEMORY: dict[str, Any] = {
    "peak MB": lambda r: _number(r.get("peak_bytes"), 1e6),
    "saved MB": lambda r: _number(r.get("saved_bytes"), 1e6),
}
_OPERATOR = {
    "shape": lambda r: f"{r['label']}, {r['seqlen']} x {r['dim']}",
    **_COMMON,
    **_TIMES,
    "of the roofline": lambda r: _share(r.get("share_of_floor")),
    "GB/s": lambda r: _number(r.get("gb_per_s"), 1),
    **_MEMORY,
    "": _status,
}
_MODEL = {
    "model": lambda r: r["label"],
    "px": lambda r: str(r.get("resolution") or ""),
    **_COMMON,
    **_TIMES,
    "images/s": _speed,
    **_MEMORY,
    "": _status,
}


def _table(rows: Sequence[Row], columns: dict[str, Any]) -> list[str]:
    if not rows:
        return ["No rows with a result."]
    cells = [[str(cell(row)).replace("|", "/") for cell in columns.values()] for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    heads = list(columns)
    lines = [[heads[i] for i in kept], ["---"] * len(kept)]
    lines += [[line[i] for i in kept] for line in cells]
    return ["| " + " | ".join(line) + " |" for line in lines]


def tables(rows: Iterable[Row]) -> str:
    """Markdown: one table per operator, machine, dtype and batch, the latest row of each kind."""
    rows = newest(rows)
    ranks = by_rank(row["provider"] for row in rows)
    text = [
        "# Measured",
        "",
        "Made from the rows in this folder by `benchmarks/tables.py`; what the columns mean is in",
        "`benchmarks/README.md`. Times are medians with the 20th and 80th percentile.",
    ]
    for (op, where, dtype, batch), here in group(rows, "op", machine, "dtype", "batch").items():
        shapes = list(dict.fromkeys((r["label"], r.get("seqlen"), r.get("dim")) for r in here))
        directions = list(DIRECTIONS)
        here.sort(
            key=lambda r: (
                shapes.index((r["label"], r.get("seqlen"), r.get("dim"))),
                directions.index(r["direction"]) if r["direction"] in directions else 9,
                ranks.index(r["provider"]),
            )
        )
        text += ["", f"## {op}: {where}, {dtype}, batch {batch}", ""]
        there = [r for r in here if r["status"] != "unavailable"]
        text += _table(there, _OPERATOR if op in OPERATORS else _MODEL)
        absent = {
            f"- {' '.join(filter(None, (look(r['provider'])[0], r.get('setting'))))}: {r['reason']}"
            for r in here
            if r["status"] == "unavailable"
        }
        if absent:
            text += ["", "Unavailable here:", "", *sorted(absent)]
    if not rows:
        text += ["", "No rows."]
    elif not any(row.get("gpu") for row in rows):
        text += [
            "",
            "Not measured, because it needs a GPU: kernel times, CUDA graphs, shares of the",
            "roofline, peak memory, and every comparison with mamba-ssm.",
        ]
    return "\n".join(text) + "\n"


def write(rows: Iterable[Row], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(tables(rows), encoding="utf-8")
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", type=Path, default=[RESULTS], help="files or folders")
    parser.add_argument("--output", type=Path, default=RESULTS / "TABLES.md", help="Markdown file")
    options = parser.parse_args()
    try:
        write(read(options.rows), options.output)
    except (OSError, ValueError) as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
