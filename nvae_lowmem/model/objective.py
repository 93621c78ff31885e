"""The training objective: ELBO with KL warm-up and balancing, and the weight of the regularisers (nvae.md, section 5).

loss = mean over the batch of (-log p(x|z) + beta * sum_i c_i KL_i) + lambda * (spectral norms + max|gamma|)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import TrainConfig
from nvae_lowmem.model.latents import Noise
from nvae_lowmem.model.nvae import NVAE

AUTOCAST_DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class LossTerms(NamedTuple):
    """The loss to go backward from, and what people want to see; everything in nats per image."""

    loss: Tensor  # () with graph: nll + beta * balanced KL, the mean over this micro-batch
    nll: Tensor  # () detached, mean reconstruction term
    kl: Tensor  # (groups,) detached, mean |KL| per group, top first
    active: Tensor  # (groups,) detached, share of latent channels with a mean KL above 0.1 nats
    coefficients: Tensor  # (groups,) detached, the balancing coefficients used


def beta_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """beta = clip((step - constant T) / (warm-up T), beta_min, beta_max), T = total steps; beta_max without warm-up."""
    if config.kl_warmup_fraction == 0:
        return config.kl_beta_max
    raw = (step - config.kl_constant_fraction * total_steps) / (config.kl_warmup_fraction * total_steps)
    return min(config.kl_beta_max, max(config.kl_beta_min, raw))


def regulariser_at(beta: float, config: TrainConfig) -> float:
    """lambda: constant, or log-linear along beta from regulariser_start to regulariser."""
    start, end = config.regulariser_start, config.regulariser
    if start <= 0 or end <= 0:
        return end
    return math.exp((1 - beta) * math.log(start) + beta * math.log(end))


def group_alphas(config: ModelConfig) -> Tensor:
    """alpha_i = 4^s / groups_s, s counted from the top scale, scaled to a minimum of 1; (groups,) top first."""
    from_top = config.scale_groups[::-1]
    alphas = torch.cat([torch.full((g,), 4.0**s / g) for s, g in enumerate(from_top)])
    return alphas / alphas.min()


def balance(kl: Tensor, alphas: Tensor) -> Tensor:
    """Coefficients proportional to (mean|KL_i| + 0.01) / alpha_i with mean 1; kl (groups,) -> (groups,), detached."""
    raw = (kl.detach().abs() + 0.01) / alphas
    return raw / raw.mean()


class Objective(nn.Module):
    """The model with its loss: what an engine wraps, what the tracer traces. Opens autocast itself, without its cache.

    DeepSpeed switches off an autocast opened around its engine, not one opened inside the module; the cache would keep
    a half copy of every weight until the pass ends.
    """

    alphas: Tensor

    def __init__(self, model: NVAE, training: TrainConfig, precision: str = "fp32") -> None:
        super().__init__()
        self.model = model
        self.balance_below = training.kl_beta_max if training.kl_balance else 0.0
        self.autocast_dtype = AUTOCAST_DTYPES[precision]
        self.register_buffer("alphas", group_alphas(model.config), persistent=False)

    def forward(self, x: Tensor, noise: Noise, beta: float) -> LossTerms:
        """Images (b, C, S, S) in [0,1] -> LossTerms. KL balancing acts while beta rises, on this micro-batch's KL."""
        dtype = self.autocast_dtype
        with torch.autocast(
            x.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False
        ):
            terms = self.model(x, noise)
        per_group = torch.stack([kl.sum(1).mean() for kl in terms.kl])  # (groups,)
        channels = torch.stack([kl.detach().mean(0) for kl in terms.kl])  # (groups, L)
        coefficients = balance(per_group, self.alphas) if beta < self.balance_below else torch.ones_like(per_group)
        nll = terms.nll.mean()
        loss = nll + beta * (coefficients * per_group).sum()
        active = (channels > 0.1).float().mean(1)
        return LossTerms(loss, nll.detach(), per_group.detach().abs(), active, coefficients)
