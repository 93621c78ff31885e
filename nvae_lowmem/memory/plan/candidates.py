"""What a person may wish of a plan, and the plans of one model for one card, ranked by those wishes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from nvae_lowmem.config.choices import Prefer
from nvae_lowmem.config.recipes import with_groups
from nvae_lowmem.config.sections import EngineName, Keep, MemoryPlan, Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.budget import Budget
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.memory.plan.block_costs import BlockTable
from nvae_lowmem.memory.plan.duration import StepTime, estimated
from nvae_lowmem.memory.plan.overhead import Groups, OverheadModel, Size, Taken
from nvae_lowmem.memory.plan.roofline import StepSeconds, rates_of, step_seconds
from nvae_lowmem.memory.plan.search import Assignment, BlockChoices, fastest, least_peak
from nvae_lowmem.memory.predict.untraced import Place, Span, engine_entries, engine_host_bytes

PLAIN_VAE: Groups = (1,)
"""No towers, so other blocks than those of the table."""
ALIKE = 1.05
"""Plans whose seconds differ by less are taken as equally fast."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a person wants of the plan."""

    prefer: Prefer = "speed"
    """speed: most images per second, and within 5 % of that the largest micro-batch; batch: the largest micro-batch;
    groups: most groups, then the largest micro-batch."""
    min_micro_batch: int = 1
    groups: tuple[int, int] | None = None
    """Fewest and most groups of the highest resolution; None: the profile's own, and fewer only if those do not fit."""
    host_mem_bytes: int | None = None
    engine: EngineName = "auto"

    def check(self, profile: Profile) -> None:
        """Raises ConfigError for a wish that no plan can fulfil."""
        total = profile.training.total_batch
        if not 1 <= self.min_micro_batch <= total:
            raise ConfigError(
                f"--min-micro-batch {self.min_micro_batch} must lie between 1 and the total batch, {total}: "
                "lower it, or raise --total-batch"
            )
        if self.groups is not None and not 1 <= self.groups[0] <= self.groups[1]:
            low, high = self.groups
            raise ConfigError(f"--groups {low}..{high} must be a rising range from 1 up, for example 8..20")
        if self.groups is not None and profile.model.vanilla:
            raise ConfigError("--groups: this model is a plain VAE without towers; leave the flag out")
        if self.groups is not None and self.groups[1] == 1 and len(profile.model.scale_groups) == 1:
            raise ConfigError("--groups 1: one group in one scale is a plain VAE without towers; ask for 2 or more")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan, with what it takes by the table of block costs."""

    profile: Profile
    micro_batch: int
    accumulation: int
    assignment: Assignment
    peak_bytes: int
    """Allocated peak by the table."""
    seconds: StepSeconds
    host_bytes: int

    @property
    def groups(self) -> Groups:
        """Per scale, highest resolution first."""
        return self.profile.model.scale_groups

    @property
    def size(self) -> Size:
        """What its overhead depends on."""
        return Size(self.groups, self.micro_batch)

    @property
    def taken(self) -> Taken:
        """Bytes on the card and on the host by the table."""
        return Taken(self.peak_bytes, self.host_bytes)

    @property
    def images_per_second(self) -> float:
        """Over a whole step, by the estimate that ranks plans; for people there is `time`."""
        return self.profile.training.total_batch / self.seconds.total

    @property
    def time(self) -> StepTime:
        """The estimate as a range of seconds, for people."""
        return estimated(self.seconds.total, self.profile.training.total_batch)


@dataclass(frozen=True, kw_only=True)
class Planner:
    """The plans of one profile for one card.

    It holds no state: what it answers follows from these fields and the overhead that it is handed. Answers are
    cached, because the same ones are asked for again and again.
    """

    profile: Profile
    card: Card
    budget: Budget
    wishes: Wishes
    table: BlockTable
    _remembered: dict[tuple[Size, Taken], list[Candidate]] = field(default_factory=dict, compare=False, repr=False)

    # -- what can be varied --

    def micro_batches(self) -> list[int]:
        """Divisors of the total batch that are large enough, largest first."""
        total = self.profile.training.total_batch
        return [m for m in range(total, self.wishes.min_micro_batch - 1, -1) if total % m == 0]

    def group_options(self, fewer: bool) -> list[Groups]:
        """Groups per scale to choose from, most first; `fewer`: than the profile's, where none were asked for."""
        own = self.profile.model.scale_groups
        if self.wishes.groups is None:
            if not fewer:
                return [own]
            training = self.profile.training
            if training.init_from or training.freeze:
                return []  # the weights belong to the groups that they have
            low, high = 1, own[0] - 1
        elif fewer:
            return []
        else:
            low, high = self.wishes.groups
        options = [scaled_groups(own, n) for n in range(high, low - 1, -1)]
        return [groups for groups in options if groups != PLAIN_VAE]

    # -- plans --

    def candidates(self, size: Size, overhead: OverheadModel) -> list[Candidate]:
        """The fastest plan for each place of the optimiser, as far as it fits."""
        key = size, overhead.estimate(size)
        if key not in self._remembered:
            plans = [self._candidate(size, plan, fastest, key[1]) for plan in self._plans()]
            self._remembered[key] = [c for c in plans if c is not None]
        return self._remembered[key]

    def smallest_peak(self, size: Size) -> Candidate:
        """The plan with the smallest peak on the card, whether it fits or not, however much host memory it takes."""

        def search(rows: BlockChoices, _: int) -> Assignment:
            return least_peak(rows)

        found = [self._candidate(size, plan, search) for plan in self._plans()]
        return min((c for c in found if c is not None), key=lambda c: c.peak_bytes)

    def smallest_of_all(self) -> Candidate:
        """The plan with the smallest peak of the fewest groups allowed, at the smallest micro-batch."""
        options = self.group_options(True) or self.group_options(False)
        return self.smallest_peak(Size(options[-1], self.micro_batches()[-1]))

    def uniform(self, like: Candidate, keep: Keep) -> Candidate:
        """The same plan with one policy for all blocks, whether it fits or not."""

        def all_alike(rows: BlockChoices, _: int) -> Assignment:
            return Assignment(tuple(next(c for c in row if c.keep == keep) for row in rows))

        found = self._candidate(like.size, like.profile.plan, all_alike)
        assert found is not None
        return found

    def priced(self, plan: MemoryPlan, groups: Groups) -> Candidate:
        """An existing plan, priced by the table."""
        names = [block.name for block in self.table.blocks(groups) if block.name != "start"]

        def as_planned(rows: BlockChoices, _: int) -> Assignment:
            chosen = zip(names, rows, strict=True)
            return Assignment(tuple(next(c for c in row if c.keep == plan.keep_of(name)) for name, row in chosen))

        found = self._candidate(Size(groups, plan.micro_batch), plan, as_planned)
        assert found is not None
        return found

    def _plans(self) -> Iterator[MemoryPlan]:
        plan = self.profile.plan
        wanted = plan.engine if self.wishes.engine == "auto" else self.wishes.engine
        if wanted == "deepspeed":  # on one card only stage 2 with the optimiser on the host saves memory
            yield replace(plan, engine="deepspeed", zero_stage=2, offload_optimizer=True, offload_parameters=False)
            return
        plan = replace(plan, engine="torch", offload_parameters=False)
        if not plan.offload_optimizer:
            yield plan
        yield replace(plan, offload_optimizer=True)

    def _candidate(
        self,
        size: Size,
        plan: MemoryPlan,
        search: Callable[[BlockChoices, int], Assignment | None],
        overhead: Taken | None = None,
    ) -> Candidate | None:
        """The plan that `search` finds; overhead: what to leave free on card and host, None: without any limit."""
        groups, micro_batch = size
        accumulation = self.profile.training.total_batch // micro_batch
        # what is on the card and on the host all the time
        cap = self.budget.cap_bytes
        sizes = self.table.parameter_elements(groups)
        resident = resident_bytes(self.table, groups, plan, accumulation)
        host = host_bytes(self.table, groups, plan, accumulation)
        averages = self.table.count(self.table.copy_bytes, groups)
        if self.profile.training.ema_decay and self.profile.training.ema_on_host:
            host += averages
        elif self.profile.training.ema_decay:
            resident += averages
        # the blocks' policies
        rates = rates_of(self.card, cap, plan.pin_memory)
        gradients_stay = not plan.offload_optimizer and accumulation == 1
        named = self.table.choices(groups, micro_batch, rates, gradients_stay)
        rows = [row for _, row in named]
        room = cap - resident - (overhead.card_bytes if overhead is not None else 0)
        assignment = search(rows, room)
        if overhead is not None:
            host_room = self._host_room(host + overhead.host_bytes)
            if assignment is not None and assignment.host_bytes > host_room:
                assignment = search([[c for c in row if c.keep != "host"] for row in rows], room)
            if assignment is not None and assignment.host_bytes > host_room:
                return None
        if assignment is None:
            return None
        # the plan as a profile
        default, exceptions = named_keeps([name for name, _ in named], assignment.keeps)
        own = groups == self.profile.model.scale_groups
        model = self.profile.model if own else with_groups(self.profile.model, groups)
        planned = replace(plan, cap_bytes=cap, micro_batch=micro_batch, keep=default, keep_blocks=exceptions)
        profile = replace(self.profile, model=model, plan=planned)
        convolutions = self.table.count(self.table.convolutions, groups)
        return Candidate(
            profile=profile,
            micro_batch=micro_batch,
            accumulation=accumulation,
            assignment=assignment,
            peak_bytes=resident + assignment.peak_bytes,
            seconds=step_seconds(profile, assignment.seconds, accumulation, sum(sizes), convolutions, rates),
            host_bytes=host + assignment.host_bytes,
        )

    def _host_room(self, taken_bytes: int) -> float:
        """Host memory that is left for block inputs; below zero where there is not even room for the rest."""
        limit = self.wishes.host_mem_bytes
        return math.inf if limit is None else limit - taken_bytes

    # -- the best of them --

    def best(self, overhead: OverheadModel) -> Candidate | None:
        """The best plan for the wishes, with fewer groups where nothing else fits."""
        for fewer in (False, True):
            options = self.group_options(fewer)
            if self.wishes.prefer == "batch":
                ranked = ([Size(g, m)] for m in self.micro_batches() for g in options)
            elif self.wishes.prefer == "groups":
                ranked = ([Size(g, m)] for g in options for m in self.micro_batches())
            else:
                ranked = ([Size(g, m) for m in self.micro_batches()] for g in options)
            for tier in ranked:
                found = [c for size in tier for c in self.candidates(size, overhead)]
                if found:
                    return fastest_of(found)
        return None

    def best_of(self, found: Sequence[Candidate]) -> Candidate:
        """The best of these plans for the wishes."""
        asked_for = self.group_options(False)

        def rank(c: Candidate) -> tuple[bool, Groups | int, Groups | int]:
            whole, prefer = c.groups in asked_for, self.wishes.prefer
            if prefer == "speed":
                return whole, c.groups, 0
            return (whole, c.micro_batch, c.groups) if prefer == "batch" else (whole, c.groups, c.micro_batch)

        highest = max(map(rank, found))
        return fastest_of([c for c in found if rank(c) == highest])


