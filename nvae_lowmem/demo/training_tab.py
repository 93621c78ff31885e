"""The page's tab on a run in training: it looks again every few seconds, and shows what has changed."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from nvae_lowmem.demo.story import HELD_OUT, LOSS, TRAINING, MemoryRow, RunStory
from nvae_lowmem.evaluation.report import kl_bars
from nvae_lowmem.units import format_bytes

REFRESH_SECONDS = 5
CHART_INCHES, CHART_DPI = (6.4, 3.6), 150
STYLE = """
.story table { border-collapse: collapse; margin: 0; width: auto }
.story table, .story tr, .story td { border: none !important; background: none !important }
.story td { padding: .15em 1.2em .15em 0 !important; vertical-align: top }
.story td.what { white-space: nowrap }
.story td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.story td.track { width: 60%; min-width: 10em; vertical-align: middle }
.story .bar { height: .9em; border-radius: 2px; background: var(--color-accent) }
.story .planned { opacity: .35 }
.story .what { color: var(--body-text-color-subdued) }
.story figure { margin: .5em 0 } .story img { max-width: 100%; image-rendering: pixelated; margin: 0 }
.story .event { color: var(--error-text-color, #a33); margin: .2em 0 }
"""
_LINES: dict[str, tuple[str, dict[str, Any]]] = {  # figure -> (label, style)
    LOSS: ("loss, as it is minimised", {"color": "C7", "linewidth": 1}),
    TRAINING: ("−ELBO of training batches", {"color": "C0", "linewidth": 1.2}),
    HELD_OUT: ("−ELBO of held-out images", {"color": "C1", "marker": "o", "markersize": 4}),
}


def training_tab(story: RunStory, page: Any, note: str) -> None:
    """Add the tab. note: what the other tabs show of the run, or why they are not there."""
    import gradio as gr

    with gr.Tab("Training"):
        gr.Markdown(note)
        with gr.Row():
            with gr.Column(min_width=320):
                gr.Markdown("The run")
                rows = gr.HTML(elem_classes=["story", "figures"], padding=False)
            with gr.Column(min_width=320):
                gr.Markdown("Memory of the card")
                memory = gr.HTML(elem_classes=["story", "memory"], padding=False)
                events = gr.HTML(elem_classes=["story", "events"], padding=False)
        with gr.Row():
            loss, kl = (_chart(caption) for caption in ("−ELBO over steps", "KL of each latent group"))
        samples = gr.HTML(elem_classes=["story", "pictures"], padding=False)
        button = gr.Button("Look again", size="sm")
    seen, outputs = gr.State(None), [rows, memory, events, loss, kl, samples]

    def look(before: Any) -> list[Any]:
        now = story.refresh()
        always = [_table(list(story.rows())), _bars(story.memory()), _events(story)]
        if now == before:
            return [now, *always, gr.skip(), gr.skip(), gr.skip()]
        groups = story.kl()
        bars = (
            None
            if groups is None
            else Image.open(io.BytesIO(kl_bars(story.profile.model, *groups, CHART_INCHES, CHART_DPI)))
        )
        return [now, *always, loss_chart(story.figures.series), bars, _pictures(story)]

    options: dict[str, Any] = {
        "fn": look, "inputs": [seen], "outputs": [seen, *outputs], "show_progress": "hidden",
        "concurrency_limit": 1, "concurrency_id": "training", "api_visibility": "private",
    }  # fmt: skip
    gr.on([page.load, button.click, gr.Timer(REFRESH_SECONDS).tick], trigger_mode="once", **options)


def loss_chart(series: dict[str, list[tuple[int, float]]]) -> np.ndarray | None:
    """Loss and −ELBO over steps, (H, W, 3) uint8; None where there are no figures yet.

    The first tenth of the steps may leave the chart at its top: there the loss falls by orders of magnitude.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    last = max((points[-1][0] for points in series.values() if points), default=0)
    if not last:
        return None
    figure = Figure(figsize=CHART_INCHES, dpi=CHART_DPI, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    for name, (label, style) in _LINES.items():
        if points := series.get(name):
            axes.plot([step for step, _ in points], [value for _, value in points], label=label, **style)
    later = [value for points in series.values() for step, value in points if 10 * step >= last]
    room = 0.05 * (max(later) - min(later)) or 1
    axes.set(xlabel="step", ylabel="nats per image", xlim=(0, None), ylim=(min(later) - room, max(later) + room))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# --- parts ------------------------------------------------------------------------------------------------------------


def _chart(caption: str) -> Any:
    import gradio as gr

    with gr.Column(min_width=320):
        gr.Markdown(caption)
        return gr.Image(format="png", interactive=False, show_label=False, buttons=[], elem_classes=["chart"])


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = (f"<tr><td class=what>{html.escape(what)}</td><td>{html.escape(value)}</td></tr>" for what, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _bars(rows: Sequence[MemoryRow]) -> str:
    """Memory as bars, the planned ones paler."""
    measured = any(row.measured for row in rows)
    nothing = "" if measured else "<p class=what>No memory of a CUDA card has been measured in this run.</p>"
    most = max((row.size_bytes for row in rows), default=1)
    cells = (
        f"<tr><td class=what>{html.escape(row.name)}</td><td class=n>{format_bytes(row.size_bytes)}</td>"
        f'<td class=track><div class="bar {"" if row.measured else "planned"}" '
        f'style="width: {100 * row.size_bytes / most:.1f}%"></div></td></tr>'
        for row in rows
    )
    return f"<table>{''.join(cells)}</table>{nothing}"


def _events(story: RunStory) -> str:
    return "".join(f"<p class=event>{html.escape(f'{e.kind}: {e.text}')}</p>" for e in story.events())


def _pictures(story: RunStory) -> str:
    figures = (
        f'<figure><figcaption class=what>{drawn.caption}</figcaption><img alt="{drawn.caption}" '
        f'src="data:image/png;base64,{base64.b64encode(drawn.png).decode("ascii")}"></figure>'
        for drawn in story.pictures()
    )
    return "".join(figures) or "<p class=what>No pictures yet: training draws them as training.sample_every says.</p>"
