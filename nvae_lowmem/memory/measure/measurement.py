"""What a measured process saw: the type between the worker, which fills it, and all that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import pydantic

from nvae_lowmem.memory.allocator.recording import RecordedCard, Recording
from nvae_lowmem.memory.measure.convolutions import Workspaces
from nvae_lowmem.memory.predict.figures import MemoryFigures
from nvae_lowmem.memory.trace.events import Trace


class DeviceFacts(NamedTuple):
    """The device of a measurement."""

    name: str
    """As the driver reports it; "cpu" without a card."""
    sm: str | None = None
    """Compute capability, such as "5.2"."""
    total_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class CardStatistics:
    """What torch.cuda.memory_stats() and mem_get_info() said at the end of a run, in bytes."""

    peak_allocated_bytes: int
    peak_requested_bytes: int
    peak_active_bytes: int
    peak_reserved_bytes: int
    peak_inactive_split_bytes: int
    retries: int
    """How often the allocator gave its cache back because the card refused a segment."""
    ooms: int
    total_bytes: int
    used_before_context_bytes: int | None
    """What other programs used before this process came; None where the driver does not say."""
    free_bytes: dict[str, int]
    """What was free on the card, by moment."""
    outside_allocator_bytes: int
    """Not free and not the allocator's: this process's context, kernels and handles, and other programs."""
    cublas_workspace_bytes: int
    """What the first matrix product left behind in the allocator."""


@dataclass(frozen=True, kw_only=True)
class StepMeasurements:
    """What the steps of a run took, in order."""

    status: Literal["ok", "out of memory"] = "ok"
    detail: str = ""
    """Where memory ran out, and what torch said."""
    seconds: tuple[float, ...] = ()
    host_bytes: tuple[int, ...] = ()
    """By how much the process had grown since before the set-up."""
    overflows: int = 0
    """Steps whose gradients overflowed, so that nothing was updated."""


@dataclass(frozen=True, kw_only=True)
class Measurement(StepMeasurements):
    """All that a measured process saw of its run."""

    engine: str
    """Which engine ran it, and why that one."""
    settings: str
    """Of PyTorch's allocator."""
    accumulation: int
    device: DeviceFacts
    versions: dict[str, str | int | None]
    """Of Python, torch, CUDA, cuDNN, the driver; and the platform."""
    peaks: MemoryFigures | None = None
    """On the CPU: of the same steps with every storage recorded, through the simulated allocator."""
    statistics: CardStatistics | None = None
    """On a card."""
    workspaces: tuple[Workspaces, ...] = ()
    """On a card: of every distinct convolution, unless memory ran out."""

    @property
    def figures(self) -> MemoryFigures:
        """Peaks of the whole run; host memory as the process grew."""
        if self.statistics is None:
            assert self.peaks is not None, "a measurement has either statistics of a card or peaks of the CPU"
            return self.peaks
        return MemoryFigures(
            allocated_peak_bytes=self.statistics.peak_allocated_bytes,
            reserved_peak_bytes=self.statistics.peak_reserved_bytes,
            host_bytes=max(self.host_bytes, default=0),
        )

    @property
    def mean_seconds(self) -> float | None:
        """Per step, without the first, which loads kernels; None where there is no other."""
        later = self.seconds[1:]
        return sum(later) / len(later) if later else None


_MEASUREMENT = pydantic.TypeAdapter(Measurement)


def measurement_to_json(measurement: Measurement) -> bytes:
    """The measurement as a JSON object."""
    return _MEASUREMENT.dump_json(measurement)


def measurement_from_json(text: str | bytes) -> Measurement:
    """What `measurement_to_json` wrote. Raises ValueError for anything else."""
    return _MEASUREMENT.validate_json(text)


def traced_recording(name: str, trace: Trace, settings: str = "") -> Recording:
    """A trace as a recording: what it asks of the card. No allocator served it, so there are no checkpoints."""
    phases: list[tuple[int, str]] = []
    for index, (a, is_alloc) in enumerate((a, is_alloc) for a, is_alloc in trace.walk() if a.on_card):
        if is_alloc and (not phases or phases[-1][1] != a.phase):
            phases.append((index, a.phase))
    return Recording(name, RecordedCard(settings, 1, 0, 0.0), list(trace.requests()), tuple(phases), ())
