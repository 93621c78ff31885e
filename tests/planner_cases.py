"""What the planner's tests share: small models, tables of them, budgets, and predictors that cost nothing."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import KEEPS, Keep, MemoryPlan, Profile, TrainConfig
from nvae_lowmem.hardware.budget import Budget
from nvae_lowmem.hardware.find_card import find_card
from nvae_lowmem.memory.plan.block_costs import BlockTable, record_blocks
from nvae_lowmem.memory.plan.candidates import Wishes, host_bytes, resident_bytes
from nvae_lowmem.memory.plan.fit import Fit, fit
from nvae_lowmem.memory.plan.roofline import rates_of
from nvae_lowmem.memory.plan.search import Assignment
from nvae_lowmem.memory.predict.predict import Prediction
from nvae_lowmem.memory.trace.events import Peak
from nvae_lowmem.memory.trace.training import trace_training

CARD = find_card("rtx-3050-ti-laptop")  # computes in bf16
RATES = rates_of(CARD)
MIB, GIB = 1 << 20, 1 << 30


def small_model(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "image_size": 16, "bits": 1, "channels_encoder": 8, "channels_decoder": 8, "latents": 4,
        "scales": 1, "groups": 1, "adaptive": False,
        "preprocess_blocks": 1, "preprocess_cells": 1, "postprocess_blocks": 1, "postprocess_cells": 1,
    }  # fmt: skip
    return ModelConfig(**{**values, **changes})


def profile_of(model: ModelConfig, total_batch: int = 16, **plan: Any) -> Profile:
    plan = {"precision": "bf16", **plan}
    return Profile(name="small", model=model, training=TrainConfig(total_batch=total_batch), plan=MemoryPlan(**plan))


SIX_BLOCKS = profile_of(small_model())  # a plain VAE: stem, pre_0_0, top, dec_0_0, post_0_0, head
TWO_SCALES = profile_of(small_model(scales=2, groups_per_scale=(3, 2), cells_encoder=1, cells_decoder=1))
# few blocks, but wide ones: what it takes lies between 0.3 GiB and 10 GiB
WIDE = profile_of(
    small_model(image_size=64, groups=4, channels_encoder=512, channels_decoder=512, cells_encoder=1, cells_decoder=1),
    total_batch=16,
)


@functools.cache
def table_of(model: ModelConfig) -> BlockTable:
    return record_blocks(profile_of(model))


def budget_of(cap_bytes: int) -> Budget:
    return Budget(cap_bytes=cap_bytes, total_bytes=2 * cap_bytes, context_bytes=0, reason="for the test")


def mixed_assignments(names: Sequence[str], count: int) -> list[dict[str, Keep]]:
    drawn = random.Random(0)
    uniform: list[dict[str, Keep]] = [dict.fromkeys(names, keep) for keep in KEEPS]
    return uniform + [{name: drawn.choice(KEEPS) for name in names} for _ in range(count)]


def predicted(profile: Profile, peak: Peak, reserved_bytes: int, host: int) -> Prediction:
    return Prediction(
        micro_batch=profile.plan.micro_batch, accumulation=1, precision="bf16", peak=peak, overlay=(), oom=None,
        allocated_peak_bytes=peak.nbytes, reserved_peak_bytes=reserved_bytes, timeline=(), host_bytes=host,
        pinned_bytes=0, context_bytes=0, init_peak_bytes=0, margin_bytes=0, retries=0, run_retries=0,
    )  # fmt: skip


def traced(profile: Profile, micro_batch: int, accumulation: int) -> Prediction:
    """A predictor without fragmentation, workspaces and margin: the traced peak."""
    trace = trace_training(profile, micro_batch, min(accumulation, 2), 2)
    return predicted(profile, trace.peak(), trace.peak().nbytes, trace.host_bytes())


def priced(profile: Profile, micro_batch: int, accumulation: int, share: float = 1.06) -> Prediction:
    """A cheap predictor: `share` of what the table says of this very plan, and some libraries' 40 MiB."""
    plan, groups, table = profile.plan, profile.model.scale_groups, table_of(WIDE.model)
    stay = not plan.offload_optimizer and accumulation == 1
    named = table.choices(groups, micro_batch, RATES, gradients_stay=stay)
    picked = Assignment(tuple(next(c for c in row if c.keep == plan.keep_of(name)) for name, row in named))
    peak = resident_bytes(table, groups, plan, accumulation) + picked.peak_bytes
    averages = table.count(table.copy_bytes, groups)
    host = host_bytes(table, groups, plan, accumulation) + averages + picked.host_bytes
    return predicted(profile, Peak(peak, 0, "", "", "", {}, {}), int(share * peak) + 40 * MIB, host)


def run(profile: Profile, cap_bytes: int, predictor: Any = priced, **wishes: Any) -> Fit:
    table = table_of(profile.model)
    return fit(profile, CARD, budget_of(cap_bytes), Wishes(**wishes), predictor, table=table)
