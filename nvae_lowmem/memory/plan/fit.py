"""The best memory plan for a card: searched in a table of block costs, verified by predicting the very step.

The table (fit_blocks) prices every assignment of policies for any number of groups and any batch within a percent of
the bytes that a trace counts. What it leaves out (fragmentation, workspaces, margins) is learnt from the predictor:
what that says of one plan beyond the table's figure is set aside in the next search.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from nvae_lowmem.config.sections import KEEPS, Profile
from nvae_lowmem.hardware.budget import Budget
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.hardware.precision import choose_precision
from nvae_lowmem.memory.plan.block_costs import BlockTable, record_blocks
from nvae_lowmem.memory.plan.candidates import Candidate, FrontierRow, Groups, Planner, Wishes
from nvae_lowmem.memory.predict.predict import Prediction
from nvae_lowmem.training.batch_split import BatchSplit
from nvae_lowmem.units import MIB, format_bytes

Predictor = Callable[[Profile, int, int], Prediction]
"""(profile with its plan, micro-batch, accumulation) -> Prediction."""
Say = Callable[[str], None]
_GOOD_ENOUGH = 0.03  # share of the cap that may stay unused without another prediction
_MOST_PREDICTIONS = 8
_STEP_SHARE = 0.01  # of the cap: the least that a failed prediction adds to what is set aside


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The answer: the chosen plan and its prediction, or the nearest miss (then `prediction` is None)."""

    chosen: Candidate
    prediction: Prediction | None
    budget: Budget
    reserved_bytes: int
    """What the allocator is to take at most, margin included; for a miss by the table."""
    reasons: tuple[str, ...]
    refused: tuple[str, ...]
    """What did not fit, and why; where nothing fits, also what would make it fit."""
    frontier: tuple[FrontierRow, ...]

    @property
    def fits(self) -> bool:
        """Whether there is a plan."""
        return self.prediction is not None


def fit(
    profile: Profile,
    card: Card,
    budget: Budget,
    wishes: Wishes,
    predictor: Predictor,
    *,
    table: BlockTable | None = None,
    time_limit_seconds: float = 45.0,
    say: Say = lambda line: None,
) -> Fit:
    """The best plan of the profile's model for the card, under the budget's cap.

    table: of the same model and precision, where it is known already. time_limit_seconds: after it a plan that fits is
    not improved any more. say: told what is being done.
    Raises ConfigError for wishes that no plan can fulfil.
    """
    start = time.monotonic()
    profile = profile.with_plan(micro_batch=0).check()
    wishes.check(profile)
    precision, why = choose_precision(profile.plan.precision, card)
    profile, why_precision = profile.with_plan(precision=precision), f"precision {precision}: {why}"
    if table is None:
        say("pricing every block under every policy")
        table = record_blocks(profile)
    planner = Planner(profile=profile, card=card, budget=budget, wishes=wishes, table=table)
    found = _verified(planner, predictor, start + time_limit_seconds, say)
    refused = _refused(planner, found[0] if found else None)
    frontier = planner.frontier()
    if found is None:
        nearest = _nearest_miss(planner)
        return Fit(
            chosen=nearest,
            prediction=None,
            budget=budget,
            reserved_bytes=planner.needed_bytes(nearest),
            reasons=(budget.reason, why_precision),
            refused=(*refused, *_ways_out(planner, nearest)),
            frontier=frontier,
        )
    chosen, prediction = found
    reserved = prediction.reserved_peak_bytes + prediction.margin_bytes
    reasons = (budget.reason, why_precision, *_reasons(planner, chosen, prediction))
    return Fit(
        chosen=chosen,
        prediction=prediction,
        budget=budget,
        reserved_bytes=reserved,
        reasons=reasons,
        refused=refused,
        frontier=frontier,
    )


