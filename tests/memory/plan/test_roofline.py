"""Seconds of a step: arithmetic counted as torch counts it, the roofline, the host's part, and what policies cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import MemoryPlan, Profile, TrainConfig
from nvae_lowmem.hardware.find_card import find_card
from nvae_lowmem.memory.plan.block_costs import record_blocks
from nvae_lowmem.memory.plan.roofline import (
    HOST_SECONDS_PER_PARAMETER,
    LAUNCH_SECONDS,
    OperationCosts,
    Rates,
    operation_costs,
    rates_of,
    step_seconds,
)

RATES = Rates(fp32_flops=1e12, half_flops=4e12, bandwidth_bytes=1e11, link_bytes=1e9, pinned_link_bytes=2e9)
GIB = 1 << 30


class Counter(TorchDispatchMode):
    """Rows of `operation_costs` of everything that runs inside."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.rows: list[tuple[float, float, float, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        row = operation_costs(func, args, kwargs, out, self.batch)
        if row is not None:
            self.rows.append(row)
        return out


@pytest.mark.parametrize(
    ("kernel", "stride", "groups"), [(3, 1, 1), (1, 1, 1), (5, 1, 12), (3, 2, 1)], ids=["3x3", "1x1", "depthwise", "s2"]
)
def test_convolution_arithmetic_is_what_torch_counts(kernel: int, stride: int, groups: int) -> None:
    x = torch.randn(7, 12, 8, 8, requires_grad=True)
    w = torch.randn(24, 12 // groups, kernel, kernel, requires_grad=True)

    def step() -> None:
        torch.nn.functional.conv2d(x, w, stride=stride, padding=kernel // 2, groups=groups).sum().backward()

    with FlopCounterMode(display=False) as reference:
        step()
    with Counter(batch=7) as counted:
        step()
    ours = OperationCosts.of(counted.rows).flops() * 7
    forward = 2 * 7 * 24 * (8 // stride) ** 2 * (12 // groups) * kernel**2
    assert ours == 3 * forward
    if groups == 1 and stride == 1:  # elsewhere torch counts the weight's gradient as a dense convolution
        assert ours == reference.get_total_flops()


def test_bytes_are_split_into_those_of_the_batch_and_the_rest() -> None:
    x, scale = torch.randn(7, 10), torch.randn(10)
    with Counter(batch=7) as counted:
        x * scale
    assert counted.rows == [(0.0, 40.0, 2 * 40.0, False)]  # the scale; x and the product, per image


def test_views_move_nothing() -> None:
    x = torch.randn(7, 10)
    with Counter(batch=7) as counted:
        x.view(70).expand(3, 70)[1:].t().detach()
    assert counted.rows == []


def test_an_operation_takes_the_longest_of_arithmetic_bytes_and_launch() -> None:
    arithmetic, moving, launch = (1e12, 0.0, 0.0, False), (0.0, 1e11, 2e11, False), (0.0, 8.0, 0.0, False)
    assert OperationCosts.of([arithmetic]).seconds(3, RATES) == pytest.approx(3)
    assert OperationCosts.of([(1e12, 0.0, 0.0, True)]).seconds(3, RATES) == pytest.approx(0.75)
    assert OperationCosts.of([moving]).seconds(3, RATES) == pytest.approx(7)
    assert OperationCosts.of([launch]).seconds(3, RATES) == LAUNCH_SECONDS
    assert OperationCosts.of([arithmetic, moving, launch]).seconds(3, RATES) == pytest.approx(10 + LAUNCH_SECONDS)
    assert OperationCosts.of([]).seconds(3, RATES) == 0


rows = st.lists(st.tuples(*[st.floats(0, 1e9)] * 3, st.booleans()), max_size=5)


@given(rows, st.integers(1, 100))
def test_more_images_take_longer_but_not_longer_each(found: list[Any], images: int) -> None:
    work = OperationCosts.of(found)
    one, more = work.seconds(images, RATES), work.seconds(images + 1, RATES)
    assert one <= more
    assert more / (images + 1) <= one / images * (1 + 1e-9)


def test_the_slow_segment_counts_only_beyond_the_fast_one() -> None:
    card = find_card("gtx-970")
    plain = replace(card, slow_segment_bytes=0)
    within, beyond = int(3.2 * GIB), int(3.7 * GIB)
    assert rates_of(card, within) == rates_of(plain, within)
    slowed = rates_of(card, beyond).bandwidth_bytes / rates_of(plain, beyond).bandwidth_bytes
    slow = (beyond + card.context_bytes - (card.total_bytes_linux - card.slow_segment_bytes)) / (
        beyond + card.context_bytes
    )
    # every byte of the slow share takes 196/28 = 7 times as long
    assert slowed == pytest.approx(1 / (1 + 6 * slow))


def test_half_precision_is_as_fast_as_the_card_makes_it() -> None:
    storage, tensor = rates_of(find_card("gtx-970")), rates_of(find_card("rtx-3050-ti-laptop"))
    assert storage.half_flops == storage.fp32_flops
    assert tensor.half_flops == 2 * tensor.fp32_flops


def _profile(**plan: Any) -> Profile:
    return Profile(plan=MemoryPlan(engine="torch", **plan))


def test_the_optimizer_on_the_card_uses_no_link() -> None:
    found = step_seconds(_profile(precision="fp16"), 1.0, 4, 10**8, 0, RATES)
    assert found.link == 0
    assert found.card > 4
    assert found.total == found.card + found.optimizer


def test_an_offloaded_step_sends_each_micro_batchs_gradients_and_the_weights_once() -> None:
    plan = _profile(precision="fp16", offload_optimizer=True)
    once, four = (step_seconds(plan, 1.0, n, 10**8, 0, RATES) for n in (1, 4))
    assert once.link == pytest.approx(2 * 0.4)
    assert four.link == pytest.approx(5 * 0.4)


@pytest.mark.parametrize(
    ("precision", "clip_norm", "overlaps"), [("bf16", 0.0, True), ("bf16", 1.0, False), ("fp16", 0.0, False)]
)
def test_the_host_updates_during_backward_unless_all_gradients_must_be_known(
    precision: Any, clip_norm: float, overlaps: bool
) -> None:
    profile = replace(_profile(precision=precision, offload_optimizer=True), training=TrainConfig(clip_norm=clip_norm))
    waited = step_seconds(profile, 10.0, 1, 10**8, 0, RATES).optimizer
    assert waited == (0 if overlaps else pytest.approx(10**8 * HOST_SECONDS_PER_PARAMETER))


def test_recomputation_falls_out_of_the_operations() -> None:
    model = ModelConfig(
        image_size=16, bits=1, channels_encoder=8, channels_decoder=8, scales=1, groups=2, adaptive=False, latents=4,
        preprocess_blocks=1, preprocess_cells=1, postprocess_blocks=1, postprocess_cells=1, squeeze_excitation=False,
    )  # fmt: skip
    table = record_blocks(Profile(model=model, plan=MemoryPlan(precision="fp32")))
    flops = {keep: costs["enc_0_0"].operations.flops() for keep, costs in table.costs.items()}
    # an encoder cell is dense convolutions: forward, two gradients, and once more forward where the input alone is kept
    assert flops["cheap"] == flops["all"]
    assert flops["input"] == flops["host"] == pytest.approx(4 / 3 * flops["all"])
    # a decoder cell's depthwise convolution is recomputed by `cheap`, too
    decoder = {keep: costs["dec_0_1"].operations.flops() for keep, costs in table.costs.items()}
    assert decoder["all"] < decoder["cheap"] < decoder["input"]
    card = rates_of(find_card("gtx-970"))
    seconds = [c.seconds for _, choices in table.choices((2,), 4, card, False) for c in choices]
    for quartet in zip(*[iter(seconds)] * 4, strict=True):
        assert quartet[0] <= quartet[2] <= quartet[3]
