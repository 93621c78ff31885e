"""The architecture as a picture, drawn from a Description: the ladder of both towers, and one decoder group inside.

Lowest resolution at the top, as the model's own words have it: the encoder runs bottom-up on the left, the decoder
top-down on the right, and every latent group is a rung between them. All coordinates are inches, y grows downwards.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

from nvae_lowmem.config import KEEPS, Keep
from nvae_lowmem.memory.describe import Block, Description, Scale, Shape, shape_text

# Okabe-Ito: told apart with any colour vision
KEEP_COLOURS: dict[Keep, str] = {"all": "#56B4E9", "cheap": "#3DBE95", "input": "#F0B541", "host": "#D994BC"}
KEEP_MEANINGS: dict[Keep, str] = {
    "all": "everything backward needs",
    "cheap": "convolution outputs",
    "input": "its input; all else is computed again",
    "host": "as input, in host memory",
}
_ROLES = {"groups": "group of a tower", "cell": "single cell", "other": "convolution or constant"}
_ROLE_COLOURS = {"groups": "#BFD9F2", "cell": "#F7DDB0", "other": "#E3DDEE"}
_PLAIN, _LINE, _FAINT, _LATENT = "#FFFFFF", "#404040", "#8A8A8A", "#FBE3E8"
_BANDS = ("#F3F4F6", "#FAFAFA")

_WIDTH, _MARGIN, _HEADER = 13.7, 0.25, 1.05
_ENCODER_X, _SUM_X, _LATENT_X, _DECODER_X = 3.2, 4.52, 5.12, 6.75  # centres of the ladder's columns
_BOX_WIDTH, _PANEL_X, _PANEL_WIDTH = 1.8, 8.35, 5.1
_PART_WIDTH, _PART_HEIGHT = 1.44, 0.36
_PANEL_HEIGHT = 7.2
_BAND_MIN, _ROW_MIN, _ROW_MAX = 0.74, 0.29, 0.46  # a band's label needs four lines
_RADIUS = 0.105


@dataclass(frozen=True)
class Band:
    """The strip of one resolution."""

    size: int
    top: float
    bottom: float


@dataclass
class Layout:
    """Where everything is: the centre line of every block, the strips, and the ladder's lower end."""

    row: float
    """Height of one row."""
    y: dict[str, float] = field(default_factory=dict)
    bands: list[Band] = field(default_factory=list)
    bottom: float = 0.0


def lay_out(blocks: Sequence[Block]) -> Layout:
    """Rows for all blocks: groups of one rung side by side, cells that change the resolution on the edge of two bands."""
    sizes = sorted({b.size for b in blocks})
    rows = sum(len(_rungs(blocks, s)) + max(map(len, _others(blocks, s))) + 1 for s in sizes)
    layout = Layout(row=min(_ROW_MAX, max(_ROW_MIN, _PANEL_HEIGHT / rows)))
    y = _HEADER
    for index, size in enumerate(sizes):
        top = y
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
        y = max(y + layout.row * (0.25 if last else 0.75), top + _BAND_MIN)
        layout.bands.append(Band(size, top, y))
        layout.y |= {b.name: y for b in blocks if _sizes(b) == {size, 2 * size}}
    layout.bottom = y
    return layout


def _sizes(block: Block) -> set[int]:
    return {shape[1] for shape in (block.input, block.output) if shape is not None}


def _rungs(blocks: Sequence[Block], size: int) -> list[tuple[str, ...]]:
    """The rows of a band that tie the towers together: (top, start), then (encoder group, decoder group) top-down."""
    here = [b.name for b in blocks if _sizes(b) == {size}]
    ends = tuple(name for name in ("top", "start") if name in here)
    pairs = [(name.replace("dec_", "enc_"), name) for name in here if name.startswith("dec_")]
    return ([ends] if ends else []) + [tuple(n for n in pair if n in here) for pair in pairs]


