"""How fast training turned out to be: when it will end, what was expected instead, and the record of it in the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.training.changes import CONFIG
from nvae_lowmem.units import clock_time, format_seconds

MEASURED, MEASURED_ON = "measured_seconds_per_step", "measured_on"
"""Keys of the provenance in a run's config.toml, by which the next estimate for this run is what it measured."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Seconds of an optimiser step as they were estimated or measured before this training."""

    least_seconds: float
    most_seconds: float
    device: str
    """For which card they were estimated, or where they were measured."""
    measured: bool = False
    is_here: bool = True
    """Whether training runs on such a device."""

    def beside(self, seconds: float) -> str:
        """A sentence on how far they were off, where a step takes so many seconds."""
        low, high = f"{self.least_seconds:.3g}", f"{self.most_seconds:.3g}"
        span = low if low == high else f"{low} to {high}"
        how = "measured before on" if self.measured else "estimated for"
        device = self.device if self.is_here else f"{self.device}, which this is not"
        if seconds > self.most_seconds:
            off = f"it takes {seconds / self.most_seconds:.2f} times {'that' if low == high else 'the most of that'}"
        elif seconds < self.least_seconds:
            off = f"it takes {seconds / self.least_seconds:.2f} times {'that' if low == high else 'the least of that'}"
        else:
            off = "as expected"
        return f"{span} s were {how} {device}: {off}"


def promise(
    step: int,
    seconds: float,
    device: str,
    left_steps: int,
    left_seconds: float,
    expected: Expected | None,
    uncounted: Sequence[str] = (),
) -> str:
    """When training ends, for people: after step `step`, at so many seconds per step, with so much left to do.

    uncounted: what left_seconds leaves out, since nobody knows yet what it takes.
    """
    without = f" without {', '.join(uncounted)}" if uncounted else ""
    beside = f". {expected.beside(seconds)}" if expected is not None else ""
    return (
        f"step {step}: {seconds:.3g} s per step on {device}: with {left_steps:,} steps left, training ends "
        f"{clock_time(left_seconds)}, in {format_seconds(left_seconds)}{without}{beside}"
    )


def record(run_dir: Path, seconds: float, device: str) -> None:
    """Write what a step takes into the provenance of the run's configuration. Raises OSError and ConfigError."""
    path = run_dir / CONFIG
    header = "\n".join(line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    profile = profiles.load(path)
    provenance = {**profile.provenance, MEASURED: float(f"{seconds:.4g}"), MEASURED_ON: device}
    profiles.save(replace(profile, provenance=provenance), path, header=header)
