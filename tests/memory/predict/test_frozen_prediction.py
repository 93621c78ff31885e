"""Predictions of trainings with frozen blocks are those of the real step, and lower than without."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.memory.predict import predict as predicting
from nvae_lowmem.memory.predict.predict import Prediction, predict
from nvae_lowmem.memory.trace.training import trace_training
from profiles import SMALL_RGB, profile_of

ENCODER = ("stem", "pre_*", "enc_*", "top")
OFFLOADED = {"keep": "input", "offload_optimizer": True, "precision": "fp16"}


def frozen(freeze: tuple[str, ...], **plan: Any) -> Profile:
    profile = profile_of(SMALL_RGB, **plan)
    return replace(profile, training=replace(profile.training, freeze=freeze))


def of_a_real_step(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> Prediction:
    """The prediction that comes of a step that really ran, on the CPU."""
    with monkeypatch.context() as patched:
        patched.setattr(predicting, "trace_training", functools.partial(trace_training, fake=False))
        predicting._traces.clear()
        found = predict(profile, 2)
        predicting._traces.clear()
    return found


@pytest.mark.parametrize("plan", [{}, OFFLOADED], ids=["on the card", "on the host"])
@pytest.mark.parametrize("freeze", [ENCODER, ("dec_0_*", "post_*")], ids=str)
def test_predicted_bytes_are_those_of_a_real_step(
    freeze: tuple[str, ...], plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = frozen(freeze, **plan)
    assert predict(profile, 2) == of_a_real_step(profile, monkeypatch)


@pytest.mark.parametrize("plan", [{}, OFFLOADED], ids=["on the card", "on the host"])
def test_freezing_the_encoder_takes_less_of_the_card_and_of_the_host(plan: dict[str, Any]) -> None:
    whole, part = (predict(frozen(freeze, **plan), 2) for freeze in ((), ENCODER))
    assert part.allocated_peak_bytes < whole.allocated_peak_bytes
    assert part.host_bytes < whole.host_bytes
