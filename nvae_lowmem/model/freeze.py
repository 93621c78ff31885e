"""Frozen blocks: weights that training leaves as they are, and does not pay for.

The parameters of a frozen block ask for no gradient, so it has none, no optimiser state and no regulariser; where
nothing before it learns either, autograd keeps none of its activations. Its BatchNorm uses the running statistics, and
they stand still, as do its power iterations: what it computes depends on its input alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.model.layers import NormLayer
from nvae_lowmem.model.nvae import NVAE


def blocks_matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The blocks that a pattern names: a name, or a prefix that ends in *."""
    if pattern.endswith("*"):
        return [name for name in names if name.startswith(pattern[:-1])]
    return [name for name in names if name == pattern]


def unknown_block(key: str, pattern: str, names: Sequence[str]) -> str:
    """The message for a pattern that names no block, which stands under the key of a profile."""
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5) or [*names[:2], names[-1]]
    return (
        f"{key} names {pattern!r}, a block that this model does not have; near: {', '.join(near)}; a prefix ends in *"
    )


def frozen_blocks(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those of a model's blocks that training.freeze names, in their order.

    Raises ConfigError for a pattern that names none, and where no block that learns is left.
    """
    for pattern in patterns:
        if not blocks_matching(pattern, names):
            raise ConfigError(unknown_block("training.freeze", pattern, names))
    found = {name for pattern in patterns for name in blocks_matching(pattern, names)}
    if found.issuperset(names):
        raise ConfigError(f"training.freeze {[*patterns]} names every block, so that nothing would be trained")
    return [name for name in names if name in found]


def freeze_blocks(model: NVAE, patterns: Sequence[str]) -> str:
    """Freeze those blocks, and no others; says which, "" for none. Raises ConfigError as `frozen_blocks` does."""
    names = frozen_blocks(model.block_names(), patterns)
    for name, block in model.blocks.items():
        block.requires_grad_(name not in names)
        for layer in block.modules():
            if isinstance(layer, NormLayer):
                layer.frozen = name in names
    if not names:
        return ""
    learning, total = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True)
    )
    return (
        f"frozen: {len(names)} of {len(model.blocks)} blocks, {total - learning:,} of {total:,} weights: no gradient, "
        "no optimiser state, no regulariser, BatchNorm with its running statistics"
    )
