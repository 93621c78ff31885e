"""A profile whose model or plan is changed after it was fitted says so, and promises nothing any more."""

from __future__ import annotations

import pytest
import torch

from nvae_lowmem.config.profile_file import CHANGED, load, override
from nvae_lowmem.training.resolve import resolve_run

FITTED = load("gtx-970-celeba64")


@pytest.mark.parametrize(
    "change",
    ["model.groups=5", "training.total_batch=32", 'plan.keep="input"', "training.ema_on_host=false", "model.flows=0"],
)
def test_a_change_of_what_a_plan_was_fitted_to_is_said_and_takes_the_prediction_away(change: str) -> None:
    extra = ["plan.micro_batch=16"] if "total_batch" in change else []
    profile = override(FITTED, [change, *extra])
    assert not any(key.startswith("predicted_") for key in profile.provenance)
    key = change.partition("=")[0]
    assert profile.provenance[CHANGED] == key
    run = resolve_run(profile.with_plan(precision="fp32"), 1000, torch.device("cpu"), 1)
    (warning,) = [reason for reason in run.reasons if reason.startswith("WARNING")]
    assert key in warning and "fit it anew" in warning


@pytest.mark.parametrize("change", ["training.epochs=3", "training.seed=5", "data.source=faces", "model.flows=1"])
def test_other_changes_and_none_at_all_leave_the_prediction_as_it_is(change: str) -> None:
    profile = override(FITTED, [change])
    assert profile.provenance == FITTED.provenance
    run = resolve_run(profile.with_plan(precision="fp32"), 1000, torch.device("cpu"), 1)
    assert not any("WARNING" in reason for reason in run.reasons)
