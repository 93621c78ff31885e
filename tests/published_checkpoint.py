"""Writes networks of ours as checkpoints in the published format, under the names that the published code gives."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.model.cells import CELLS, Cell, InvertedResidual, Kind, Residual, Side
from nvae_lowmem.model.layers import ConvUnit, DownSkip, ResidualTail, UpSkip
from nvae_lowmem.model.nvae import NVAE, DecoderGroup, EncoderGroup

Named = tuple[str, nn.Module, str]  # published path, our module, one of NORM, CONVOLUTION, SQUEEZE, EXCITE
FIXTURES = Path(__file__).parent / "fixtures" / "nvlabs"
NORM = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_variance"}
CONVOLUTION = {"weight": "weight", "bias": "bias", "log_weight_norm": "log_norm"}
SQUEEZE = {"weight": "squeeze_weight", "bias": "squeeze_bias"}
EXCITE = {"weight": "excite_weight", "bias": "excite_bias"}
FIELDS = {"norm": NORM, "convolution": CONVOLUTION, "squeeze": SQUEEZE, "excite": EXCITE}


def random_model(config: ModelConfig, seed: int = 0) -> NVAE:
    """A network whose tensors all differ, so that no two of equal shape can be swapped unnoticed."""
    torch.manual_seed(seed)
    model = NVAE(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_variance"):
                tensor.uniform_(0.5, 1.5)
            elif not name.endswith((".u", ".v")):
                tensor.add_(0.05 * torch.randn_like(tensor))
    return model


def published_state(model: NVAE, synchronised: str = "some") -> dict[str, Tensor]:
    """The published state_dict, with its aliases and counters.

    synchronised: which normalisations have a `.bn` level: "none", "some" as in files of distributed runs, or "all".
    """
    state: dict[str, Tensor] = {}
    if "start" in model.blocks:
        state["prior_ftr0"] = model.blocks["start"].h.detach().clone()
    for path, module, role in _network(model):
        if role == "norm":
            plain = path.endswith(("bn_act", ".conv.1")) and not path.endswith("_ops.0.conv.1")
            path += ".bn" if synchronised == "all" or (synchronised == "some" and not plain) else ""
            state[f"{path}.num_batches_tracked"] = torch.tensor(7)
        for theirs, ours in FIELDS[role].items():
            if getattr(module, ours) is not None:
                state[f"{path}.{theirs}"] = getattr(module, ours).detach().clone()
        if role == "convolution" and module.log_norm is not None:
            state[f"{path}.weight_normalized"] = torch.full_like(module.weight, 9.0)
    return state


def published_args(config: ModelConfig, dataset: str, **changed: Any) -> argparse.Namespace:
    """args of the published code for this network."""
    values = {
        "dataset": dataset, "num_latent_scales": config.scales, "num_groups_per_scale": config.groups,
        "num_latent_per_group": config.latents, "ada_groups": config.adaptive,
        "min_groups_per_scale": config.min_groups, "num_channels_enc": config.channels_encoder,
        "num_channels_dec": config.channels_decoder, "num_preprocess_blocks": config.preprocess_blocks,
        "num_preprocess_cells": config.preprocess_cells, "num_postprocess_blocks": config.postprocess_blocks,
        "num_postprocess_cells": config.postprocess_cells, "num_cell_per_cond_enc": config.cells_encoder,
        "num_cell_per_cond_dec": config.cells_decoder, "num_mixture_dec": config.mixtures, "num_nf": config.flows,
        "num_x_bits": config.bits, "use_se": config.squeeze_excitation, "res_dist": config.residual_posterior,
        "arch_instance": config.architecture,
    }  # fmt: skip
    return argparse.Namespace(**{name: value for name, value in (values | changed).items() if value is not ...})


def published_operations(config: ModelConfig) -> dict[str, list[str]]:
    """arch_instance as the published code resolves it: operations per side."""
    sides: dict[Side, str] = {"encoder": "enc", "preprocess": "pre", "decoder": "dec", "postprocess": "post"}
    operations = {}
    for side, short in sides.items():
        names = _operations(CELLS[config.architecture][side])
        resampling = "up" if side in ("decoder", "postprocess") else "down"
        operations |= {f"normal_{short}": names, f"{resampling}_{short}": names}
    return operations | {"ar_nn": [""]}


def save(path: Path, state: dict[str, Tensor], args: argparse.Namespace, arch_instance: Any) -> Path:
    """A checkpoint.pt with everything that the published code saves."""
    torch.save(
        {
            "epoch": 12, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}, "global_step": 3456,
            "args": args, "arch_instance": arch_instance, "scheduler": {}, "grad_scalar": {},
        },
        path,
    )  # fmt: skip
    return path


def save_model(path: Path, model: NVAE, dataset: str, **changed: Any) -> Path:
    """The network as a published checkpoint; `changed` replaces args, or removes those set to `...`."""
    args = published_args(model.config, dataset, **changed)
    return save(path, published_state(model), args, published_operations(model.config))


def assert_same_network(loaded: nn.Module, model: nn.Module) -> None:
    """Every tensor is equal, but for the power iterations' vectors."""
    ours = {k: v for k, v in model.state_dict().items() if not k.endswith((".u", ".v"))}
    theirs = loaded.state_dict()
    assert not [k for k, v in ours.items() if not torch.equal(v, theirs[k])]


