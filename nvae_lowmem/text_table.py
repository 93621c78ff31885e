"""Tables as text: columns as wide as they need to be."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(alignment: str, rows: Sequence[Sequence[str]], rule: bool = True) -> list[str]:
    """Aligned lines, the first row being the header, with a rule under it.

    alignment: one of "<" (flush left) and ">" (flush right) per column; the last one also serves further columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = alignment.ljust(len(widths), alignment[-1])
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]] if rule else lines
