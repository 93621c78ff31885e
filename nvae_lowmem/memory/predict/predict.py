"""What training will take of a card: the traced step and what a trace cannot see, through the simulated allocator.

    prediction = predict(recipe("celeba64"), micro_batch=16, card=find_card("gtx-970"))
    prediction.reserved_peak_bytes + prediction.margin_bytes

What is replayed is a whole run in small (see whole_run.py).
"""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

from nvae_lowmem.config.sections import MemoryPlan, Precision, Profile, TrainConfig
from nvae_lowmem.errors import ConfigError, raise_problems
from nvae_lowmem.hardware.budget import Budget
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.hardware.precision import choose_precision
from nvae_lowmem.memory.allocator.allocator import AllocatorSettings, Replay
from nvae_lowmem.memory.allocator.settings import round_to_block
from nvae_lowmem.memory.predict.untraced import (
    Entry,
    MeasuredEntry,
    Place,
    Span,
    entries,
    flattened_weights,
    overlaid,
    pinned_bytes,
    runs_deepspeed,
    untraced_host_bytes,
    without_weights,
)
from nvae_lowmem.memory.predict.whole_run import last_step, last_step_retries, whole_run
from nvae_lowmem.memory.trace.batch_scaling import NotAffine, affine
from nvae_lowmem.memory.trace.events import ON_CARD, Category, Peak, Phase, Trace
from nvae_lowmem.memory.trace.inference import trace_generation
from nvae_lowmem.memory.trace.training import trace_training
from nvae_lowmem.units import format_bytes

__all__ = ["Prediction", "as_text", "predict", "resolve_plan"]

_TIMELINE_POINTS = 400
_TRACES_KEPT = 6  # some ten MiB each


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Peaks of training in bytes, and what owns them."""

    micro_batch: int
    accumulation: int
    precision: Precision
    allocated_peak_bytes: int
    """Most bytes in blocks of the caching allocator at once: torch.cuda.max_memory_allocated()."""
    reserved_peak_bytes: int
    """Most bytes the allocator takes from the card: torch.cuda.max_memory_reserved(). Where `oom`: without the cap."""
    peak: Peak
    """The moment of the largest use: block, phase, operation, and the split by category and block."""
    timeline: tuple[tuple[int, dict[Category, int]], ...]
    """The last step, thinned out so that every peak stays: (event, bytes by category), in order."""
    host_bytes: int
    """Host memory for weights, gradients, states, averages and parked activations, the page-locked part included."""
    pinned_bytes: int
    """The page-locked part."""
    context_bytes: int
    """On the card, outside the allocator: CUDA context and other programs."""
    init_peak_bytes: int
    """Most bytes in the allocator while the engine is built, before the first step."""
    margin_bytes: int
    """Upper bound of unmeasured memory, added to either peak; it does not depend on what the budget leaves free."""
    retries: int
    """How often the allocator gives back its cache in a later step before it gets memory, which is slow."""
    run_retries: int
    """How often in the whole replay: in the first steps and between steps, too."""
    overlay: tuple[Entry, ...]
    """What no trace sees, each with its source."""
    oom: str | None
    """Why the allocator runs out under the budget's cap, less the margin or with every bound allocated, if it does."""

    def fits(self, cap_bytes: int) -> bool:
        """Whether training runs when the allocator may take `cap_bytes`, with the margin."""
        most = max(self.reserved_peak_bytes + self.margin_bytes, self.init_peak_bytes)
        return self.oom is None and most <= cap_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain tables, numbers and texts."""
        table: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return table


def predict(
    profile: Profile,
    micro_batch: int,
    accumulation: int = 1,
    card: Card | None = None,
    budget: Budget | None = None,
    settings: str = "",
    *,
    calibration: Mapping[str, MeasuredEntry] | None = None,
) -> Prediction:
    """Predict training of the profile's model under its plan, in one process.

    budget: with it, steps run under its cap, where the allocator first gives back what it caches. settings: of
    PyTorch's allocator (PYTORCH_CUDA_ALLOC_CONF) instead of the plan's. calibration: measured entries of the
    overlay, by name. Raises ConfigError for a profile that cannot train, sizes below 1, and settings
    that PyTorch would refuse.
    """
    problems = [*profile.model.problems(), *profile.plan.problems()]
    sizes = {"micro-batch": micro_batch, "accumulation": accumulation}
    problems += [f"{name} {value} must be at least 1" for name, value in sizes.items() if value < 1]
    raise_problems(problems, "prediction")
    parsed = AllocatorSettings.from_string(settings or profile.plan.allocator_settings)
    profile = resolve_plan(profile, card, budget)

    # The step as traced, and what no trace sees.
    trace = _traced(profile, micro_batch, accumulation)
    context = budget.context_bytes if budget is not None else None
    overlay = tuple(entries(profile, trace, accumulation, card, context, calibration))
    plan = profile.plan
    if runs_deepspeed(plan) and plan.offload_parameters:
        trace = without_weights(trace, 4 * (plan.bucket_elements // 500))  # smaller ones stay: see deepspeed_config
    elif runs_deepspeed(plan) and plan.zero_stage in (1, 2):
        trace = flattened_weights(trace)

    # The whole run through the allocator, without and with what is only bounded.
    held = [entry for entry in overlay if entry.is_replayed]
    between = _traced_between(profile, micro_batch)
    known = overlaid(trace, [entry for entry in held if not entry.is_bound])
    run, worst = (whole_run(trace, between, [e for e in held if sure or not e.is_bound]) for sure in (False, True))
    replays = run.replays(parsed)
    known_most, most = _most(replays), _most(worst.replays(parsed))
    margin = max(m - k for m, k in zip(most, known_most, strict=True))

    # Close to the cap: whether the allocator gets through under it.
    oom = None
    if budget is not None and known_most.reserved_bytes + margin > budget.cap_bytes:
        capped = run.replays(parsed, budget, margin)
        oom = run.why(capped, margin)
        if oom is None:  # free memory may be fragmented, so replay once more with all bounds allocated
            oom = worst.why(worst.replays(parsed, budget))
            oom = oom and f"with the unknown at its most: {oom}"
        if oom is None:
            replays, known_most = capped, _most(capped)

    # Beside the allocator.
    locked = sum(entry.nbytes for entry in overlay if entry.place is Place.PINNED) + _parked_bytes(trace)
    return Prediction(
        micro_batch=micro_batch,
        accumulation=accumulation,
        precision=plan.precision,
        allocated_peak_bytes=known_most.allocated_bytes,
        reserved_peak_bytes=known_most.reserved_bytes,
        peak=known.peak(),
        timeline=tuple(_timeline(known, last_step(known), _TIMELINE_POINTS)),
        host_bytes=trace.host_bytes() + untraced_host_bytes(overlay),
        pinned_bytes=locked,
        context_bytes=sum(entry.nbytes for entry in overlay if entry.place is Place.CARD),
        init_peak_bytes=_at_setup(trace) + sum(entry.nbytes for entry in overlay if entry.span is Span.SETUP),
        margin_bytes=margin,
        retries=max(last_step_retries(replay) for replay in replays),
        run_retries=max(replay.checkpoints[-1].retries for replay in replays),
        overlay=overlay,
        oom=oom,
    )


def resolve_plan(profile: Profile, card: Card | None, budget: Budget | None = None) -> Profile:
    """The profile with its precision decided for the card (fp16 where none is named) and the budget's cap."""
    plan = replace(profile.plan, precision=choose_precision(profile.plan.precision, card)[0])
    if budget is not None:
        plan = replace(plan, cap_bytes=budget.cap_bytes)
    if plan.offload_optimizer and plan.zero_stage == 0 and runs_deepspeed(plan):
        raise ConfigError("plan.offload_optimizer = true needs plan.zero_stage = 1, 2 or 3, not 0")
    return replace(profile, plan=plan)


