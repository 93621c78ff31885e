"""Where the blocks of a network stand in its picture: bands by resolution, rows, and rungs between the towers.

Lowest resolution first, at the top. All lengths are inches, y grows downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nvae_lowmem.summary.summary import BlockSummary

_BAND_MIN = 0.74  # the label of a band has up to four lines
_ROW_MIN, _ROW_MAX = 0.29, 0.46


@dataclass(frozen=True)
class Band:
    """The horizontal strip of one resolution, from `top` down to `bottom`."""

    size: int
    top: float
    bottom: float


@dataclass
class Layout:
    """The positions in the picture: centre lines of blocks by name, strips of resolutions, and the lower end."""

    row: float
    """Height of one row."""
    y: dict[str, float] = field(default_factory=dict)
    bands: list[Band] = field(default_factory=list)
    bottom: float = 0.0


def lay_out(blocks: Sequence[BlockSummary], top: float, height: float) -> Layout:
    """A row for every block, from `top` downwards: the two halves of a group side by side, cells that change the
    resolution on the edge between two bands. Few rows are spread over about `height`."""
    sizes = sorted({b.size for b in blocks})
    rows = sum(len(_rungs(blocks, s)) + max(map(len, _others(blocks, s))) + 1 for s in sizes)
    layout = Layout(row=min(_ROW_MAX, max(_ROW_MIN, height / rows)))
    y = top
    for index, size in enumerate(sizes):
        edge = y
        y += layout.row * (0.75 if index else 0.25)  # the edge runs through the middle of a row
        for rung in _rungs(blocks, size):
            for name in rung:
                layout.y[name] = y + layout.row / 2
            y += layout.row
        columns = _others(blocks, size)
        y += layout.row * max(map(len, columns))
        for column in columns:
            for place, block in enumerate(reversed(column)):
                layout.y[block.name] = y - layout.row * (place + 0.5)
        last = index == len(sizes) - 1
        y = max(y + layout.row * (0.25 if last else 0.75), edge + _BAND_MIN)
        layout.bands.append(Band(size, edge, y))
        layout.y |= {b.name: y for b in blocks if _sizes(b) == {size, 2 * size}}
    layout.bottom = y
    return layout


def _sizes(block: BlockSummary) -> set[int]:
    return {shape[1] for shape in (block.input, block.output) if shape is not None}


def _rungs(blocks: Sequence[BlockSummary], size: int) -> list[tuple[str, ...]]:
    """The rows of a band that tie the towers together: (top, start), then (encoder group, decoder group) top-down."""
    here = [b.name for b in blocks if _sizes(b) == {size}]
    ends = tuple(name for name in ("top", "start") if name in here)
    pairs = [(name.replace("dec_", "enc_"), name) for name in here if name.startswith("dec_")]
    return ([ends] if ends else []) + [tuple(n for n in pair if n in here) for pair in pairs]


def _others(blocks: Sequence[BlockSummary], size: int) -> tuple[list[BlockSummary], list[BlockSummary]]:
    """What else keeps this resolution, of the encoder and of the decoder, each from the top down."""
    rungs = {name for rung in _rungs(blocks, size) for name in rung}
    rest = [b for b in blocks if _sizes(b) == {size} and b.name not in rungs]
    return [b for b in reversed(rest) if b.tower == "encoder"], [b for b in rest if b.tower == "decoder"]