def _operations(kind: Kind) -> list[str]:
    if isinstance(kind, InvertedResidual):
        return [f"mconv_e{kind.expand}k{kind.kernel}g{kind.groups}"]
    name = f"res_{'bn' if kind.norm else ''}{kind.activation}"
    return [name + ("5" if dilation == 2 else "") for dilation in kind.dilations]


def _network(model: NVAE) -> Iterator[Named]:
    config, blocks = model.config, model.blocks
    yield "stem", blocks["stem"].conv, "convolution"
    for index, name in enumerate(n for n in blocks if n.startswith("pre_")):
        yield from _cell(f"pre_process.{index}", blocks[name], CELLS[config.architecture]["preprocess"])
    yield from _encoder_tower(model)
    yield "enc0.1", blocks["top"].conv, "convolution"
    groups = [block for block in blocks.values() if isinstance(block, DecoderGroup)]
    for index, group in enumerate(groups):
        yield f"enc_sampler.{index}", group.posterior, "convolution"
        if index:
            yield f"dec_sampler.{index - 1}.1", group.prior, "convolution"
        for cell_index, cell in enumerate(group.flow.cells if group.flow is not None else ()):
            path = f"nf_cells.{index * config.flows + cell_index // 2}.cell{cell_index % 2 + 1}"
            yield f"{path}.conv.convz.0", cell.first, "convolution"
            yield f"{path}.conv.convz.2", cell.depthwise, "convolution"
            yield f"{path}.mu.conv_0", cell.last, "convolution"
    if config.vanilla:
        yield "stem_decoder", groups[0].combiner, "convolution"
    else:
        yield from _decoder_tower(model)
    for index, name in enumerate(n for n in blocks if n.startswith("post_")):
        yield from _cell(f"post_process.{index}", blocks[name], CELLS[config.architecture]["postprocess"])
    yield "image_conditional.1", blocks["head"].conv, "convolution"


def _encoder_tower(model: NVAE) -> Iterator[Named]:
    kind, index = CELLS[model.config.architecture]["encoder"], 0
    groups_left = model.config.total_groups
    for block in model.blocks.values():
        if isinstance(block, EncoderGroup):
            groups_left -= 1
            for cell in block.cells:
                yield from _cell(f"enc_tower.{index}", cell, kind)
                index += 1
            if groups_left:  # the groups of the encoder, highest resolution first, are the decoder's backwards
                group = [b for b in model.blocks.values() if isinstance(b, DecoderGroup)][groups_left]
                yield f"enc_tower.{index}.conv", group.encoder_combiner, "convolution"
                index += 1
        elif isinstance(block, Cell) and block in [model.blocks[n] for n in model.blocks if n.endswith("_down")]:
            yield from _cell(f"enc_tower.{index}", block, kind)
            index += 1


def _decoder_tower(model: NVAE) -> Iterator[Named]:
    kind, index = CELLS[model.config.architecture]["decoder"], 0
    for name, block in model.blocks.items():
        if isinstance(block, DecoderGroup):
            for cell in block.cells:
                yield from _cell(f"dec_tower.{index}", cell, kind)
                index += 1
            yield f"dec_tower.{index}.conv", block.combiner, "convolution"
            index += 1
        elif name.endswith("_up"):
            yield from _cell(f"dec_tower.{index}", block, kind)
            index += 1


def _cell(path: str, cell: nn.Module, kind: Kind) -> Iterator[Named]:
    assert isinstance(cell, Cell)
    units: list[ConvUnit] = list(cell.units)  # type: ignore[arg-type]
    if isinstance(cell.skip, DownSkip):
        yield from ((f"{path}.skip.conv_{i + 1}", part, "convolution") for i, part in enumerate(cell.skip.parts))
    elif isinstance(cell.skip, UpSkip):
        yield f"{path}.skip.1", cell.skip.project, "convolution"
    if isinstance(kind, Residual):
        for i, unit in enumerate(units):
            if kind.norm:
                yield f"{path}._ops.{i}.{'bn_act' if kind.activation == 'swish' else 'bn'}", unit, "norm"
            yield f"{path}._ops.{i}.conv_0", unit, "convolution"
    else:
        first = 1 if isinstance(cell.skip, UpSkip) else 0  # an upsampling layer comes first
        inner = f"{path}._ops.0.conv"
        yield f"{inner}.{first}", units[0], "norm"
        for i in (0, 1):
            yield f"{inner}.{first + 1 + i}.conv.0", units[i], "convolution"
            yield f"{inner}.{first + 1 + i}.conv.1", units[i + 1], "norm"
        yield f"{inner}.{first + 3}", units[2], "convolution"
        yield f"{inner}.{first + 4}", cell.tail, "norm"
    tail: ResidualTail = cell.tail
    if tail.squeeze_weight is not None:
        yield f"{path}.se.se.0", tail, "squeeze"
        yield f"{path}.se.se.2", tail, "excite"
