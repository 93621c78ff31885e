"""Everything that a step needs, made in the one order in which it has to be made.

The order matters: the average copies the model before policies and hooks are put on it, and the engine takes the model
with its policies. Training, measuring and tracing all come here, so that what is traced is what is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nvae_lowmem.config.sections import EngineName, Profile
from nvae_lowmem.model.data_init import estimate_statistics, initialise_from_data
from nvae_lowmem.model.freeze import freeze_blocks
from nvae_lowmem.model.keep import apply_plan
from nvae_lowmem.model.latents import SeededNoise
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import Objective
from nvae_lowmem.training.ema import WeightEma
from nvae_lowmem.training.engines.engine import Engine
from nvae_lowmem.training.engines.torch_engine import TorchEngine
from nvae_lowmem.training.resolve import ResolvedRun
from nvae_lowmem.training.step import Training

EngineFactory = Callable[[Objective, Profile, torch.device, int], Engine]
"""(objective, profile, device, accumulation) -> engine."""
ESTIMATION_PASSES = 32
"""Micro-batches that BatchNorm's statistics are estimated from, where trained weights meet other images."""


def build_model(profile: Profile) -> NVAE:
    """The profile's model with the initial weights of its seed, on the host. Seeds torch's global generator."""
    torch.manual_seed(profile.training.seed)
    return NVAE(profile.model)


def build_training(
    run: ResolvedRun,
    model: NVAE,
    device: torch.device,
    make_engine: EngineFactory = TorchEngine,
    first_images: Callable[[int], Tensor] | None = None,
) -> Training:
    """Average, policies, objective and engine around a model, ready for `training_step`.

    first_images: of a step by its number, the first micro-batch (b, C, S, S) in [0, 1]; asked for if the model is to be
    initialised from images. None: it is not, because its weights are those of an earlier step.
    Raises ConfigError for a plan or training.freeze that names unknown blocks, and for what the engine refuses.
    """
    profile, config = run.profile, run.profile.training
    # 1. weights
    model.train()
    if first_images is not None:
        _look_at_images(model.to(device), profile, first_images)
    freeze_blocks(model, config.freeze)
    # 2. the average, a copy of the model while nothing is hooked on it
    ema = None
    if config.ema_decay:
        ema = WeightEma(model.to(device), config.ema_decay, "cpu" if config.ema_on_host else None)
    # 3. policies, and the engine, which takes the model to the device
    apply_plan(model, profile.plan)
    objective = Objective(model, config, profile.plan.precision)
    engine = make_engine(objective, profile, device, run.split.accumulation)
    return Training(run=run, engine=engine, ema=ema)


def _look_at_images(model: NVAE, profile: Profile, first_images: Callable[[int], Tensor]) -> None:
    """Set what a new run's model takes from its first images."""
    config, device = profile.training, next(model.parameters()).device
    noise = SeededNoise(config.seed)
    if not config.init_from:
        if profile.model.data_init:
            initialise_from_data(model, first_images(0).to(device), noise)
    elif config.init_statistics == "estimate":
        micro_batches = (first_images(step).to(device) for step in range(ESTIMATION_PASSES))
        estimate_statistics(Objective(model, config, profile.plan.precision).to(device), micro_batches, noise)


def engine_factory(name: EngineName) -> EngineFactory:
    """What makes the engine of that name, as `choose_engine` decided it: "torch" or "deepspeed"."""
    if name == "deepspeed":
        from nvae_lowmem.training.engines.deepspeed_engine import ZeroEngine  # imports DeepSpeed, which takes seconds

        return ZeroEngine
    return TorchEngine


def prepare_for_inference(model: NVAE, profile: Profile) -> NVAE:
    """The model, in evaluation mode, under the part of the profile's plan that matters without gradients.

    Those are its chunks of the likelihood. What blocks keep for a backward pass does not matter; running parts of them
    again would only fuse operations, which takes more memory within a block.
    """
    apply_plan(model, replace(profile.plan, keep="all", keep_blocks={}))
    return model.eval()
