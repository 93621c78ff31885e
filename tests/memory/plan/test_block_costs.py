"""The table of block costs, against traces of whole models."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_cases import RATES, TWO_SCALES, mixed_assignments, profile_of, run, small_model, table_of, traced

from nvae_lowmem.config.sections import MemoryPlan, Profile, TrainConfig
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.memory.plan.block_costs import record_blocks
from nvae_lowmem.memory.plan.candidates import resident_bytes
from nvae_lowmem.memory.plan.explain import reasons
from nvae_lowmem.memory.plan.search import Assignment
from nvae_lowmem.memory.trace.training import trace_training
from nvae_lowmem.model.nvae import NVAE


@pytest.mark.parametrize("groups", [(5,), (3, 2), (1, 1)])
def test_the_table_knows_the_blocks_of_a_model_with_any_number_of_groups(groups: tuple[int, ...]) -> None:
    model = small_model(scales=len(groups), groups_per_scale=groups)
    like = small_model(scales=len(groups), groups_per_scale=tuple(2 for _ in groups))
    table = record_blocks(profile_of(like), keeps=("all",))
    network = NVAE(model)
    assert [b.name for b in table.blocks(groups)] == [n for n in network.block_names() if n != "start"]
    parameters = sum(table.parameter_elements(groups))
    assert parameters == sum(p.numel() for p in network.parameters())
    states = [*network.parameters(), *network.buffers()]
    assert table.count(table.state_bytes, groups) == sum(-(-t.nbytes // 512) * 512 for t in states)


@pytest.mark.parametrize("offload", [True, False], ids=["offloaded", "on the card"])
def test_the_table_prices_mixed_policies_as_a_trace_of_the_whole_model_does(offload: bool) -> None:
    images, groups = 64, TWO_SCALES.model.scale_groups
    table = table_of(TWO_SCALES.model)
    named = table.choices(groups, images, RATES, gradients_stay=not offload)
    always = resident_bytes(table, groups, MemoryPlan(offload_optimizer=offload), 1)
    drawn = mixed_assignments([name for name, _ in named], 2)
    for keeps in drawn if offload else drawn[-2:]:
        picked = Assignment(tuple(next(c for c in row if c.keep == keeps[name]) for name, row in named))
        plan = MemoryPlan(precision="bf16", offload_optimizer=offload, keep_blocks=keeps)
        trace = trace_training(replace(TWO_SCALES, plan=plan), images, 1, 1 if offload else 2)
        # rather too much than too little: what a parked input's neighbours fetch ahead is counted at its most
        assert 0.98 < (always + picked.peak_bytes) / trace.peak().nbytes < 1.05, keeps


def frozen(*freeze: str) -> Profile:
    return replace(TWO_SCALES, training=replace(TWO_SCALES.training, freeze=freeze))


@pytest.mark.parametrize("offload", [True, False], ids=["offloaded", "on the card"])
@pytest.mark.parametrize("freeze", [("stem", "pre_*", "enc_*", "top"), ("dec_*", "start"), ("enc_0_*", "post_*")])
def test_the_table_prices_frozen_blocks_as_a_trace_does(freeze: tuple[str, ...], offload: bool) -> None:
    assert_priced(frozen(*freeze), offload)


def test_the_table_prices_class_labels_as_a_trace_does() -> None:
    assert_priced(replace(TWO_SCALES, model=replace(TWO_SCALES.model, classes=100)), offload=True)


def assert_priced(profile: Profile, offload: bool) -> None:
    """The table's peak of mixed policies is that of a trace of the whole model."""
    images = 64
    groups, table = profile.model.scale_groups, record_blocks(profile)
    named = table.choices(groups, images, RATES, gradients_stay=not offload)
    always = resident_bytes(table, groups, MemoryPlan(offload_optimizer=offload), 1)
    (keeps,) = mixed_assignments([name for name, _ in named], 1)[-1:]
    picked = Assignment(tuple(next(c for c in row if c.keep == keeps[name]) for name, row in named))
    plan = MemoryPlan(precision="bf16", offload_optimizer=offload, keep_blocks=keeps)
    trace = trace_training(replace(profile, plan=plan), images, 1, 1 if offload else 2)
    assert sum(table.parameter_elements(groups)) == sum(trace.parameter_bytes) // 4
    assert 0.98 < (always + picked.peak_bytes) / trace.peak().nbytes < 1.08


def test_a_plan_says_what_is_frozen() -> None:
    found = run(frozen("stem", "enc_*"), 1 << 28, traced)
    assert any(reason.startswith("frozen stem, enc_*: neither gradients") for reason in reasons(found))


def test_a_block_that_stands_for_one_that_learns_is_never_priced_too_low() -> None:
    groups = TWO_SCALES.model.scale_groups
    part, whole = (record_blocks(frozen(*freeze), keeps=("all",)) for freeze in (("dec_0_1",), ()))
    assert part.parameter_elements(groups) == whole.parameter_elements(groups)
    with pytest.raises(ConfigError, match="'dec_0_7', a block that this model does not have"):
        record_blocks(frozen("dec_0_7"))


def test_fewer_groups_are_not_tried_where_weights_belong_to_them() -> None:
    for training in (TrainConfig(freeze=("stem",)), TrainConfig(init_from="run")):
        found = run(replace(TWO_SCALES, training=replace(training, total_batch=16)), 1 << 16, traced)
        assert not found.fits and found.chosen.groups == TWO_SCALES.model.scale_groups
