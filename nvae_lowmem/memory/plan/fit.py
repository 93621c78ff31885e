"""The best memory plan for a card: searched in a table of block costs, verified by predicting the very step.

    found = fit(recipe("celeba64"), card, budget, Wishes(), predictor_for(card, budget))
    found.fits, found.chosen.profile, found.reserved_bytes

The table (block_costs) prices every assignment of policies for any number of groups and any batch within a percent of
the bytes that a trace counts. What it leaves out (overhead) is learnt from the predictor. explain says it in words.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.hardware.budget import Budget
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.hardware.precision import choose_precision
from nvae_lowmem.memory.plan.block_costs import BlockTable, record_blocks
from nvae_lowmem.memory.plan.candidates import Candidate, Planner, Wishes
from nvae_lowmem.memory.plan.overhead import OverheadModel
from nvae_lowmem.memory.predict.predict import Prediction

Predictor = Callable[[Profile, int, int], Prediction]
"""(profile with its plan, micro-batch, accumulation) -> Prediction."""
Say = Callable[[str], None]
_GOOD_ENOUGH = 0.03  # share of the cap that may stay unused without another prediction
_MOST_PREDICTIONS = 8


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The answer: the chosen plan and its prediction, or the nearest miss (then `prediction` is None)."""

    chosen: Candidate
    prediction: Prediction | None
    planner: Planner
    """What the plan was chosen from."""
    overhead: OverheadModel
    """What was learnt of predictions beyond the table."""
    why_precision: str

    @property
    def fits(self) -> bool:
        """Whether there is a plan."""
        return self.prediction is not None

    @property
    def budget(self) -> Budget:
        """What of the card the allocator may take."""
        return self.planner.budget

    @property
    def reserved_bytes(self) -> int:
        """What the allocator is to take at most, margin included; for a miss by the table and the overhead."""
        if self.prediction is None:
            return self.needed_bytes(self.chosen)
        return self.prediction.reserved_peak_bytes + self.prediction.margin_bytes

    def needed_bytes(self, candidate: Candidate) -> int:
        """What another plan would take of the card, as far as is known: the table's peak and the overhead."""
        return candidate.peak_bytes + self.overhead.estimate(candidate.size).card_bytes


def fit(
    profile: Profile,
    card: Card,
    budget: Budget,
    wishes: Wishes,
    predictor: Predictor,
    *,
    table: BlockTable | None = None,
    first: Profile | None = None,
    time_limit_seconds: float = 45.0,
    say: Say = lambda line: None,
) -> Fit:
    """The best plan of the profile's model for the card, under the budget's cap.

    table: of the same model and precision, where it is known already. first: an earlier answer, which is kept if it
    still fits and needs no retry. time_limit_seconds: after it a plan that fits is not improved any more. say: told
    what is being done.
    Raises ConfigError for wishes that no plan can fulfil.
    """
    start = time.monotonic()
    profile = profile.with_plan(micro_batch=0).check()
    wishes.check(profile)
    precision, why = choose_precision(profile.plan.precision, card)
    profile = profile.with_plan(precision=precision)
    if table is None:
        say("pricing every block under every policy")
        table = record_blocks(profile)
    planner = Planner(profile=profile, card=card, budget=budget, wishes=wishes, table=table)
    overhead = OverheadModel(budget.cap_bytes)
    found = None
    if first is not None:
        found = _kept(planner, overhead, predictor, first)
    if found is None:
        found = _verified(planner, overhead, predictor, start + time_limit_seconds, say)
    chosen, prediction = found or (planner.smallest_of_all(), None)
    return Fit(
        chosen=chosen,
        prediction=prediction,
        planner=planner,
        overhead=overhead,
        why_precision=f"precision {precision}: {why}",
    )


def _kept(
    planner: Planner, overhead: OverheadModel, predictor: Predictor, first: Profile
) -> tuple[Candidate, Prediction] | None:
    """The earlier plan with today's prediction, where it is still good."""
    candidate = planner.priced(first.plan, first.model.scale_groups)
    prediction = predictor(candidate.profile, candidate.micro_batch, candidate.accumulation)
    if prediction.run_retries or not prediction.fits(planner.budget.cap_bytes):
        return None
    overhead.observe(candidate.size, candidate.taken, prediction)
    return candidate, prediction


def _verified(
    planner: Planner, overhead: OverheadModel, predictor: Predictor, deadline: float, say: Say
) -> tuple[Candidate, Prediction] | None:
    """The best plan that the predictor agrees to, improved while there is time and something to gain."""
    cap, host_limit = planner.budget.cap_bytes, planner.wishes.host_mem_bytes
    accepted: list[tuple[Candidate, Prediction]] = []
    tried: list[Profile] = []
    for attempt in range(_MOST_PREDICTIONS):
        candidate = planner.best(overhead)
        if candidate is None and attempt == 0:
            candidate = planner.smallest_of_all()  # the overhead is only a guess as yet
        if candidate is None or candidate.profile in tried:
            break
        tried.append(candidate.profile)
        began = time.monotonic()
        groups = " + ".join(map(str, candidate.groups))
        say(f"predicting the step: groups {groups}, micro-batch {candidate.micro_batch}")
        prediction = predictor(candidate.profile, candidate.micro_batch, candidate.accumulation)
        ends = 2 * time.monotonic() - began  # when another prediction would be done
        if prediction.fits(cap) and (host_limit is None or prediction.host_bytes <= host_limit):
            candidate = replace(candidate, seconds=candidate.seconds.with_retries(prediction.retries))
            accepted.append((candidate, prediction))
            unused = cap - prediction.reserved_peak_bytes - prediction.margin_bytes
            whole = candidate.groups == planner.group_options(False)[0]
            if whole and not prediction.run_retries and unused < _GOOD_ENOUGH * cap:
                break
        if accepted and ends > deadline:
            break
        overhead.observe(candidate.size, candidate.taken, prediction)
    if not accepted:
        return None
    best = planner.best_of([candidate for candidate, _ in accepted])
    return next(pair for pair in accepted if pair[0] is best)
