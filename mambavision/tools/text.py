"""Tables, numbers and progress for the terminal."""

import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["amount", "percent", "progress", "table"]


def table(rows: Sequence[Sequence[str]], sides: str) -> str:
    """Columns two spaces apart, each to the left or right as its letter in `sides` (l, r) says.

    >>> print(table([("a", "1"), ("bcd", "23")], "lr"))
    a     1
    bcd  23
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def percent(share: float) -> str:
    """With a decimal, and never rounded up to a certainty or down to nothing.

    >>> percent(0.99999), percent(1), percent(0.0001), percent(0)
    ('99.9 %', '100.0 %', '<0.1 %', '0.0 %')
    """
    if 0 < share < 0.0005:
        return "<0.1 %"
    return f"{100 * (min(share, 0.999) if share < 1 else 1):.1f} %"


def amount(number: float, unit: str = "", digits: int = 3) -> str:
    """In thousands, millions, billions of a unit.

    >>> amount(31_794_248), amount(4.464e9, digits=4), amount(12, "B"), amount(1.5e6, "B")
    ('31.8 M', '4.464 G', '12 B', '1.5 MB')
    """
    for prefix in ("", "k", "M", "G"):
        if number < 999.5 or prefix == "G":
            break
        number /= 1000
    return f"{number:.{digits}g} {prefix}{unit}".rstrip()


def progress(total: int, unit: str, label: str = "") -> Any:
    """A bar that goes when it is done; in a log file, a line every half minute."""
    from tqdm import tqdm

    waiting = 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=total, unit=f" {unit}", desc=label or None, leave=False, mininterval=waiting)
