"""How to use the memory tools as a library: predict a plan, compare policies, fit a card, read a trace, replay it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nvae_lowmem.config import profile_file
from nvae_lowmem.config.recipes import recipe, with_groups
from nvae_lowmem.config.sections import KEEPS, Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.budget import usable_bytes
from nvae_lowmem.hardware.find_card import find_card
from nvae_lowmem.memory.allocator.allocator import AllocatorSettings, CachingAllocator
from nvae_lowmem.memory.plan.candidates import Wishes
from nvae_lowmem.memory.plan.explain import as_text, planned
from nvae_lowmem.memory.plan.fit import fit
from nvae_lowmem.memory.predict.predict import predict, predictor_for
from nvae_lowmem.memory.trace.training import trace_training
from nvae_lowmem.units import GIB


@pytest.fixture
def profile() -> Profile:
    """A published recipe with fewer groups, which the tests have no time for."""
    mnist = recipe("mnist")
    small = replace(mnist, name="small-mnist", model=with_groups(mnist.model, (1, 1)))
    return small.with_plan(keep="input", offload_optimizer=True, precision="fp16", engine="torch")


def test_predict_what_training_takes_of_a_card(profile: Profile) -> None:
    card = find_card("gtx-970")
    budget = usable_bytes(card, "linux")  # what of the card PyTorch's allocator may take

    prediction = predict(profile, micro_batch=50, accumulation=4, card=card, budget=budget)

    assert prediction.fits(budget.cap_bytes)
    assert prediction.allocated_peak_bytes <= prediction.reserved_peak_bytes < budget.cap_bytes
    # whose bytes they are at the moment of the peak
    peak = prediction.peak
    assert max(peak.by_category.values()) > peak.by_category["weight"] > 0 and peak.block in peak.by_block
    # and what no trace sees, each with its source
    assert {"cublas-workspaces", "cudnn-workspace"} <= {entry.name for entry in prediction.overlay}
    assert all(entry.source for entry in prediction.overlay)


def test_compare_policies_without_a_gpu(profile: Profile) -> None:
    peaks = {keep: predict(profile.with_plan(keep=keep), micro_batch=50).reserved_peak_bytes for keep in KEEPS}
    assert peaks["all"] > peaks["cheap"] > peaks["input"] >= peaks["host"]


def test_fit_a_plan_to_a_card_and_train_by_it(profile: Profile, tmp_path: Path) -> None:
    card = find_card("gtx-1050-ti")
    budget = usable_bytes(card, "linux")

    found = fit(profile, card, budget, Wishes(prefer="speed"), predictor_for(card, budget))

    assert found.fits and found.reserved_bytes <= budget.cap_bytes
    assert found.chosen.micro_batch * found.chosen.accumulation == profile.training.total_batch
    assert "micro-batch" in as_text(found)  # the reasons, for people

    # the profile to train with: nvae-lowmem train --profile small-mnist.toml
    plan = planned(found, "linux", "written by a program")
    profile_file.save(plan, tmp_path / "small-mnist.toml")
    loaded = profile_file.load(tmp_path / "small-mnist.toml")
    assert loaded == plan and loaded.plan.cap_bytes == budget.cap_bytes
    again = predict(loaded, found.chosen.micro_batch, found.chosen.accumulation, card, budget)
    assert again == found.prediction


def test_what_cannot_fit_is_an_answer_and_what_makes_no_sense_an_error(profile: Profile) -> None:
    card = find_card("gtx-970")
    budget = replace(usable_bytes(card, "linux"), cap_bytes=16 << 20)
    found = fit(profile, card, budget, Wishes(), predictor_for(card, budget), time_limit_seconds=1.0)
    assert not found.fits and found.prediction is None
    assert found.reserved_bytes > budget.cap_bytes  # the nearest miss, and what it would take
    with pytest.raises(ConfigError, match="micro-batch 0 must be at least 1"):
        predict(profile, micro_batch=0)


def test_read_a_trace_event_by_event_and_replay_it(profile: Profile) -> None:
    trace = trace_training(profile, micro_batch=50, steps=1)

    written = {"forward": 0, "backward": 0}
    for allocation, is_alloc in trace.walk():
        if is_alloc and allocation.on_card and allocation.phase in written:
            written[allocation.phase] += allocation.nbytes
    assert written["backward"] > written["forward"] > trace.peak().nbytes

    allocator = CachingAllocator(AllocatorSettings.from_string("expandable_segments:True"), total_bytes=4 * GIB)
    replay = allocator.replay(trace.requests())
    assert replay.oom is None
    assert replay.checkpoints[-1].peak_allocated_bytes >= trace.peak().nbytes
    assert sum(segment.mapped_bytes for segment in allocator.segments()) == allocator.stats.reserved_bytes
