"""What an evaluation found: as a JSON object, as lines of text, and as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.evaluation.distances import Distance

FORMAT = 1
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1040px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse }
th, td { padding: .25em 1em .25em 0; text-align: left; border-bottom: 1px solid #ddd }
td.n { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100% } .note { color: #a33 }
"""


class Mean(NamedTuple):
    """A mean over images and its standard error."""

    value: float
    standard_error: float

    @staticmethod
    def of(values: Tensor) -> Mean:
        """From (n,); the standard error of a single value is nan."""
        return Mean(float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan)


@dataclass(frozen=True, kw_only=True)
class LikelihoodFigures:
    """Means over held-out images, in nats per image unless said otherwise; groups from the top (coarsest) down."""

    images: int
    nelbo: Mean
    """-ELBO: nll + KL, one posterior sample per image."""
    bound: Mean
    """The importance-weighted bound of -log p(x)."""
    draws: int
    """k of the importance-weighted bound."""
    nll: Mean
    kl: Mean
    squared_error: Mean
    """Between images and their reconstructions, the means of p(x|z), per channel value in [0, 1]."""
    kl_of_groups: Sequence[float]
    active_of_groups: Sequence[int]
    """Latent channels whose mean KL is above `active_nats`."""
    active_nats: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that was found about one checkpoint."""

    run: str
    checkpoint: str
    model: ModelConfig
    settings: Mapping[str, Any]
    """Seed, precision, device, versions: what the figures depend on."""
    likelihood: LikelihoodFigures
    distances: Sequence[Distance] = ()
    notes: Sequence[str] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """Caption -> PNG, in the order in which they are shown."""

    def bits_per_dim(self, nats: float) -> float:
        """Nats per image as bits per channel value."""
        return nats / (self.model.image_dims * math.log(2))


def scale_of_groups(model: ModelConfig) -> list[int]:
    """Pixels per side of each group's latents, top group first."""
    scales = zip(reversed(model.scale_sizes), reversed(model.scale_groups), strict=True)
    return [size for size, groups in scales for _ in range(groups)]


# --- JSON and text ----------------------------------------------------------------------------------------------------


def to_json(found: Evaluation) -> str:
    """The figures, without the pictures. What cannot be known (the standard error of one image) is null."""
    groups = zip(
        scale_of_groups(found.model), found.likelihood.kl_of_groups, found.likelihood.active_of_groups, strict=True
    )
    table = {
        "format": FORMAT,
        "run": found.run,
        "checkpoint": found.checkpoint,
        "settings": dict(found.settings),
        "images": found.likelihood.images,
        "negative_elbo": _both_units(found, found.likelihood.nelbo),
        "importance_weighted_bound": {"draws": found.likelihood.draws} | _both_units(found, found.likelihood.bound),
        "reconstruction_nll": _both_units(found, found.likelihood.nll),
        "kl": _both_units(found, found.likelihood.kl),
        "reconstruction_mse": _number(found.likelihood.squared_error),
        "groups": [{"size": s, "kl_nats": kl, "active_channels": active} for s, kl, active in groups],
        "active_channels": sum(found.likelihood.active_of_groups),
        "latent_channels": found.model.total_groups * found.model.latents,
        "active_threshold_nats": found.likelihood.active_nats,
        "distances": [asdict(d) for d in found.distances],
        "notes": list(found.notes),
    }
    return json.dumps(table, indent=1, allow_nan=False)


def _both_units(found: Evaluation, mean: Mean) -> dict[str, float | None]:
    return {
        "nats": mean.value,
        "nats_standard_error": _known(mean.standard_error),
        "bits_per_dim": found.bits_per_dim(mean.value),
        "bits_per_dim_standard_error": _known(found.bits_per_dim(mean.standard_error)),
    }


