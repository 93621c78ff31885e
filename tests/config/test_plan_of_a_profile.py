"""What a profile says of its own plan: its micro-batch, and copies with other values."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.config.sections import MemoryPlan, Profile, TrainConfig
from nvae_lowmem.training.out_of_memory import next_settings
from nvae_lowmem.training.resolve import split_batch


@given(share=st.integers(1, 300), processes=st.integers(1, 8), planned=st.booleans())
def test_a_micro_batch_of_zero_means_the_whole_share_of_a_process(share: int, processes: int, planned: bool) -> None:
    plan = MemoryPlan(micro_batch=share if planned else 0)
    profile = Profile(training=TrainConfig(total_batch=share * processes), plan=plan)
    assert split_batch(profile, processes).micro == profile.micro_batch(processes) == share


def test_the_report_of_too_little_memory_halves_what_the_run_would_take() -> None:
    profile = Profile(training=TrainConfig(total_batch=12))
    assert any(line.startswith("--micro-batch 6 ") for line in next_settings(profile))


def test_with_plan_changes_those_values_alone() -> None:
    profile = Profile(name="one", plan=MemoryPlan(keep="host", cap_bytes=7))
    changed = profile.with_plan(keep="input", micro_batch=4)
    assert changed.plan == MemoryPlan(keep="input", cap_bytes=7, micro_batch=4)
    assert dataclasses.replace(changed, plan=profile.plan) == profile
