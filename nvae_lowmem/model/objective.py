"""The training objective: ELBO with KL warm-up and balancing, and the weight of the regularisers.

    loss = mean over the batch of (-log p(x|z) + beta sum_l c_l KL_l) + lambda (sum spectral norms + sum max|gamma|)

The first part is the negative of equation 1 of NVAE (arXiv 2007.03898) with the weights of its appendix A on the KL of
each group l; the second is its equation 3, whose gradient the layers add themselves (`regularizers.py`).
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


def beta_at(step: float, total_steps: float, config: TrainConfig) -> float:
    """The weight beta of the KL at optimiser step `step`, from 0 (NVAE, appendix A, warming up the KL).

        beta = clip((step - constant T) / (warm-up T), beta_min, beta_max),   T = total_steps

    constant and warm-up are shares of T; without warm-up, and from trained weights on, it is beta_max.
    """
    if config.kl_warmup_fraction == 0 or config.init_from:
        return config.kl_beta_max
    raw = (step - config.kl_constant_fraction * total_steps) / (config.kl_warmup_fraction * total_steps)
    return min(config.kl_beta_max, max(config.kl_beta_min, raw))


def regulariser_at(beta: float, config: TrainConfig) -> float:
    """The weight lambda of NVAE's equation 3: constant, or annealed along beta.

    log lambda = (1 - beta) log regulariser_start + beta log regulariser
    """
    start, end = config.regulariser_start, config.regulariser
    if start <= 0 or end <= 0:
        return end
    return math.exp((1 - beta) * math.log(start) + beta * math.log(end))


def group_alphas(config: ModelConfig) -> Tensor:
    """What balancing divides each group's KL by, (groups,) top first (NVAE, appendix A, balancing the KL terms).

    alpha_l = 4^s / groups_s,   s = the group's scale counted from the top; scaled so that the smallest is 1
    """
    from_top = config.scale_groups[::-1]
    alphas = torch.cat([torch.full((g,), 4.0**s / g) for s, g in enumerate(from_top)])
    return alphas / alphas.min()


def balance(kl: Tensor, alphas: Tensor) -> Tensor:
    """The coefficients c_l of the groups' KL while beta rises (NVAE, appendix A, balancing the KL terms).

        c_l proportional to (|KL_l| + 0.01) / alpha_l, with mean 1

    kl: mean KL of each group over the micro-batch, (groups,) top first -> (groups,), detached.
    """
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

    def forward(self, x: Tensor, noise: Noise, beta: float, labels: Tensor | None = None) -> LossTerms:
        """Images (b, C, S, S) in [0, 1] -> LossTerms (equation 1, negative). KL is balanced while beta rises.

        Balancing looks at this micro-batch's KL.
        """
        dtype = self.autocast_dtype
        with torch.autocast(
            x.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False
        ):
            terms = self.model(x, noise, labels)
        per_group = torch.stack([kl.sum(1).mean() for kl in terms.kl])  # (groups,)
        channels = torch.stack([kl.detach().mean(0) for kl in terms.kl])  # (groups, L)
        coefficients = balance(per_group, self.alphas) if beta < self.balance_below else torch.ones_like(per_group)
        nll = terms.nll.mean()
        loss = nll + beta * (coefficients * per_group).sum()
        active = (channels > 0.1).float().mean(1)
        return LossTerms(loss, nll.detach(), per_group.detach().abs(), active, coefficients)
