"""Measured rows: reading them, and which of them say the same thing about the same machine."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "DIRECTIONS", "OPERATORS", "Row", "group", "machine", "measured", "newest", "read", "times",
]  # fmt: skip

Row = dict[str, Any]
OPERATORS = ("selective_scan", "conv1d_silu", "mixer", "mixer_module")
DIRECTIONS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of JSON-lines files, or of the folders that hold them; those of other formats not.

    ValueError, with file and line, for what is no JSON object.
    """
    rows = []
    for path in paths:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        for file in files:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    row = json.loads(line)
                    known = "eager_us" in row and "status" in row
                except (ValueError, TypeError):
                    raise ValueError(f"{file}:{number} is no row: {line[:60]!r}") from None
                if known:
                    rows.append(row)
    return rows


SAME = (
    "op", "provider", "label", "setting", "batch", "seqlen", "dim", "dstate", "dtype", "direction",
    "resolution",
)  # fmt: skip


def machine(row: Row) -> str:
    """The GPU's name, or the CPU's with the threads used."""
    if row.get("gpu"):
        return row["gpu"]
    return f"{row.get('cpu') or 'CPU'}, {row.get('threads', '?')} threads"


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that measured the same thing on the same machine, the last."""
    kept: dict[tuple, Row] = {}
    for row in rows:
        key = (machine(row), *(row.get(name) for name in SAME))
        kept.pop(key, None)
        kept[key] = row
    return list(kept.values())


def times(row: Row) -> list[float] | None:
    """Median, p20, p80 in microseconds: of the kernels, where they were timed, else of the wall."""
    return row.get("kernel_us") or row.get("eager_us")


def group(rows: Iterable[Row], *keys: Callable[[Row], Any] | str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = tuple(k(row) if callable(k) else row.get(k) for k in keys)
        groups.setdefault(key, []).append(row)
    return groups


def measured(rows: Iterable[Row], ops: Sequence[str], gpu: bool | None = None) -> list[Row]:
    return [
        row
        for row in rows
        if row["status"] == "ok"
        and row["op"] in ops
        and (gpu is None or bool(row.get("gpu")) == gpu)
    ]
