"""From measured runs to a calibration file: what of the overlay's table was measured on a card, with its source.

The file is read by overlay.load_calibration and given to predict(..., calibration=...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from nvae_lowmem.memory.measure.convolutions import largest_bytes
from nvae_lowmem.memory.predict.untraced import Entry, When

_WHEN: dict[str, When] = {
    "cublas-workspaces": "always",
    "cudnn-workspace": "convolution",
    "reductions": "always",
    "cuda-context": "context",
}


def calibrate(rows: Sequence[Mapping[str, Any]], source: str) -> dict[str, Entry]:
    """The overlay's entries from what measure_assess.assess says of each run on one card: of each the largest value.

    An entry that no run can tell is left out. source: "measured on <device>, torch <version>, <date>".
    """
    found = {
        "cublas-workspaces": [(row["cublas_kept_bytes"], row) for row in rows if "cublas_kept_bytes" in row],
        "cudnn-workspace": [
            (largest_bytes(w), row) for row in rows if (w := row.get("measured", {}).get("workspaces"))
        ],
        "reductions": [(_unexplained(row), row) for row in rows if row.get("engine") == "torch" and "stream" in row],
        "cuda-context": [(_outside(row), row) for row in rows if "statistics" in row.get("measured", {})],
    }
    what = {
        "cublas-workspaces": "workspaces still held at the end of",
        "cudnn-workspace": "largest workspace of all convolutions of",
        "reductions": "largest allocation that neither the trace nor a library's workspace explains, in",
        "cuda-context": "on the card beside the allocator and other programs after",
    }
    out = {}
    for name, values in found.items():
        if values:
            nbytes, row = max(values, key=lambda pair: pair[0])
            text = f"{source}: {what[name]} {row['name']}"
            out[name] = Entry(name=name, nbytes=nbytes, when=_WHEN[name], source=text)
    return out


def _unexplained(row: Mapping[str, Any]) -> int:
    unmatched = row["stream"]["unmatched"]
    return max((u["bytes"] for u in unmatched if not u["expected"] and not u["what"]), default=0)


def _outside(row: Mapping[str, Any]) -> int:
    statistics = row["measured"]["statistics"]
    return max(0, statistics["outside_allocator_bytes"] - (statistics["used_before_context_bytes"] or 0))


def save_calibration(path: Path, calibration: Mapping[str, Entry], header: str) -> None:
    """Write the entries as TOML below a comment. Raises OSError where the file cannot be written."""
    tables = {name: {"nbytes": entry.nbytes, "source": entry.source} for name, entry in calibration.items()}
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    path.write_text(f"{comment}\n{tomli_w.dumps(tables)}", encoding="utf-8")
