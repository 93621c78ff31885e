"""BatchNorm, activations and weights as plain functions with their gradients: what the autograd functions are made of.

Shapes: B batch, C channels, H x W pixels, O output channels. Activations have the compute dtype (fp32, fp16, bf16);
parameters, statistics and every reduction over them are fp32. Everything computes in the dtype of its input, so no
autocast list is involved.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

aten = torch.ops.aten
BN_EPS = 1e-5
WEIGHT_NORM_EPS = 1e-5

_thread = threading.local()


def recomputing() -> bool:
    """Whether this thread runs a block again for its backward pass: statistics and power iterations stand still."""
    return getattr(_thread, "recomputing", False)


@contextlib.contextmanager
def recomputation() -> Iterator[None]:
    """Marks the second forward pass of a checkpointed block (autograd may run it in a thread of its own)."""
    before = recomputing()
    _thread.recomputing = True
    try:
        yield
    finally:
        _thread.recomputing = before


def recompute_in_backward(function: Callable[..., Any], *args: Any) -> Any:
    """Run function(*args) so that only its tensor arguments are kept and it runs again in backward."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)


def _contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), recomputation()


class BatchStatistics(NamedTuple):
    """Mean and variance that BatchNorm used, (C,) each; inverse standard deviation where they are the batch's own."""

    mean: Tensor
    variance: Tensor
    inverse_std: Tensor | None


class RunningStatistics(NamedTuple):
    """What BatchNorm reads and moves: running mean and variance (C,), momentum, and whether it is training."""

    mean: Tensor
    variance: Tensor
    momentum: float
    training: bool


# --- what is computed in full precision -------------------------------------------------------------------------------


def computing_type(x: Tensor) -> torch.dtype:
    """The type in which latents and likelihoods of these parameters are computed: fp32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def full_precision(x: Tensor) -> Tensor:
    """The tensor in its `computing_type`: half types are widened."""
    return x.to(computing_type(x))


def soft_clamp(x: Tensor) -> Tensor:
    """5 tanh(x / 5): bounds the outputs that become the mu and log sigma of a normal."""
    return (x / 5).tanh() * 5


# --- activations: f(x), f in place, f'(g, x) --------------------------------------------------------------------------


class Activation(NamedTuple):
    """A pointwise function, the same in place, and its gradient g f'(x)."""

    of: Callable[[Tensor], Tensor]
    into: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _elu_backward(g: Tensor, x: Tensor) -> Tensor:
    return aten.elu_backward(g, 1, 1, 1, False, x)


ACTIVATIONS = {
    "none": Activation(lambda x: x, lambda x: x, lambda g, x: g),
    "swish": Activation(aten.silu, aten.silu_, aten.silu_backward),
    "elu": Activation(aten.elu, aten.elu_, _elu_backward),
    "elu_elu": Activation(
        lambda x: aten.elu_(aten.elu(x)),
        lambda x: aten.elu_(aten.elu_(x)),
        lambda g, x: _elu_backward(_elu_backward(g, aten.elu(x)), x),
    ),
}


# --- BatchNorm --------------------------------------------------------------------------------------------------------


def batch_norm(x: Tensor, gamma: Tensor, beta: Tensor, running: RunningStatistics) -> tuple[Tensor, BatchStatistics]:
    """BatchNorm of x (B,C,H,W) and the statistics it used. Moves the running ones, except in a recomputation."""
    if not running.training:
        return batch_norm_with(x, gamma, beta, running.mean, running.variance), BatchStatistics(
            running.mean, running.variance, None
        )
    # statistics and normalisation are two operations, so that a recomputation repeats the second bit for bit; a run
    # again moves a copy, because without running statistics a half input would get half-precision ones
    moved = (running.mean.clone(), running.variance.clone()) if recomputing() else (running.mean, running.variance)
    mean, variance = aten.batch_norm_update_stats(x, *moved, running.momentum)
    y = batch_norm_with(x, gamma, beta, mean, variance)
    return y, BatchStatistics(mean, variance, (variance + BN_EPS).rsqrt_())


