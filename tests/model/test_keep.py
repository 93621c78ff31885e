"""Memory policies: whatever a block keeps, training is the same; what it keeps is less, policy by policy."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    build,
    images,
    loss_of,
    saved_storages,
    tiny_rgb,
)
from torch import Tensor, nn

from nvae_lowmem.config.sections import KEEPS, Keep, MemoryPlan, Profile, TrainConfig
from nvae_lowmem.data.labels import label_rows
from nvae_lowmem.data.pipeline import MicroBatch
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.memory.trace.training import trace_training
from nvae_lowmem.model import functional as functional_module
from nvae_lowmem.model import layers as layers_module
from nvae_lowmem.model.hooks import BN_MOMENTUM
from nvae_lowmem.model.keep import HostStore, KeepRunner, apply_plan
from nvae_lowmem.model.latents import SeededNoise
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import Objective
from nvae_lowmem.training.ema import WeightEma
from nvae_lowmem.training.engines.host_adamax import HostAdamax
from nvae_lowmem.training.engines.torch_engine import TorchEngine
from nvae_lowmem.training.resolve import run_without_data
from nvae_lowmem.training.step import Training, training_step

# RGB, flows, classes, a scale of two groups and one of one: every kind of block, as small as it gets
CONFIG = tiny_rgb(preprocess_cells=1, postprocess_cells=1, adaptive=True, classes=3)
TOTAL_BATCH, STEPS = 6, 2
FITTING_SCALE = 2.0**6  # a loss scale in fp16 that no gradient of this model overflows
# beta and with it the balancing coefficients move, and every step regularises and decays
TRAINING = TrainConfig(total_batch=TOTAL_BATCH, regulariser=1e-2, kl_balance=True)
BLOCKS = [name for name in build(CONFIG).block_names() if name != "start"]  # the start has nothing to keep
every_policy = pytest.mark.parametrize("keep", KEEPS)
every_other_policy = pytest.mark.parametrize("keep", [k for k in KEEPS if k != "all"])


class RecordingAdamax(HostAdamax):
    """Adamax that remembers the gradients it was given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Tensor] = []

    def step(self, closure: Any = None) -> Any:
        parameters = (p for group in self.param_groups for p in group["params"])
        self.seen += [p.grad.clone() for p in parameters if p.grad is not None]
        return super().step(closure)


class Run(NamedTuple):
    """What a few steps leave behind."""

    losses: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, Tensor]


def plan_of(keeps: Sequence[Keep]) -> MemoryPlan:
    return MemoryPlan(keep_blocks=dict(zip(BLOCKS, keeps, strict=True)))


