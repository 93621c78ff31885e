"""Weights that a training starts from in place of random ones: what fits is taken, and the rest is said in words.

A tensor is taken where name and shape agree. The decoder's learned start is the one tensor as large as the image: from
a model of another image size it is scaled, since the rest of the network is convolutions. Everything else keeps the
initial values of the run's own seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.model.nvae import NVAE

LEAST_SHARE = 0.5
"""Of the model's weights that have to be taken: with fewer it is another model, and the rest would unlearn them."""
_START = "blocks.start.h"
_OF_THE_IMAGES = {"image_channels", "image_size", "padding", "bits", "likelihood", "mixtures", "classes"}
"""Fields of a model that say what its images are: at most stem, start, head and class tables depend on them."""
_GROUPS = {"groups", "adaptive", "min_groups", "groups_per_scale"}
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Trained weights, on the host."""

    origin: str
    """What they are, for people: "run runs/00003-faces, step 1600, averaged weights"."""
    tensors: Mapping[str, Tensor]
    """By the names of a model's state_dict."""


def differing_fields(own: ModelConfig, other: ModelConfig) -> list[str]:
    """The fields in which two models are not the same network, "model.latents 20 -> 8" each, from `other` to `own`.

    Fields that say what images look like may differ, and groups are compared per scale, however they are written.
    """
    before, now = dataclasses.asdict(other), dataclasses.asdict(own)
    skipped = _OF_THE_IMAGES | _GROUPS | {"data_init"}
    found = [
        f"model.{key} {before[key]} -> {now[key]}" for key in now if key not in skipped and before[key] != now[key]
    ]
    if own.scale_groups != other.scale_groups:
        found.append(f"groups per scale {list(other.scale_groups)} -> {list(own.scale_groups)}")
    return found


@torch.no_grad()
def take_over(model: NVAE, weights: InitialWeights) -> str:
    """Give the model those of the weights that fit; what was taken and what was not, in one sentence each.

    A model on the device "meta" stays as it is: the answer is the same. Raises ConfigError, with the model unchanged,
    where less than `LEAST_SHARE` of its parameters would come from the weights.
    """
    own, given = model.state_dict(), dict(weights.tensors)
    said = []
    if (scaled := _scaled_start(own, given)) is not None:
        said.append(f"the decoder's learned start is scaled from {_pixels(given[_START])} to {_pixels(scaled)}")
        given[_START] = scaled
    taken = [name for name, tensor in own.items() if name in given and given[name].shape == tensor.shape]
    left = [name for name in own if name not in set(taken)]
    unused = [name for name in given if name not in set(taken)]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    total, reached = sum(sizes.values()), sum(sizes.get(name, 0) for name in taken)
    share = f"{len(taken)} of {len(own)} tensors, {reached:,} of {total:,} weights"
    if reached < LEAST_SHARE * total:
        raise ConfigError(
            f"{weights.origin} is too little like this model to start from: only {share} agree in name and shape; "
            f"{_listed(left, own, given)}. Take the model that the weights belong to (leave --profile out), or train "
            "from random weights (leave --init-from out)"
        )
    for name in taken:
        own[name].copy_(given[name])
    head = f"weights from {weights.origin}: {share} are taken"
    if left:
        said.append(f"{len(left)} tensors keep their initial values ({_listed(left, own, given)})")
    if unused:
        shown = ", ".join(unused[:_NAMED])
        said.append(f"{len(unused)} tensors of the weights have no place here (first: {shown})")
    return "; ".join([head, *said])


def _scaled_start(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor | None:
    """The given learned start (C, h, w) at the size of the model's own; None where there is nothing to scale."""
    here, there = own.get(_START), given.get(_START)
    if here is None or there is None or here.shape == there.shape or here.shape[:1] != there.shape[:1]:
        return None
    if there.ndim != 3:
        return None
    return F.interpolate(there[None].float(), size=here.shape[1:], mode="bilinear", align_corners=False)[0]


def _pixels(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape[1:]))


def _listed(names: Sequence[str], own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """The first names, each with its shape here and there."""
    there = [f"there {list(given[name].shape)}" if name in given else "not there" for name in names[:_NAMED]]
    shown = (f"{name} {list(own[name].shape)}, {text}" for name, text in zip(names, there, strict=False))
    return "first: " + "; ".join(shown)
