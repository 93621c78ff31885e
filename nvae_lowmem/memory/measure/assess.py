"""Three comparisons of a measured run: the allocator's figures, the stream of requests, and the predicted peaks.

A: the recorded requests through the simulated allocator against the recorded figures. B: the recorded requests against
those of the traced step. C: measured against predicted peaks.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.budget import Budget
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.memory.allocator.recording import OUT_OF_MEMORY, Recording
from nvae_lowmem.memory.measure.job import Outcome
from nvae_lowmem.memory.measure.measurement import Measurement, traced_recording
from nvae_lowmem.memory.predict.figures import MemoryFigures
from nvae_lowmem.memory.predict.predict import Prediction, predict
from nvae_lowmem.memory.predict.untraced import CUBLASLT_WORKSPACE_BYTES
from nvae_lowmem.memory.trace.training import trace_training

STEP_PHASES = ("setup", "forward", "backward", "update")


class ReplayComparison(NamedTuple):
    """A: the recorded requests through the simulated allocator."""

    equal: bool
    """Every recorded figure to the byte."""
    events: int
    checkpoints: int
    streams: int
    """CUDA streams that memory was allocated on; the simulator knows one."""
    differences: list[dict[str, Any]]


class SizeCount(NamedTuple):
    """A size that was asked for more or less often than in the trace."""

    phase: str
    bytes: int
    recorded: int
    expected: int
    what: str
    """What else asks for so many bytes, where the trace does nowhere in that phase; empty if unknown."""


class StreamComparison(NamedTuple):
    """B: recorded requests against those of the trace, as multisets of (phase, bytes)."""

    recorded: int
    expected: int
    same_order: bool
    unknown_bytes: int
    """The sum of all that the trace has nowhere in its phase, and that is not known otherwise."""
    unmatched: tuple[SizeCount, ...]
    """Sizes whose counts differ, those that the trace has nowhere in that phase first, then by bytes."""


class PeakComparison(NamedTuple):
    """A predicted and a measured peak in bytes."""

    predicted: int
    measured: int
    error_percent: float | None
    """100 (predicted / measured - 1): negative where more was taken than predicted."""


class PeaksComparison(NamedTuple):
    """C: predicted against measured peaks, allocated and reserved both on the card."""

    margin_bytes: int
    allocated: PeakComparison
    reserved: PeakComparison
    host: PeakComparison
    within_margin: bool
    """Neither peak on the card lies more than the margin above its prediction."""


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """An outcome compared with its prediction, as far as the run went."""

    outcome: Outcome
    prediction: Prediction | None = None
    replay: ReplayComparison | None = None
    """On a card."""
    cublas_kept_bytes: int | None = None
    """On a card: in workspaces of cuBLAS that were never freed."""
    stream: StreamComparison | None = None
    """Where the run came to its end; so are peaks."""
    peaks: PeaksComparison | None = None

    @property
    def agrees(self) -> bool | None:
        """Whether the run is as predicted: within the margin, or out of memory where that was predicted.

        None where nothing was compared.
        """
        if self.prediction is None:
            return None
        if self.outcome.status == OUT_OF_MEMORY:
            return self.prediction.oom is not None
        replay_agrees = self.replay is None or self.replay.equal or self.replay.streams > 1
        return self.peaks is not None and self.peaks.within_margin and replay_agrees

    def to_json(self) -> dict[str, Any]:
        """The row of the report: all that was measured, so that it can be compared again (see `measured_files`)."""
        row = _described(self.outcome)
        if self.prediction is not None:
            row["prediction"] = {"oom": self.prediction.oom, "overlay": self.prediction.to_json()["overlay"]}
        if self.replay is not None:
            row["replay"] = self.replay._asdict()
            row["cublas_kept_bytes"] = self.cublas_kept_bytes
        if self.stream is not None:
            row["stream"] = {**self.stream._asdict(), "unmatched": [size._asdict() for size in self.stream.unmatched]}
        if self.peaks is not None:
            kinds = {kind: getattr(self.peaks, kind)._asdict() for kind in ("allocated", "reserved", "host")}
            row["peaks"] = {**self.peaks._asdict(), **kinds}
        if self.agrees is not None:
            row["agrees"] = self.agrees
        return row


def _described(outcome: Outcome) -> dict[str, Any]:
    """The configuration, and what was measured."""
    job, measured = outcome.job, outcome.measured
    row: dict[str, Any] = {
        "name": job.name,
        "status": outcome.status,
        "detail": outcome.detail,
        "job": {"device": job.device, "steps": job.steps},
        "ended": outcome.ended._asdict(),
    }
    if outcome.resolved is None or measured is None:
        return row
    profile, plan = outcome.resolved, outcome.resolved.plan
    mean = measured.mean_seconds
    return row | {
        "profile": profiles.to_dict(profile),
        "measured": {
            **asdict(measured),
            "device": measured.device._asdict(),
            "workspaces": [one._asdict() for one in measured.workspaces],
        },
        "micro_batch": plan.micro_batch,
        "accumulation": measured.accumulation,
        "precision": plan.precision,
        "keep": plan.keep,
        "offload_optimizer": plan.offload_optimizer,
        "engine": plan.engine,
        "cap_bytes": plan.cap_bytes,
        "seconds_per_step": mean,
        "images_per_second": profile.training.total_batch / mean if mean else None,
    }


def assess(outcome: Outcome, card: Card | None = None) -> Assessment:
    """Compare a measured run in all three ways, as far as it went.

    card: the one it ran on; None: the CPU. Raises ConfigError where prediction or replay is impossible.
    """
    recording, profile, measured = outcome.recording, outcome.resolved, outcome.measured
    if recording is None or profile is None or measured is None:
        return Assessment(outcome=outcome)
    micro, accumulation = profile.plan.micro_batch, measured.accumulation
    prediction = predict(profile, micro, accumulation, card, _budget(profile, measured), measured.settings)
    found = Assessment(outcome=outcome, prediction=prediction)
    if recording.checkpoints and measured.statistics is not None:
        workspace, kept = measured.statistics.cublas_workspace_bytes, recording.kept()
        phases = ("libraries", "forward", "backward")  # weights and states of that size are made in other phases
        kept_bytes = workspace * sum(kept[phase, workspace] for phase in phases)
        found = replace(found, replay=compare_replay(recording), cublas_kept_bytes=kept_bytes)
    if outcome.status == "ok":
        expected = traced_recording(outcome.job.name, trace_training(profile, micro, accumulation, outcome.job.steps))
        stream = compare_streams(recording, expected, _known_sizes(measured))
        predicted = _of_the_whole_run(prediction, on_card=measured.statistics is not None)
        peaks = compare_peaks(predicted, measured.figures, prediction.margin_bytes)
        found = replace(found, stream=stream, peaks=peaks)
    return found


def assess_or_fail(outcome: Outcome, card: Card | None = None) -> Assessment:
    """`assess`, but any error becomes a failed run with the error as its detail, so that other runs can go on."""
    try:
        return assess(outcome, card)
    except ConfigError as error:
        detail = str(error)
    except Exception as error:  # whatever it is, the rows of the other runs must not be lost with it
        frame = traceback.extract_tb(error.__traceback__)[-1]
        detail = f"cannot be compared: {type(error).__name__}: {error} ({frame.name}, line {frame.lineno})"
    return Assessment(outcome=replace(outcome, status="failed", detail=detail))


def _budget(profile: Profile, measured: Measurement) -> Budget | None:
    """The cap that the run was under, on that card; None without one."""
    statistics, cap = measured.statistics, profile.plan.cap_bytes
    if statistics is None or not 0 < cap < statistics.total_bytes:
        return None
    outside = min(statistics.outside_allocator_bytes, statistics.total_bytes - cap)
    return Budget(
        cap_bytes=cap, total_bytes=statistics.total_bytes, context_bytes=outside, reason="the cap of the measured run"
    )


def _known_sizes(measured: Measurement) -> dict[int, str]:
    """What libraries ask the allocator for, as far as it was measured."""
    known = {nbytes: "convolution workspace" for one in measured.workspaces for nbytes in one.sizes}
    cublas = measured.statistics.cublas_workspace_bytes if measured.statistics is not None else 0
    if measured.statistics is not None:
        known[CUBLASLT_WORKSPACE_BYTES] = "cuBLASLt workspace, or sums over many thread blocks"
    return known | ({cublas: "cuBLAS workspace of the forward or the backward thread"} if cublas else {})


def _of_the_whole_run(prediction: Prediction, on_card: bool) -> MemoryFigures:
    """The prediction as a run on a card measures it, set-up included; on the CPU only the steps are recorded."""
    setup = prediction.init_peak_bytes if on_card else 0
    return MemoryFigures(
        allocated_peak_bytes=max(prediction.allocated_peak_bytes, setup),
        reserved_peak_bytes=max(prediction.reserved_peak_bytes, setup),
        host_bytes=prediction.host_bytes,
    )


def compare_replay(recording: Recording) -> ReplayComparison:
    """A: the recorded requests through the simulated allocator. Raises ConfigError where they make no sense."""
    differences = recording.differences()
    return ReplayComparison(
        equal=not differences,
        events=len(recording.events),
        checkpoints=len(recording.checkpoints),
        streams=recording.streams,
        differences=[d._asdict() for d in differences],
    )


def compare_streams(recorded: Recording, expected: Recording, known: Mapping[int, str]) -> StreamComparison:
    """B: recorded requests against those of the trace. known: what else asks for so many bytes (libraries)."""
    had, wanted = recorded.sizes(), expected.sizes()
    unmatched = [
        SizeCount(
            phase=phase,
            bytes=nbytes,
            recorded=had[phase, nbytes],
            expected=wanted[phase, nbytes],
            what=known.get(nbytes, "") if had[phase, nbytes] > wanted[phase, nbytes] else "",
        )
        for phase, nbytes in had.keys() | wanted.keys()
        if phase in STEP_PHASES and had[phase, nbytes] != wanted[phase, nbytes]
    ]
    unmatched.sort(key=lambda u: (u.expected > 0, bool(u.what), -u.bytes, u.phase))
    return StreamComparison(
        recorded=sum(n for (phase, _), n in had.items() if phase in STEP_PHASES),
        expected=sum(wanted.values()),
        same_order=recorded.events == expected.events,
        unknown_bytes=sum(u.bytes * u.recorded for u in unmatched if not u.expected and not u.what),
        unmatched=tuple(unmatched),
    )


def compare_peaks(predicted: MemoryFigures, measured: MemoryFigures, margin_bytes: int) -> PeaksComparison:
    """C: predicted against measured peaks."""
    allocated = _compare(predicted.allocated_peak_bytes, measured.allocated_peak_bytes)
    reserved = _compare(predicted.reserved_peak_bytes, measured.reserved_peak_bytes)
    within = all(peak.measured <= peak.predicted + margin_bytes for peak in (allocated, reserved))
    return PeaksComparison(
        margin_bytes, allocated, reserved, _compare(predicted.host_bytes, measured.host_bytes), within
    )


def _compare(predicted: int, measured: int) -> PeakComparison:
    return PeakComparison(predicted, measured, 100 * (predicted / measured - 1) if measured > 0 else None)
