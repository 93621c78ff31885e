"""The shipped profiles: every published recipe fitted to small cards, and whether the files are still right.

A cell is one recipe on one card under one system. Cells are independent of each other, so that making one of them alone
gives the same file as making them all.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvae_lowmem.config.profile_file import PROFILES_DIR, load, save
from nvae_lowmem.config.recipes import PUBLISHED_IMAGES, PUBLISHED_RECIPES, recipe, with_groups
from nvae_lowmem.config.sections import KEEPS, Profile
from nvae_lowmem.errors import ConfigError, unknown_name
from nvae_lowmem.hardware.budget import Budget, usable_bytes
from nvae_lowmem.hardware.card import Card, OsName
from nvae_lowmem.hardware.find_card import find_card
from nvae_lowmem.hardware.precision import choose_precision
from nvae_lowmem.memory.plan.block_costs import BlockTable, record_blocks
from nvae_lowmem.memory.plan.candidates import Wishes
from nvae_lowmem.memory.plan.duration import StepTime, estimated
from nvae_lowmem.memory.plan.explain import planned, predicted, reasons
from nvae_lowmem.memory.plan.fit import Fit, fit
from nvae_lowmem.memory.predict.predict import predictor_for

WISHES = Wishes(prefer="batch")
"""The published batch per GPU in one piece where the card allows, for BatchNorm's sake; then the fastest such plan."""


@dataclass(frozen=True)
class Target:
    """A card under a system: one row of the table, and the first part of a profile's name."""

    name: str
    title: str
    card_id: str
    os: OsName = "linux"

    def card(self) -> Card:
        """The card, from the table of cards."""
        return find_card(self.card_id)

    def budget(self) -> Budget:
        """What of the card the allocator may take."""
        return usable_bytes(self.card(), self.os)


TARGETS: tuple[Target, ...] = (
    Target("2g", "any 2 GB card", "2g"),
    Target("3g", "any 3 GB card", "3g"),
    Target("4g", "any 4 GB card", "4g"),
    Target("gtx-970", "GTX 970", "gtx-970"),
    Target("gtx-970-desktop", "GTX 970, Linux desktop", "gtx-970", "desktop"),
    Target("gtx-970-windows", "GTX 970, Windows", "gtx-970", "windows"),
    Target("gtx-1050-ti", "GTX 1050 Ti", "gtx-1050-ti"),
    Target("gtx-1650", "GTX 1650", "gtx-1650"),
    Target("rtx-3050-laptop", "RTX 3050 Laptop", "rtx-3050-laptop"),
    Target("6g", "any 6 GB card", "6g"),
    Target("8g", "any 8 GB card", "8g"),
)


@dataclass(frozen=True)
class CardRecipe:
    """One recipe on one target."""

    target: Target
    recipe: str

    @property
    def name(self) -> str:
        """Of the profile, and of its file."""
        return f"{self.target.name}-{self.recipe}"

    @property
    def path(self) -> Path:
        """The profile's file."""
        return PROFILES_DIR / f"{self.name}.toml"


def cells(only: Sequence[str] = ()) -> list[CardRecipe]:
    """Every cell, or those of the named cards and recipes, recipe by recipe. Raises ConfigError for unknown names."""
    targets, recipes = [t.name for t in TARGETS], PUBLISHED_RECIPES
    for name in only:
        if name not in targets and name not in recipes:
            raise ConfigError(f"--only: {unknown_name('card or recipe', name, [*targets, *recipes])}")
    wanted_targets = [t for t in TARGETS if t.name in only] or TARGETS
    wanted_recipes = [r for r in recipes if r in only] or recipes
    return [CardRecipe(t, r) for r, t in itertools.product(wanted_recipes, wanted_targets)]


@dataclass(frozen=True, kw_only=True)
class CatalogueRow:
    """One recipe on one card: the chosen plan and its prediction, or the nearest miss. Sizes in bytes."""

    target: str
    recipe: str
    fits: bool
    micro_batch: int
    accumulation: int
    groups: Sequence[int]
    own_groups: Sequence[int]
    precision: str
    offload_optimizer: bool
    keeps: Mapping[str, int]
    """Policy -> how many blocks have it."""
    cap_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    """Without the margin."""
    margin_bytes: int
    host_bytes: int
    retries: int = 0
    """How often per step the allocator is expected to give back its cache."""
    seconds_per_step: float
    """By the estimate that ranks plans; for people there is `time`."""

    @property
    def time(self) -> StepTime:
        """The estimate as a range of seconds, for people."""
        return estimated(self.seconds_per_step, self.micro_batch * self.accumulation)

    @property
    def training_seconds(self) -> tuple[float, float]:
        """The least and the most for the recipe's epochs of its published data set."""
        return self.time.training_seconds(recipe(self.recipe), PUBLISHED_IMAGES.get(self.recipe, 0))

    @property
    def share(self) -> float:
        """Of the cap that the plan takes with its margin."""
        return (self.reserved_bytes + self.margin_bytes) / self.cap_bytes


# ---- making ----------------------------------------------------------------------------------------------------------


def make(cell: CardRecipe, refresh: bool = False) -> CatalogueRow:
    """Fit the cell's recipe to its card and write the profile, or remove it where nothing fits; the table's row.

    refresh: keep the plan that is there, if it still fits and needs no retry, and make only its figures anew.
    """
    card, profile = cell.target.card(), recipe(cell.recipe)
    found = fitted(profile, card, cell.target.budget(), first=_earlier(cell) if refresh else None)
    if found.fits:
        command = f"tools/ship_profiles.py --only {cell.target.name} {cell.recipe}"
        shipped = replace(planned(found, cell.target.os, command), name=cell.name)
        save(shipped, cell.path, header="\n".join(reasons(found)))
    else:
        cell.path.unlink(missing_ok=True)
    return _row(cell, found)


