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
from nvae_lowmem.model.data_init import initialise_from_data
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


def build_model(profile: Profile) -> NVAE:
    """The profile's model with the initial weights of its seed, on the host. Seeds torch's global generator."""
    torch.manual_seed(profile.training.seed)
    return NVAE(profile.model)


def build_training(
    run: ResolvedRun,
    model: NVAE,
    device: torch.device,
    make_engine: EngineFactory = TorchEngine,
    first_images: Callable[[], Tensor] | None = None,
) -> Training:
    """Average, policies, objective and engine around a model, ready for `training_step`.

    first_images: the first micro-batch (b, C, S, S) in [0, 1], asked for if the model is to be initialised from it;
    None: it is not, because its weights come from elsewhere.
    Raises ConfigError for a plan that names unknown blocks, and for what the engine refuses.
    """
    profile, config = run.profile, run.profile.training
    # 1. weights
    model.train()
    if profile.model.data_init and first_images is not None:
        initialise_from_data(model.to(device), first_images().to(device), SeededNoise(config.seed))
    # 2. the average, a copy of the model while nothing is hooked on it
    ema = None
    if config.ema_decay:
        ema = WeightEma(model.to(device), config.ema_decay, "cpu" if config.ema_on_host else None)
    # 3. policies, and the engine, which takes the model to the device
    apply_plan(model, profile.plan)
    objective = Objective(model, config, profile.plan.precision)
    engine = make_engine(objective, profile, device, run.split.accumulation)
    return Training(run=run, engine=engine, ema=ema)


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
