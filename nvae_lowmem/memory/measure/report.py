"""Measured runs for people: a table of many, or all that there is to say of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvae_lowmem.text_table import text_table
from nvae_lowmem.units import format_bytes, format_seconds

Row = Mapping[str, Any]
_SIZES_SHOWN = 12


def as_table(rows: Sequence[Row]) -> str:
    """One line per run."""
    head = ("run", "batch", "precision", "engine", "s/step", "images/s", "allocated", "error", "reserved", "error",
            "margin", "replay", "verdict")  # fmt: skip
    return "\n".join(text_table("<<<<>>>>>>><<", [head, *map(_cells, rows)]))


def _cells(row: Row) -> tuple[str, ...]:
    if "micro_batch" not in row:
        return (row["name"], *[""] * 11, f"{row['status']}: {row['detail'].splitlines()[0] if row['detail'] else ''}")
    mean, speed = row["seconds_per_step"], row["images_per_second"]
    peaks = row.get("peaks")
    figures = [""] * 5
    if peaks:
        pairs = [(format_bytes(peaks[k]["measured"]), _percent(peaks[k])) for k in ("allocated", "reserved")]
        figures = [*pairs[0], *pairs[1], format_bytes(peaks["margin_bytes"])]
    return (
        row["name"], f"{row['micro_batch']} x {row['accumulation']}", row["precision"], row["engine"],
        f"{mean:.3f}" if mean else "", f"{speed:.1f}" if speed else "", *figures, _replay(row), _verdict(row),
    )  # fmt: skip


def as_text(row: Row) -> str:
    """Everything of one run that is worth a line."""
    if "micro_batch" not in row:
        return "\n".join(
            [f"{row['name']}: {row['status']}: {row['detail']}", *(f"  {line}" for line in row["ended"]["stderr"])]
        )
    measured = row["measured"]
    versions = ", ".join(f"{name} {value}" for name, value in measured["versions"].items() if value)
    pairs = [("device", f"{measured['device']['name']}; {versions}")]
    if row["seconds_per_step"]:
        speed = f"{format_seconds(row['seconds_per_step'])} per step, {row['images_per_second']:.1f} images/s"
        pairs.append(("speed", f"{speed} (without the first step)"))
    peaks = row.get("peaks", {})
    for kind in ("allocated", "reserved", "host"):
        if kind in peaks:
            p = peaks[kind]
            said = f"{format_bytes(p['measured'])}, predicted {format_bytes(p['predicted'])} ({_percent(p)})"
            pairs.append((f"{kind} peak", said))
    if peaks:
        pairs.append(("margin", f"{format_bytes(peaks['margin_bytes'])}: {'held' if _held(row) else 'EXCEEDED'}"))
    if "replay" in row:
        pairs.append(("replay", f"{_replay(row)} at {row['replay']['checkpoints']} checkpoints"))
    stream = row.get("stream")
    if stream:
        order = "the same as the trace's, one by one" if stream["same_order"] else f"the trace's: {stream['expected']}"
        unknown = format_bytes(stream["unknown_bytes"])
        pairs.append(("allocations", f"{stream['recorded']}, {order}; {unknown} of unknown sizes"))
    lines = [f"{row['name']}: {_verdict(row)}"]
    lines += [f"  {name:<16}{text}" for name, text in pairs]
    return "\n".join(lines + _unmatched(stream["unmatched"] if stream else ()))


def _unmatched(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    head = ("phase", "bytes", "measured", "traced", "")
    cells = [(r["phase"], str(r["bytes"]), str(r["recorded"]), str(r["expected"]), r["what"]) for r in rows]
    lines = ["", "Sizes that are asked for more or less often than in the trace"]
    lines += [f"  {line}" for line in text_table("<>>><", [head, *cells[:_SIZES_SHOWN]])]
    more = len(cells) - _SIZES_SHOWN
    return lines + ([f"  and {more} more: see --json"] if more > 0 else [])


def _percent(pair: Row) -> str:
    return f"{pair['error_percent']:+.1f} %" if pair["error_percent"] is not None else ""


def _held(row: Row) -> bool:
    return bool(row["peaks"]["within_margin"])


def _replay(row: Row) -> str:
    replay = row.get("replay")
    if replay is None:
        return ""
    if replay["equal"]:
        return "equal"
    streams = f", {replay['streams']} streams" if replay["streams"] > 1 else ""
    return f"{len(replay['differences'])} differences{streams}"


def _verdict(row: Row) -> str:
    said = "" if row["status"] == "ok" else f"{row['status']} {row['detail']}"
    if "agrees" not in row:
        return said or "measured"
    if row["agrees"]:
        return f"{said}, as predicted" if said else "as predicted"
    if said:
        return said
    return "REPLAY DIFFERS" if _held(row) else "MORE THAN THE MARGIN"