def batch_norm_with(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """gamma (x - mean) / sqrt(variance + eps) + beta with given statistics."""
    return aten.native_batch_norm(x, gamma, beta, mean, variance, False, 0.0, BN_EPS)[0]


def batch_norm_backward(
    g: Tensor, x: Tensor, gamma: Tensor, statistics: BatchStatistics, regulariser: float, learns: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients with respect to x, gamma, beta; gamma's includes regulariser x d max|gamma|: a sign at the maximum.

    learns: whether those of gamma and beta are wanted; None in their place where they are not.
    """
    training = statistics.inverse_std is not None
    gx, ggamma, gbeta = aten.native_batch_norm_backward(
        g,
        x,
        gamma,
        statistics.mean,
        statistics.variance,
        statistics.mean if training else None,
        statistics.inverse_std,
        training,
        BN_EPS,
        [True, learns, learns],
    )
    if not learns:
        return gx, None, None
    if regulariser:
        largest = gamma.abs().argmax().view(1)
        ggamma = ggamma.index_add(0, largest, gamma.index_select(0, largest).sign(), alpha=regulariser)
    return gx, ggamma, gbeta


# --- the weight as it is used -----------------------------------------------------------------------------------------


def effective_weight(weight: Tensor, log_norm: Tensor | None, mask: Tensor | None) -> Tensor:
    """w = exp(g) v / (||v|| + 1e-5) per output channel, v masked first; the weight itself where not normalised."""
    v = weight if mask is None else weight * mask
    if log_norm is None:
        return v
    return v * (log_norm.exp() / (_norms(v) + WEIGHT_NORM_EPS))


def effective_weight_backward(
    gw: Tensor, weight: Tensor, log_norm: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients with respect to weight and log_norm.

    With r = e^g / (n + eps), n = ||v|| per output channel: dg = r <gw, v>, dv = r gw - dg v / (n (n + eps)).
    """
    if log_norm is None:
        return (gw if mask is None else gw * mask), None
    v = weight if mask is None else weight * mask
    norms = _norms(v)
    ratio = log_norm.exp() / (norms + WEIGHT_NORM_EPS)
    glog = (gw * v).sum((1, 2, 3), keepdim=True) * ratio
    # a row that is all zero has no direction: its norm's gradient is taken as 0, as torch's norm does
    pull = torch.where(norms > 0, glog / (norms * (norms + WEIGHT_NORM_EPS)), 0.0)
    gv = torch.addcmul(gw * ratio, v, pull, value=-1)
    return (gv if mask is None else gv.mul_(mask)), glog


def _norms(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v.flatten(1), dim=1).view(-1, 1, 1, 1)


def power_iteration(w: Tensor, u: Tensor, v: Tensor, iterations: int) -> Tensor:
    """Moves u (O,), v (rest,) towards the largest singular pair of w (O, rest) and returns sigma = u^T w v, 0-dim."""
    matrix = w.flatten(1)
    for _ in range(iterations):
        v.copy_(_unit_vector(matrix.t() @ u))
        u.copy_(_unit_vector(matrix @ v))
    return u @ (matrix @ v)


def _unit_vector(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x).clamp_min(1e-12)


# --- depthwise convolutions on the CPU --------------------------------------------------------------------------------

_as_on_card = False


@contextlib.contextmanager
def as_on_card() -> Iterator[None]:
    """Inside, the CPU takes no short cuts of its own: it stands for the card while a step is traced."""
    global _as_on_card
    before, _as_on_card = _as_on_card, True
    try:
        yield
    finally:
        _as_on_card = before


def weight_gradient_by_groups(a: Tensor, w: Tensor, stride: int, dilation: int) -> bool:
    """Whether `depthwise_weight_gradient` is the faster way: real depthwise convolutions on the CPU, stride 1."""
    depthwise = w.shape[1] == 1 and w.shape[0] == a.shape[1] and w.shape[2] > 1
    return depthwise and stride == dilation == 1 and a.device.type == "cpu" and not _as_on_card


def depthwise_weight_gradient(g: Tensor, a: Tensor, padding: int) -> Tensor:
    """Gradient (C, 1, k, k) of a depthwise convolution's weight from g and its input a, both (B, C, H, W).

    gw[c] = sum over images of the correlation of a[b, c] with g[b, c]: itself a convolution with B*C groups, whose
    kernels are the gradients. oneDNN's own depthwise weight gradient is several times slower (benchmarks/depthwise.py).
    """
    batch, channels, height, width = a.shape
    images = a.transpose(0, 1).reshape(1, channels * batch, height, width)
    kernels = g.transpose(0, 1).reshape(channels * batch, 1, *g.shape[2:])
    p = [padding, padding]
    per_image = aten.convolution(images, kernels, None, [1, 1], p, [1, 1], False, [0, 0], channels * batch)
    return per_image.view(channels, batch, *per_image.shape[2:]).sum(1).unsqueeze_(1)
