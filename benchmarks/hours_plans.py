"""What is chosen for a dozen combinations of card, hours and images, each verified by prediction; needs no GPU.

    python benchmarks/hours_plans.py --json benchmarks/results/hours-plans-2026-11-25.json --markdown plans.md

No images are needed: a look at colour photographs is written down, only their number differs. Two combinations are held
out: the rules were not tuned on them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import machine, write_json

from nvae_lowmem.budget import words
from nvae_lowmem.budget.choose import Wanted
from nvae_lowmem.budget.planned import Planned, for_card
from nvae_lowmem.config.sections import DataConfig
from nvae_lowmem.data.look import Look
from nvae_lowmem.hardware.budget import chosen_card
from nvae_lowmem.memory.plan.candidates import Wishes
from nvae_lowmem.memory.plan.duration import range_text
from nvae_lowmem.units import format_bytes


@dataclass(frozen=True)
class Case:
    """One combination."""

    card: str
    hours: float
    size: int
    images: int
    held_out: bool = False


CASES = (
    Case("gtx-970", 4, 32, 5_000),
    Case("gtx-970", 24, 64, 200_000),
    Case("gtx-970", 72, 128, 5_000),
    Case("gtx-970", 72, 256, 200_000),
    Case("gtx-1050-ti", 24, 64, 500),
    Case("gtx-1650", 72, 32, 200_000),
    Case("mx350-2g", 4, 64, 5_000),
    Case("rtx-3050-6g", 24, 128, 200_000),
    Case("8g", 72, 64, 200_000),
    Case("2g", 24, 256, 500),
    Case("gtx-1060-6g", 24, 32, 5_000, held_out=True),
    Case("rtx-3050-laptop", 72, 256, 5_000, held_out=True),
)


def photographs(images: int) -> Look:
    """A look at so many colour photographs of 400 x 300 pixels."""
    return Look(
        description=f"{images:,} photographs", images=images, has_test_part=False, looked_at=200, unreadable=0, grey=0,
        levels=256, least_size=(400, 300), most_size=(400, 300), same_size=True, lost_share=0.25, most_lost_share=0.25,
        middle_share=0.5,
    )  # fmt: skip


def planned(case: Case) -> Planned:
    """The profile that is chosen. Raises NothingFits."""
    chosen = chosen_card(case.card, None, "linux")
    assert chosen is not None
    wanted = Wanted(data=DataConfig(source="photographs"), hours=case.hours, size=case.size)
    look = photographs(case.images)
    return for_card(wanted, *chosen, Wishes(), on="linux", command="benchmarks/hours_plans.py", look=look)


def row(case: Case) -> dict[str, Any]:
    """A combination's answer."""
    began = time.process_time()
    found = planned(case)
    fit, choice, model = found.fit, found.choice, found.profile.model
    assert fit is not None and fit.prediction is not None
    return {
        "card": case.card, "hours": case.hours, "size": case.size, "images": case.images, "held_out": case.held_out,
        "rung": choice.rung.number, "channels": model.channels_encoder, "groups": list(model.scale_groups),
        "parameters": sum(fit.planner.table.parameter_elements(model.scale_groups)),
        "total_batch": choice.profile.training.total_batch, "micro_batch": fit.chosen.micro_batch,
        "precision": fit.chosen.profile.plan.precision, "steps": choice.steps, "images_seen": choice.images_seen,
        "passes": round(choice.passes, 2), "images_per_second": [round(v, 2) for v in choice.time.images_per_second],
        "ends_before_the_hours": choice.limited_by_images, "fits": found.fit is not None and fit.fits,
        "reserved_bytes": fit.reserved_bytes, "cap_bytes": fit.budget.cap_bytes, "given_up": words.gave_up(choice),
        "planning_cpu_seconds": round(time.process_time() - began, 1),
    }  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/hours.md."""
    head = "| card | hours | images | model | batch | images seen (passes) | memory | given up |"
    lines = [head, "|" + " --- |" * 8]
    for r in rows:
        card = f"{r['card']} (held out)" if r["held_out"] else r["card"]
        groups = " + ".join(map(str, r["groups"]))
        model = f"rung {r['rung']}: {r['channels']} channels, {groups}, {r['parameters'] / 1e6:.0f} M"
        accumulation = r["total_batch"] // r["micro_batch"]
        batch = f"{r['micro_batch']}" + (f" x {accumulation}" if accumulation > 1 else "")
        early = ", ends early" if r["ends_before_the_hours"] else ""
        seen = f"{r['images_seen']:,} ({r['passes']:.3g}{early}) at {range_text(*r['images_per_second'])}/s"
        memory = f"{format_bytes(r['reserved_bytes'])} of {format_bytes(r['cap_bytes'])}"
        images = f"{r['images']:,} of {r['size']} px"
        lines.append(
            f"| {card} | {r['hours']:g} | {images} | {model} | {batch} | {seen} | {memory} | {r['given_up'][0]} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table of docs/hours.md")
    parser.add_argument("--only", type=int, nargs="+", default=range(len(CASES)), help="numbers of combinations")
    options = parser.parse_args(arguments)
    rows = []
    for number in options.only:
        rows.append(row(CASES[number]))
        print(json.dumps(rows[-1]), flush=True)
    write_json(options.json, {**machine(1), "plans": rows})
    if options.markdown is not None:
        options.markdown.write_text(markdown(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
