"""Networks of ours as checkpoints in the published format, the way back of `nvlabs`.

Such a file holds one network and the options that describe it. Its optimiser is empty, since the state of another one
would not fit, so it can be evaluated and sampled from, not trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.files import partial_file
from nvae_lowmem.interop.nvlabs_config import FLAGS, NUMBERS, PADDED_BINARY, PADDING, SIDES, size_by_name
from nvae_lowmem.interop.nvlabs_weights import START, Kind, PublishedModule, pair, published_modules
from nvae_lowmem.model.cells import CELLS, Cell, InvertedResidual, Side
from nvae_lowmem.model.cells import Kind as CellKind
from nvae_lowmem.model.flows import Flow
from nvae_lowmem.model.layers import DownSkip, UpSkip
from nvae_lowmem.model.likelihoods import Bernoulli, DiscretisedNormal, LogisticMixture, make_likelihood
from nvae_lowmem.model.nvae import NVAE

_BINARY_SIZE = 28
_PUBLISHED_BITS = 8  # of binary networks too, where they play no part
_LARGEST_SIZE = 9999  # the size is told by the digits at the end of a data set's name
_RESAMPLING: dict[Side, str] = {
    "encoder": "down_enc",
    "preprocess": "down_pre",
    "decoder": "up_dec",
    "postprocess": "up_post",
}
_SIDE_OF_PART: dict[str, Side] = {part: side for side, (_, part) in SIDES.items()}
# what is between the path of a place that is one convolution, and the convolution
_CONVOLUTION = {
    "enc_tower": ".conv",
    "dec_tower": ".conv",
    "enc0": ".1",
    "dec_sampler": ".1",
    "image_conditional": ".1",
}


def save(path: Path, profile: Profile, model: NVAE, step: int) -> Path:
    """Write the network as a published checkpoint.pt, whole or not at all; returns the path.

    step: optimiser steps it was trained for. The epoch of an imported checkpoint comes back; of our own runs, which
    count steps, it is 0.
    Raises ConfigError that names everything that the format cannot hold, and OSError.
    """
    check_holdable(profile.model)
    imported = profile.provenance if step == 0 else {}
    content = {
        "epoch": imported.get("epoch", 0),
        "global_step": imported.get("global_step", step),
        "state_dict": published_state(model),
        "args": argparse.Namespace(**published_args(profile)),
        "arch_instance": operations(profile.model),
        "optimizer": {"state": {}, "param_groups": []},
        "scheduler": {},
        "grad_scalar": {},
    }
    with partial_file(path) as partial:
        torch.save(content, partial)
    return path


def check_holdable(config: ModelConfig) -> None:
    """Raise ConfigError, naming all of it, for a network that the published format has no place for."""
    if unholdable := list(_unholdable(config)):
        raise ConfigError(f"the published format cannot hold {'; nor '.join(unholdable)}")


def _unholdable(config: ModelConfig) -> Iterator[str]:
    """What the format has no place for, each with what it has one for.

    The published code knows images by its data sets alone: padded binary digits, or colours without padding.
    """
    likelihood = _likelihood(config)
    if config.classes:
        yield f"model.classes = {config.classes}: the published models know no class labels"
    if config.groups_per_scale is not None and _groups(config) is None:
        yield (
            f"model.groups_per_scale = {list(config.groups_per_scale)}: it knows one number of groups for "
            "all scales, or one that is halved from scale to scale down to a smallest one"
        )
    if isinstance(likelihood, Bernoulli):
        digits = (config.image_channels, config.image_size, config.padding) == (1, _BINARY_SIZE, PADDING)
        if not digits:
            yield (
                f"binary images {config.image_channels} x {config.image_size} x {config.image_size} with "
                f"padding {config.padding}: model.likelihood = 'bernoulli' goes with model.image_channels = 1, "
                f"image_size = {_BINARY_SIZE} and padding = {PADDING} there"
            )
        return
    if isinstance(likelihood, LogisticMixture) and config.mixtures == 1:
        yield "a mixture of one logistic: for model.mixtures = 1 it has a normal"
    elif not isinstance(likelihood, (LogisticMixture, DiscretisedNormal)):
        yield f"model.likelihood = {config.likelihood!r}: it knows bernoulli, logistic_mixture and normal"
    if config.image_channels != 3:
        yield f"model.image_channels = {config.image_channels}: images that are not binary are RGB, 3"
    if config.padding:
        yield f"model.padding = {config.padding}: only binary images of 28 pixels are padded"
    if config.network_size > _LARGEST_SIZE:
        yield f"model.image_size = {config.image_size}: at most {_LARGEST_SIZE}"


def _likelihood(config: ModelConfig) -> Any:
    return make_likelihood(config.likelihood, config.image_channels, config.bits, config.mixtures)


def _groups(config: ModelConfig) -> dict[str, int] | None:
    """The published options that give these groups per scale, by our fields; None where none do."""
    given = config.scale_groups
    for adaptive in (config.adaptive, not config.adaptive):
        for least in (config.min_groups, 1, given[-1]):
            same = replace(config, groups_per_scale=None, groups=given[0], adaptive=adaptive, min_groups=least)
            if same.scale_groups == given:
                return {"groups": given[0], "adaptive": adaptive, "min_groups": least}
    return None


# --- options ----------------------------------------------------------------------------------------------------------


def published_args(profile: Profile) -> dict[str, Any]:
    """The options of the published code that describe the network; of an imported one also those it came with."""
    config = profile.model
    groups = _groups(config)
    assert groups is not None, config
    values = {field: getattr(config, field) for field in (*NUMBERS, *FLAGS)} | groups
    likelihood = _likelihood(config)
    if isinstance(likelihood, DiscretisedNormal):
        values["mixtures"] = 1
    came_with = _came_with(profile)
    if isinstance(likelihood, Bernoulli):
        values["bits"] = came_with.get("num_x_bits", _PUBLISHED_BITS)
    names = {field: name for field, (name, *_) in (NUMBERS | FLAGS).items()}
    own = {names[field]: value for field, value in values.items()}
    own |= {"dataset": dataset_name(profile), "arch_instance": config.architecture}
    return came_with | own | {"batch_size": profile.training.total_batch}


def _came_with(profile: Profile) -> dict[str, Any]:
    """The options of an imported network; {} for one of ours."""
    options = profile.provenance.get("published_args")
    return dict(options) if isinstance(options, Mapping) else {}


def dataset_name(profile: Profile) -> str:
    """The published data set that stands for the run's, since its name is what tells image size, padding and colours.

    The one that an imported network came with; else MNIST for binary digits, CIFAR-10 for itself, and CelebA of that
    size for all other images.
    """
    config = profile.model
    size = config.network_size
    came_with = str(_came_with(profile).get("dataset", ""))
    sizes = (size,) if config.vanilla else (size, 0)  # a plain VAE has no learned start that tells the size
    if came_with and size_by_name(came_with) in sizes and (came_with in PADDED_BINARY) == bool(config.padding):
        return came_with
    if config.padding:
        return PADDED_BINARY[0]
    return "cifar10" if profile.data.source == "cifar10" and size == size_by_name("cifar10") else f"celeba_{size}"


def operations(config: ModelConfig) -> dict[str, list[str]]:
    """`arch_instance` of a file: the operations of a cell of each side, and of those that resample."""
    named = {side: _operations(CELLS[config.architecture][side]) for side in SIDES}
    same = {SIDES[side][0]: names for side, names in named.items()}
    return same | {_RESAMPLING[side]: names for side, names in named.items()} | {"ar_nn": [""]}


def _operations(kind: CellKind) -> list[str]:
    """['res_bnswish', 'res_bnswish5'] or ['mconv_e6k5g0']: see `nvlabs_config`, which reads them."""
    if isinstance(kind, InvertedResidual):
        return [f"mconv_e{kind.expand}k{kind.kernel}g{kind.groups}"]
    name = f"res_{'bn' if kind.norm else ''}{kind.activation}"
    return [name + ("5" if dilation == 2 else "") for dilation in kind.dilations]


# --- tensors ----------------------------------------------------------------------------------------------------------


def published_state(model: NVAE) -> dict[str, Tensor]:
    """Our state_dict under the published names, on the CPU, with the aliases and counters of the published one.

    The power iterations' vectors have no place there. An alias shares the storage of what it stands for.
    """
    state = {}
    own = model.state_dict()
    for ours, theirs in published_names(model).items():
        state[theirs] = own[ours].detach().cpu()
        layer, _, field = theirs.rpartition(".")
        if field == "running_var":
            state[f"{layer}.num_batches_tracked"] = torch.tensor(0)
    for key in [key for key, tensor in state.items() if key.endswith(".weight") and tensor.dim() == 4]:
        layer = key.removesuffix(".weight")
        if f"{layer}.log_weight_norm" not in state:
            state[f"{layer}.weight_normalized"] = state[key]
    return state


def published_names(model: NVAE) -> dict[str, str]:
    """The published name of every tensor of our state_dict but the power iterations' vectors."""
    names = {module: name for name, module in model.named_modules()}
    found = {"blocks.start.h": START} if "start" in model.blocks else {}
    for place in published_modules(model):
        pairs, lacking = pair(place, _paths(model.config, place), names)
        assert not lacking, lacking
        found |= pairs
    return found


