"""Everything that is set on a model from outside, in one place. A new model has the defaults: it runs plainly.

    hook              sits on                       set by
    run_block         NVAE: a BlockRunner           keep.apply_plan; the tracer and the summary wrap what is there
    recompute         NormLayer, Cell, FlowCell     keep.apply_plan: keep less for backward
    frozen            NormLayer                     freeze.freeze_blocks: running statistics, which stand still
    recompute_latent  DecoderGroup                  keep.apply_plan: run the latents' arithmetic again in backward
    chunk_bytes       Head                          keep.apply_plan: bound of the likelihood's temporaries
    settings          NVAE and each of its layers,  the step, by way of regularizers.py; momentum also by the
                      one object for all            recalibration of BatchNorm
    pre_run_hook      ConvUnit                      data_init.py, while it runs

What a plan sets (not `frozen`) changes what is kept, never what is computed. Copying a model copies its hooks.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

BN_MOMENTUM = 0.05


class BlockRunner(Protocol):
    """Runs a block of the network: the one place where a policy, a tracer or a summary can put itself between."""

    def __call__(self, name: str, block: nn.Module, *args: Any) -> Any:
        """What `block(*args)` returns; name: the block's, as `NVAE.block_names` gives it."""
        ...


def run_plainly(name: str, block: nn.Module, *args: Any) -> Any:
    """The BlockRunner of a new model."""
    return block(*args)


class LayerSettings:
    """What the training step tells every layer of one model.

    The gradient of the regulariser, sum(spectral norms) + sum(max|gamma|), is added where the layer's own gradient is
    produced. One that started at the loss would wait in autograd's buffers for every weight of the model: 4 bytes per
    parameter.
    """

    def __init__(self) -> None:
        self.coefficient = 0.0
        """Weight of that gradient: lambda, the loss scale and the share of this micro-batch in one."""
        self.iterations = 0
        """Power iterations that are due now."""
        self.momentum = BN_MOMENTUM
        """Weight of this micro-batch in BatchNorm's running statistics."""
