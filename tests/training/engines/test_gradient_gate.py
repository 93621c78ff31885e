"""Steps whose gradient is too large are skipped, in every engine; what decides it goes with the checkpoint."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from zero_worker import make, profile, train

from nvae_lowmem.config.sections import Profile, TrainConfig
from nvae_lowmem.training.engines.deepspeed_engine import ZeroEngine
from nvae_lowmem.training.engines.gradient_gate import ENOUGH, GradientGate
from nvae_lowmem.training.engines.torch_engine import GOOD_STEPS, TorchEngine


def with_training(run: Profile, **changes: Any) -> Profile:
    return dataclasses.replace(run, training=dataclasses.replace(run.training, **changes))


def test_a_quantile_needs_some_norms_first_and_follows_them() -> None:
    gate = GradientGate(TrainConfig(skip_gradient_quantile=0.99))
    assert not any(gate.refuses(1.0 + i % 3) for i in range(ENOUGH)) and not gate.refuses(math.inf)
    assert gate.refuses(3.5) and not gate.refuses(2.0)
    other = GradientGate(TrainConfig(skip_gradient_quantile=0.99))
    other.load_state(gate.state())
    assert other.refuses(1e3) and not GradientGate(TrainConfig()).refuses(1e30)


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        (TorchEngine, {}),
        (TorchEngine, {"offload_optimizer": True}),
        (ZeroEngine, {"zero_stage": 0}),
        (ZeroEngine, {"zero_stage": 1}),
        (ZeroEngine, {"zero_stage": 2, "offload_optimizer": True}),
        (ZeroEngine, {"zero_stage": 3}),
    ],
    ids=["torch", "torch host", "ZeRO 0", "ZeRO 1", "ZeRO 2 host", "ZeRO 3"],
)
def test_a_refused_step_changes_neither_weights_nor_states_and_the_next_one_is_as_ever(
    kind: Any, plan: dict[str, Any]
) -> None:
    free, gated = profile(plan), with_training(profile(plan), skip_gradient_norm=1e-6)
    engine = make(kind, gated, evaluating=True)
    before = engine.state()
    (result,) = train(engine, gated, range(1))
    after = engine.state()
    assert result.update.refused and not result.update.overflow and float(result.update.gradient_norm) > 1e-6
    moved = [name for name in before if name.startswith("weight.") and not torch.equal(before[name], after[name])]
    assert moved == [] and all(not bool(t.any()) for name, t in after.items() if name.startswith("exp_"))
    if kind is ZeroEngine:
        engine.close()
    wide = with_training(profile(plan), skip_gradient_norm=1e9)
    states = []
    for run in (free, wide):
        engine = make(kind, run, evaluating=True)
        train(engine, run, range(2))
        states.append(engine.state())
        if kind is ZeroEngine:
            engine.close()
    weights = [name for name in states[0] if name.startswith("weight.")]
    assert [name for name in weights if not torch.equal(states[0][name], states[1][name])] == []


@pytest.mark.parametrize("kind", [TorchEngine, ZeroEngine], ids=["torch", "ZeRO 2"])
def test_the_loss_scale_of_a_resumed_run_grows_when_the_others_does(kind: Any) -> None:
    run = profile()
    first, second = (make(kind, run, precision="fp16") for _ in range(2))
    step = 0
    while not (good := int(first.state()[GOOD_STEPS])):  # the first steps overflow
        train(first, run, range(step, step := step + 1))
        assert step < 30
    second.load_state(first.state())
    assert int(second.state()[GOOD_STEPS]) == good and second.loss_scale == first.loss_scale


def test_a_gradient_that_is_no_number_is_not_applied_where_its_norm_is_known() -> None:
    run = with_training(profile(), clip_norm=1.0)
    engine = make(TorchEngine, run)
    before = engine.state()
    backward = engine.backward

    def broken(loss: torch.Tensor, last: bool) -> None:
        backward(loss * math.nan, last)

    engine.backward = broken
    (result,) = train(engine, run, range(1))
    after = engine.state()
    assert result.update.overflow
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("weight."))
