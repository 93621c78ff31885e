"""The torch engine: offloaded or not, split or whole, interrupted or not, a step is the same step."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zero_worker import LEARNING_RATE, TOTAL, images, losses, make, profile, train

from nvae_lowmem.model.hooks import BN_MOMENTUM
from nvae_lowmem.model.latents import SeededNoise
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.regularizers import begin_micro_batch, end_step
from nvae_lowmem.training.engines.host_adamax import HostAdamax
from nvae_lowmem.training.engines.torch_engine import GOOD_STEPS, TorchEngine
from nvae_lowmem.training.step import StepResult

ON_HOST = {"offload_optimizer": True}
PRECISIONS = ("fp32", "bf16", "fp16")
# so small a scale that no gradient of this model overflows, and half precision's small gradients survive
FITTING_SCALE = 2.0**9
where_the_states_are = pytest.mark.parametrize("plan", [{}, ON_HOST], ids=["device", "host"])
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=f"{name}: {{}}".format)


def with_scale(engine: Any, scale: float) -> Any:
    engine.load_state(engine.state() | {"loss_scale": torch.tensor(scale)})
    return engine


class WatchingAdamax(HostAdamax):
    """Adamax that remembers the norm of the gradients it was given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norms: list[float] = []

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])).item())
        return super().step(closure)


# --- states on the host -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [{}, {"clip_norm": 0.5, "adamax_eps": 1.0}], ids=["early", "clipped"])
@every_precision
def test_with_states_on_the_host_training_is_bit_for_bit_the_same(precision: str, training: dict[str, float]) -> None:
    accumulation = 2  # a gradient is first copied to the host, then added to
    runs = []
    for plan in ({}, ON_HOST):
        run = profile(plan, **training)
        engine = with_scale(make(TorchEngine, run, accumulation, precision=precision), FITTING_SCALE)
        runs.append((losses(train(engine, run, range(2), accumulation)), engine.state()))
    (expected, state), (found, found_state) = runs
    assert torch.equal(found, expected)
    assert_same_state(found_state, state)
    assert any(key.startswith("exp_inf.") and bool(value.any()) for key, value in state.items())


def test_with_states_on_the_host_no_gradient_stays_on_the_device() -> None:
    run = profile(ON_HOST)
    engine = make(TorchEngine, run, accumulation=2)
    seen: list[Tensor | None] = []
    for index in range(2):
        terms = engine.forward(images(0, 2 * index, 2), SeededNoise(1), 1.0)
        engine.backward(terms.loss, last=index == 1)
        seen += [p.grad for p in engine.model.parameters()]
    assert len(seen) == 2 * len(list(engine.model.parameters())) and all(grad is None for grad in seen)


def test_states_on_the_host_are_updated_while_backward_is_still_under_way() -> None:
    run = profile(ON_HOST)
    engine = make(TorchEngine, run)
    before = {name: value.clone() for name, value in engine.state().items()}
    engine.begin(LEARNING_RATE)
    engine.backward(engine.forward(images(0, 0, TOTAL), SeededNoise(1), 1.0).loss, last=True)
    after = engine.state()  # the masters; the update is not called yet
    moved = [name for name in before if name.startswith("weight.") and not torch.equal(after[name], before[name])]
    assert len(moved) == len(list(engine.model.parameters()))
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter.detach(), before[f"weight.{name}"])
    engine.update()
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter.detach(), after[f"weight.{name}"])


# --- accumulation -----------------------------------------------------------------------------------------------------


@where_the_states_are
def test_four_micro_batches_of_one_are_one_of_four(plan: dict[str, Any]) -> None:
    """Where the images of a batch do not see each other: fixed BatchNorm statistics, no balancing of the KL."""
    run = profile(plan, kl_balance=False)
    assert run.training.regulariser > 0
    results = []
    for accumulation in (1, TOTAL):
        engine = make(TorchEngine, run, accumulation, evaluating=True)
        results.append((losses(train(engine, run, range(3), accumulation)), engine.state()))
    (expected, state), (found, found_state) = results
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    assert_same_state(found_state, state, 1e-5)


