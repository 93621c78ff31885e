"""Spectral and BatchNorm regularisation: sum over convolutions of the largest singular value, sum of max|gamma|.

NVAE (arXiv 2007.03898), equation 3: lambda sum_i s_i, s_i the largest singular value of convolution i's weight as it is
used, a (O, rest) matrix; the norms' scales gamma are regularised with the same lambda.

The gradients have a closed form and are added where a layer's own gradient is produced (`functional.py`): for
sigma = u^T W v it is u v^T, taken through the weight normalisation; for max|gamma| a sign at the maximum. Here is what
the step tells the layers, and the value for the log.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvae_lowmem.model.hooks import BN_MOMENTUM
from nvae_lowmem.model.layers import ConvUnit
from nvae_lowmem.model.nvae import NVAE

ITERATIONS = 4
FIRST_ITERATIONS = 40


def begin_micro_batch(model: NVAE, index: int, count: int, coefficient: float, step: int) -> None:
    """Tell every layer what to do in micro-batch `index` of `count` of optimiser step `step`.

    coefficient: lambda x loss scale / count, so that the micro-batches' shares add up to lambda after unscaling.
    Power iteration runs in the first micro-batch only. BatchNorm's running statistics move once per step by the mean of
    the micro-batches' statistics: with momentum m, share i of n has momentum m / (n - (n - 1 - i) m), because
    r_i = (1 - a_i) r_(i-1) + a_i s_i then unrolls to (1 - m) r_0 + (m / n) sum of s_i.
    """
    settings = model.settings
    settings.coefficient = coefficient
    due = FIRST_ITERATIONS if step == 0 else ITERATIONS
    settings.iterations = due if index == 0 and coefficient else 0
    settings.momentum = BN_MOMENTUM / (count - (count - 1 - index) * BN_MOMENTUM)


def end_step(model: NVAE) -> None:
    """Back to a model that regularises nothing and moves its statistics as a single batch would."""
    begin_micro_batch(model, 0, 1, 0.0, 1)


@torch.no_grad()
def regularisation_values(model: NVAE) -> tuple[Tensor, Tensor]:
    """(sum of spectral norms as of the last power iteration, sum of max|gamma|), 0-dim each, before lambda.

    Frozen layers, which have no regulariser, are not in them.
    """
    layers = [layer for layer in model.layers() if not layer.frozen]
    sigmas = [layer.sigma for layer in layers if isinstance(layer, ConvUnit)]
    gammas = [layer.gamma.abs().amax() for layer in layers if layer.gamma is not None]
    sums = (torch.stack(values).sum() if values else torch.zeros(()) for values in (sigmas, gammas))
    return next(sums), next(sums)
