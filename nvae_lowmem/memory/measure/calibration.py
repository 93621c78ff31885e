"""From measured runs to a calibration file: what was measured on a card of the memory that no trace sees.

The file is read by `predict.untraced.load_calibration` and given to predict(..., calibration=...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import tomli_w

from nvae_lowmem.memory.measure.assess import Assessment
from nvae_lowmem.memory.measure.convolutions import largest_bytes
from nvae_lowmem.memory.measure.measurement import CardStatistics
from nvae_lowmem.memory.predict.untraced import MeasuredEntry

_WHAT = {
    "cublas-workspaces": "workspaces still held at the end of",
    "cudnn-workspace": "largest workspace of all convolutions of",
    "reductions": "largest allocation that neither the trace nor a library's workspace explains, in",
    "cuda-context": "on the card beside the allocator and other programs after",
}


def calibrate(runs: Sequence[Assessment], source: str) -> dict[str, MeasuredEntry]:
    """Entries of untraced memory, by name, from runs on one card: of each the largest value of all runs.

    An entry that no run can tell is left out. source: "measured on <device>, torch <version>, <date>".
    """
    out: dict[str, MeasuredEntry] = {}
    for run in runs:
        for name, nbytes in _measured_bytes(run).items():
            if name not in out or nbytes > out[name].nbytes:
                text = f"{source}: {_WHAT[name]} {run.outcome.job.name}"
                out[name] = MeasuredEntry(nbytes, text)
    return {name: out[name] for name in _WHAT if name in out}


def _measured_bytes(run: Assessment) -> dict[str, int]:
    """Bytes of the entries that this run can tell."""
    out = {}
    measured, profile = run.outcome.measured, run.outcome.resolved
    if run.cublas_kept_bytes is not None:
        out["cublas-workspaces"] = run.cublas_kept_bytes
    if run.stream is not None and profile is not None and profile.plan.engine == "torch":
        unexplained = (u.bytes for u in run.stream.unmatched if not u.expected and not u.what)
        out["reductions"] = max(unexplained, default=0)
    if measured is not None and measured.workspaces:
        out["cudnn-workspace"] = largest_bytes(measured.workspaces)
    if measured is not None and measured.statistics is not None:
        out["cuda-context"] = _context_bytes(measured.statistics)
    return out


def _context_bytes(statistics: CardStatistics) -> int:
    return max(0, statistics.outside_allocator_bytes - (statistics.used_before_context_bytes or 0))


def save_calibration(path: Path, calibration: Mapping[str, MeasuredEntry], header: str) -> None:
    """Write the entries as TOML below a comment. Raises OSError where the file cannot be written."""
    tables = {name: {"nbytes": entry.nbytes, "source": entry.source} for name, entry in calibration.items()}
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    path.write_text(f"{comment}\n{tomli_w.dumps(tables)}", encoding="utf-8")
