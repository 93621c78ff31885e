"""What a run is to be, from a profile and a machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nvae_lowmem.config.recipes import RECIPES, recipe
from nvae_lowmem.training.resolve import ResolvedRun, resolve_run, run_without_data

CPU = torch.device("cpu")


def resolved(name: str = "mnist", **provenance: object) -> ResolvedRun:
    profile = recipe(name)
    return resolve_run(replace(profile, provenance={**profile.provenance, **provenance}), 50_000, CPU, 1)


def test_provenance_is_not_obeyed() -> None:
    claimed = resolved(published_total_batch=10, published_learning_rate=0.5, total_batch=1, micro_batch=1)
    assert claimed.schedule == resolved().schedule and claimed.split == resolved().split
    assert claimed.reasons == resolved().reasons


def test_the_rate_is_derived_from_the_published_batch_and_rate() -> None:
    training = replace(recipe("mnist").training, published_total_batch=800, published_learning_rate=8e-3)
    run = resolve_run(replace(recipe("mnist"), training=training), 50_000, CPU, 1)
    assert run.schedule.peak_rate == pytest.approx(4e-3)
    assert any("the published 0.008 is for a total batch of 800" in reason for reason in run.reasons)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_at_its_published_batch_gets_its_published_rate(name: str) -> None:
    profile = recipe(name)
    whole = replace(profile.training, total_batch=profile.training.published_total_batch)
    run = resolve_run(replace(profile, training=whole), 50_000, CPU, 1)
    assert run.schedule.peak_rate == profile.training.published_learning_rate


def test_a_run_without_data_keeps_its_rate() -> None:
    run = run_without_data(recipe("mnist"), 4, accumulation=3, total_steps=7, rate=2e-3)
    assert str(run.split) == "total batch 12 = micro-batch 4 x accumulation 3 x processes 1"
    assert [run.learning_rate(step) for step in range(7)] == [pytest.approx(2e-3)] * 7