def fastest_of(candidates: Sequence[Candidate]) -> Candidate:
    """The fastest plan; among those within `ALIKE` of it, one without retries, then the largest micro-batch.

    Seconds are estimated far less exactly than bytes, and larger micro-batches give better BatchNorm statistics. A plan
    with retries, for which the allocator gives back its cache, uses its room to the last piece.
    """
    least = min(c.seconds.total for c in candidates)
    near = [c for c in candidates if c.seconds.total <= ALIKE * least]
    return min(near, key=lambda c: (c.seconds.retries > 0, -c.micro_batch, c.seconds.total))


def resident_bytes(table: BlockTable, groups: Groups, plan: MemoryPlan, accumulation: int) -> int:
    """On the card all the time, averages apart: weights and buffers, and what the optimiser's place and engine add."""
    out = table.count(table.state_bytes, groups)
    if not plan.offload_optimizer:
        # two Adamax states, and from the first of several micro-batches on the gradients
        out += (3 if accumulation > 1 else 2) * table.count(table.parameter_bytes, groups)
    sizes = [4 * elements for elements in table.parameter_elements(groups)]
    return out + sum(
        entry.nbytes
        for entry in engine_entries(plan, sizes, accumulation)
        if entry.place is Place.ALLOCATOR and entry.span in (Span.ALWAYS, Span.BACKWARD) and not entry.is_bound
    )