# --- traces -----------------------------------------------------------------------------------------------------------

_traces: OrderedDict[tuple[str, int], Trace] = OrderedDict()


def _traced(profile: Profile, micro_batch: int, accumulation: int) -> Trace:
    """A trace of the first step and, where it differs, the second; from two known traces where that is exact.

    From the second micro-batch of a step on all are alike (but for five numbers for the log); so are all steps where
    the host has the states.
    """
    accumulation, steps = min(accumulation, 2), 1 if profile.plan.offload_optimizer else 2
    plan, training = replace(profile.plan, micro_batch=0, cap_bytes=0), replace(profile.training, total_batch=0)
    key = repr((profile.model, plan, training, accumulation))
    if (key, micro_batch) in _traces:
        _traces.move_to_end((key, micro_batch))
        return _traces[key, micro_batch]
    known = [trace for (k, _), trace in _traces.items() if k == key]
    for first, second in combinations(known, 2):
        try:
            return affine(first, second)(micro_batch)
        except NotAffine:
            continue
    trace = _traces[key, micro_batch] = trace_training(profile, micro_batch, accumulation, steps)
    while len(_traces) > _TRACES_KEPT:
        _traces.popitem(last=False)
    return trace


_between: OrderedDict[tuple[str, int], Trace] = OrderedDict()


def _traced_between(profile: Profile, micro_batch: int) -> Trace:
    """A trace of what is done between two steps, which does not depend on what blocks keep."""
    plan = MemoryPlan(precision=profile.plan.precision, likelihood_chunk_bytes=profile.plan.likelihood_chunk_bytes)
    training = TrainConfig(ema_decay=profile.training.ema_decay, ema_on_host=profile.training.ema_on_host)
    profile = replace(profile, plan=plan, training=training)
    key = (repr((profile.model, plan, training)), micro_batch)
    if key not in _between:
        _between[key] = trace_generation(profile, "between steps", micro_batch)
    _between.move_to_end(key)
    while len(_between) > _TRACES_KEPT:
        _between.popitem(last=False)
    return _between[key]


