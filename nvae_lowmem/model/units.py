"""The two autograd functions that the network is made of: chains of convolution units, and the residual tail.

Both save as little as they can and write their own backward pass, so that a policy decides what stays in memory:
a unit is [BatchNorm] -> [activation] -> [x2 upsampling] -> convolution with a (weight-normalised, masked) weight.
Shapes: B batch, C channels, H x W pixels, O output channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from nvae_lowmem.model.functional import (
    ACTIVATIONS,
    BatchStatistics,
    RunningStatistics,
    aten,
    batch_norm,
    batch_norm_backward,
    batch_norm_with,
    depthwise_weight_gradient,
    effective_weight,
    effective_weight_backward,
    weight_gradient_by_groups,
)
from nvae_lowmem.model.hooks import LayerSettings


class UnitParameters(NamedTuple):
    """The tensors of one unit: weight (O, C/groups, k, k), log_norm (O,1,1,1), bias (O,), gamma (C,), beta (C,)."""

    weight: Tensor
    log_norm: Tensor | None
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None


class UnitSpec(NamedTuple):
    """What a unit does, apart from its parameters."""

    activation: str  # a key of ACTIVATIONS
    upsample: bool
    stride: int
    padding: int
    dilation: int
    groups: int
    mask: Tensor | None  # (O, C/groups, k, k), multiplies the weight before its normalisation
    u: Tensor  # (O,), left singular vector of the weight as it is used
    v: Tensor  # (C/groups*k*k,), right singular vector
    settings: LayerSettings


# --- one unit ---------------------------------------------------------------------------------------------------------


def _normalise(
    x: Tensor, p: UnitParameters, running: RunningStatistics | None, statistics: BatchStatistics | None
) -> tuple[Tensor, BatchStatistics | None]:
    """BatchNorm(x) with the given statistics, else with those it computes; x itself where there is no BatchNorm."""
    if p.gamma is None or p.beta is None:
        return x, None
    if statistics is not None:
        return batch_norm_with(x, p.gamma, p.beta, statistics.mean, statistics.variance), statistics
    assert running is not None
    return batch_norm(x, p.gamma, p.beta, running)


def _activate(normed: Tensor, spec: UnitSpec, overwrite: bool) -> Tensor:
    """What the convolution reads: the activation, upsampled where the unit does so."""
    activation = ACTIVATIONS[spec.activation]
    a = (activation.into if overwrite else activation.of)(normed)
    if spec.upsample:
        a = aten.upsample_nearest2d(a, [2 * a.shape[2], 2 * a.shape[3]], 2.0, 2.0)
    return a


def _unit_output(x: Tensor, p: UnitParameters, spec: UnitSpec, statistics: BatchStatistics | None) -> Tensor:
    """The unit once more, with the statistics of its first run."""
    normed, _ = _normalise(x, p, None, statistics)
    return _convolve(_activate(normed, spec, overwrite=p.gamma is not None), p, spec)


def _convolve(a: Tensor, p: UnitParameters, spec: UnitSpec) -> Tensor:
    w = effective_weight(p.weight, p.log_norm, spec.mask).to(a.dtype)
    bias = None if p.bias is None else p.bias.to(a.dtype)
    s, q, d = spec.stride, spec.padding, spec.dilation
    return aten.convolution(a, w, bias, [s, s], [q, q], [d, d], False, [0, 0], spec.groups)


def _unit_backward(
    g: Tensor,
    x: Tensor,
    a: Tensor | None,
    statistics: BatchStatistics | None,
    p: UnitParameters,
    spec: UnitSpec,
    needs_input_gradient: bool,
    learns: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients with respect to x and (weight, log_norm, bias, gamma, beta).

    g: of the output; x: the unit's input; a: what its convolution read, where that was saved. learns: whether the
    parameters' gradients are wanted: of a frozen unit they are None.
    """
    s, q, d = spec.stride, spec.padding, spec.dilation

    # What the convolution read, and the weight that it used, once more.
    normed: Tensor | None = None
    if not learns:
        a = _of_its_shape(x, spec)
    elif a is None:
        normed, _ = _normalise(x, p, None, statistics)
        a = _activate(normed, spec, overwrite=False)
    w = effective_weight(p.weight, p.log_norm, spec.mask).to(a.dtype)

    # Backward through the convolution: ga of what it read, gw of the weight it used, gb of the bias.
    sizes = [p.weight.shape[0]] if p.bias is not None else None
    wanted = [needs_input_gradient or p.gamma is not None, learns, learns and p.bias is not None]
    by_groups = learns and weight_gradient_by_groups(a, w, spec.stride, spec.dilation)
    wanted[1] = learns and not by_groups
    ga, gw, gb = aten.convolution_backward(g, a, w, sizes, [s, s], [q, q], [d, d], False, [0, 0], spec.groups, wanted)
    if by_groups:
        gw = depthwise_weight_gradient(g, a, spec.padding)
    del a, w

    grads: list[Tensor | None] = [None] * 5
    if learns:
        # The spectral regulariser, d(u^T w v)/dw = u v^T, is one of the weight as it is used: before the normalisation.
        gw = gw.to(p.weight.dtype)
        if spec.settings.coefficient:
            matrix = gw if gw.is_contiguous() else gw.contiguous()
            matrix.view(gw.shape[0], -1).addr_(spec.u, spec.v, alpha=spec.settings.coefficient)
            gw = matrix

        # Backward through weight normalisation and mask.
        grads[0], grads[1] = effective_weight_backward(gw, p.weight, p.log_norm, spec.mask)
        del gw
        grads[2] = gb.to(p.weight.dtype) if p.bias is not None else None
    if ga is None:
        return None, grads

    # Backward through upsampling, activation and BatchNorm.
    if spec.upsample:
        h2, w2 = 2 * x.shape[2], 2 * x.shape[3]
        ga = aten.upsample_nearest2d_backward(ga, [h2, w2], list(x.shape), 2.0, 2.0)
    if spec.activation != "none":
        if normed is None:
            normed, _ = _normalise(x, p, None, statistics)
        ga = ACTIVATIONS[spec.activation].backward(ga, normed)
    del normed
    if p.gamma is not None:
        assert statistics is not None
        ga, grads[3], grads[4] = batch_norm_backward(ga, x, p.gamma, statistics, spec.settings.coefficient, learns)
    return ga, grads


