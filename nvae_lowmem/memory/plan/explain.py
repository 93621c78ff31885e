"""A fit in words, as a table for programs, and as the profile to train with."""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import torch

from nvae_lowmem import __version__
from nvae_lowmem.config.profile_file import CHANGED
from nvae_lowmem.config.sections import KEEPS, Profile
from nvae_lowmem.hardware.card import OsName
from nvae_lowmem.memory.plan.candidates import Candidate
from nvae_lowmem.memory.plan.duration import described, published_images, range_text
from nvae_lowmem.memory.plan.fit import Fit
from nvae_lowmem.memory.plan.frontier import frontier
from nvae_lowmem.memory.plan.overhead import Groups, Size
from nvae_lowmem.memory.predict.predict import Prediction
from nvae_lowmem.text_table import text_table
from nvae_lowmem.training.batch_split import BatchSplit
from nvae_lowmem.units import MIB, format_bytes, format_seconds

# ---- why -------------------------------------------------------------------------------------------------------------


def reasons(found: Fit) -> list[str]:
    """Why the plan is what it is, the budget and the precision first."""
    out = [found.budget.reason, found.why_precision]
    return out if found.prediction is None else [*out, *_choices(found, found.prediction)]


def _choices(found: Fit, prediction: Prediction) -> list[str]:
    """One line per decision of the planner."""
    planner, chosen = found.planner, found.chosen
    plan, cap = chosen.profile.plan, found.budget.cap_bytes
    own = planner.profile.model.scale_groups
    out = [str(BatchSplit(chosen.profile.training.total_batch, chosen.micro_batch, chosen.accumulation, 1))]
    if chosen.groups == own:
        out.append(f"groups {_join(own)}: the model as it is")
    else:
        asked = ", of those asked for" if planner.wishes.groups is not None else ""
        out.append(f"groups {_join(chosen.groups)} instead of {_join(own)}: the most that fit{asked}")
    if freeze := chosen.profile.training.freeze:
        out.append(f"frozen {', '.join(freeze)}: neither gradients nor Adamax states, and counted so")
    if plan.offload_optimizer:
        saved = format_bytes(12.0 * sum(planner.table.parameter_elements(chosen.groups)))
        out.append(f"engine {plan.engine}: gradients and Adamax states on the host take {saved} off the card")
    else:
        out.append(f"engine {plan.engine}: gradients and Adamax states fit on the card, nothing crosses the bus")
    counts = Counter(chosen.assignment.keeps)
    shares = ", ".join(f"{counts[keep]} {keep}" for keep in KEEPS if counts[keep])
    fastest = planner.uniform(chosen, "all").seconds.with_retries(prediction.retries)
    extra = chosen.seconds.total / fastest.total - 1
    out.append(f"blocks keep: {shares}; recomputation makes a step {extra:.0%} longer than keeping everything")
    out.append(
        f"peak {format_bytes(prediction.reserved_peak_bytes)} reserved + {format_bytes(prediction.margin_bytes)} margin"
        f" = {format_bytes(found.reserved_bytes)}, {format_bytes(cap - found.reserved_bytes)} below the cap"
    )
    if prediction.run_retries:
        out.append(
            f"the allocator is expected to give back its cache {prediction.run_retries} times in the first steps and "
            f"{prediction.retries} times in each later one, counted as {chosen.seconds.retries:.1f} s: no plan without "
            "that was as good"
        )
    out.append(f"host memory {format_bytes(prediction.host_bytes)}")
    return out


def refusals(found: Fit) -> list[str]:
    """What does not fit, and why; where nothing fits, also what would make it fit."""
    planner, cap = found.planner, found.budget.cap_bytes
    chosen = found.chosen if found.fits else None
    out = []
    own = planner.group_options(False)[0]
    if chosen is None or chosen.groups != own:
        least = planner.smallest_peak(Size(own, planner.micro_batches()[-1]))
        out.append(
            f"groups {_join(own)}: at micro-batch {least.micro_batch} the smallest plan takes "
            f"{format_bytes(found.needed_bytes(least))} on the card and {format_bytes(least.host_bytes)} on the host"
        )
    if chosen is None:
        return [*out, *_ways_out(found)]
    for keep in KEEPS:
        alike = planner.uniform(chosen, keep)
        if found.needed_bytes(alike) > cap:
            out.append(f"every block on {keep}: {format_bytes(found.needed_bytes(alike))}")
    return out + _larger_micro_batches(found, chosen)


def _larger_micro_batches(found: Fit, chosen: Candidate) -> list[str]:
    planner, out = found.planner, []
    sizes = [Size(chosen.groups, m) for m in planner.micro_batches() if m > chosen.micro_batch]
    too_large = [size for size in sizes if not planner.candidates(size, found.overhead)]
    if too_large:
        least = planner.smallest_peak(too_large[-1])
        out.append(f"micro-batch {least.micro_batch}: at least {format_bytes(found.needed_bytes(least))}")
    fitting = [c for size in sizes for c in planner.candidates(size, found.overhead)]
    slower = [c for c in fitting if c.images_per_second < chosen.images_per_second]
    if slower:
        best = max(c.images_per_second for c in slower)
        out.append(
            f"micro-batch {slower[-1].micro_batch} and up would fit, but recompute so much that a step takes longer: "
            f"by the same estimate {best:.3g} images/s, not {chosen.images_per_second:.3g}"
        )
    return out


