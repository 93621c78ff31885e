"""Measured runs as text: a table of many, or one in full."""

from __future__ import annotations

from collections.abc import Sequence

from nvae_lowmem.memory.measure.assess import Assessment, PeakComparison, SizeCount
from nvae_lowmem.text_table import text_table
from nvae_lowmem.units import format_bytes, format_seconds

_SIZES_SHOWN = 12


def as_table(assessments: Sequence[Assessment]) -> str:
    """One line per run."""
    head = ("run", "batch", "precision", "engine", "s/step", "images/s", "allocated", "error", "reserved", "error",
            "margin", "replay", "verdict")  # fmt: skip
    return "\n".join(text_table("<<<<>>>>>>><<", [head, *map(_cells, assessments)]))


def _cells(assessment: Assessment) -> tuple[str, ...]:
    outcome, peaks = assessment.outcome, assessment.peaks
    measured, profile = outcome.measured, outcome.resolved
    if measured is None or profile is None:
        first_line = outcome.detail.splitlines()[0] if outcome.detail else ""
        return (outcome.job.name, *[""] * 11, f"{outcome.status}: {first_line}")
    mean, plan = measured.mean_seconds, profile.plan
    figures = [""] * 5
    if peaks is not None:
        pairs = [(format_bytes(peak.measured), _percent(peak)) for peak in (peaks.allocated, peaks.reserved)]
        figures = [*pairs[0], *pairs[1], format_bytes(peaks.margin_bytes)]
    return (
        outcome.job.name, f"{plan.micro_batch} x {measured.accumulation}", plan.precision, plan.engine,
        f"{mean:.3f}" if mean else "", f"{profile.training.total_batch / mean:.1f}" if mean else "", *figures,
        _replay(assessment), _verdict(assessment),
    )  # fmt: skip


def as_text(assessment: Assessment) -> str:
    """One run: device, speed, peaks, replay, and sizes that the trace does not explain."""
    outcome, peaks, stream = assessment.outcome, assessment.peaks, assessment.stream
    measured, profile = outcome.measured, outcome.resolved
    if measured is None or profile is None:
        head = f"{outcome.job.name}: {outcome.status}: {outcome.detail}"
        return "\n".join([head, *(f"  {line}" for line in outcome.ended.stderr)])
    versions = ", ".join(f"{name} {value}" for name, value in measured.versions.items() if value)
    pairs = [("device", f"{measured.device.name}; {versions}")]
    if mean := measured.mean_seconds:
        speed = f"{format_seconds(mean)} per step, {profile.training.total_batch / mean:.1f} images/s"
        pairs.append(("speed", f"{speed} (without the first step)"))
    if peaks is not None:
        for kind, peak in (("allocated", peaks.allocated), ("reserved", peaks.reserved), ("host", peaks.host)):
            said = f"{format_bytes(peak.measured)}, predicted {format_bytes(peak.predicted)} ({_percent(peak)})"
            pairs.append((f"{kind} peak", said))
        held = "held" if peaks.within_margin else "EXCEEDED"
        pairs.append(("margin", f"{format_bytes(peaks.margin_bytes)}: {held}"))
    if assessment.replay is not None:
        pairs.append(("replay", f"{_replay(assessment)} at {assessment.replay.checkpoints} checkpoints"))
    if stream is not None:
        order = "the same as the trace's, one by one" if stream.same_order else f"the trace's: {stream.expected}"
        unknown = format_bytes(stream.unknown_bytes)
        pairs.append(("allocations", f"{stream.recorded}, {order}; {unknown} of unknown sizes"))
    lines = [f"{outcome.job.name}: {_verdict(assessment)}"]
    lines += [f"  {name:<16}{text}" for name, text in pairs]
    return "\n".join(lines + _unmatched(stream.unmatched if stream is not None else ()))


def _unmatched(sizes: Sequence[SizeCount]) -> list[str]:
    if not sizes:
        return []
    head = ("phase", "bytes", "measured", "traced", "")
    cells = [(u.phase, str(u.bytes), str(u.recorded), str(u.expected), u.what) for u in sizes]
    lines = ["", "Sizes that are asked for more or less often than in the trace"]
    lines += [f"  {line}" for line in text_table("<>>><", [head, *cells[:_SIZES_SHOWN]])]
    more = len(cells) - _SIZES_SHOWN
    return lines + ([f"  and {more} more: see --json"] if more > 0 else [])


def _percent(peak: PeakComparison) -> str:
    return f"{peak.error_percent:+.1f} %" if peak.error_percent is not None else ""


def _replay(assessment: Assessment) -> str:
    replay = assessment.replay
    if replay is None:
        return ""
    if replay.equal:
        return "equal"
    streams = f", {replay.streams} streams" if replay.streams > 1 else ""
    return f"{len(replay.differences)} differences{streams}"


def _verdict(assessment: Assessment) -> str:
    outcome = assessment.outcome
    said = "" if outcome.status == "ok" else f"{outcome.status} {outcome.detail}"
    if assessment.agrees is None:
        return said or "measured"
    if assessment.agrees:
        return f"{said}, as predicted" if said else "as predicted"
    if said:
        return said
    held = assessment.peaks is not None and assessment.peaks.within_margin
    return "REPLAY DIFFERS" if held else "MORE THAN THE MARGIN"
