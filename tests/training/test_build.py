"""What a step works with is made in one order, for whoever runs steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from zero_worker import CPU, MODEL, TOTAL, images, profile

from nvae_lowmem.data.pipeline import MicroBatch
from nvae_lowmem.model.keep import KeepRunner
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.build import build_model, build_training, engine_factory, prepare_for_inference
from nvae_lowmem.training.engines.torch_engine import TorchEngine
from nvae_lowmem.training.resolve import run_without_data
from nvae_lowmem.training.step import training_step


def test_the_seed_decides_the_initial_weights() -> None:
    first, again = build_model(profile(seed=3)), build_model(profile(seed=3))
    other = build_model(profile(seed=4))
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_policies_are_on_the_model_and_not_on_its_average() -> None:
    run = run_without_data(profile({"keep": "input"}), TOTAL)
    training = build_training(run, build_model(run.profile), CPU)
    assert isinstance(training.engine, TorchEngine) and engine_factory("torch") is TorchEngine
    assert isinstance(training.engine.model.run_block, KeepRunner) and training.engine.model.training
    assert training.ema is not None
    assert not isinstance(training.ema.module.run_block, KeepRunner)


def test_the_step_moves_the_average() -> None:
    run = run_without_data(profile(ema_decay=0.5), TOTAL)
    training = build_training(run, build_model(run.profile), CPU)
    before = [p.clone() for p in training.engine.model.parameters()]
    training_step(training, iter([MicroBatch(0, images(0, 0, TOTAL))]), 0)
    decay = min(0.5, 2 / 11)  # the average's own warm-up: (1 + 1) / (10 + 1) after the first step
    assert training.ema is not None
    for old, new, averaged in zip(
        before, training.engine.model.parameters(), training.ema.module.parameters(), strict=True
    ):
        torch.testing.assert_close(averaged.detach(), decay * old + (1 - decay) * new.detach())


def test_without_a_decay_there_is_no_average() -> None:
    run = run_without_data(profile(ema_decay=0.0), TOTAL)
    assert build_training(run, build_model(run.profile), CPU).ema is None


@pytest.mark.parametrize("asked", [True, False])
def test_a_model_is_initialised_from_data_before_its_average_is_made(asked: bool) -> None:
    model = replace(MODEL, architecture="res_elu", data_init=True)
    run = run_without_data(replace(profile(), model=model), TOTAL)
    drawn: list[Tensor] = []

    def first_images(step: int) -> Tensor:
        drawn.append(images(step, 0, TOTAL))
        return drawn[0]

    network = build_model(run.profile)
    fresh = [p.clone() for p in network.parameters()]
    training = build_training(run, network, CPU, first_images=first_images if asked else None)
    assert len(drawn) == asked and training.ema is not None
    now, averaged = list(training.engine.model.parameters()), list(training.ema.module.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(fresh, now, strict=True)) == asked
    assert all(torch.equal(a, b) for a, b in zip(now, averaged, strict=True))


def test_inference_runs_whole_blocks_in_the_plans_chunks_of_the_likelihood() -> None:
    run = profile({"keep": "host", "keep_blocks": {"head": "input"}, "likelihood_chunk_bytes": 12345})
    model = prepare_for_inference(NVAE(MODEL), run)
    assert not model.training and model.blocks["head"].chunk_bytes == 12345
    assert isinstance(model.run_block, KeepRunner) and set(model.run_block.keeps.values()) == {"all"}
