"""The architecture as a picture, drawn from a Description: the ladder of both towers, and one decoder group inside.

Lowest resolution at the top: the encoder runs bottom-up on the left, the decoder top-down on the right, and every
latent group is a rung between them. All coordinates are inches, y grows downwards.
"""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

from nvae_lowmem.config.sections import KEEPS, Keep
from nvae_lowmem.summary.layout import Band, Layout, lay_out
from nvae_lowmem.summary.summary import BlockSummary, Description, ScaleSummary, Shape, shape_text

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
_OUTLINE: dict[str, Any] = {"edgecolor": _LINE, "linewidth": 0.6, "zorder": 3}
_BANDS = ("#F3F4F6", "#FAFAFA")

_WIDTH, _MARGIN, _HEADER = 13.7, 0.25, 1.05
_ENCODER_X, _SUM_X, _LATENT_X, _DECODER_X = 3.2, 4.52, 5.12, 6.75  # centres of the ladder's columns
_BOX_WIDTH, _PANEL_X, _PANEL_WIDTH = 1.8, 8.35, 5.1
_PART_WIDTH, _PART_HEIGHT = 1.44, 0.36
_PANEL_HEIGHT = 7.2
_RADIUS, _Z_RADIUS = 0.105, 0.17
# the parts of a group in the panel: columns, then rows
_LEFT, _MIDDLE, _RIGHT = (_PANEL_X + share * _PANEL_WIDTH for share in (0.17, 0.5, 0.83))
_STATE_Y, _CELLS_Y, _SUM_Y, _POSTERIOR_Y, _FLOW_Y, _LATENT_Y, _END_Y = (
    _HEADER + y for y in (0.13, 0.55, 1.15, 1.75, 2.35, 2.88, 3.33)
)


def draw(description: Description, file_format: str) -> bytes:
    """The picture as the bytes of an svg or png file. In SVG every block's box has the id "block-" + its name."""
    layout = lay_out(description.blocks, _HEADER, _PANEL_HEIGHT)
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


def _text(axes: Axes, x: float, y: float, text: str, size: float = 7, **style: Any) -> None:
    axes.text(x, y, text, **{"fontsize": size, "va": "center", "ha": "left", "color": "#202020", **style})


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, gid: str = "") -> None:
    """A rounded box around its centre."""
    corner, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.05"
    patch = FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, **_OUTLINE)
    patch.set_gid(gid or None)
    axes.add_patch(patch)


def _node(axes: Axes, x: float, y: float, text: str, colour: str = _PLAIN, radius: float = _RADIUS) -> None:
    axes.add_patch(Circle((x, y), radius, facecolor=colour, **_OUTLINE))
    _text(axes, x, y, text, 5.5 if len(text) > 1 else 8, ha="center", zorder=4)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    look: dict[str, Any] = {
        "arrowstyle": "-|>,head_length=0.28,head_width=0.13",
        "linewidth": 0.7,
        "color": _LINE,
        "shrinkA": 0,
    }
    axes.annotate("", xy=end, xytext=start, arrowprops=look | {"shrinkB": 0} | style, zorder=2)


def _count(parameters: int) -> str:
    """A number of parameters, short: 868, 24.3 k, 1.41 M."""
    if parameters < 1000:
        return str(parameters)
    return f"{parameters / 1e3:.3g} k" if parameters < 999_500 else f"{parameters / 1e6:.3g} M"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _times(shape: Shape | None) -> str:
    return shape_text(shape).replace("x", "×")


# ---- the ladder ------------------------------------------------------------------------------------------------------


def _header(axes: Axes, d: Description) -> None:
    _text(axes, _MARGIN, 0.3, d.name, 15, weight="bold")
    groups, count = " + ".join(map(str, d.groups_per_scale)), _plural(sum(d.groups_per_scale), "latent group")
    _text(
        axes,
        _MARGIN,
        0.58,
        f"{d.parameters:,} parameters · {count} ({groups}, highest resolution first)"
        f" · {d.latent_dims:,} latent dimensions · {d.architecture}",
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
        (_ENCODER_X, f"x: {_times(d.image)}{padded}", y + 0.22, layout.y["stem"] + height / 2),
        (_DECODER_X, "p(x|z)", layout.y["head"] + height / 2, y + 0.22),
    ):
        _arrow(axes, (x, start), (x, end))
        _text(axes, x, y + 0.33, text, 8, ha="center", weight="bold")
    _text(axes, _DECODER_X, y + 0.52, d.likelihood.partition(",")[0], 7, ha="center")


def _band(axes: Axes, band: Band, scale: ScaleSummary, channels: int, colour: str) -> None:
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


def _colour(block: BlockSummary, planned: bool) -> str:
    if planned:
        return KEEP_COLOURS[block.keep] if block.keep is not None else _PLAIN
    return _ROLE_COLOURS[_role(block)]


def _role(block: BlockSummary) -> str:
    return "groups" if "group" in block.kind else "cell" if block.cells else "other"


def _block_box(axes: Axes, block: BlockSummary, y: float, height: float) -> None:
    x = _ENCODER_X if block.tower == "encoder" else _DECODER_X
    _box(axes, x, y, _BOX_WIDTH, height, _colour(block, block.keep is not None), f"block-{block.name}")
    _text(axes, x - _BOX_WIDTH / 2 + 0.08, y, block.name, 7, zorder=4)
    _text(axes, x + _BOX_WIDTH / 2 - 0.08, y, _count(block.parameters), 6, ha="right", color="#303030", zorder=4)
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
    _text(axes, _PANEL_X, _HEADER - 0.17, f"inside a decoder group: {group.name}", 9, weight="bold")
    _group_spine(axes, group)
    if "prior" in group.parts:
        _group_prior(axes, d, group)
    else:  # the first group: a standard normal prior, and the encoder's map as it is
        _arrow(axes, (_LEFT, _STATE_Y + 0.08), (_LEFT, _POSTERIOR_Y - _PART_HEIGHT / 2))
    _group_posterior(axes, d, group)
    return _END_Y


