"""Frozen blocks: they stay as they are to the last bit, and the others train as if nothing had been frozen."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, images, tiny_rgb
from torch import Tensor

from nvae_lowmem.config.model import Architecture, ModelConfig
from nvae_lowmem.config.sections import KEEPS, Keep, Profile, TrainConfig
from nvae_lowmem.data.pipeline import MicroBatch
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.model.freeze import freeze_blocks, frozen_blocks
from nvae_lowmem.model.keep import apply_plan
from nvae_lowmem.model.latents import SeededNoise
from nvae_lowmem.model.layers import NormLayer
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import Objective
from nvae_lowmem.model.regularizers import begin_micro_batch, regularisation_values
from nvae_lowmem.training.build import build_training
from nvae_lowmem.training.engines.torch_engine import TorchEngine
from nvae_lowmem.training.resolve import run_without_data
from nvae_lowmem.training.step import Training, training_step

CONFIG = tiny_rgb(preprocess_cells=1, postprocess_cells=1, adaptive=True)
BLOCKS = build(CONFIG).block_names()
ENCODER = ("stem", "pre_*", "enc_*", "top")
SOME = ((), ENCODER, ("stem", "pre_*"), ("dec_*", "start"), ("enc_0_0", "dec_1_0", "post_0_0", "head"), ("enc_*",))
CPU = torch.device("cpu")
COEFFICIENT = 0.01


class Pass(NamedTuple):
    """One forward and backward pass."""

    loss: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def backward(model: NVAE, keep: Keep) -> Pass:
    profile = Profile(model=CONFIG).with_plan(keep=keep)
    apply_plan(model.train(), profile.plan)
    begin_micro_batch(model, 0, 1, COEFFICIENT, 1)
    terms = Objective(model, profile.training)(images(CONFIG, 3), SeededNoise(5), 0.5)
    terms.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Pass(terms.loss.detach(), gradients, dict(model.named_buffers()))


def with_still_statistics(freeze: tuple[str, ...], config: ModelConfig = CONFIG) -> NVAE:
    """The model in which everything learns, but with the BatchNorm of those blocks as if they were frozen."""
    model = build(config)
    for name in frozen_blocks(model.block_names(), freeze):
        for layer in model.blocks[name].modules():
            if isinstance(layer, NormLayer):
                layer.frozen = True
    return model


@functools.cache
def reference(freeze: tuple[str, ...]) -> Pass:
    return backward(with_still_statistics(freeze), "all")


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("freeze", SOME, ids=str)
def test_losses_and_gradients_are_those_of_a_model_in_which_everything_learns(
    freeze: tuple[str, ...], keep: Keep
) -> None:
    model = build(CONFIG)
    freeze_blocks(model, freeze)
    found, expected = backward(model, keep), reference(freeze)
    assert torch.equal(found.loss, expected.loss)
    learning = {n for n in expected.gradients if n.split(".")[1] not in frozen_blocks(model.block_names(), freeze)}
    assert found.gradients.keys() == learning
    assert [n for n in learning if not torch.equal(found.gradients[n], expected.gradients[n])] == []
    assert [n for n, b in expected.buffers.items() if not torch.equal(found.buffers[n], b)] == []


@pytest.mark.parametrize("architecture", ["res_elu", "res_bnswish", "mbconv_den"])
def test_cells_of_every_kind_can_be_frozen_between_others(architecture: Architecture) -> None:
    config, freeze = replace(CONFIG, architecture=architecture), ("pre_*", "dec_*", "post_*")
    model = build(config)
    freeze_blocks(model, freeze)
    found, expected = (
        backward(m, "cheap" if m is model else "all") for m in (model, with_still_statistics(freeze, config))
    )
    assert torch.equal(found.loss, expected.loss) and found.gradients.keys() < expected.gradients.keys()
    assert all(torch.equal(g, expected.gradients[n]) for n, g in found.gradients.items())


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.sets(st.sampled_from(BLOCKS), max_size=len(BLOCKS) - 1), st.sampled_from(KEEPS))
def test_any_blocks_can_be_frozen_under_any_policy(freeze: set[str], keep: Keep) -> None:
    model = build(CONFIG)
    freeze_blocks(model, sorted(freeze))
    found, expected = backward(model, keep), backward(with_still_statistics(tuple(sorted(freeze))), "all")
    assert torch.equal(found.loss, expected.loss)
    assert found.gradients.keys() == {n for n in expected.gradients if n.split(".")[1] not in freeze}
    assert all(torch.equal(g, expected.gradients[n]) for n, g in found.gradients.items())


# --- training ---------------------------------------------------------------------------------------------------------


def trained(freeze: tuple[str, ...], steps: int = 3, **plan: Any) -> tuple[dict[str, Tensor], Training]:
    """(every tensor before, a training after a few steps)."""
    training = TrainConfig(freeze=freeze, total_batch=4, ema_decay=0.5, regulariser=0.1)
    profile = Profile(model=CONFIG, training=training).with_plan(precision="fp32", **plan)
    run = run_without_data(profile, 2, 2, rate=1e-2)
    model = build(CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = build_training(run, model, CPU)

    def micro_batches(step: int) -> Iterator[MicroBatch]:
        return (MicroBatch(slot, images(CONFIG, 2, seed=10 * step + slot)) for slot in (0, 2))

    for step in range(steps):
        training_step(made, micro_batches(step), step)
    return before, made


@pytest.mark.parametrize("plan", [{}, {"offload_optimizer": True}, {"keep": "host"}], ids=str)
@pytest.mark.parametrize("freeze", [ENCODER, ("dec_0*", "head")], ids=str)
def test_what_is_frozen_is_the_same_to_the_last_bit_and_everything_else_has_moved(
    freeze: tuple[str, ...], plan: dict[str, Any]
) -> None:
    before, made = trained(freeze, **plan)
    assert isinstance(made.engine, TorchEngine) and made.ema is not None
    frozen = set(frozen_blocks(made.engine.model.block_names(), freeze))
    for tensors in (made.engine.model.state_dict(), made.ema.module.state_dict()):
        moved = {name for name, tensor in tensors.items() if not torch.equal(tensor, before[name])}
        assert not {name for name in moved if name.split(".")[1] in frozen}
        weights = {n for n, p in made.engine.model.named_parameters() if p.requires_grad}
        assert weights <= moved
    state = made.engine.state()
    assert not {name for name in state if name.startswith("exp_") and name.split(".")[2] in frozen}
    assert {name for name in before if f"weight.{name}" in state or f"buffer.{name}" in state} == before.keys()


def test_a_state_goes_into_an_engine_that_has_other_blocks_frozen() -> None:
    _, part = trained(ENCODER, steps=1)
    _, whole = trained((), steps=0)
    state = part.engine.state()
    whole.engine.load_state(state)
    training_step(whole, iter([MicroBatch(s, images(CONFIG, 2, s)) for s in (0, 2)]), 1)
    assert len(whole.engine.state()) > len(state)
    part.engine.load_state(whole.engine.state())
    taken = part.engine.state()
    assert all(torch.equal(value, whole.engine.state()[name]) for name, value in taken.items())


def test_the_regularisers_values_leave_frozen_layers_out() -> None:
    model = build(CONFIG)
    spectral, norms = regularisation_values(model)
    freeze_blocks(model, [name for name in BLOCKS if name != "head"])
    assert regularisation_values(model)[0] <= spectral and regularisation_values(model)[1] == 0 < norms
    freeze_blocks(model, ())
    assert regularisation_values(model) == (spectral, norms)
    assert all(p.requires_grad for p in model.parameters())


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freeze", "told"),
    [
        (("encoder",), "training.freeze names 'encoder', a block that this model does not have; near: "),
        (("dec_0_9",), "near: dec_0_"),
        (("enc_9*",), "'enc_9*'"),
        (("*",), "names every block, so that nothing would be trained"),
    ],
)
def test_what_cannot_be_frozen_is_refused(freeze: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        freeze_blocks(build(CONFIG), freeze)
    assert told in str(caught.value)


def test_what_is_frozen_is_said() -> None:
    model = build(replace(CONFIG))
    said = freeze_blocks(model, ("stem",))
    weights = sum(p.numel() for p in model.parameters())
    stem = sum(p.numel() for p in model.blocks["stem"].parameters())
    assert said.startswith(f"frozen: 1 of {len(BLOCKS)} blocks, {stem:,} of {weights:,} weights: no gradient")
    assert freeze_blocks(model, ()) == ""