def _verified(planner: Planner, predictor: Predictor, deadline: float, say: Say) -> tuple[Candidate, Prediction] | None:
    """The best plan that the predictor agrees to, improved while there is time and something to gain."""
    cap, host_limit = planner.budget.cap_bytes, planner.wishes.host_mem_bytes
    accepted: list[tuple[Candidate, Prediction]] = []
    tried: list[Profile] = []
    brackets: dict[tuple[Groups, int], _Bracket] = {}
    for attempt in range(_MOST_PREDICTIONS):
        candidate = planner.best()
        if candidate is None and attempt == 0:
            candidate = _nearest_miss(planner)  # what is set aside is only a guess as yet
        if candidate is None or candidate.profile in tried:
            break
        tried.append(candidate.profile)
        began = time.monotonic()
        say(f"predicting the step: groups {_join(candidate.groups)}, micro-batch {candidate.micro_batch}")
        prediction = predictor(candidate.profile, candidate.micro_batch, candidate.accumulation)
        ends = 2 * time.monotonic() - began  # when another prediction would be done
        needed = prediction.reserved_peak_bytes + prediction.margin_bytes
        fits_card = prediction.fits(cap)
        if fits_card and (host_limit is None or prediction.host_bytes <= host_limit):
            accepted.append((candidate, prediction))
            if candidate.groups == planner.group_options(False)[0] and cap - needed < _GOOD_ENOUGH * cap:
                break
        if accepted and ends > deadline:
            break
        bracket = brackets.setdefault((candidate.groups, candidate.micro_batch), _Bracket())
        # where memory ran out the need is not known: ask for more and more, so that it comes to an end
        least = 0 if fits_card else planner.aside_of(candidate) + (int(_STEP_SHARE * cap) << attempt)
        wanted = max(least, needed - candidate.peak_bytes, 0)
        aside = bracket.narrowed(planner.aside_of(candidate), fits_card, wanted)
        planner.set_aside(candidate, aside, max(0, prediction.host_bytes - candidate.host_bytes))
    if not accepted:
        return None
    best = planner.best_of([candidate for candidate, _ in accepted])
    return next(pair for pair in accepted if pair[0] is best)


@dataclass
class _Bracket:
    """What was set aside for plans of one size when one of them did not fit, and when one did."""

    too_little: int | None = None
    enough: int | None = None

    def narrowed(self, aside: int, fits: bool, wanted: int) -> int:
        """What to set aside next: `wanted`, but halfway between the two bounds where it lies outside of them."""
        if fits:
            self.enough = aside
        else:
            self.too_little = aside
        if self.too_little is None or self.enough is None or self.too_little < wanted < self.enough:
            return wanted
        return (self.too_little + self.enough) // 2


def _nearest_miss(planner: Planner) -> Candidate:
    """The leanest plan of the fewest groups allowed, at the smallest micro-batch."""
    options = planner.group_options(True) or planner.group_options(False)
    return planner.leanest(options[-1], planner.micro_batches()[-1])


# ---- in words --------------------------------------------------------------------------------------------------------


def _reasons(planner: Planner, chosen: Candidate, prediction: Prediction) -> list[str]:
    plan, cap = chosen.profile.plan, planner.budget.cap_bytes
    own = planner.profile.model.scale_groups
    out = [str(BatchSplit(chosen.profile.training.total_batch, chosen.micro_batch, chosen.accumulation, 1))]
    if chosen.groups == own:
        out.append(f"groups {_join(own)}: the model as it is")
    else:
        asked = ", of those asked for" if planner.wishes.groups is not None else ""
        out.append(f"groups {_join(chosen.groups)} instead of {_join(own)}: the most that fit{asked}")
    parameters = planner.table.count(planner.table.parameters, chosen.groups)
    if plan.offload_optimizer:
        saved = format_bytes(12.0 * parameters)
        out.append(f"engine {plan.engine}: gradients and Adamax states on the host take {saved} off the card")
    else:
        out.append(f"engine {plan.engine}: gradients and Adamax states fit on the card, nothing crosses the bus")
    counts = Counter(chosen.assignment.keeps)
    shares = ", ".join(f"{counts[keep]} {keep}" for keep in KEEPS if counts[keep])
    fastest = planner.uniform(chosen, "all")
    extra = chosen.seconds.total / fastest.seconds.total - 1
    out.append(f"blocks keep: {shares}; recomputation makes a step {extra:.0%} longer than keeping everything")
    needed = prediction.reserved_peak_bytes + prediction.margin_bytes
    out.append(
        f"peak {format_bytes(prediction.reserved_peak_bytes)} reserved + {format_bytes(prediction.margin_bytes)} margin"
        f" = {format_bytes(needed)}, {format_bytes(cap - needed)} below the cap"
    )
    if prediction.retries:
        out.append(f"the allocator gives back its cache {prediction.retries} times per step, which takes time")
    return out