def _group_spine(axes: Axes, group: BlockSummary) -> None:
    """The decoder's state: through the cells, then merged with z."""
    half = _PART_HEIGHT / 2
    if group.input is not None:
        _text(axes, _RIGHT, _STATE_Y, f"state {_times(group.input)}", 7, ha="center")
        y = _STATE_Y + 0.08
        if group.cells:
            _part(axes, _RIGHT, _CELLS_Y, _plural(group.cells, "cell"), "", group.parts["cells"])
            _arrow(axes, (_RIGHT, y), (_RIGHT, _CELLS_Y - half))
            y = _CELLS_Y + half
        _arrow(axes, (_RIGHT, y), (_RIGHT, _LATENT_Y - half))
    merged = "1×1 of [state, z]" if group.input is not None else "1×1 of z"
    _part(axes, _RIGHT, _LATENT_Y, "combiner", merged, group.parts["combiner"])
    _arrow(axes, (_RIGHT, _LATENT_Y + half), (_RIGHT, _END_Y - 0.08))
    _text(axes, _RIGHT, _END_Y, f"state {_times(group.output)}", 7, ha="center")


def _group_prior(axes: Axes, d: Description, group: BlockSummary) -> None:
    """What the state gives: the prior, and its share of what the posterior reads."""
    half = _PART_WIDTH / 2
    _node(axes, _LEFT, _SUM_Y, "+")
    _arrow(axes, (_LEFT, _STATE_Y + 0.08), (_LEFT, _SUM_Y - _RADIUS))
    _arrow(axes, (_LEFT, _SUM_Y + _RADIUS), (_LEFT, _POSTERIOR_Y - _PART_HEIGHT / 2))
    _part(axes, _MIDDLE, _SUM_Y, "encoder combiner", "1×1", group.parts["encoder_combiner"])
    _arrow(axes, (_RIGHT, _SUM_Y), (_MIDDLE + half, _SUM_Y))
    _arrow(axes, (_MIDDLE - half, _SUM_Y), (_LEFT + _RADIUS, _SUM_Y))
    _part(axes, _MIDDLE, _POSTERIOR_Y, "prior", f"1×1 → {_normal_shape(group)}", group.parts["prior"])
    _arrow(axes, (_RIGHT, _POSTERIOR_Y), (_MIDDLE + half, _POSTERIOR_Y))
    if d.residual_posterior:  # q is given relative to p
        _arrow(axes, (_MIDDLE - half, _POSTERIOR_Y), (_LEFT + half, _POSTERIOR_Y), color=_FAINT)
    bottom = _POSTERIOR_Y + _PART_HEIGHT / 2
    _arrow(axes, (_MIDDLE, bottom), (_MIDDLE, _LATENT_Y - _Z_RADIUS), linestyle="dashed")
    _text(axes, _MIDDLE + 0.06, (bottom + _LATENT_Y) / 2, "p(z|…)", 6.5, color="#505050")


def _group_posterior(axes: Axes, d: Description, group: BlockSummary) -> None:
    """From the encoder's map to z."""
    _text(axes, _LEFT, _STATE_Y, "encoder map", 7, ha="center")
    _part(axes, _LEFT, _POSTERIOR_Y, "posterior", f"3×3 → {_normal_shape(group)}", group.parts["posterior"])
    y = _POSTERIOR_Y + _PART_HEIGHT / 2
    if "flow" in group.parts:
        _part(axes, _LEFT, _FLOW_Y, f"{2 * d.flows} flow cells", "autoregressive", group.parts["flow"])
        _arrow(axes, (_LEFT, y), (_LEFT, _FLOW_Y - _PART_HEIGHT / 2))
        y = _FLOW_Y + _PART_HEIGHT / 2
    _arrow(axes, (_LEFT, y), (_MIDDLE - _Z_RADIUS, _LATENT_Y), connectionstyle="angle,angleA=90,angleB=0,rad=4")
    _text(axes, _LEFT + 0.06, y + 0.1, "q(z|…, x)", 6.5, color="#505050")
    _node(axes, _MIDDLE, _LATENT_Y, "z", _LATENT, _Z_RADIUS)
    _text(axes, _MIDDLE, _LATENT_Y + 0.28, _times(group.latent), 6.5, ha="center", color="#505050")
    _arrow(axes, (_MIDDLE + _Z_RADIUS, _LATENT_Y), (_RIGHT - _PART_WIDTH / 2, _LATENT_Y))


def _normal_shape(group: BlockSummary) -> str:
    """mu and log sigma: twice the channels of z."""
    assert group.latent is not None
    channels, *size = group.latent
    return _times((2 * channels, size[0], size[1]))


def _part(axes: Axes, x: float, y: float, name: str, detail: str, parameters: int) -> None:
    _box(axes, x, y, _PART_WIDTH, _PART_HEIGHT, _PLAIN)
    _text(axes, x, y - (0.075 if detail else 0), f"{name} · {_count(parameters)}", 7, ha="center", zorder=4)
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
            _text(axes, _PANEL_X, y, f"{block.kind.removesuffix(' group').removesuffix(' cell')} ({block.name})", 7)
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
            (KEEP_COLOURS[k], f"{k}: {KEEP_MEANINGS[k]} ({_plural(planned.count(k), 'block')})")
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