def _others(blocks: Sequence[Block], size: int) -> tuple[list[Block], list[Block]]:
    """What else keeps this resolution, of the encoder and of the decoder, each from the top down."""
    rungs = {name for rung in _rungs(blocks, size) for name in rung}
    rest = [b for b in blocks if _sizes(b) == {size} and b.name not in rungs]
    return [b for b in reversed(rest) if b.tower == "encoder"], [b for b in rest if b.tower == "decoder"]


def draw(description: Description, file_format: Literal["svg", "png"]) -> bytes:
    """The picture as the bytes of a file. In SVG every block's box has the id "block-" + its name."""
    layout = lay_out(description.blocks)
    height = max(layout.bottom + 0.75, _HEADER + _PANEL_HEIGHT + _MARGIN)
    # the same description gives the same bytes; text stays text, so that it can be searched
    with matplotlib.rc_context({"svg.hashsalt": "nvae", "svg.fonttype": "none", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(_WIDTH, height), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, _WIDTH), ylim=(height, 0))
        axes.set_axis_off()
        _header(axes, description)
        _ladder(axes, description, layout)
        bottom = _group_panel(axes, description)
        bottom = _cells_panel(axes, description, bottom)
        _legend(axes, description, bottom)
        buffer = io.BytesIO()
        metadata = {"Date": None} if file_format == "svg" else {}
        figure.savefig(buffer, format=file_format, dpi=130, metadata=metadata)
    return buffer.getvalue()


# ---- strokes ---------------------------------------------------------------------------------------------------------


def _text(axes: Axes, x: float, y: float, text: str, size: float = 7, **style: object) -> None:
    axes.text(x, y, text, **{"fontsize": size, "va": "center", "ha": "left", "color": "#202020", **style})


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, gid: str = "") -> None:
    """A rounded box around its centre."""
    patch = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.05",
        facecolor=colour,
        edgecolor=_LINE,
        linewidth=0.6,
        zorder=3,
    )
    patch.set_gid(gid or None)
    axes.add_patch(patch)


def _node(axes: Axes, x: float, y: float, text: str, colour: str = _PLAIN, radius: float = _RADIUS) -> None:
    axes.add_patch(Circle((x, y), radius, facecolor=colour, edgecolor=_LINE, linewidth=0.6, zorder=3))
    _text(axes, x, y, text, 5.5 if len(text) > 1 else 8, ha="center", zorder=4)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    look = {"arrowstyle": "-|>,head_length=0.28,head_width=0.13", "linewidth": 0.7, "color": _LINE, "shrinkA": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=look | {"shrinkB": 0} | style, zorder=2)


def _count(parameters: int) -> str:
    """A number of parameters, short: 868, 24.3 k, 1.41 M."""
    if parameters < 1000:
        return str(parameters)
    return f"{parameters / 1e3:.3g} k" if parameters < 999_500 else f"{parameters / 1e6:.3g} M"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _times(shape: Shape) -> str:
    return shape_text(shape).replace("x", "×")


# ---- the ladder ------------------------------------------------------------------------------------------------------


def _header(axes: Axes, d: Description) -> None:
    _text(axes, _MARGIN, 0.3, d.name, 15, weight="bold")
    groups = " + ".join(map(str, d.groups_per_scale))
    _text(
        axes,
        _MARGIN,
        0.58,
        f"{d.parameters:,} parameters   ·   {sum(d.groups_per_scale)} latent groups ({groups}, highest resolution first)"
        f"   ·   {d.latent_dims:,} latent dimensions   ·   {d.architecture}",
        8.5,
    )
    for x, heading in (
        (_ENCODER_X, "encoder, bottom-up"),
        (_LATENT_X, "z ~ q(z|x)"),
        (_DECODER_X, "decoder, top-down"),
    ):
        _text(axes, x, 0.88, heading, 8, ha="center", weight="bold")