def _refused(planner: Planner, chosen: Candidate | None) -> tuple[str, ...]:
    """Simpler or larger plans than the chosen one that the cap forbids."""
    cap = planner.budget.cap_bytes
    out = []
    own = planner.group_options(False)[0]
    if chosen is None or chosen.groups != own:
        lean = planner.leanest(own, planner.micro_batches()[-1])
        out.append(
            f"groups {_join(own)}: at micro-batch {lean.micro_batch} the leanest plan takes "
            f"{format_bytes(planner.needed_bytes(lean))} on the card and {format_bytes(lean.host_bytes)} on the host"
        )
    if chosen is None:
        return tuple(out)
    for keep in KEEPS:
        alike = planner.uniform(chosen, keep)
        if planner.needed_bytes(alike) > cap:
            out.append(f"every block on {keep}: {format_bytes(planner.needed_bytes(alike))}")
    larger = [m for m in planner.micro_batches() if m > chosen.micro_batch]
    too_large = [m for m in larger if not planner.candidates(chosen.groups, m)]
    if too_large:
        lean = planner.leanest(chosen.groups, too_large[-1])
        out.append(f"micro-batch {too_large[-1]}: at least {format_bytes(planner.needed_bytes(lean))}")
    fitting = [c for m in larger for c in planner.candidates(chosen.groups, m)]
    slower = [c for c in fitting if c.images_per_second < chosen.images_per_second]
    if slower:
        best = max(c.images_per_second for c in slower)
        out.append(
            f"micro-batch {slower[-1].micro_batch} and up would fit, but recompute so much that a step takes longer: "
            f"{best:.3g} images/s, not {chosen.images_per_second:.3g}"
        )
    return tuple(out)


def _ways_out(planner: Planner, nearest: Candidate) -> list[str]:
    """What would make it fit, from the leanest plan there is."""
    cap, needed = planner.budget.cap_bytes, planner.needed_bytes(nearest)
    out = [
        f"nearest miss: groups {_join(nearest.groups)} at micro-batch {nearest.micro_batch} takes "
        f"{format_bytes(needed)} of {format_bytes(cap)} on the card, {format_bytes(nearest.host_bytes)} on the host"
    ]
    if needed > cap:
        out.append(f"needed: a card that leaves {format_bytes(needed)} to the allocator")
    limit = planner.wishes.host_mem_bytes
    if limit is not None and nearest.host_bytes + planner.host_aside_bytes > limit:
        out.append(f"needed: --host-mem {_round_up(nearest.host_bytes + planner.host_aside_bytes)}")
    if planner.wishes.min_micro_batch > 1:
        out.append("or: a smaller --min-micro-batch")
    if planner.wishes.groups is not None and planner.wishes.groups[0] > 1:
        out.append(f"or: fewer groups, --groups 1..{planner.wishes.groups[0] - 1}")
    return out


def _round_up(nbytes: int) -> str:
    return f"{-(-nbytes // (100 * MIB)) * 100}M"


def _join(groups: Groups) -> str:
    return " + ".join(map(str, groups))