def _earlier(cell: CardRecipe) -> Profile | None:
    """The committed profile, if its plan is one for today's recipe and budget."""
    try:
        profile = load(cell.path)
    except ConfigError:
        return None
    origin = _with_groups_of(recipe(cell.recipe), profile)
    same = (profile.model, profile.data, profile.training) == (origin.model, origin.data, origin.training)
    return profile if same and profile.plan.cap_bytes == cell.target.budget().cap_bytes else None


_tables: dict[str, BlockTable] = {}


def fitted(profile: Profile, card: Card, budget: Budget, wishes: Wishes = WISHES, first: Profile | None = None) -> Fit:
    """`fit` without a limit of time, which would let the answer depend on the machine; tables of blocks are shared."""
    decided = profile.with_plan(precision=choose_precision(profile.plan.precision, card)[0])
    # the bytes and the work of a block depend on nothing else: the recipes of one model share a table, as cards do
    key = repr((decided.model, decided.plan))
    if key not in _tables:
        _tables[key] = record_blocks(decided)
    predictor = predictor_for(card, budget)
    table = _tables[key]
    return fit(profile, card, budget, wishes, predictor, table=table, first=first, time_limit_seconds=math.inf)


def _row(cell: CardRecipe, found: Fit) -> CatalogueRow:
    c, p = found.chosen, found.prediction
    keeps = Counter(c.assignment.keeps)
    return CatalogueRow(
        target=cell.target.name,
        recipe=cell.recipe,
        fits=found.fits,
        micro_batch=c.micro_batch,
        accumulation=c.accumulation,
        groups=list(c.groups),
        own_groups=list(recipe(cell.recipe).model.scale_groups),
        precision=c.profile.plan.precision,
        offload_optimizer=c.profile.plan.offload_optimizer,
        keeps={keep: keeps[keep] for keep in KEEPS if keeps[keep]},
        cap_bytes=found.budget.cap_bytes,
        allocated_bytes=p.allocated_peak_bytes if p else c.peak_bytes,
        reserved_bytes=p.reserved_peak_bytes if p else found.reserved_bytes,
        margin_bytes=p.margin_bytes if p else 0,
        host_bytes=p.host_bytes if p else c.host_bytes,
        retries=p.retries if p else 0,
        seconds_per_step=round(c.seconds.total, 3),
    )


# ---- checking --------------------------------------------------------------------------------------------------------


def check_cell(cell: CardRecipe, row: CatalogueRow | None) -> list[str]:
    """What is wrong with the cell's committed file and its row: by the recipe, the card, and a new prediction."""
    if row is None:
        return [f"{cell.name}: the table has no such row"]
    if not row.fits:
        return [f"{cell.name}: the table says that nothing fits, but there is a file"] if cell.path.exists() else []
    try:
        profile = load(cell.path)
    except ConfigError as error:
        return [f"{cell.name}: {error}"]
    problems = _differences(cell, profile, row) or _prediction(cell, profile)  # of another plan than the recipe's: moot
    return [f"{cell.name}: {problem}" for problem in problems]


def _differences(cell: CardRecipe, profile: Profile, row: CatalogueRow) -> list[str]:
    """Where the file is not the recipe on the card's budget, and where the table says something else."""
    origin, plan, made = recipe(cell.recipe), profile.plan, profile.provenance
    expected: dict[str, tuple[Any, Any]] = {
        "name": (profile.name, cell.name),
        "model": (profile.model, _with_groups_of(origin, profile).model),
        "data": (profile.data, origin.data),
        "training": (profile.training, origin.training),
        "engine": (plan.engine, "torch"),
        "cap": (plan.cap_bytes, cell.target.budget().cap_bytes),
        "card": (made.get("card"), cell.target.card_id),
        "os": (made.get("os"), cell.target.os),
        "micro-batch in the table": (row.micro_batch, plan.micro_batch),
        "cap in the table": (row.cap_bytes, plan.cap_bytes),
        "groups in the table": (tuple(row.groups), profile.model.scale_groups),
        "allocated peak in the table": (row.allocated_bytes, made.get("predicted_allocated_bytes")),
        "reserved peak in the table": (row.reserved_bytes, made.get("predicted_reserved_bytes")),
        "margin in the table": (row.margin_bytes, made.get("margin_bytes")),
        "host memory in the table": (row.host_bytes, made.get("predicted_host_bytes")),
        "retries in the table": (row.retries, made.get("predicted_retries", 0)),
        "seconds per step in the table": (row.seconds_per_step, made.get("predicted_seconds_per_step")),
    }
    return [f"{what} is {found!r}, not {wanted!r}" for what, (found, wanted) in expected.items() if found != wanted]


def _with_groups_of(origin: Profile, profile: Profile) -> Profile:
    groups = profile.model.scale_groups
    if groups == origin.model.scale_groups:
        return origin
    return replace(origin, model=with_groups(origin.model, groups))


def _prediction(cell: CardRecipe, profile: Profile) -> list[str]:
    """Where today's prediction is not the file's, or does not fit."""
    budget, made, plan = cell.target.budget(), profile.provenance, profile.plan
    accumulation = profile.training.total_batch // plan.micro_batch
    p = predictor_for(cell.target.card(), budget)(profile, plan.micro_batch, accumulation)
    out = [] if p.fits(budget.cap_bytes) else [f"does not fit {budget.cap_bytes} bytes: {p.oom or 'more than the cap'}"]
    now = predicted(p).items()
    return out + [f"{key} = {made.get(key)}, predicted now: {n}" for key, n in now if made.get(key) != n]