# --- margins ----------------------------------------------------------------------------------------------------------


class _Most(NamedTuple):
    """The largest peaks of several replays, in bytes."""

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int


def _most(replays: Iterable[Replay]) -> _Most:
    """The largest peaks of replays of one run.

    Two of such differ by an upper bound of what is unmeasured, where one has none of it and the other all. Fragments
    may well make a peak lower when more is asked for; the peak of the bytes asked for itself never falls.
    """
    ends = [replay.checkpoints[-1] for replay in replays]
    return _Most(
        max(end.peak_requested_bytes for end in ends),
        max(end.peak_allocated_bytes for end in ends),
        max(end.peak_reserved_bytes for end in ends),
    )


# --- what people ask --------------------------------------------------------------------------------------------------


def _timeline(trace: Trace, start: int, points: int) -> Iterator[tuple[int, dict[Category, int]]]:
    """(event, bytes by category) at the highest moment of each of `points` equal stretches from event `start` on."""
    stretch = max(1, (len(trace.events) - start) // points)
    live: dict[Category, int] = dict.fromkeys(ON_CARD, 0)
    total, best, at, moment = 0, -1, 0, dict(live)
    for i, (a, is_alloc) in enumerate(trace.walk()):
        if a.on_card:
            change = round_to_block(a.nbytes) * (1 if is_alloc else -1)
            live[a.category] += change
            total += change
        if i >= start and total > best:
            best, at, moment = total, i, dict(live)
        if i >= start and ((i - start) % stretch == stretch - 1 or i == len(trace.events) - 1):
            yield at, moment
            best, at, moment = -1, i + 1, dict(live)


def _at_setup(trace: Trace) -> int:
    """Most bytes in the allocator while the engine is built; buffers of libraries come with the first step."""
    end = trace.marks["setup done"]
    return max((live for i, live in trace.live_bytes() if i < end), default=0)


def _parked_bytes(trace: Trace) -> int:
    """Most page-locked bytes of parked block inputs at once."""
    live = most = 0
    for a, is_alloc in trace.walk():
        if not a.on_card and a.phase is Phase.FORWARD:
            live += pinned_bytes(a.nbytes) * (1 if is_alloc else -1)
            most = max(most, live)
    return most


def as_text(prediction: Prediction, cap_bytes: int = 0) -> str:
    """The prediction for people: what it comes to, what owns the peak, and what no trace sees. cap_bytes 0: no cap."""
    p, gib = prediction, format_bytes
    rows = [
        ("micro-batch", f"{p.micro_batch} x accumulation {p.accumulation}, {p.precision}"),
        ("allocated peak", gib(p.allocated_peak_bytes)),
        ("reserved peak", f"{gib(p.reserved_peak_bytes)}, and up to {gib(p.margin_bytes)} more (margin)"),
        ("outside the allocator", gib(p.context_bytes)),
        ("while the engine is built", gib(p.init_peak_bytes)),
        ("host memory", f"{gib(p.host_bytes)}, of it page-locked {gib(p.pinned_bytes)}"),
    ]
    if p.run_retries:
        often = f"{p.run_retries} times in the first steps, {p.retries} times in each later one"
        rows.append(("cache given back", f"{often}, which is slow: use a smaller micro-batch"))
    if cap_bytes:
        rows.append((f"fits {gib(cap_bytes)}", "yes" if p.fits(cap_bytes) else f"NO: {p.oom or 'more than the cap'}"))
    blocks = sorted(p.peak.by_block.items(), key=lambda item: -item[1])[:5]
    tables: dict[str, Sequence[tuple[str, str]]] = {
        "": rows,
        f"The peak comes in {p.peak.phase} of {p.peak.block}, {p.peak.operation}; then there are": [
            (name, gib(nbytes)) for name, nbytes in p.peak.by_category.items() if nbytes
        ],
        "Made by the blocks": [(name or "set-up", gib(nbytes)) for name, nbytes in blocks],
        "Not in the trace": [
            (e.name, f"{'up to ' if e.is_bound else ''}{gib(e.nbytes)} ({e.held}): {e.source}") for e in p.overlay
        ],
    }
    lines = []
    for title, table in tables.items():
        lines += ["", title] if title else []
        lines += [f"  {name:<26}{text}" for name, text in table]
    return "\n".join(lines)


def predictor_for(
    card: Card, budget: Budget, calibration: Mapping[str, MeasuredEntry] | None = None
) -> Callable[[Profile, int, int], Prediction]:
    """`predict` for one card, what is left of it, and what was measured on it."""
    return functools.partial(predict, card=card, budget=budget, calibration=calibration)