def _ladder(axes: Axes, d: Description, layout: Layout) -> None:
    scales = {s.size: s for s in d.scales}
    channels = {b.size: b.output[0] for b in d.blocks if b.name != "head"}
    for index, band in enumerate(layout.bands):
        _band(axes, band, scales[band.size], channels[band.size], _BANDS[index % 2])
    height = layout.row * 0.68
    for block in d.blocks:
        _block_box(axes, block, layout.y[block.name], height)
    towers = [[b.name for b in d.blocks if b.tower == tower] for tower in ("encoder", "decoder")]
    for x, names, direction in zip((_ENCODER_X, _DECODER_X), towers, (-1, 1), strict=True):
        for one, next_one in pairwise(names):
            start, end = layout.y[one] + direction * height / 2, layout.y[next_one] - direction * height / 2
            _arrow(axes, (x, start), (x, end))
    groups = [b.name for b in d.blocks if b.latent is not None]
    for index, name in enumerate(groups):
        _rung(axes, layout, name, index, first=index == 0)
    y = layout.bottom
    padded = f", {d.padding} pixels of padding" if d.padding else ""
    for x, text, start, end in (
        (_ENCODER_X, f"x   {_times(d.image)}{padded}", y + 0.22, layout.y["stem"] + height / 2),
        (_DECODER_X, "p(x|z)", layout.y["head"] + height / 2, y + 0.22),
    ):
        _arrow(axes, (x, start), (x, end))
        _text(axes, x, y + 0.33, text, 8, ha="center", weight="bold")
    _text(axes, _DECODER_X, y + 0.52, d.likelihood.partition(",")[0], 7, ha="center")


def _band(axes: Axes, band: Band, scale: Scale, channels: int, colour: str) -> None:
    height = band.bottom - band.top
    axes.add_patch(Rectangle((_MARGIN, band.top), _PANEL_X - 0.45 - _MARGIN, height, facecolor=colour, linewidth=0))
    x, middle = _MARGIN + 0.12, (band.top + band.bottom) / 2
    lines = [f"{channels} channels"]
    if scale.latent is not None:
        lines.append(f"{_plural(scale.groups, 'group')} of z {_times(scale.latent)}")
    lines.append(f"encoder {_count(scale.encoder_parameters)}, decoder {_count(scale.decoder_parameters)}")
    y = middle - 0.14 * len(lines) / 2
    _text(axes, x, y, f"{scale.size} × {scale.size}", 9.5, weight="bold")
    for i, line in enumerate(lines):
        _text(axes, x, y + 0.17 + 0.14 * i, line, 6.8, color="#505050")


def _colour(block: Block, planned: bool) -> str:
    if planned:
        return KEEP_COLOURS[block.keep] if block.keep is not None else _PLAIN
    return _ROLE_COLOURS[_role(block)]


def _role(block: Block) -> str:
    return "groups" if "group" in block.kind else "cell" if block.cells else "other"


def _block_box(axes: Axes, block: Block, y: float, height: float) -> None:
    x = _ENCODER_X if block.tower == "encoder" else _DECODER_X
    _box(axes, x, y, _BOX_WIDTH, height, _colour(block, block.keep is not None), f"block-{block.name}")
    _text(axes, x - _BOX_WIDTH / 2 + 0.08, y, block.name, 7, zorder=4)
    _text(axes, x + _BOX_WIDTH / 2 - 0.08, y, _count(block.parameters), 6, ha="right", color="#505050", zorder=4)
    side = 0.075
    for i in range(min(block.cells, 4)):  # one small square per cell
        corner = (x + 0.02 + i * (side + 0.035), y - side / 2)
        axes.add_patch(Rectangle(corner, side, side, facecolor=_LINE, linewidth=0, zorder=4))