def _number(mean: Mean) -> dict[str, float | None]:
    return {"value": mean.value, "standard_error": _known(mean.standard_error)}


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def to_text(found: Evaluation) -> str:
    """A line for each figure."""
    width = max(len(name) for name, _ in _rows(found))
    lines = [f"{name:<{width}}  {value}" for name, value in _rows(found)]
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def _rows(found: Evaluation) -> list[tuple[str, str]]:
    """(what, value) of every figure, for people."""

    def nats(mean: Mean) -> str:
        return f"{mean.value:.2f} ± {mean.standard_error:.2f} nats, {found.bits_per_dim(mean.value):.4f} bits/dim"

    channels = found.model.total_groups * found.model.latents
    error = found.likelihood.squared_error
    rows = [
        ("-ELBO", nats(found.likelihood.nelbo)),
        (f"-log p(x), bound of {found.likelihood.draws} draws", nats(found.likelihood.bound)),
        ("reconstruction term", nats(found.likelihood.nll)),
        ("KL", nats(found.likelihood.kl)),
        ("reconstruction error", f"{error.value:.5f} ± {error.standard_error:.5f} (MSE, channel values in [0, 1])"),
        (
            "active latent channels",
            f"{sum(found.likelihood.active_of_groups)} of {channels} (KL above {found.likelihood.active_nats:g} nats)",
        ),
    ]
    for d in found.distances:
        spread = "" if d.standard_deviation is None else f" ± {d.standard_deviation:.3g} over subsets"
        rows.append((f"{d.name}: {d.other}", f"{d.value:.4g}{spread} ({d.images[0]} and {d.images[1]} images)"))
    return rows


# --- HTML -------------------------------------------------------------------------------------------------------------


def to_html(found: Evaluation) -> str:
    """One page with figures, the KL of each group, and pictures. Loads nothing from anywhere."""
    title = f"Evaluation of {Path(found.run).name}"
    settings = ", ".join(f"{key} {value}" for key, value in found.settings.items())
    pictures = {"KL of each latent group, from the coarsest down": kl_plot(found)} | dict(found.pictures)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(found.checkpoint)}; {found.likelihood.images} held-out images. ± is the standard error over "
        f"images; of bounds, errors and distances, lower is better.<br>{html.escape(settings)}</p>",
        "<table>",
        *(f"<tr><th>{html.escape(k)}</th><td class=n>{html.escape(v)}</td></tr>" for k, v in _rows(found)),
        "</table>",
        *(f"<p class=note>{html.escape(note)}</p>" for note in found.notes),
        *(_figure(caption, png) for caption, png in pictures.items()),
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return "\n".join(["<!doctype html>", f'<html lang="en"><head>{head}</head><body>', *body, "</body></html>", ""])


def _figure(caption: str, png: bytes) -> str:
    data, caption = base64.b64encode(png).decode("ascii"), html.escape(caption)
    return f'<h2>{caption}</h2><img alt="{caption}" src="data:image/png;base64,{data}">'


def kl_plot(found: Evaluation) -> bytes:
    """`kl_bars` of what was found."""
    return kl_bars(found.model, found.likelihood.kl_of_groups, found.likelihood.active_of_groups)


def kl_bars(
    model: ModelConfig, kl: Sequence[float], active: Sequence[int],
    inches: tuple[float, float] = (10, 3.2), dpi: int = 100,
) -> bytes:  # fmt: skip
    """KL in nats of each group, top first: bars in a scale's colour, active channels above them: a PNG."""
    # the object interface: pyplot would keep global state, and look for a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    sizes = scale_of_groups(model)
    figure = Figure(figsize=inches, dpi=dpi, layout="constrained")
    axes = figure.add_subplot()
    for colour, size in enumerate(sorted(set(sizes))):
        members = [i for i, s in enumerate(sizes) if s == size]
        bars = axes.bar(
            [i + 1 for i in members],
            [kl[i] for i in members],
            color=f"C{colour}",
            label=f"{size} x {size}",
        )
        if len(sizes) <= 4 * inches[0]:
            axes.bar_label(bars, [str(active[i]) for i in members], fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    about = f"latent group, 1 is the coarsest (above it: active channels of {model.latents})"
    axes.set(xlabel=about, ylabel="KL in nats per image")
    axes.legend(title="latents")
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()
