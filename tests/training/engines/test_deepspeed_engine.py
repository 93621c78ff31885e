"""The deepspeed engine, on the CPU with the real DeepSpeed, held against the torch engine."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("deepspeed")

from zero_worker import CPU, MODEL, PLANS, SHARED, TOTAL, finish, free_port, losses, make, profile, start, train

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.model.freeze import frozen_blocks
from nvae_lowmem.model.keep import apply_plan
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import LossTerms
from nvae_lowmem.training.divergence import Diverged
from nvae_lowmem.training.ema import WeightEma
from nvae_lowmem.training.engines import distributed
from nvae_lowmem.training.engines.deepspeed_engine import LossScale, ZeroEngine, deepspeed_config
from nvae_lowmem.training.engines.engine import Update
from nvae_lowmem.training.engines.torch_engine import TorchEngine

# pytest puts its own warning filters in the place of those of `initialise`
pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.filterwarnings("ignore:.*torch.distributed.*deprecated:FutureWarning"),
]

SCALED = ["1", "2, optimizer on host", "3, all on host"]  # stage 0 has no loss scale


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """A process group of this process alone, and the environment as it was afterwards."""
    launcher = dict.fromkeys(distributed.LAUNCHER_VARIABLES, "")
    with mock.patch.dict(os.environ, launcher):
        for name in launcher:
            del os.environ[name]
        assert distributed.initialise(CPU) == (0, 1, CPU)
        yield
        distributed.shutdown()


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


# --- the same training as the torch engine ----------------------------------------------------------------------------


@functools.cache
def torch_run() -> tuple[Tensor, dict[str, Tensor]]:
    run = profile()
    engine = make(TorchEngine, run)
    return losses(train(engine, run, range(20))), engine.state()


@pytest.mark.parametrize("name", PLANS)
def test_losses_and_state_are_those_of_the_torch_engine(name: str) -> None:
    run = profile(PLANS[name])
    assert run.training.regulariser > 0 and run.training.weight_decay > 0
    engine = make(ZeroEngine, run)
    found = losses(train(engine, run, range(20)))
    expected, state = torch_run()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    assert_same_state(engine.state(), state, 1e-5)
    engine.close()


@pytest.mark.parametrize("keep", ["all", "input"])
@pytest.mark.parametrize("name", SHARED)
def test_labels_train_as_with_the_torch_engine(name: str, keep: str) -> None:
    plain, run = (replace(p, model=replace(MODEL, classes=3)) for p in (profile(), profile(PLANS[name])))
    expected, engine = make(TorchEngine, plain), make(ZeroEngine, run)
    apply_plan(engine.model, replace(run.plan, keep=keep))
    torch.testing.assert_close(
        losses(train(engine, run, range(6))), losses(train(expected, plain, range(6))), rtol=1e-6, atol=0.0
    )
    state = engine.state()
    assert_same_state(state, expected.state(), 1e-5)
    rows = [
        value.abs().sum(1) > 0
        for key, value in state.items()
        if key.startswith("weight.") and key.endswith("class_bias.rows")
    ]
    assert rows and all(seen.tolist() == [True, True, False, True] for seen in rows)  # no image is of class 2
    engine.close()


@pytest.mark.parametrize("name", PLANS)
def test_frozen_blocks_stay_and_the_others_train_as_with_the_torch_engine(name: str) -> None:
    freeze = ("stem", "pre_*", "enc_*", "dec_1_0")
    plain, run = profile(freeze=freeze), profile(PLANS[name], freeze=freeze)
    expected, engine = make(TorchEngine, plain), make(ZeroEngine, run)
    before = engine.state()
    torch.testing.assert_close(
        losses(train(engine, run, range(6))), losses(train(expected, plain, range(6))), rtol=1e-6, atol=0.0
    )
    state = engine.state()
    assert_same_state(state, expected.state(), 1e-5)
    names = tuple(f"blocks.{block}." for block in frozen_blocks(engine.model.block_names(), freeze))
    frozen = {key for key in before if key.partition(".")[2].startswith(names)}
    assert len(frozen) > 40 and all(torch.equal(state[key], before[key]) for key in frozen)
    engine.load_state(before | {key: value for key, value in state.items() if key not in frozen})
    assert_same_state(engine.state(), state, 0.0)
    engine.close()


@pytest.mark.parametrize("name", SHARED)
def test_four_micro_batches_of_one_are_one_of_four(name: str) -> None:
    """Where the images of a batch do not see each other: fixed BatchNorm statistics, no balancing of the KL."""
    run = profile(kl_balance=False)
    whole = make(TorchEngine, run, evaluating=True)
    expected = losses(train(whole, run, range(4)))
    run = profile({**PLANS[name], "micro_batch": 1}, kl_balance=False)
    engine = make(ZeroEngine, run, accumulation=TOTAL, evaluating=True)
    found = losses(train(engine, run, range(4), accumulation=TOTAL))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)
    assert_same_state(engine.state(), whole.state(), 1e-5)
    engine.close()


@pytest.mark.parametrize("keep", ["cheap", "input", "host"])
@pytest.mark.parametrize("name", ["2, optimizer on host", "3, all on host"])
def test_blocks_that_run_again_in_backward_train_alike(name: str, keep: str) -> None:
    run = profile({**PLANS[name], "keep": keep})
    engine = make(ZeroEngine, run)
    apply_plan(engine.model, run.plan)
    found = losses(train(engine, run, range(4)))
    torch.testing.assert_close(found, torch_run()[0][:4], rtol=1e-6, atol=0.0)
    engine.close()


def test_stage_3_holds_few_weights_at_a_time() -> None:
    run = profile(PLANS["3, all on host"])
    engine = make(ZeroEngine, run)
    parameters = list(engine.model.parameters())
    held: list[int] = []
    for block in engine.model.blocks.values():
        block.register_forward_hook(lambda *_: held.append(sum(p.numel() for p in parameters)))
    train(engine, run, range(3))  # from the second step on DeepSpeed knows what comes next and fetches ahead
    assert 0 < max(held) < sum(p.ds_numel for p in parameters) / 3
    engine.close()


# --- loss scale and clipping ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALED)
def test_an_overflow_skips_the_step_and_lowers_the_scale(name: str) -> None:
    run = profile(PLANS[name])
    engine = make(ZeroEngine, run, precision="fp16")
    engine.scale.value = 2.0**40
    before = engine.state()
    (first,) = train(engine, run, range(1))
    assert first.update == Update(True, float("inf")) and engine.loss_scale == 2.0**39
    after = engine.state()
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith("weight."))
    engine.scale.value = 2.0**14  # nearer to a scale that fits, for the sake of time
    results = train(engine, run, range(1, 9))
    skipped = sum(result.update.overflow for result in results)
    assert 0 < skipped < len(results) and engine.loss_scale == 2.0 ** (14 - skipped)
    assert not results[-1].update.overflow and torch.isfinite(losses(results)).all()
    trained = engine.state()
    assert all(torch.isfinite(value).all() for value in trained.values())
    moved = [key for key in before if key.startswith("weight.") and not torch.equal(trained[key], before[key])]
    assert len(moved) == len(list(engine.model.parameters()))
    engine.close()


def test_a_nan_is_skipped_and_counted_in_fp32_too() -> None:
    run = profile(PLANS["2"])
    engine = make(ZeroEngine, run)
    engine.model.settings.coefficient = 0.0
    engine.begin(1e-3)
    engine.backward(sum(p.sum() for p in engine.model.parameters()) * float("nan"), last=True)
    assert engine.update().overflow and engine.loss_scale == 1.0
    assert torch.isfinite(losses(train(engine, run, range(2)))).all()
    engine.close()


@pytest.mark.parametrize("name", SCALED)
def test_what_is_clipped_is_the_unscaled_gradient(name: str) -> None:
    # Adamax hardly feels the gradient's size, unless eps is large
    limits = {"clip_norm": 0.5, "adamax_eps": 1.0}
    reference_run = profile(**limits)
    reference = make(TorchEngine, reference_run, precision="fp16")
    scale = {"loss_scale": torch.tensor(2.0**9)}
    reference.load_state(reference.state() | scale)
    expected = train(reference, reference_run, range(3))
    run = profile(PLANS[name], **limits)
    engine = make(ZeroEngine, run, precision="fp16")
    engine.load_state(engine.state() | scale)
    found = train(engine, run, range(3))
    torch.testing.assert_close(losses(found), losses(expected), rtol=1e-6, atol=0.0)
    norms = [torch.tensor([float(r.update.gradient_norm) for r in results]) for results in (found, expected)]
    assert engine.loss_scale == reference.loss_scale == 2.0**9
    assert norms[1].min() > 2 * limits["clip_norm"] and not any(r.update.overflow for r in found)
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=0.0)
    assert_same_state(engine.state(), reference.state(), 1e-5)
    free = make(TorchEngine, profile(adamax_eps=1.0), precision="fp16")
    free.load_state(free.state() | scale)
    train(free, profile(adamax_eps=1.0), range(3))
    with pytest.raises(AssertionError):
        assert_same_state(free.state(), reference.state(), 1e-5)
    engine.close()


def test_stage_0_clips_too() -> None:
    limits = {"clip_norm": 0.5, "adamax_eps": 1.0}
    reference_run, run = profile(**limits), profile(PLANS["0"], **limits)
    reference, engine = make(TorchEngine, reference_run), make(ZeroEngine, run)
    expected, found = train(reference, reference_run, range(2)), train(engine, run, range(2))
    assert [float(r.update.gradient_norm) for r in found] == [float(r.update.gradient_norm) for r in expected]
    assert_same_state(engine.state(), reference.state(), 1e-6)
    engine.close()


def test_the_scale_grows_after_a_thousand_good_steps_up_to_its_cap() -> None:
    scale = LossScale(dynamic=True)
    for _ in range(999):
        scale.update(overflow=False)
    assert scale.value == 2.0**16
    scale.update(overflow=False)
    assert scale.value == 2.0**17
    scale.update(overflow=True)
    assert scale.value == 2.0**16
    for _ in range(20_000):
        scale.update(overflow=False)
    assert scale.value == 2.0**24


@pytest.mark.parametrize(
    ("plan", "precision", "message"),
    [
        ({"zero_stage": 0}, "fp16", "plan.zero_stage = 1 or 2"),
        ({"zero_stage": 0, "offload_optimizer": True}, "fp32", "needs plan.zero_stage"),
    ],
)
def test_stage_0_refuses_what_it_cannot_do(plan: dict[str, object], precision: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(ZeroEngine, profile(plan), precision=precision)


# --- state ------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_unchanged_through_every_engine_and_stage() -> None:
    state: dict[str, Tensor] | None = None
    kinds = ["2, optimizer on host", "torch", "3, all on host", "1", "0", "3"]
    for index, name in enumerate(kinds):
        run = profile(PLANS.get(name))
        engine = make(TorchEngine if name == "torch" else ZeroEngine, run)
        if state is not None:
            engine.load_state(state)
            assert_same_state(engine.state(), state, 0.0)
        steps = range(2 * index, 2 * index + 2)
        torch.testing.assert_close(losses(train(engine, run, steps)), torch_run()[0][steps], rtol=1e-6, atol=0.0)
        state = engine.state()
        if name != "torch":
            engine.close()


@pytest.mark.parametrize("name", ["0", "1", "2, optimizer on host", "3, all on host"])
def test_a_state_goes_into_an_engine_that_has_trained(name: str) -> None:
    run = profile(PLANS[name])
    engine = make(ZeroEngine, run)
    untrained = engine.state()
    assert untrained.keys() == make(TorchEngine, profile()).state().keys()
    train(engine, run, range(3))
    engine.load_state(torch_run()[1])
    assert_same_state(engine.state(), torch_run()[1], 0.0)
    engine.close()


def test_the_loss_scale_is_part_of_the_state() -> None:
    run = profile(PLANS["2"])
    saved = make(ZeroEngine, run, precision="fp16")
    saved.scale.value = 2.0**11
    resumed = make(ZeroEngine, run, precision="fp16")
    resumed.load_state(saved.state())
    assert resumed.loss_scale == 2.0**11
    resumed.load_state(make(TorchEngine, profile()).state())  # fp32 has no scale to hand on
    assert resumed.loss_scale == 2.0**11


@pytest.mark.parametrize("name", ["2", "3, all on host"])
def test_gathered_weights_can_be_read_and_run_and_training_goes_on(name: str) -> None:
    run = profile(PLANS[name])
    engine = make(ZeroEngine, run)
    train(engine, run, range(2))
    reference = make(TorchEngine, profile())
    train(reference, profile(), range(2))
    for _ in range(2):
        with engine.gathered(), torch.no_grad():
            for found, expected in zip(engine.model.parameters(), reference.model.parameters(), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            x = torch.zeros(2, 1, 16, 16)
            maps = [e.model.encode(x) for e in (engine, reference, engine)]  # the second pass finds the weights too
            for found, expected, again in zip(*maps, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
                assert torch.equal(found, again)
    found = losses(train(engine, run, range(2, 5)))
    torch.testing.assert_close(found, losses(train(reference, profile(), range(2, 5))), rtol=1e-6, atol=0.0)
    engine.close()


@pytest.mark.parametrize("name", PLANS)
def test_the_average_moves_within_the_step_at_every_stage(name: str) -> None:
    """At stage 3 weights are empty but where they are gathered."""
    run, reference_run = profile(PLANS[name]), profile()
    torch.manual_seed(0)
    average = WeightEma(NVAE(MODEL), 0.9)
    engine, reference = make(ZeroEngine, run), make(TorchEngine, reference_run)
    expected = WeightEma(reference.model, 0.9)
    train(engine, run, range(2), ema=average)
    train(reference, reference_run, range(2), ema=expected)
    assert_same_state(dict(average.module.named_parameters()), dict(expected.module.named_parameters()), 1e-5)
    engine.close()


@pytest.mark.parametrize("name", PLANS)
def test_a_loss_that_is_no_number_is_refused_before_the_weights_move(name: str) -> None:
    run = profile(PLANS[name])
    engine = make(ZeroEngine, run)
    train(engine, run, range(1))
    before, forward = engine.state(), engine.forward

    def breaking(*arguments: object) -> LossTerms:
        terms = forward(*arguments)
        return terms._replace(loss=terms.loss * float("inf"))

    with mock.patch.object(engine, "forward", breaking), pytest.raises(Diverged, match="step 2: the loss is inf"):
        train(engine, run, range(1, 2))
    after = engine.state()
    moved = [key for key in before if not key.startswith("buffer.") and not torch.equal(after[key], before[key])]
    assert moved == []
    engine.close()


# --- several processes ------------------------------------------------------------------------------------------------


def test_two_processes_are_one_with_the_same_total_batch(tmp_path: Path) -> None:
    run = profile(kl_balance=False)
    reference = make(TorchEngine, run, evaluating=True)
    train(reference, run, range(2))
    torch.save(reference.state(), tmp_path / "start.pt")
    port = str(free_port())
    worker = [str(Path(__file__).parents[2] / "zero_worker.py"), str(tmp_path)]
    ranks = [{"RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": "2", "MASTER_PORT": port} for r in "01"]
    processes = [start(worker, **rank) for rank in ranks]
    outputs = finish(processes)
    assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)
    assert outputs == ["", ""], "DeepSpeed is to keep quiet"
    expected = losses(train(reference, run, range(2, 5)))
    each = [torch.load(tmp_path / f"losses_{rank}.pt") for rank in (0, 1)]
    for name in SHARED:
        assert not torch.equal(each[0][name], each[1][name]), "both processes saw the same images"
        torch.testing.assert_close((each[0][name] + each[1][name]) / 2, expected, rtol=1e-5, atol=0.0)
        assert_same_state(torch.load(tmp_path / f"{name}.pt"), reference.state(), 1e-5)


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_nothing_that_harms_a_small_card_is_left_to_deepspeed(name: str) -> None:
    config = deepspeed_config(profile(PLANS[name]), accumulation=3)
    assert not {"fp16", "bf16", "torch_autocast", "optimizer"} & config.keys()
    assert config["gradient_accumulation_steps"] == 3 and config["gradient_clipping"] == 0.0
    zero = config["zero_optimization"]
    assert zero["overlap_comm"] is False
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 2000
    for key in ("offload_optimizer", "offload_param"):
        assert zero.get(key, {}).get("pin_memory", False) is False
    assert ("offload_optimizer" in zero) == ("host" in name) and ("offload_param" in zero) == ("all on host" in name)
