"""A fit in words, as a table for programs, and as the profile to train with."""

from __future__ import annotations

import platform
from dataclasses import asdict, replace
from typing import Any

import torch

from nvae_lowmem import __version__
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.hardware.card import Card, OsName
from nvae_lowmem.memory.plan.fit import Fit
from nvae_lowmem.text_table import text_table
from nvae_lowmem.units import format_bytes, format_seconds


def as_json(found: Fit, profile: Profile) -> dict[str, Any]:
    """The answer for programs; sizes in bytes, for a miss those of the nearest one."""
    c, plan = found.chosen, found.chosen.profile.plan
    p = found.prediction
    return {
        "recipe": profile.name,
        "fits": found.fits,
        "cap_bytes": found.budget.cap_bytes,
        "micro_batch": c.micro_batch,
        "accumulation": c.accumulation,
        "total_batch": c.profile.training.total_batch,
        "groups_per_scale": list(c.groups),
        "precision": plan.precision,
        "engine": plan.engine,
        "zero_stage": plan.zero_stage if plan.engine == "deepspeed" else None,
        "peak_allocated_bytes": p.allocated_peak_bytes if p else c.peak_bytes,
        "peak_reserved_bytes": found.reserved_bytes,
        "host_bytes": p.host_bytes if p else c.host_bytes,
        "seconds_per_step": c.seconds.total,
        "reasons": [*found.reasons, *found.refused],
        "plan": asdict(plan),
    }


def as_text(found: Fit, profile: Profile) -> str:
    """The answer for people."""
    c = found.chosen
    head = "fits" if found.fits else "does not fit"
    lines = [f"{profile.name} {head}", *(f"  {reason}" for reason in found.reasons)]
    if found.fits:
        s = c.seconds
        parts = f"card {s.card:.2f} s, bus {s.link:.2f} s, optimiser {s.optimizer:.2f} s"
        lines.append(f"  about {format_seconds(s.total)} per step ({parts}), {c.images_per_second:.3g} images/s")
    if found.refused:
        lines += ["", "What does not fit" if found.fits else "Why not", *(f"  {line}" for line in found.refused)]
    return "\n".join(
        [*lines, "", "Peak and speed, estimated", *(f"  {line}" for line in text_table(*frontier_rows(found)))]
    )


def frontier_rows(found: Fit) -> tuple[str, list[tuple[str, ...]]]:
    """(alignment, rows) of the table over groups and micro-batches."""
    rows: list[tuple[str, ...]] = [("groups", "micro-batch", "peak", "images/s")]
    for row in found.frontier:
        speed = f"{row.images_per_second:.3g}" if row.images_per_second is not None else "does not fit"
        groups = " + ".join(map(str, row.groups))
        rows.append((groups, str(row.micro_batch), format_bytes(row.peak_bytes), speed))
    return "<>>>", rows


def planned(found: Fit, card: Card, on: OsName, command: str) -> Profile:
    """The chosen profile of a fit, with where it comes from."""
    c, p = found.chosen, found.prediction
    assert p is not None
    made = {
        "card": card.id,
        "os": on,
        "command": command,
        "versions": f"nvae-lowmem {__version__}, torch {torch.__version__}, python {platform.python_version()}",
        "cap": found.budget.reason,
        "predicted_allocated_bytes": p.allocated_peak_bytes,
        "predicted_reserved_bytes": p.reserved_peak_bytes,
        "margin_bytes": p.margin_bytes,
        "predicted_host_bytes": p.host_bytes,
        "predicted_seconds_per_step": round(c.seconds.total, 3),
    }
    return replace(c.profile, provenance={**c.profile.provenance, **made})