def test_a_steps_figures_are_the_means_over_its_micro_batches() -> None:
    run = profile(kl_balance=False)
    whole, split = (
        train(make(TorchEngine, run, n, evaluating=True), run, range(1), n)[0]._replace(update=None)  # type: ignore[arg-type]
        for n in (1, 2)
    )
    for name in StepResult._fields:
        expected, found = getattr(whole, name), getattr(split, name)
        if isinstance(expected, Tensor) and name != "active":  # a share of channels over a threshold is no mean
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=f"{name}: {{}}".format)


def statistics(model: NVAE) -> list[Tensor]:
    """Copies of every running mean and variance."""
    used = [running for layer in model.layers() if (running := layer.running()) is not None]
    return [t.clone() for running in used for t in (running.mean, running.variance)]


@settings(max_examples=4, deadline=None, derandomize=True)
@given(count=st.integers(1, 5), seed=st.integers(0, 99))
def test_micro_batches_move_the_running_statistics_once_by_the_mean_of_theirs(count: int, seed: int) -> None:
    model = make(TorchEngine, profile()).model
    before = statistics(model)
    batches = [torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
    own = []
    with torch.no_grad():
        for i, batch in enumerate(batches):
            alone = copy.deepcopy(model)
            for layer in alone.layers():
                layer.settings.momentum = 1.0  # the running statistics become the batch's own
            alone(batch, SeededNoise(i))
            own.append(statistics(alone))
        for i, batch in enumerate(batches):
            begin_micro_batch(model, i, count, 0.0, step=1)
            model(batch, SeededNoise(i))
    assert before and len(own) == count
    for start, moved, *batch_own in zip(before, statistics(model), *own, strict=True):
        mean = torch.stack(batch_own).mean(0)
        torch.testing.assert_close(moved, torch.lerp(start, mean, BN_MOMENTUM), rtol=1e-5, atol=1e-7)
    end_step(model)
    assert {layer.settings.momentum for layer in model.layers()} == {BN_MOMENTUM} and model.settings.coefficient == 0.0


# --- loss scale and clipping ------------------------------------------------------------------------------------------


@where_the_states_are
def test_an_overflow_skips_the_step_halves_the_scale_and_training_goes_on(plan: dict[str, Any]) -> None:
    run = profile(plan)
    engine = with_scale(make(TorchEngine, run, precision="fp16"), 2.0**40)
    before = {name: value.clone() for name, value in engine.state().items()}
    (first,) = train(engine, run, range(1))
    assert first.update.overflow and engine.loss_scale == 2.0**39
    skipped = engine.state()
    assert all(torch.equal(skipped[name], before[name]) for name in before if name.startswith("weight."))
    assert not any(name.startswith("exp_avg.") and bool(value.any()) for name, value in skipped.items())
    with_scale(engine, 2.0**14)  # nearer to a scale that fits, for the sake of time
    results = train(engine, run, range(1, 7))
    skips = sum(result.update.overflow for result in results)
    assert 0 < skips < len(results)
    assert engine.loss_scale == 2.0 ** (14 - skips) and torch.isfinite(losses(results)).all()
    trained = engine.state()
    assert all(torch.isfinite(value).all() for value in trained.values())
    assert not any(torch.equal(trained[name], before[name]) for name in before if name.startswith("weight."))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_fp16_has_a_loss_scale(precision: str) -> None:
    run = profile()
    engine = with_scale(make(TorchEngine, run, precision=precision), 2.0**11)  # of a run in fp16
    assert engine.loss_scale == 1.0
    assert not any(result.update.overflow for result in train(engine, run, range(2)))


def test_the_regulariser_weighs_the_same_at_every_loss_scale() -> None:
    """Its gradient is added to scaled ones, so it has to be scaled alike."""
    states = []
    for scale in (2.0**7, 2.0**9):
        run = profile(regulariser=10.0, adamax_eps=1.0)
        engine = with_scale(make(TorchEngine, run, precision="fp16"), scale)
        assert not any(result.update.overflow for result in train(engine, run, range(2)))
        states.append({k: v for k, v in engine.state().items() if k != "loss_scale"})
    assert_same_state(states[0], states[1], 2e-3)


@where_the_states_are
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_is_clipped_is_the_true_gradient(precision: str, plan: dict[str, Any]) -> None:
    limit = 0.5
    clipped, free = profile(plan, clip_norm=limit), profile(plan, clip_norm=1e9)
    results: dict[float, Any] = {}
    given_: dict[float, float] = {}
    for run in (clipped, free):
        kind = functools.partial(TorchEngine, make_optimizer=WatchingAdamax)
        engine = with_scale(make(kind, run, precision=precision), FITTING_SCALE)
        results[run.training.clip_norm] = train(engine, run, range(1))[0]
        given_[run.training.clip_norm] = engine.optimizer.norms[0]
    norms = {bound: float(result.update.gradient_norm) for bound, result in results.items()}
    assert norms[limit] == norms[1e9] > 2 * limit  # told before clipping
    assert given_[1e9] == pytest.approx(norms[1e9], rel=1e-4) and given_[limit] == pytest.approx(limit, rel=1e-4)
    full = make(functools.partial(TorchEngine, make_optimizer=WatchingAdamax), free)
    train(full, free, range(1))
    assert norms[limit] == pytest.approx(full.optimizer.norms[0], rel=2e-2)  # neither scaled nor counted twice


def test_without_clipping_nobody_computes_the_norm() -> None:
    run = profile()
    assert train(make(TorchEngine, run), run, range(1))[0].update.gradient_norm is None


# --- state ------------------------------------------------------------------------------------------------------------


@where_the_states_are
@every_precision
def test_a_run_goes_on_exactly_where_its_state_was_taken(precision: str, plan: dict[str, Any]) -> None:
    run = profile(plan)
    whole = with_scale(make(TorchEngine, run, precision=precision), FITTING_SCALE)
    expected = losses(train(whole, run, range(4)))
    first = with_scale(make(TorchEngine, run, precision=precision), FITTING_SCALE)
    train(first, run, range(2))
    state = {name: value.clone() for name, value in first.state().items()}
    # the other engine has trained on something else, so that whatever is not in the state shows
    other = make(TorchEngine, run, precision=precision)
    train(other, run, range(10, 11))
    other.load_state(state)
    assert_same_state(other.state(), state)
    assert torch.equal(losses(train(other, run, range(2, 4))), expected[2:])
    assert_same_state(other.state(), whole.state())


def test_a_state_moves_between_states_on_the_device_and_on_the_host() -> None:
    expected = losses(train(make(TorchEngine, profile()), profile(), range(3)))
    state: dict[str, Tensor] | None = None
    for index, plan in enumerate((None, ON_HOST, None)):
        run = profile(plan)
        engine = make(TorchEngine, run)
        if state is not None:
            engine.load_state(state)
        assert torch.equal(losses(train(engine, run, range(index, index + 1))), expected[index : index + 1])
        state = engine.state()


def test_the_state_names_everything_that_moves() -> None:
    run = profile()
    engine = make(TorchEngine, run, precision="fp16")
    untrained = engine.state()
    names = [name for name, _ in engine.model.named_parameters()]
    buffers = {f"buffer.{name}" for name in engine.model.state_dict()} - {f"buffer.{name}" for name in names}
    assert untrained.keys() == {f"weight.{name}" for name in names} | buffers | {"loss_scale", GOOD_STEPS}
    assert any(name.endswith(".u") for name in buffers) and any(name.endswith("_variance") for name in buffers)
    with_scale(engine, FITTING_SCALE)
    train(engine, run, range(1))
    trained = engine.state()
    assert trained.keys() - untrained.keys() == {f"{k}.{n}" for n in names for k in ("step", "exp_avg", "exp_inf")}
    assert all(value.device.type == "cpu" and not value.requires_grad for value in trained.values())


def test_the_learning_rate_of_a_step_is_the_one_given() -> None:
    run = profile(regulariser=0.0, weight_decay=0.0)
    engine = make(TorchEngine, run)
    before = {name: value.clone() for name, value in engine.state().items() if name.startswith("weight.")}
    engine.begin(0.0)
    engine.backward(engine.forward(images(0, 0, TOTAL), SeededNoise(1), 1.0).loss, last=True)
    engine.update()
    after = engine.state()
    assert all(torch.equal(after[name], value) for name, value in before.items())
