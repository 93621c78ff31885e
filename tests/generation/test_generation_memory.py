"""Sampling, evaluation and pictures take no more of the card than the training step of the same plan, by count."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_runs import TINY
from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.config.recipes import recipe, with_groups
from nvae_lowmem.config.sections import Profile, TrainConfig
from nvae_lowmem.memory.trace.events import Trace
from nvae_lowmem.memory.trace.inference import WORKS, Work, generation_peaks, trace_generation
from nvae_lowmem.memory.trace.training import trace_training
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.checkpoint import export_weights
from nvae_lowmem.training.open_run import images_per_pass, open_run
from nvae_lowmem.training.validation import validate

DRAWS = 100
LEAN_BATCHES = {"mnist": 200, "cifar10": 32, "celeba64": 16, "imagenet32": 24, "celebahq256": 4, "ffhq256": 4}
"""The published batch per GPU, which the shipped plans for 4 GB cards take in one micro-batch."""
RGB = replace(TINY, image_channels=3, image_size=8, padding=0, bits=8, mixtures=2, latents=3)


def lean(profile: Profile, **plan: Any) -> Profile:
    plan = {"precision": "fp16", "keep": "input", "offload_optimizer": True, "engine": "torch", **plan}
    return profile.with_plan(**plan)


@cache
def small(work: Work, micro_batch: int = 4, draws: int = 0, fake: bool = True, **training: Any) -> Trace:
    profile = lean(Profile(model=RGB, training=TrainConfig(**training)))
    return trace_generation(profile, work, micro_batch, draws, fake)


@cache
def training_peak_bytes(name: str, groups: tuple[int, ...], micro_batch: int) -> int:
    return trace_training(profile_of(name, groups), micro_batch, steps=1).peak().nbytes


def profile_of(name: str, groups: tuple[int, ...] = ()) -> Profile:
    profile = lean(recipe(name))
    return replace(profile, model=with_groups(profile.model, groups)) if groups else profile


def live_bytes(trace: Trace, mark: str) -> int:
    before = trace.marks[mark]
    return max((nbytes for i, nbytes in trace.live_bytes() if i == before - 1), default=0)


# --- no more than training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize(
    ("name", "groups", "micro_batch"), [("tiny", (), 32), ("mnist", (1, 1), 200), ("cifar10", (2,), 32)]
)
def test_nothing_takes_more_of_the_card_than_a_training_step(
    name: str, groups: tuple[int, ...], micro_batch: int, work: Work
) -> None:
    peak = trace_generation(profile_of(name, groups), work, micro_batch, DRAWS).peak()
    assert peak.by_category["weight"] > 0 and peak.phase == "evaluation"
    assert peak.nbytes <= training_peak_bytes(name, groups, micro_batch)


@pytest.mark.slow
@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("name", LEAN_BATCHES)
def test_no_recipe_takes_more_than_its_training_step_at_the_plan_for_4_gb(name: str, work: Work) -> None:
    micro_batch = LEAN_BATCHES[name]
    peak = trace_generation(profile_of(name), work, micro_batch, DRAWS).peak()
    assert peak.nbytes <= training_peak_bytes(name, (), micro_batch)


@pytest.mark.parametrize("plan", [{"keep": "host"}, {"keep": "all"}, {"precision": "fp32"}])
def test_other_plans_hold_while_training(plan: dict[str, Any]) -> None:
    profile = lean(Profile(model=RGB), **plan)
    most = trace_training(profile, 4, steps=1).peak().nbytes
    for work in ("validation", "pictures"):
        assert trace_generation(profile, work, 4).peak().nbytes <= most


def test_all_peaks_are_there_by_name() -> None:
    peaks = generation_peaks(lean(Profile(model=RGB)), 4)
    assert tuple(peaks) == WORKS
    assert {name: peak.nbytes for name, peak in peaks.items()} == {work: small(work).peak().nbytes for work in WORKS}


@pytest.mark.parametrize("draws", [5, 12])
def test_the_number_of_draws_does_not_matter(draws: int) -> None:
    assert small("bound", draws=draws).peak().nbytes == small("bound").peak().nbytes


@pytest.mark.parametrize("work", WORKS)
def test_work_leaves_nothing_on_the_card(work: Work) -> None:
    trace = small(work)
    assert live_bytes(trace, "end") == live_bytes(trace, "setup done") > 0


def test_averaged_weights_on_the_host_take_nothing_of_the_card() -> None:
    without, on_host, on_card = (
        small("validation", **ema).peak().nbytes
        for ema in ({"ema_decay": 0.0}, {"ema_on_host": True}, {"ema_on_host": False})
    )
    weights = sum(small("validation").parameter_bytes)
    assert on_host == without
    assert on_card >= without + weights


def test_states_on_the_card_are_there_while_pictures_are_drawn() -> None:
    profile = lean(Profile(model=RGB), offload_optimizer=False)
    trace = trace_generation(profile, "pictures", 4)
    assert trace.peak().by_category["optimizer state"] >= 2 * sum(trace.parameter_bytes)


# --- the count is that of a real run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("work", WORKS)
def test_a_trace_without_memory_equals_that_of_real_work(work: Work) -> None:
    traced, real = (small(work, 2, fake=fake) for fake in (True, False))
    assert [(a.nbytes, *a.kind, a.born, a.died) for a in traced.allocations] == [
        (a.nbytes, *a.kind, a.born, a.died) for a in real.allocations
    ]
    assert traced.events == real.events and traced.peak() == real.peak()


def test_real_samples_of_a_shipped_recipe_are_traced_exactly() -> None:
    traced, real = (trace_generation(profile_of("tiny"), "sampling", 4, fake=fake) for fake in (True, False))
    assert [(a.nbytes, *a.kind) for a in traced.allocations] == [(a.nbytes, *a.kind) for a in real.allocations]
    assert traced.events == real.events


# --- how many images a pass takes -------------------------------------------------------------------------------------


@given(
    micro_batch=st.integers(0, 300),
    total=st.integers(1, 300),
    planned=st.sampled_from(["fp32", "bf16", "fp16", "auto"]),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
)
def test_a_pass_is_never_wider_than_one_of_training(micro_batch: int, total: int, planned: Any, precision: str) -> None:
    profile = Profile(training=TrainConfig(total_batch=total))
    profile = profile.with_plan(micro_batch=micro_batch, precision=planned)
    images, trained = images_per_pass(profile, precision), micro_batch or total
    assert 1 <= images <= trained
    if planned in ("bf16", "fp16") and precision == "fp32":
        assert images == 1 or 2 * images <= trained
    elif micro_batch:
        assert images == micro_batch


@pytest.mark.parametrize(("given_batch", "precision", "images"), [(0, "fp32", 3), (0, "fp16", 6), (9, "fp32", 9)])
def test_an_opened_run_takes_the_images_of_its_plan_unless_told(
    tmp_path: Path, given_batch: int, precision: str, images: int
) -> None:
    profile = lean(
        Profile(model=RGB, training=TrainConfig(total_batch=12)), micro_batch=6, likelihood_chunk_bytes=12_345
    )
    export_weights(tmp_path / "run", profile, NVAE(RGB).state_dict())
    run = open_run(str(tmp_path / "run"), "", "cpu", given_batch, precision)
    assert run.micro_batch == images and f"{images} images per pass" in run.describe()
    head: Any = run.model.blocks["head"]
    assert head.chunk_bytes == 12_345 and not run.model.training
    assert not any(layer.recompute for layer in run.model.layers())


def test_validation_does_not_depend_on_chunks() -> None:
    torch.manual_seed(0)
    model, x = NVAE(RGB), torch.rand(5, 3, 8, 8)
    whole, parts = (validate(model, x.split(size), seed=3) for size in (5, 2))
    assert parts.nelbo == pytest.approx(whole.nelbo, rel=1e-6) and parts.kl == pytest.approx(whole.kl, rel=1e-5)
    assert parts.images == whole.images == 5 and model.training
