"""What to try after training ran out of memory: nothing that is set already, nothing that cannot help there."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import MemoryPlan, Profile, TrainConfig
from nvae_lowmem.training.out_of_memory import BACKWARD, FORWARD, SET_UP, UPDATE, next_settings

PHASES = (SET_UP, "step", FORWARD, BACKWARD, UPDATE, "evaluation", "sample pictures", "checkpoint")
KEEPS = st.sampled_from(["all", "cheap", "input", "host"])


@st.composite
def profiles_of_any_plan(draw: st.DrawFn) -> Profile:
    engine, stage = draw(st.sampled_from(["torch", "deepspeed"])), draw(st.integers(0, 3))
    plan = MemoryPlan(
        engine=engine,
        zero_stage=stage,
        offload_optimizer=draw(st.booleans()) and (engine == "torch" or stage > 0),
        offload_parameters=draw(st.booleans()) and engine == "deepspeed" and stage == 3,
        micro_batch=draw(st.sampled_from([0, 1, 2, 25, 50])),
        keep=draw(KEEPS),
        keep_blocks=draw(st.dictionaries(st.sampled_from(["head", "enc_0_*"]), KEEPS)),
    )
    training = TrainConfig(total_batch=50, ema_on_host=draw(st.booleans()))
    return Profile(model=ModelConfig(image_size=32), training=training, plan=plan)


def settings_of(advice: str) -> list[str]:
    """The KEY=VALUE of an advice's flags."""
    words = shlex.split(advice.partition(" (")[0])
    pairs = zip(words[::2], words[1::2], strict=True)
    return [f"plan.micro_batch={value}" if flag == "--micro-batch" else value for flag, value in pairs]


@given(profiles_of_any_plan(), st.sampled_from(PHASES))
def test_every_advice_changes_the_profile_and_can_be_followed(profile: Profile, phase: str) -> None:
    *tips, last = next_settings(profile, phase)
    assert last.startswith("fewer groups")
    for advice in tips:
        assert profiles.override(profile, settings_of(advice)) != profile  # which also checks what goes together


@given(profiles_of_any_plan(), st.sampled_from([SET_UP, UPDATE, "evaluation", "sample pictures", "checkpoint"]))
def test_policies_are_advised_for_steps_only(profile: Profile, phase: str) -> None:
    assert not any("plan.keep" in advice for advice in next_settings(profile, phase))


@pytest.mark.parametrize(
    ("engine", "data_init", "expected"),
    [
        ("torch", False, []),
        ("torch", True, ["--micro-batch 1"]),
        ("deepspeed", False, ["--set plan.offload_optimizer=true"]),
    ],
)
def test_the_set_up_of_an_engine_is_helped_by_what_it_holds(engine: Any, data_init: bool, expected: list[str]) -> None:
    """Of torch's, the weights alone, and a first pass where weights are initialised by one; DeepSpeed copies them."""
    profile = Profile(plan=MemoryPlan(engine=engine, micro_batch=2), training=TrainConfig(total_batch=50))
    profile = replace(profile, model=replace(profile.model, data_init=data_init))
    assert [advice.partition(" (")[0] for advice in next_settings(profile, SET_UP)[:-1]] == expected
