"""Three comparisons of a measured run: the allocator's figures, the stream of requests, and the predicted peaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvae_lowmem.memory.allocator.recording import Recording

STEP_PHASES = ("setup", "forward", "backward", "update")


def replayed(recording: Recording) -> dict[str, Any]:
    """A: the recorded requests through the simulated allocator. equal: every recorded figure to the byte.

    Raises ConfigError where the recording makes no sense.
    """
    differences = recording.differences()
    return {
        "equal": not differences,
        "events": len(recording.events),
        "checkpoints": len(recording.checkpoints),
        "streams": recording.streams,
        "differences": [d._asdict() for d in differences],
    }


def matched(recorded: Recording, expected: Recording, known: Mapping[int, str]) -> dict[str, Any]:
    """B: recorded requests against those of the trace, as multisets of (phase, bytes).

    known: what else asks for so many bytes (libraries). unmatched: sizes whose counts differ, those that the trace has
    nowhere in that phase first, then by bytes; unknown_bytes: the sum of these, and not of what is known otherwise.
    """
    had, wanted = recorded.sizes(), expected.sizes()
    rows: list[dict[str, Any]] = [
        {
            "phase": phase,
            "bytes": nbytes,
            "recorded": had[phase, nbytes],
            "expected": wanted[phase, nbytes],
            "what": known.get(nbytes, "") if not wanted[phase, nbytes] else "",
        }
        for phase, nbytes in had.keys() | wanted.keys()
        if phase in STEP_PHASES and had[phase, nbytes] != wanted[phase, nbytes]
    ]
    rows.sort(key=lambda r: (r["expected"] > 0, bool(r["what"]), -r["bytes"], r["phase"]))
    return {
        "recorded": sum(n for (phase, _), n in had.items() if phase in STEP_PHASES),
        "expected": sum(wanted.values()),
        "same_order": recorded.events == expected.events,
        "unknown_bytes": sum(r["bytes"] * r["recorded"] for r in rows if not r["expected"] and not r["what"]),
        "unmatched": rows,
    }


def compared(predicted: Mapping[str, int], measured: Mapping[str, int], margin_bytes: int) -> dict[str, Any]:
    """C: predicted against measured peaks in bytes, by kind: allocated, reserved (both on the card) and host.

    error_percent = 100 (predicted / measured - 1): negative where more was taken than predicted. within_margin: neither
    peak on the card lies more than the margin above its prediction.
    """
    out: dict[str, Any] = {"margin_bytes": margin_bytes}
    for kind, nbytes in measured.items():
        error = 100 * (predicted[kind] / nbytes - 1) if nbytes > 0 else None
        out[kind] = {"predicted": predicted[kind], "measured": nbytes, "error_percent": error}
    out["within_margin"] = all(measured[k] <= predicted[k] + margin_bytes for k in ("allocated", "reserved"))
    return out
