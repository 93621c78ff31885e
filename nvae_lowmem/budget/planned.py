"""The whole answer: the chosen profile with its memory plan, what it was chosen from, and a picture of the images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from nvae_lowmem.budget import words
from nvae_lowmem.budget.choose import ChosenModel, Wanted, choose
from nvae_lowmem.budget.ladder import LADDER
from nvae_lowmem.budget.speed import CardSpeed, CpuSpeed
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.data.look import Look, look_at, seen_by_training
from nvae_lowmem.errors import NothingFits
from nvae_lowmem.generation.grids import default_columns, grid, labelled
from nvae_lowmem.hardware.budget import Budget
from nvae_lowmem.hardware.card import Card, OsName
from nvae_lowmem.hardware.find_card import device_name
from nvae_lowmem.memory.plan import explain
from nvae_lowmem.memory.plan.candidates import Wishes
from nvae_lowmem.memory.plan.fit import Fit, Predictor, Say, fit
from nvae_lowmem.memory.predict.predict import predictor_for
from nvae_lowmem.training.speed import MEASURED, MEASURED_ON

SHEET_ROWS = 5


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The profile to train with, and where it comes from."""

    look: Look
    choice: ChosenModel
    fit: Fit | None
    """On a card."""
    profile: Profile

    def text(self) -> str:
        """What was found, chosen and given up, in words for a terminal; the memory plan is explained by its fit."""
        return words.described(self.choice, self.look)

    def as_json(self) -> dict[str, Any]:
        """What a program may want of the choice."""
        choice = self.choice
        return {
            "rung": choice.rung.number,
            "hours": choice.hours,
            "steps": choice.steps,
            "images_seen": choice.images_seen,
            "training_images": choice.images,
            "ends_before_the_hours": choice.limited_by_images,
            "found": words.found(self.look, choice.images),
            "chosen": words.chosen(choice, self.look),
            "given_up": words.gave_up(choice),
        }

    def header(self) -> str:
        """The same as the head of the profile's file."""
        lines = [
            *words.found(self.look, self.choice.images),
            *words.chosen(self.choice, self.look),
            *words.gave_up(self.choice),
        ]
        return "\n".join(lines + (explain.reasons(self.fit) if self.fit is not None else []))


def for_cpu(wanted: Wanted, look: Look | None = None) -> Planned:
    """For this machine's CPU, which is timed for some seconds. Raises ConfigError as `choose` does."""
    look = look or look_at(wanted.data, wanted.size)
    choice = choose(look, wanted, CpuSpeed())
    profile = _with_words(choice, look)
    timed = {MEASURED: float(f"{choice.time.most_seconds:.4g}"), MEASURED_ON: device_name(torch.device("cpu"))}
    profile = replace(profile, provenance={**profile.provenance, **timed})
    return Planned(look=look, choice=choice, fit=None, profile=profile)


def for_card(
    wanted: Wanted,
    card: Card,
    budget: Budget,
    wishes: Wishes,
    predictor: Predictor | None = None,
    *,
    on: OsName,
    command: str,
    look: Look | None = None,
    say: Say = lambda line: None,
) -> Planned:
    """For a card, whether there is one or not; the plan is verified by prediction.

    predictor: with what was measured on the card, if anything was. command: what was typed, for the provenance.
    Raises ConfigError as `choose` does, and NothingFits.
    """
    look = look or look_at(wanted.data, wanted.size)
    speed, below = CardSpeed(card, budget, wishes), len(LADDER)
    while below:
        say("pricing models of several sizes")
        choice = choose(look, wanted, speed, below)
        table = speed.table(choice.profile)  # known already, for the precision that the card's plan has, too
        predict = predictor or predictor_for(card, budget)
        found = fit(choice.profile, card, budget, wishes, predict, table=table, say=say)
        if found.fits and found.chosen.groups == choice.profile.model.scale_groups:
            profile = explain.planned(_named(found, _with_words(choice, look)), on, command)
            return Planned(look=look, choice=choice, fit=found, profile=profile)
        below = choice.rung.number
    raise NothingFits(f"not even the smallest model fits {card.name}: lower --size")


def sheet(profile: Profile) -> np.ndarray:
    """(H, W, 3) uint8: images spread over the source, as training will see them."""
    columns = default_columns(profile.model.image_size)
    images = seen_by_training(profile, SHEET_ROWS * columns, log=lambda line: None)
    colours = "grey" if profile.model.image_channels == 1 else "RGB"
    size, bits = profile.model.image_size, profile.model.bits
    caption = f"what training sees: {size} x {size}, {colours}, {bits} bit{'s' if bits > 1 else ''}"
    return labelled(grid(torch.as_tensor(images), columns), caption)


def _with_words(choice: ChosenModel, look: Look) -> Profile:
    made = {
        "asked_hours": choice.hours,
        "training_images": choice.images,
        "images_seen": choice.images_seen,
        "chosen": words.chosen(choice, look),
        "given_up": words.gave_up(choice),
    }
    return replace(choice.profile, provenance=made)


def _named(found: Fit, profile: Profile) -> Fit:
    """The fit with the provenance of the choice in its profile."""
    chosen = replace(found.chosen, profile=replace(found.chosen.profile, provenance=profile.provenance))
    return replace(found, chosen=chosen)
