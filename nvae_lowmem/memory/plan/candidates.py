"""What a person may wish of a plan, and the plans of one model for one card in the order of those wishes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from nvae_lowmem.config.recipes import with_groups
from nvae_lowmem.config.sections import EngineName, Keep, MemoryPlan, Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.budget import Budget
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.memory.plan.block_costs import BlockTable
from nvae_lowmem.memory.plan.roofline import StepSeconds, rates_of, step_seconds
from nvae_lowmem.memory.plan.search import Assignment, Rows, fastest, least_peak
from nvae_lowmem.units import MIB

Prefer = Literal["speed", "batch", "groups"]
Groups = tuple[int, ...]
T = TypeVar("T")
PLAIN_VAE: Groups = (1,)
"""No towers, so other blocks than those of the table."""
ALIKE = 1.05
"""Plans whose seconds differ by less are taken as equally fast."""
_FIRST_SHARE, _FIRST_BYTES = 0.05, 24 * MIB  # set aside until the predictor has said what the table leaves out


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
    """A plan as the table sees it."""

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
    def images_per_second(self) -> float:
        """Over a whole step."""
        return self.profile.training.total_batch / self.seconds.total


@dataclass(frozen=True, kw_only=True)
class FrontierRow:
    """What one number of groups and one micro-batch take at best; seconds is None where they do not fit."""

    groups: Groups
    micro_batch: int
    peak_bytes: int
    images_per_second: float | None


@dataclass
class Planner:
    """Searches plans of one profile for one card.

    What the table's peak has to stay below the cap is set aside for each number of groups and micro-batch, which it
    differs between; `aside_bytes` is for those that nothing is known of.
    """

    profile: Profile
    card: Card
    budget: Budget
    wishes: Wishes
    table: BlockTable
    aside_bytes: int = 0
    host_aside_bytes: int = 0
    _asides: dict[tuple[Groups, int], int] = field(default_factory=dict)
    _found: dict[tuple[Groups, int], list[Candidate]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.aside_bytes = int(_FIRST_SHARE * self.budget.cap_bytes) + _FIRST_BYTES

    def set_aside(self, like: Candidate, nbytes: int, host_bytes: int) -> None:
        """Search anew with this much left free: on the card for that size and unknown ones, and on the host."""
        self._asides[like.groups, like.micro_batch] = nbytes
        self.aside_bytes, self.host_aside_bytes = nbytes, host_bytes
        self._found.clear()

    def aside_of(self, like: Candidate) -> int:
        """What is set aside on the card for plans of the candidate's groups and micro-batch."""
        return self._asides.get((like.groups, like.micro_batch), self.aside_bytes)

    def needed_bytes(self, candidate: Candidate) -> int:
        """What the candidate takes of the card, as far as is known: the table's peak and what is set aside."""
        return candidate.peak_bytes + self.aside_of(candidate)

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
            low, high = 1, own[0] - 1
        elif fewer:
            return []
        else:
            low, high = self.wishes.groups
        options = [scaled_groups(own, n) for n in range(high, low - 1, -1)]
        return [groups for groups in options if groups != PLAIN_VAE]

    # -- plans --

    def candidates(self, groups: Groups, micro_batch: int) -> list[Candidate]:
        """The fastest plan for each place of the optimiser, as far as it fits."""
        key = (groups, micro_batch)
        if key not in self._found:
            plans = [self._candidate(groups, micro_batch, plan, fastest) for plan in self._plans()]
            self._found[key] = [c for c in plans if c is not None]
        return self._found[key]

    def leanest(self, groups: Groups, micro_batch: int) -> Candidate:
        """The plan with the smallest peak on the card, whether it fits or not, however much host memory it takes."""

        def search(rows: Rows, _: int) -> Assignment:
            return least_peak(rows)

        found = [self._candidate(groups, micro_batch, p, search, limit_host=False) for p in self._plans()]
        return min((c for c in found if c is not None), key=lambda c: c.peak_bytes)

    def uniform(self, like: Candidate, keep: Keep) -> Candidate:
        """The same plan with one policy for all blocks, whether it fits or not."""

        def all_alike(rows: Rows, _: int) -> Assignment:
            return Assignment(tuple(next(c for c in row if c.keep == keep) for row in rows))

        found = self._candidate(like.groups, like.micro_batch, like.profile.plan, all_alike, limit_host=False)
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
        groups: Groups,
        micro_batch: int,
        plan: MemoryPlan,
        search: Callable[[Rows, int], Assignment | None],
        limit_host: bool = True,
    ) -> Candidate | None:
        accumulation = self.profile.training.total_batch // micro_batch
        parameters = self.table.count(self.table.parameters, groups)
        cap = self.budget.cap_bytes
        rates = rates_of(self.card, cap, plan.pin_memory)
        first_gradients = not plan.offload_optimizer and accumulation == 1
        named = self.table.choices(groups, micro_batch, rates, gradients_stay=first_gradients)
        always = always_bytes(self.table, groups, plan, accumulation)
        rows = [row for _, row in named]
        host = host_bytes(plan, accumulation, parameters, self.profile.training.ema_on_host)
        room = cap - self._asides.get((groups, micro_batch), self.aside_bytes) - always
        assignment = search(rows, room)
        if limit_host and assignment is not None and self._host_full(host + assignment.host_bytes):
            assignment = search([[c for c in row if c.keep != "host"] for row in rows], room)
        if assignment is None or (limit_host and self._host_full(host + assignment.host_bytes)):
            return None
        default, exceptions = named_keeps([name for name, _ in named], assignment.keeps)
        planned = replace(plan, cap_bytes=cap, micro_batch=micro_batch, keep=default, keep_blocks=exceptions)
        own = groups == self.profile.model.scale_groups
        model = self.profile.model if own else with_groups(self.profile.model, groups)
        profile = replace(self.profile, model=model, plan=planned)
        convolutions = self.table.count(self.table.convolutions, groups)
        return Candidate(
            profile=profile,
            micro_batch=micro_batch,
            accumulation=accumulation,
            assignment=assignment,
            peak_bytes=always + assignment.peak_bytes,
            seconds=step_seconds(profile, assignment.seconds, accumulation, parameters, convolutions, rates),
            host_bytes=host + assignment.host_bytes,
        )

    def _host_full(self, nbytes: int) -> bool:
        limit = self.wishes.host_mem_bytes
        return limit is not None and nbytes + self.host_aside_bytes > limit

    # -- the best of them --

    def best(self) -> Candidate | None:
        """The best plan for the wishes, with fewer groups where nothing else fits."""
        for fewer in (False, True):
            options = self.group_options(fewer)
            if self.wishes.prefer == "batch":
                ranked = ([(g, m)] for m in self.micro_batches() for g in options)
            elif self.wishes.prefer == "groups":
                ranked = ([(g, m)] for g in options for m in self.micro_batches())
            else:
                ranked = ([(g, m) for m in self.micro_batches()] for g in options)
            for tier in ranked:
                found = [c for g, m in tier for c in self.candidates(g, m)]
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

    def frontier(self, most_rows: int = 24) -> tuple[FrontierRow, ...]:
        """Peak and speed over groups and micro-batches, thinned out; peaks by the table, with what is set aside."""
        options = self.group_options(False)
        if len(options) == 1:
            own = options[0]
            quarters = sorted({-(-own[0] * k // 4) for k in (1, 2, 3, 4)}, reverse=True)
            options = [groups for groups in (scaled_groups(own, n) for n in quarters) if groups != PLAIN_VAE]
        options, batches = _thin(options, 4), _thin(self.micro_batches(), most_rows // 4)
        rows = []
        for groups in options:
            for micro_batch in batches:
                found = self.candidates(groups, micro_batch)
                c = min(found, key=lambda c: c.seconds.total) if found else self.leanest(groups, micro_batch)
                rows.append(
                    FrontierRow(
                        groups=groups,
                        micro_batch=micro_batch,
                        peak_bytes=self.needed_bytes(c),
                        images_per_second=c.images_per_second if found else None,
                    )
                )
        return tuple(rows)


def fastest_of(candidates: Sequence[Candidate]) -> Candidate:
    """The fastest; of those that the estimate cannot tell from it, the one with the largest micro-batch.

    BatchNorm's statistics are the better for it, and seconds are estimated far less exactly than bytes.
    """
    least = min(c.seconds.total for c in candidates)
    near = [c for c in candidates if c.seconds.total <= ALIKE * least]
    return min(near, key=lambda c: (-c.micro_batch, c.seconds.total))


def always_bytes(table: BlockTable, groups: Groups, plan: MemoryPlan, accumulation: int) -> int:
    """On the card all the time: weights and buffers, and what the optimiser's place and the engine add."""
    out = table.count(table.state_bytes, groups)
    if not plan.offload_optimizer:
        # two Adamax states, and from the first of several micro-batches on the gradients
        out += (3 if accumulation > 1 else 2) * table.count(table.parameter_bytes, groups)
    if plan.engine == "deepspeed":
        out += 4 * (plan.bucket_elements + table.largest_parameter)
    return out


def host_bytes(plan: MemoryPlan, accumulation: int, parameters: int, ema_on_host: bool) -> int:
    """Host memory of weights, gradients, states and averages, parked block inputs apart.

    The torch engine's offloaded optimiser takes 16 bytes per parameter; DeepSpeed's stage 2 has a staging copy as well,
    and its own sums where several micro-batches accumulate.
    """
    per_parameter = 4 if ema_on_host else 0
    if plan.offload_optimizer:
        per_parameter += 16 if plan.engine != "deepspeed" else 24 if accumulation > 1 else 20
    return per_parameter * parameters


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


def _thin(values: Sequence[T], most: int) -> list[T]:
    """At most so many of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
