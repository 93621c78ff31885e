"""A prediction as a picture: what lies on the card during one step, by kind, under the cap; PNG, or one HTML file."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

from nvae_lowmem.memory.predict.predict import Prediction
from nvae_lowmem.memory.trace.events import ON_CARD, Category
from nvae_lowmem.units import GIB, format_bytes

# Okabe-Ito and its tints: told apart with any colour vision, the lasting kinds at the bottom in calm colours
COLOURS = {
    Category.WEIGHT: "#7A8CA3",
    Category.OPTIMIZER_STATE: "#B4BFCC",
    Category.GRADIENT: "#D55E00",
    Category.BLOCK_INPUT: "#F0B541",
    Category.SAVED_ACTIVATION: "#56B4E9",
    Category.TEMPORARY: "#D994BC",
    Category.NOISE: "#3DBE95",
    Category.DATA: "#404040",
    Category.BUFFER: "#C9B79C",
}
_CAP_COLOUR = "#B00020"


def used_categories(prediction: Prediction) -> list[Category]:
    """The kinds that the timeline has any bytes of, bottom of the stack first."""
    return [c for c in ON_CARD if any(moment.get(c, 0) for _, moment in prediction.timeline)]


def timeline_png(prediction: Prediction, title: str, cap_bytes: int = 0) -> bytes:
    """The stacked timeline as the bytes of a PNG file; cap_bytes 0: no line for the cap."""
    import matplotlib
    from matplotlib.figure import Figure

    names = used_categories(prediction)
    events, stacks = _stacks(prediction, names)
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(10.5, 5.2), facecolor="white", layout="constrained")
        axes = figure.add_subplot()
        axes.stackplot(events, stacks, labels=names, colors=[COLOURS[n] for n in names], step="post", linewidth=0)
        peak = prediction.allocated_peak_bytes / GIB
        axes.axhline(peak, color="#202020", linewidth=0.8, linestyle=":")
        _note(axes, peak, f"allocated peak {format_bytes(prediction.allocated_peak_bytes)}", "#202020")
        top = peak
        if cap_bytes:
            top = max(top, cap_bytes / GIB)
            axes.axhline(cap_bytes / GIB, color=_CAP_COLOUR, linewidth=1.4)
            _note(axes, cap_bytes / GIB, f"cap {format_bytes(cap_bytes)}", _CAP_COLOUR)
        axes.set(xlim=(events[0], max(events[-1], events[0] + 1)), ylim=(0, 1.1 * top))
        axes.set_xlabel("allocations and frees of one training step")
        axes.set_ylabel("on the card, GiB")
        axes.set_title(f"{title}\n", loc="left", fontsize=11)
        axes.text(0, 1.02, _peak_text(prediction), transform=axes.transAxes, fontsize=8, color="#505050")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(*(part[::-1] for part in axes.get_legend_handles_labels()), loc="center left",
                    bbox_to_anchor=(1.0, 0.5), frameon=False)  # fmt: skip
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _note(axes: Any, height_gib: float, text: str, colour: str) -> None:
    axes.annotate(
        text, (0.005, height_gib), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
        fontsize=8, color=colour,
    )  # fmt: skip


def timeline_html(
    prediction: Prediction, title: str, cap_bytes: int = 0, tables: Sequence[tuple[str, Sequence[Sequence[str]]]] = ()
) -> str:
    """One HTML page that needs nothing else: the timeline to zoom into, then tables of (heading, rows)."""
    import plotly.graph_objects as go

    names = used_categories(prediction)
    events, stacks = _stacks(prediction, names)
    figure = go.Figure()
    for name, values in zip(names, stacks, strict=True):
        figure.add_trace(
            go.Scatter(
                x=events, y=values, name=name, stackgroup="bytes", mode="lines",
                line={"width": 0, "shape": "hv"}, fillcolor=COLOURS[name],
                hovertemplate="%{y:.3f} GiB",
            )
        )  # fmt: skip
    if cap_bytes:
        figure.add_hline(
            y=cap_bytes / GIB, line_color=_CAP_COLOUR, annotation_text=f"cap {format_bytes(cap_bytes)}",
            annotation_position="top left",
        )  # fmt: skip
    figure.update_layout(
        template="plotly_white",
        hovermode="x unified",
        height=520,
        margin={"t": 30, "l": 60, "r": 20, "b": 50},
        legend={"traceorder": "reversed"},
        xaxis_title="allocations and frees of one training step",
        yaxis={"title": "on the card, GiB", "rangemode": "tozero"},
    )
    picture = figure.to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False})
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(_peak_text(prediction))}</p>", picture]
    for heading, rows in tables:
        body += [f"<h2>{html.escape(heading)}</h2>", _html_table(rows)]
    return _PAGE.format(title=html.escape(title), body="\n".join(body))


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #202020; max-width: 1100px; margin: 2em auto; padding: 0 1em }}
h1 {{ font-size: 1.4em }} h2 {{ font-size: 1.1em; margin-top: 1.6em }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ text-align: left; padding: 2px 14px 2px 0; border-bottom: 1px solid #e4e4e4; vertical-align: top }}
th {{ font-weight: 600 }}
</style></head><body>
{body}
</body></html>
"""


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head, if there is more than one column."""
    out = []
    for i, row in enumerate(rows):
        tag = "th" if i == 0 and len(row) > 1 else "td"
        out.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return "<table>\n" + "\n".join(out) + "\n</table>"


def _stacks(prediction: Prediction, names: Sequence[Category]) -> tuple[list[int], list[list[float]]]:
    """(event numbers from 0, GiB per kind at each of them)."""
    first = prediction.timeline[0][0]
    events = [event - first for event, _ in prediction.timeline]
    return events, [[moment.get(name, 0) / GIB for _, moment in prediction.timeline] for name in names]


def _peak_text(prediction: Prediction) -> str:
    p = prediction.peak
    return (
        f"peak in the {p.phase} pass of block {p.block}; "
        f"{format_bytes(prediction.reserved_peak_bytes)} reserved, {format_bytes(prediction.host_bytes)} on the host"
    )