def train(plan: MemoryPlan, accumulation: int = 1, precision: str = "fp32", steps: int = STEPS) -> Run:
    """A few optimiser steps from the same weights every time."""
    model = build(CONFIG).train()
    apply_plan(model, plan)
    profile = Profile(model=CONFIG, training=TRAINING, plan=plan)
    engine = TorchEngine(
        Objective(model, TRAINING, precision), profile, torch.device("cpu"), accumulation, RecordingAdamax
    )
    # from the usual first scale the first steps would all overflow and be skipped
    engine.load_state(engine.state() | {"loss_scale": torch.tensor(FITTING_SCALE)})
    run = run_without_data(profile, TOTAL_BATCH // accumulation, accumulation, total_steps=10)
    training = Training(run=run, engine=engine, ema=None)

    def micro_batches(step: int) -> Iterator[MicroBatch]:
        x = images(CONFIG, TOTAL_BATCH, seed=step)
        labels = label_rows([0, 1, 2, -1, 1, 1], CONFIG.classes)
        return (MicroBatch(slots.start, x[slots], labels[slots]) for slots in run.split.slots(rank=0))

    results = [training_step(training, micro_batches(step), step) for step in range(steps)]
    assert isinstance(engine.optimizer, RecordingAdamax) and not any(r.update.overflow for r in results)
    return Run([r.loss for r in results], engine.optimizer.seen, engine.state())


@functools.cache
def reference(accumulation: int = 1, precision: str = "fp32") -> Run:
    return train(MemoryPlan(keep="all"), accumulation, precision)


def assert_same_bits(found: Run, expected: Run) -> None:
    for ours, theirs in zip(found.losses, expected.losses, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        assert torch.equal(ours, theirs)
    assert found.state.keys() == expected.state.keys()
    different = [name for name, value in expected.state.items() if not torch.equal(found.state[name], value)]
    assert not different


# --- the same training ------------------------------------------------------------------------------------------------


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    keeps=st.lists(st.sampled_from(KEEPS), min_size=len(BLOCKS), max_size=len(BLOCKS)),
    accumulation=st.sampled_from([1, 3]),
)
def test_any_mixture_of_policies_trains_bit_for_bit_alike(keeps: list[Keep], accumulation: int) -> None:
    assert_same_bits(train(plan_of(keeps), accumulation), reference(accumulation))


@every_other_policy
def test_one_policy_everywhere_trains_bit_for_bit_alike(keep: Keep) -> None:
    expected = reference(accumulation=3)
    assert expected.gradients and not torch.equal(*expected.losses)
    assert_same_bits(train(MemoryPlan(keep=keep), accumulation=3), expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@every_other_policy
def test_in_half_precision_it_stays_finite_and_near(keep: Keep, precision: str) -> None:
    found, expected = train(MemoryPlan(keep=keep), precision=precision), reference(precision=precision)
    assert all(torch.isfinite(value).all() for value in (*found.losses, *found.state.values()))
    # a recomputation repeats roundings, so that the policies differ by less than half precision does from full
    for ours, theirs in zip(found.losses, expected.losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0.0)
    for name, value in expected.state.items():
        torch.testing.assert_close(found.state[name], value, rtol=1e-2, atol=1e-3, msg=f"{name}: {{}}".format)


# --- what moves, moves once -------------------------------------------------------------------------------------------


def backward_of_one_pass(model: NVAE, noise: Any) -> None:
    loss_of(model(images(CONFIG), noise)).backward()


@every_policy
def test_running_statistics_move_by_one_momentum_per_step(keep: Keep) -> None:
    model, batch_statistics = build(CONFIG), build(CONFIG)
    for layer in batch_statistics.layers():
        layer.settings.momentum = 1.0
    with torch.no_grad():
        batch_statistics(images(CONFIG), SeededNoise(0))
    apply_plan(model, MemoryPlan(keep=keep))
    before = [used for layer in model.layers() if (used := layer.running()) is not None]
    start = [(used.mean.clone(), used.variance.clone()) for used in before]
    backward_of_one_pass(model, SeededNoise(0))
    own = [used for layer in batch_statistics.layers() if (used := layer.running()) is not None]
    assert own
    for moved, (mean, variance), batch in zip(before, start, own, strict=True):
        torch.testing.assert_close(moved.mean, torch.lerp(mean, batch.mean, BN_MOMENTUM))
        torch.testing.assert_close(moved.variance, torch.lerp(variance, batch.variance, BN_MOMENTUM))


@every_policy
def test_every_convolution_does_its_power_iterations_once_per_step(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, original = build(CONFIG), list[int](), layers_module.power_iteration

    def counted(w: Tensor, u: Tensor, v: Tensor, iterations: int) -> Tensor:
        seen.append(u.data_ptr())
        return original(w, u, v, iterations)

    monkeypatch.setattr(layers_module, "power_iteration", counted)
    apply_plan(model, MemoryPlan(keep=keep))
    model.settings.iterations = 4
    backward_of_one_pass(model, SeededNoise(0))
    units = [m for m in model.modules() if isinstance(m, layers_module.ConvUnit)]
    assert sorted(seen) == sorted(unit.u.data_ptr() for unit in units)


class RecordedNoise:
    """Seeded noise that remembers what it gave each group."""

    def __init__(self) -> None:
        self.given: dict[int, list[Tensor]] = {}

    def normal(self, group: int, shape: Sequence[int], device: torch.device) -> Tensor:
        eps = SeededNoise(7).normal(group, shape, device)
        self.given.setdefault(group, []).append(eps)
        return eps


@every_policy
def test_noise_asked_for_again_is_the_same_and_no_generator_moves(keep: Keep) -> None:
    model, noise = build(CONFIG), RecordedNoise()
    apply_plan(model, MemoryPlan(keep=keep))
    before = torch.get_rng_state()
    backward_of_one_pass(model, noise)
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(noise.given) == list(range(CONFIG.total_groups))
    for draws in noise.given.values():
        assert (len(draws) > 1) == (keep != "all")
        assert all(torch.equal(draw, draws[0]) for draw in draws)


# --- what is kept -----------------------------------------------------------------------------------------------------


def saved_bytes(*plans: MemoryPlan) -> int:
    """Bytes that autograd holds between forward and backward, weights aside, under the last of the plans."""
    model = build(CONFIG)
    for plan in plans:
        apply_plan(model, plan)
    return sum(t.untyped_storage().nbytes() for t in saved_storages(model, images(CONFIG), SeededNoise(0)).values())


def test_all_keeps_more_than_cheap_and_cheap_more_than_input_and_host_nearly_nothing() -> None:
    everything, cheap, block_input, host = (saved_bytes(MemoryPlan(keep=keep)) for keep in KEEPS)
    assert everything > 1.5 * cheap and cheap > 1.5 * block_input and block_input > 4 * host


@pytest.mark.parametrize("block", ["pre_0_0", "enc_0_0", "dec_0_1", "dec_1_up", "post_0_0"])
def test_one_block_alone_keeps_less(block: str) -> None:
    sizes = [saved_bytes(MemoryPlan(keep_blocks={block: keep})) for keep in ("all", "cheap", "input")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert sizes[0] == saved_bytes(MemoryPlan())


def kept_on_card_and_host(keep: Keep) -> tuple[int, int]:
    """(saved activations and block inputs live as backward begins, host memory made in forward), by the tracer."""
    model = replace(CONFIG, scales=1, groups=2)  # a trace takes seconds
    profile = Profile(model=model, training=TRAINING, plan=MemoryPlan(keep=keep, precision="fp32"))
    trace = trace_training(profile, micro_batch=2, steps=1)
    start = next(a.born for a in trace.allocations if a.phase == "backward")
    live = [a for a in trace.allocations if a.born < start and not 0 <= a.died <= start and a.phase == "forward"]
    kept = sum(a.nbytes for a in live if a.category in ("saved activation", "block input"))
    return kept, sum(a.nbytes for a in live if a.category == "host")


def test_the_traced_step_keeps_less_policy_by_policy_and_host_moves_the_inputs_over() -> None:
    (everything, no_host), (cheap, _), (block_input, _), (host, parked) = map(kept_on_card_and_host, KEEPS)
    assert everything > 1.5 * cheap and cheap > 1.5 * block_input and block_input > 2 * host
    assert no_host == 0 and parked > 0.5 * block_input


# --- where policies do not matter -------------------------------------------------------------------------------------


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a policy acted where nothing is kept")


@every_other_policy
def test_without_gradients_no_policy_acts(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = build(CONFIG).eval(), build(CONFIG).eval()
    apply_plan(model, MemoryPlan(keep=keep))
    monkeypatch.setattr(functional_module, "checkpoint", refuse)
    monkeypatch.setattr(HostStore, "pack", refuse)
    with torch.no_grad():
        found, expected = (loss_of(m(images(CONFIG), SeededNoise(0))) for m in (model, plain))
    assert torch.equal(found, expected)


@every_other_policy
def test_in_evaluation_mode_gradients_are_the_same_and_no_statistic_moves(keep: Keep) -> None:
    grads = []
    for plan in (MemoryPlan(), MemoryPlan(keep=keep)):
        model = build(CONFIG).eval()
        before = copy.deepcopy(model.state_dict())
        apply_plan(model, plan)
        model.settings.iterations = 4
        backward_of_one_pass(model, SeededNoise(0))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        grads.append([p.grad for p in model.parameters()])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unknown", ["dec_7_0", "decoder_*", "Stem", "start"])
def test_blocks_that_the_model_does_not_have_are_named(unknown: str) -> None:
    with pytest.raises(ConfigError, match=r"plan\.keep_blocks") as caught:
        apply_plan(build(CONFIG), MemoryPlan(keep_blocks={"stem": "input", unknown: "input"}))
    assert repr(unknown) in str(caught.value) and "'stem'" not in str(caught.value)


def test_names_and_the_longest_prefix_decide_what_a_block_keeps() -> None:
    model = build(CONFIG)
    apply_plan(model, MemoryPlan(keep="cheap", keep_blocks={"dec_*": "input", "dec_0_*": "host", "dec_0_1": "all"}))
    assert isinstance(model.run_block, KeepRunner)
    keeps = model.run_block.keeps
    wanted = {"stem": "cheap", "enc_0_0": "cheap", "dec_1_0": "input", "dec_1_up": "input", "dec_0_0": "host"}
    assert wanted.items() <= keeps.items() and keeps["dec_0_1"] == "all"
    assert len(keeps) == len(BLOCKS)


def test_a_later_plan_replaces_the_earlier_one() -> None:
    assert saved_bytes(MemoryPlan(keep="input"), MemoryPlan(keep="all")) == saved_bytes(MemoryPlan(keep="all"))


def test_the_head_takes_the_plans_chunk_size() -> None:
    model = build(CONFIG)
    apply_plan(model, MemoryPlan(likelihood_chunk_bytes=12345))
    assert model.blocks["head"].chunk_bytes == 12345


def average_of(model: nn.Module) -> nn.Module:
    return WeightEma(model, 0.9).module


@pytest.mark.parametrize("copied", [copy.deepcopy, average_of])
def test_a_model_with_a_plan_can_be_copied(copied: Callable[[nn.Module], Any]) -> None:
    model = build(CONFIG)
    apply_plan(model, plan_of([KEEPS[i % len(KEEPS)] for i in range(len(BLOCKS))]))
    backward_of_one_pass(model, SeededNoise(0))  # so that the host store has been at work
    twin = copied(model)
    assert isinstance(model.run_block, KeepRunner)
    assert twin.run_block is not model.run_block and twin.run_block.keeps == model.run_block.keeps
    with torch.no_grad():
        found, expected = (loss_of(m.eval()(images(CONFIG), SeededNoise(1))) for m in (twin, model))
    assert torch.equal(found, expected)
    twin.train().requires_grad_()
    backward_of_one_pass(twin, SeededNoise(0))
    assert all(p.grad is not None for p in twin.parameters())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(elements=st.integers(0, 4096), dtype=st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]))
def test_the_host_store_gives_back_what_it_was_given_and_leaves_small_things_alone(
    elements: int, dtype: torch.dtype
) -> None:
    store, tensor = HostStore(), torch.arange(elements).to(dtype)
    packed = store.pack(tensor)
    assert (packed is tensor) == (elements < 1024 or not dtype.is_floating_point)
    assert torch.equal(store.unpack(packed), tensor)


def test_what_a_block_kept_on_the_host_is_on_its_way_before_the_block_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, on_their_way, unpack = build(CONFIG), list[bool](), HostStore.unpack

    def watched(self: HostStore, parked: Any) -> Tensor:
        if not isinstance(parked, Tensor):
            on_their_way.append(parked.back is not None)
        return unpack(self, parked)

    monkeypatch.setattr(HostStore, "unpack", watched)
    apply_plan(model, MemoryPlan(keep="host"))
    backward_of_one_pass(model, SeededNoise(0))
    # the head comes first in backward: its two inputs, the state and the images, are fetched when they are needed
    assert len(on_their_way) > len(BLOCKS) and all(on_their_way[2:])
