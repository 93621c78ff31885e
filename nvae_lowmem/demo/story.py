"""A run in training as the page shows it: figures, charts, newest pictures, memory beside its plan, and time left.

The run may be another process's: its files are read, and nothing in its folder is locked or written.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from nvae_lowmem.config import profile_file
from nvae_lowmem.data import fingerprint
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.training import checkpoint
from nvae_lowmem.training.figures import Event, Figures
from nvae_lowmem.training.resolve import total_steps
from nvae_lowmem.training.runs import trained_by
from nvae_lowmem.units import GIB, format_seconds

LOSS, TRAINING, HELD_OUT = "train/loss", "train/nelbo_iter", "val/nelbo"
SHOWN_EVENTS = 5
_SAMPLES = re.compile(r"step-(\d{1,12})-t(\d\.\d+)\.png")
_RECONSTRUCTIONS = re.compile(r"reconstructions-(\d{1,12})\.png")
_PLANNED = {  # key of provenance -> what it is called
    "predicted_allocated_bytes": "planned peak, allocated",
    "predicted_reserved_bytes": "planned peak, reserved",
}
# figure in stats.jsonl -> what it is called, measured by the process that trains
_MEASURED = {
    "memory/peak_allocated_gib": "measured peak, allocated",
    "memory/peak_reserved_gib": "measured peak, reserved",
    "memory/process_gib": "the process on the card",
    "memory/others_gib": "other programs on the card",
}


class MemoryRow(NamedTuple):
    """A figure of memory, planned or measured."""

    name: str
    size_bytes: int
    measured: bool


class Drawn(NamedTuple):
    """A picture that training has drawn."""

    caption: str
    png: bytes


class RunStory:
    """What is known of a run's training. `refresh` before asking; calls must not overlap."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError where the run's configuration cannot be read."""
        self.folder = folder
        self.profile = profile_file.load(folder / "config.toml")
        self.figures = Figures(folder / "stats.jsonl", (LOSS, TRAINING, HELD_OUT))

    def refresh(self) -> tuple[object, ...]:
        """Read what is new; what is returned is another value when there was something."""
        with contextlib.suppress(ConfigError):  # settings may change when a run goes on
            self.profile = profile_file.load(self.folder / "config.toml")
        figures = self.figures.refresh()
        return figures.step, len(figures.series[TRAINING]), len(figures.series[HELD_OUT]), *self._newest_pictures()

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole training; None where neither configuration nor data.json tells."""
        training = self.profile.training
        if training.hours:
            planned = self.figures.latest.get("schedule/total_steps")
            return int(planned) if planned else None
        if training.steps:
            return training.steps
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            images = json.loads((self.folder / fingerprint.FILE_NAME).read_bytes())["train_images"]
            if type(images) is int and images > 0:
                return total_steps(training, images)
        return None

    def seconds_left(self) -> float | None:
        """At the speed of the newest steps; None where the end or the speed is not known."""
        total, seconds = self.total_steps, self.figures.seconds_per_step()
        if total is None or seconds is None:
            return None
        return max(0, total - self.figures.step) * seconds

    # --- rows of text -------------------------------------------------------------------------------------------------

    def rows(self) -> Iterator[tuple[str, str]]:
        """(what, value), for people."""
        latest, step, total = self.figures.latest, self.figures.step, self.total_steps
        yield "state", self._state(total)
        if who := trained_by(self.folder):
            yield "trained by", who
        yield "step", f"{step:,} of {total:,} ({step / total:.0%})" if total else f"{step:,}"
        if (left := self.seconds_left()) is not None and (total is None or step < total):
            yield "time left", f"about {format_seconds(left)} at the speed of the newest steps"
        if "timing/images_per_sec" in latest:
            yield "speed", f"{latest['timing/images_per_sec']:.1f} images/s"
        if TRAINING in latest:
            split = f"reconstruction {latest.get('train/recon_iter', 0):,.2f}, KL {latest.get('train/kl_iter', 0):,.2f}"
            yield "−ELBO in training", f"{latest[TRAINING]:,.2f} nats ({split})"
        if HELD_OUT in latest:
            bits = f" = {latest['val/bpd_elbo']:.3f} bits/dim" if "val/bpd_elbo" in latest else ""
            at = self.figures.series[HELD_OUT][-1][0]
            yield "−ELBO held out", f"{latest[HELD_OUT]:,.2f} nats{bits}, at step {at:,}"
        if "kl_coeff/coeff" in latest and "train/lr" in latest:
            yield "β, learning rate", f"{latest['kl_coeff/coeff']:.3g}, {latest['train/lr']:.3g}"
        yield "newest checkpoint", self._checkpoint()

    def events(self) -> list[Event]:
        """The newest things that happened, newest first: alarms, rewinds, changed settings."""
        return self.figures.events[: -SHOWN_EVENTS - 1 : -1]

    def _state(self, total: int | None) -> str:
        if total is not None and self.figures.step >= total:
            return "finished"
        seconds, heard = math.inf, "no figures yet"
        with contextlib.suppress(OSError):
            seconds = max(0, time.time() - self.figures.path.stat().st_mtime)
            heard = f"newest figures {format_seconds(seconds)} old"
        if trained_by(self.folder):
            return f"training; {heard}"
        # who trains elsewhere, or on Windows, cannot be known: there the age of the figures has to tell
        expected = self.profile.training.log_every * (self.figures.seconds_per_step() or 0)
        return f"{'training, or just stopped' if seconds < 60 + 2 * expected else 'not training'}; {heard}"

    def _checkpoint(self) -> str:
        try:
            path = checkpoint.newest(self.folder)
        except ConfigError as error:
            return str(error)
        return f"step {checkpoint.step_of(path):,}" if path is not None else "none yet"

    # --- memory -------------------------------------------------------------------------------------------------------

    def memory(self) -> list[MemoryRow]:
        """Planned and measured figures that are there, side by side."""
        said, plan = self.profile.provenance, self.profile.plan
        latest = self.figures.latest
        planned = {name: said.get(key) for key, name in _PLANNED.items()}
        rows = [MemoryRow(name, size, False) for name, size in planned.items() if type(size) is int and size > 0]
        rows += [MemoryRow(name, int(latest[key] * GIB), True) for key, name in _MEASURED.items() if key in latest]
        rows.sort(key=lambda row: ("allocated" not in row.name, "reserved" not in row.name))
        return [*rows, MemoryRow("cap of the plan", plan.cap_bytes, False)] if plan.cap_bytes else rows

    # --- groups and pictures ------------------------------------------------------------------------------------------

    def kl(self) -> tuple[list[float], list[int]] | None:
        """(KL in nats, number of active channels) of every group, top first; None before the first figures."""
        model, latest = self.profile.model, self.figures.latest
        names = [(f"kl_vals/layer_{i}", f"kl/active_{i}") for i in range(model.total_groups)]
        if not all(kl in latest for kl, _ in names):
            return None
        return [latest[kl] for kl, _ in names], [round(latest.get(active, 0) * model.latents) for _, active in names]

    def pictures(self) -> list[Drawn]:
        """The newest samples at each temperature, and reconstructions, that training has drawn."""
        drawn = []
        for path in self._newest_pictures():
            with contextlib.suppress(OSError, ValueError, SyntaxError):  # removed meanwhile, or no whole picture
                png = path.read_bytes()
                Image.open(io.BytesIO(png)).load()
                drawn.append(Drawn(_caption(path.name), png))
        return drawn

    def _newest_pictures(self) -> list[Path]:
        """Files of the newest step: samples by temperature, then reconstructions."""
        found: list[tuple[int, bool, str, Path]] = []
        with contextlib.suppress(OSError):
            for path in (self.folder / "samples").iterdir():
                if match := _SAMPLES.fullmatch(path.name) or _RECONSTRUCTIONS.fullmatch(path.name):
                    found.append((int(match[1]), match.re is _RECONSTRUCTIONS, path.name, path))
        newest = max((step for step, *_ in found), default=0)
        return [path for step, *_, path in sorted(found) if step == newest]


def _caption(name: str) -> str:
    if match := _SAMPLES.fullmatch(name):
        return f"samples at temperature {match[2]}, step {int(match[1]):,}"
    match = _RECONSTRUCTIONS.fullmatch(name)
    assert match is not None, name
    return f"held-out images above their reconstructions, step {int(match[1]):,}"