def _of_its_shape(x: Tensor, spec: UnitSpec) -> Tensor:
    """What stands for the convolution's input where only its shape is asked for: the weight is not differentiated."""
    if not spec.upsample:
        return x
    return x.new_empty(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])


class Chain(torch.autograd.Function):
    """Units one after the other. Saves the first one's input, and, if asked for, what every convolution read.

    Chain.apply(x (B,C,H,W), specs, runnings, save_conv_inputs, *parameters) -> y (B,O,H',W')
    parameters: five per unit, None where absent. Per unit five tensors are saved, None where there is nothing: three
    statistics of its BatchNorm, the unit's input (for the first one that is x), and what its convolution read.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        specs: tuple[UnitSpec, ...],
        runnings: tuple[RunningStatistics | None, ...],
        save_conv_inputs: bool,
        *parameters: Tensor | None,
    ) -> Tensor:
        ctx.learns = any(ctx.needs_input_grad[4:])  # or all of its units are frozen: they are of one block
        saved: list[Tensor | None] = [x]
        y = x
        for i, (spec, running) in enumerate(zip(specs, runnings, strict=True)):
            p = UnitParameters(*parameters[5 * i : 5 * i + 5])  # type: ignore[arg-type]
            unit_input = y

            # BatchNorm, activation, convolution; what BatchNorm returned is overwritten by the activation.
            normed, statistics = _normalise(unit_input, p, running, None)
            a = _activate(normed, spec, overwrite=p.gamma is not None)
            del normed
            y = _convolve(a, p, spec)

            # What backward needs and cannot compute from x, or is spared.
            saved += statistics if statistics is not None else (None, None, None)
            saved += [
                unit_input if save_conv_inputs and i else None,
                a if save_conv_inputs and ctx.learns and a is not unit_input else None,
            ]
        ctx.specs = specs
        ctx.save_for_backward(*saved, *parameters)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        # What forward saved, unit by unit.
        n = len(ctx.specs)
        saved = ctx.saved_tensors
        parameters = [UnitParameters(*saved[1 + 5 * n + 5 * i :][:5]) for i in range(n)]
        statistics = [None if saved[1 + 5 * i] is None else BatchStatistics(*saved[1 + 5 * i :][:3]) for i in range(n)]
        inputs = [saved[0] if i == 0 else saved[4 + 5 * i] for i in range(n)]
        read = [saved[5 + 5 * i] for i in range(n)]
        del saved

        # The inputs of later units, where they were not saved, from the first one's.
        for i in range(1, n):
            if inputs[i] is None:
                inputs[i] = _unit_output(inputs[i - 1], parameters[i - 1], ctx.specs[i - 1], statistics[i - 1])

        # Backward through the units, the last first; each gives up its input as soon as it is done.
        grads: list[Tensor | None] = []
        for i in reversed(range(n)):
            needs_input = i > 0 or ctx.needs_input_grad[0]
            gx, own = _unit_backward(
                g, inputs.pop(), read.pop(), statistics[i], parameters[i], ctx.specs[i], needs_input, ctx.learns
            )
            grads = own + grads
            g = cast(Tensor, gx)  # None for the first unit alone, where nobody needs it
        return (g, None, None, None, *grads)


class Tail(torch.autograd.Function):
    """A cell's end: skip + 0.1 * SE(BatchNorm(c)), each optional; saves c, and BatchNorm's output if asked for.

    SE(y) = y * sigmoid(W2 relu(W1 mean_hw(y) + b1) + b2), computed in fp32 on (B, C).
    Tail.apply(skip (B,C,H,W), c, running, save_output, settings, gamma, beta, w1, b1, w2, b2) -> (B,C,H,W)
    """

    @staticmethod
    def forward(
        ctx: Any,
        skip: Tensor,
        c: Tensor,
        running: RunningStatistics | None,
        save_output: bool,
        settings: LayerSettings,
        gamma: Tensor | None,
        beta: Tensor | None,
        w1: Tensor | None,
        b1: Tensor | None,
        w2: Tensor | None,
        b2: Tensor | None,
    ) -> Tensor:
        # y = BatchNorm(c)
        y, statistics = c, None
        if gamma is not None and beta is not None:
            assert running is not None
            y, statistics = batch_norm(c, gamma, beta, running)

        # skip + 0.1 * SE(y)
        mean = hidden = gate = None
        if w1 is not None and w2 is not None and b1 is not None and b2 is not None:
            mean = y.mean((2, 3), dtype=w1.dtype)
            hidden = torch.addmm(b1, mean, w1.t()).relu_()
            gate = torch.addmm(b2, hidden, w2.t()).sigmoid_()
            out = torch.addcmul(skip, y, (0.1 * gate).to(y.dtype)[:, :, None, None])
        else:
            out = torch.add(skip, y, alpha=0.1)

        # What backward needs.
        ctx.settings, ctx.learns = settings, any(ctx.needs_input_grad[5:])
        output = y if save_output and y is not c else None
        stats = statistics if statistics is not None else (None, None, None)
        ctx.save_for_backward(c, output, *stats, mean, hidden, gate, gamma, beta, w1, b1, w2, b2)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        c, y, mu, variance, inverse_std, mean, hidden, gate, gamma, beta, w1, _, w2, _ = ctx.saved_tensors
        gw1 = gb1 = gw2 = gb2 = ggamma = gbeta = None
        if gate is not None:
            # Through the gate: its two linear layers, then the mean over pixels that they read.
            if y is None:
                y = c if gamma is None else batch_norm_with(c, gamma, beta, mu, variance)
            glogit = (g * y).sum((2, 3), dtype=gate.dtype).mul_(0.1).mul_(gate * (1 - gate))
            del y
            if ctx.learns:
                gw2, gb2 = glogit.t() @ hidden, glogit.sum(0)
            ghidden = (glogit @ w2).mul_(hidden > 0)
            if ctx.learns:
                gw1, gb1 = ghidden.t() @ mean, ghidden.sum(0)
            gmean = (ghidden @ w1).div_(c.shape[2] * c.shape[3]).to(g.dtype)
            # y reaches the output directly, scaled by the gate, and by way of the mean.
            gy = torch.addcmul(gmean[:, :, None, None], g, (0.1 * gate).to(g.dtype)[:, :, None, None])
        else:
            gy = 0.1 * g
        if gamma is not None:
            statistics = BatchStatistics(mu, variance, inverse_std)
            gy, ggamma, gbeta = batch_norm_backward(gy, c, gamma, statistics, ctx.settings.coefficient, ctx.learns)
        return g, gy, None, None, None, ggamma, gbeta, gw1, gb1, gw2, gb2