def host_bytes(table: BlockTable, groups: Groups, plan: MemoryPlan, accumulation: int) -> int:
    """Host memory of weights, gradients and states; averages and parked block inputs apart."""
    return engine_host_bytes(plan, [4 * elements for elements in table.parameter_elements(groups)], accumulation)


def scaled_groups(groups: Groups, highest: int) -> Groups:
    """Groups per scale with `highest` at the highest resolution and the others in proportion, at least one each."""
    return tuple(max(1, round(g * highest / groups[0])) for g in groups)


def named_keeps(names: Sequence[str], keeps: Sequence[Keep]) -> tuple[Keep, dict[str, Keep]]:
    """(the most frequent policy, the blocks that have another one; prefix* where all blocks of it agree)."""
    default = Counter(keeps).most_common(1)[0][0]
    by_prefix: dict[str, list[Keep]] = {}
    for name, keep in zip(names, keeps, strict=True):
        by_prefix.setdefault(_prefix(name), []).append(keep)
    out: dict[str, Keep] = {}
    for name, keep in zip(names, keeps, strict=True):
        alike = by_prefix[_prefix(name)]
        if keep != default:
            out[f"{_prefix(name)}*" if len(alike) > 1 and len(set(alike)) == 1 else name] = keep
    return default, out


def _prefix(name: str) -> str:
    """Tower and scale of a block's name: "dec_0_" of "dec_0_12"."""
    return name[: name.rfind("_") + 1] or name