def _rung(axes: Axes, layout: Layout, name: str, index: int, first: bool) -> None:
    """Encoder map -> combiner (+) with the decoder's state -> z -> decoder group."""
    y = layout.y[name]
    encoder, decoder = _ENCODER_X + _BOX_WIDTH / 2, _DECODER_X - _BOX_WIDTH / 2
    if first:  # reads the top's map as it is
        start = (encoder, layout.y["top"])
        _arrow(axes, start, (_LATENT_X, y - _RADIUS), connectionstyle="angle,angleA=0,angleB=90,rad=4")
    else:
        _node(axes, _SUM_X, y, "+", radius=0.075)
        _arrow(axes, (encoder, y), (_SUM_X - 0.075, y))
        _arrow(axes, (_SUM_X + 0.075, y), (_LATENT_X - _RADIUS, y))
        # over the z's head
        _arrow(
            axes,
            (decoder, y - 0.05),
            (_SUM_X + 0.03, y - 0.075),
            connectionstyle="arc3,rad=0.16",
            color=_FAINT,
            linewidth=0.5,
        )
    _node(axes, _LATENT_X, y, str(index + 1), _LATENT)
    _arrow(axes, (_LATENT_X + _RADIUS, y), (decoder, y))


# ---- the panel on the right ------------------------------------------------------------------------------------------


def _group_panel(axes: Axes, d: Description) -> float:
    """One decoder group from inside, with the parameters of its parts. Returns where the panel ends."""
    group = next(b for b in reversed(d.blocks) if b.latent is not None)  # the one that has every part, if any has
    assert group.latent is not None and group.input is not None
    parts, later = group.parts, "prior" in group.parts
    z, doubled = _times(group.latent), _times((2 * group.latent[0], *group.latent[1:]))
    left, middle, right = (_PANEL_X + share * _PANEL_WIDTH for share in (0.17, 0.5, 0.83))
    top = _HEADER - 0.17
    _text(axes, _PANEL_X, top, f"inside a decoder group: {group.name}", 9, weight="bold")
    y_state, y_cells, y_sum, y_conv, y_flow, y_z, y_end = (top + dy for dy in (0.3, 0.72, 1.32, 1.92, 2.52, 3.05, 3.5))

    _text(axes, right, y_state, f"state {_times(group.input)}", 7, ha="center")
    spine = y_state + 0.08
    if group.cells:
        _part(axes, right, y_cells, _plural(group.cells, "cell"), "", parts["cells"])
        _arrow(axes, (right, spine), (right, y_cells - _PART_HEIGHT / 2))
        spine = y_cells + _PART_HEIGHT / 2
    _arrow(axes, (right, spine), (right, y_z - _PART_HEIGHT / 2))
    _text(axes, left, y_state, "encoder map", 7, ha="center")
    if later:
        _arrow(axes, (left, y_state + 0.08), (left, y_sum - _RADIUS))
        _node(axes, left, y_sum, "+")
        _arrow(axes, (left, y_sum + _RADIUS), (left, y_conv - _PART_HEIGHT / 2))
        _part(axes, middle, y_sum, "encoder combiner", "1×1", parts["encoder_combiner"])
        _arrow(axes, (right, y_sum), (middle + _PART_WIDTH / 2, y_sum))
        _arrow(axes, (middle - _PART_WIDTH / 2, y_sum), (left + _RADIUS, y_sum))
        _part(axes, middle, y_conv, "prior", f"1×1 → {doubled}", parts["prior"])
        _arrow(axes, (right, y_conv), (middle + _PART_WIDTH / 2, y_conv))
        _arrow(axes, (middle - _PART_WIDTH / 2, y_conv), (left + _PART_WIDTH / 2, y_conv), color=_FAINT)
        _arrow(axes, (middle, y_conv + _PART_HEIGHT / 2), (middle, y_z - 1.6 * _RADIUS), linestyle="dashed")
        _text(axes, middle + 0.06, (y_conv + y_z) / 2, "p(z|…)", 6.5, color="#505050")
    else:
        _arrow(axes, (left, y_state + 0.08), (left, y_conv - _PART_HEIGHT / 2))
    _part(axes, left, y_conv, "posterior", f"3×3 → {doubled}", parts["posterior"])
    from_y = y_conv + _PART_HEIGHT / 2
    if "flow" in parts:
        _part(axes, left, y_flow, f"{2 * d.flows} flow cells", "autoregressive", parts["flow"])
        _arrow(axes, (left, from_y), (left, y_flow - _PART_HEIGHT / 2))
        from_y = y_flow + _PART_HEIGHT / 2
    _arrow(axes, (left, from_y), (middle - 1.6 * _RADIUS, y_z), connectionstyle="angle,angleA=90,angleB=0,rad=4")
    _text(axes, left + 0.06, from_y + 0.1, "q(z|…, x)", 6.5, color="#505050")
    _node(axes, middle, y_z, "z", _LATENT, 1.6 * _RADIUS)
    _text(axes, middle, y_z + 0.28, z, 6.5, ha="center", color="#505050")
    _arrow(axes, (middle + 1.6 * _RADIUS, y_z), (right - _PART_WIDTH / 2, y_z))
    _part(axes, right, y_z, "combiner", "1×1 of [state, z]", parts["combiner"])
    _arrow(axes, (right, y_z + _PART_HEIGHT / 2), (right, y_end - 0.08))
    _text(axes, right, y_end, f"state {_times(group.output)}", 7, ha="center")
    return y_end