def _ways_out(found: Fit) -> list[str]:
    """What would make it fit, from the plan with the smallest peak."""
    planner, nearest = found.planner, found.chosen
    cap, needed, wishes = found.budget.cap_bytes, found.reserved_bytes, planner.wishes
    host = nearest.host_bytes + found.overhead.estimate(nearest.size).host_bytes
    out = [
        f"nearest miss: groups {_join(nearest.groups)} at micro-batch {nearest.micro_batch} takes "
        f"{format_bytes(needed)} of {format_bytes(cap)} on the card, {format_bytes(nearest.host_bytes)} on the host"
    ]
    if needed > cap:
        out.append(f"needed: a card that leaves {format_bytes(needed)} to the allocator")
    if wishes.host_mem_bytes is not None and host > wishes.host_mem_bytes:
        out.append(f"needed: --host-mem {_round_up(host)}")
    if wishes.min_micro_batch > 1:
        out.append("or: a smaller --min-micro-batch")
    if wishes.groups is not None and wishes.groups[0] > 1:
        out.append(f"or: fewer groups, --groups 1..{wishes.groups[0] - 1}")
    return out


def _round_up(nbytes: int) -> str:
    return f"{-(-nbytes // (100 * MIB)) * 100}M"


def _join(groups: Groups) -> str:
    return " + ".join(map(str, groups))


FRONTIER_TITLE = "Peak and speed of other sizes, estimated"


# ---- the answer ------------------------------------------------------------------------------------------------------


def as_text(found: Fit) -> str:
    """The answer for people."""
    c, profile = found.chosen, found.planner.profile
    lines = [f"{profile.name} {'fits' if found.fits else 'does not fit'}", *(f"  {line}" for line in reasons(found))]
    if found.fits:
        s = c.seconds
        parts = f"card {s.card:.2f} s, bus {s.link:.2f} s, optimiser {s.optimizer:.2f} s"
        parts += f", cache given back {s.retries:.2f} s" if s.retries else ""
        lines += [f"  {described(c.time, c.profile)}", f"  at best {format_seconds(s.total)} per step ({parts})"]
    refused = refusals(found)
    if refused:
        lines += ["", "What does not fit" if found.fits else "Why not", *(f"  {line}" for line in refused)]
    return "\n".join([*lines, "", FRONTIER_TITLE, *(f"  {line}" for line in text_table(*frontier_table(found)))])


def frontier_table(found: Fit) -> tuple[str, list[tuple[str, ...]]]:
    """(alignment, rows) of the table over groups and micro-batches; the answer's row is marked."""
    rows: list[tuple[str, ...]] = [("groups", "micro-batch", "peak", "images/s", "")]
    for row in frontier(found):
        speed = range_text(*row.images_per_second) if row.images_per_second else "does not fit"
        mark = ("<- this plan" if found.fits else "<- the nearest") if row.is_answer else ""
        rows.append((_join(row.groups), str(row.micro_batch), format_bytes(row.peak_bytes), speed, mark))
    return "<>>><", rows


def as_json(found: Fit) -> dict[str, Any]:
    """The answer for programs; sizes in bytes, for a miss those of the nearest one."""
    c, plan = found.chosen, found.chosen.profile.plan
    p, card, profile = found.prediction, found.planner.card, found.planner.profile
    images = published_images(profile)
    schedule_is_known = bool(images or c.profile.training.steps)
    return {
        "recipe": profile.name,
        "fits": found.fits,
        "card": {"id": card.id, "name": card.name, "total_bytes": found.budget.total_bytes},
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
        "allocator_retries": p.retries if p else None,
        "host_bytes": p.host_bytes if p else c.host_bytes,
        "seconds_per_step": [c.time.least_seconds, c.time.most_seconds],
        "images_per_second": list(c.time.images_per_second),
        "training_seconds": list(c.time.training_seconds(c.profile, images)) if schedule_is_known else None,
        "speed_measured_on": c.time.measured_on or None,
        "reasons": [*reasons(found), *refusals(found)],
        "frontier": [asdict(row) for row in frontier(found)],
        "plan": asdict(plan),
    }


def planned(found: Fit, on: OsName, command: str) -> Profile:
    """The chosen profile of a fit, with where it comes from."""
    c, p, card = found.chosen, found.prediction, found.planner.card
    assert p is not None
    made = {
        "card": card.id,
        "os": on,
        "command": command,
        "versions": f"nvae-lowmem {__version__}, torch {torch.__version__}, python {platform.python_version()}",
        "cap": found.budget.reason,
        **predicted(p),
        "predicted_seconds_per_step": round(c.seconds.total, 3),
        "speed": described(c.time, c.profile),
    }
    before = {key: value for key, value in c.profile.provenance.items() if key != CHANGED}
    return replace(c.profile, provenance={**before, **made})


def predicted(prediction: Prediction) -> dict[str, int]:
    """What a profile's provenance says of its prediction."""
    return {
        "predicted_allocated_bytes": prediction.allocated_peak_bytes,
        "predicted_reserved_bytes": prediction.reserved_peak_bytes,
        "margin_bytes": prediction.margin_bytes,
        "predicted_host_bytes": prediction.host_bytes,
        "predicted_retries": prediction.retries,
        "predicted_run_retries": prediction.run_retries,
    }