def _paths(config: ModelConfig, place: PublishedModule) -> dict[Kind, list[str]]:
    """The published paths of a place's layers, by kind, each in the order of computation."""
    part = place.path.partition(".")[0]
    if part == "nf_cells":
        flows = [module for module in place.modules if isinstance(module, Flow)]
        return {"convolution": list(_flow_convolutions(place.path, flows))}
    (module,) = place.modules
    if isinstance(module, Cell):
        return _cell_paths(place.path, module, CELLS[config.architecture][_SIDE_OF_PART[part]])
    return {"convolution": [place.path + _CONVOLUTION.get(part, "")]}


def _flow_convolutions(path: str, flows: list[Flow]) -> Iterator[str]:
    """A published cell is a pair of ours, one for each direction."""
    cells = [cell for flow in flows for cell in flow.cells]
    for index in range(len(cells)):
        cell = f"{path}.{index // 2}.cell{index % 2 + 1}"
        yield from (f"{cell}.conv.convz.0", f"{cell}.conv.convz.2", f"{cell}.mu.conv_0")


def _cell_paths(path: str, cell: nn.Module, kind: CellKind) -> dict[Kind, list[str]]:
    """Of a cell's branch, then of its skip. A normalisation that is not fused with its activation has a level more."""
    assert isinstance(cell, Cell)
    if isinstance(kind, InvertedResidual):
        first = 1 if isinstance(cell.skip, UpSkip) else 0  # an upsampling layer comes first
        inner = [f"{path}._ops.0.conv.{first + i}" for i in range(5)]
        norms = [f"{inner[0]}.bn", f"{inner[1]}.conv.1", f"{inner[2]}.conv.1", f"{inner[4]}.bn"]
        convolutions = [f"{inner[1]}.conv.0", f"{inner[2]}.conv.0", inner[3]]
    else:
        fused = "bn_act" if kind.activation == "swish" else "bn.bn"
        norms = [f"{path}._ops.{i}.{fused}" for i in (0, 1)]
        convolutions = [f"{path}._ops.{i}.conv_0" for i in (0, 1)]
    if isinstance(cell.skip, DownSkip):
        convolutions += [f"{path}.skip.conv_{i + 1}" for i in range(len(cell.skip.parts))]
    elif isinstance(cell.skip, UpSkip):
        convolutions.append(f"{path}.skip.1")
    return {
        "normalisation": norms,
        "convolution": convolutions,
        "linear layer": [f"{path}.se.se.0", f"{path}.se.se.2"],
    }