def _part(axes: Axes, x: float, y: float, name: str, detail: str, parameters: int) -> None:
    _box(axes, x, y, _PART_WIDTH, _PART_HEIGHT, _PLAIN)
    _text(axes, x, y - (0.075 if detail else 0), f"{name}   {_count(parameters)}", 7, ha="center", zorder=4)
    _text(axes, x, y + 0.085, detail, 6, ha="center", color="#505050", zorder=4)


def _cells_panel(axes: Axes, d: Description, top: float) -> float:
    """What the cells of each side compute, for the blocks of the highest resolution. Returns where the panel ends."""
    y = top + 0.42
    _text(axes, _PANEL_X, y, "cells: skip(x) + 0.1 · branch(x)", 9, weight="bold")
    for kind in ("pre-process cell", "encoder group", "decoder group", "post-process cell"):
        found = [b for b in d.blocks if b.kind == kind and b.cell]
        if found:
            block = max(found, key=lambda b: b.size)
            y += 0.24
            _text(axes, _PANEL_X, y, f"{block.kind.removesuffix(' group').removesuffix(' cell')}  ({block.name})", 7)
            y += 0.15
            _text(axes, _PANEL_X + 0.1, y, block.cell.replace("->", "→").replace("x", "×"), 6.2, color="#505050")
    return y


def _legend(axes: Axes, d: Description, top: float) -> None:
    y = top + 0.42
    planned = [b.keep for b in d.blocks if b.keep is not None]
    title = "colour: what a block keeps for the backward pass" if planned else "colour: kind of block"
    _text(axes, _PANEL_X, y, title, 9, weight="bold")
    if planned:
        entries = [
            (KEEP_COLOURS[k], f"{k}:  {KEEP_MEANINGS[k]}  ({_plural(planned.count(k), 'block')})")
            for k in KEEPS
            if k in planned
        ]
    else:
        entries = [(colour, _ROLES[role]) for role, colour in _ROLE_COLOURS.items()]
    for colour, text in entries:
        y += 0.21
        _box(axes, _PANEL_X + 0.15, y, 0.26, 0.13, colour)
        _text(axes, _PANEL_X + 0.4, y, text, 7)
    y += 0.26
    _node(axes, _PANEL_X + 0.15, y, "1", _LATENT)
    _text(axes, _PANEL_X + 0.4, y, "latent group, counted from the top", 7)
    y += 0.22
    _node(axes, _PANEL_X + 0.15, y, "+", radius=0.075)
    _text(axes, _PANEL_X + 0.4, y, "encoder map + 1×1 of the decoder's state", 7)
    y += 0.22
    axes.add_patch(Rectangle((_PANEL_X + 0.11, y - 0.037), 0.075, 0.075, facecolor=_LINE, linewidth=0))
    _text(axes, _PANEL_X + 0.4, y, "one cell", 7)
