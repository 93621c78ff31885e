"""What network a published NVAE checkpoint holds: its args and the shapes of its tensors as a `Profile`.

Whatever the tensors tell is taken from them (image channels and size, the likelihood), so that a dataset nobody listed
here works as well; args tell the rest, and every disagreement between the two is reported. Nothing large is built
before the counts in args agree with the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nvae_lowmem.config.model import Architecture, LikelihoodName, ModelConfig
from nvae_lowmem.config.sections import DataConfig, Profile, TrainConfig
from nvae_lowmem.errors import ConfigError, raise_problems
from nvae_lowmem.interop.nvlabs_weights import START, indices_of, layers_of
from nvae_lowmem.model.cells import CELLS, InvertedResidual, Kind, Residual, Side

PADDED_BINARY = ("mnist", "omniglot")  # 28 x 28 images in a 32 x 32 network
PADDING = 2
_NETWORK_SIZES = {"mnist": 32, "omniglot": 32, "cifar10": 32, "ffhq": 256}  # others end in _SIZE
_SOURCES = {"mnist": "mnist5k"}
_MOST = 1 << 16  # of anything that args count
_LONGEST_TEXT = 1000

# our field -> (name in args, default for files that lack it, smallest)
NUMBERS: dict[str, tuple[str, int | None, int]] = {
    "scales": ("num_latent_scales", None, 1),
    "groups": ("num_groups_per_scale", None, 1),
    "min_groups": ("min_groups_per_scale", 1, 1),
    "latents": ("num_latent_per_group", None, 1),
    "channels_encoder": ("num_channels_enc", None, 1),
    "channels_decoder": ("num_channels_dec", None, 1),
    "preprocess_blocks": ("num_preprocess_blocks", None, 0),
    "preprocess_cells": ("num_preprocess_cells", None, 1),
    "postprocess_blocks": ("num_postprocess_blocks", None, 0),
    "postprocess_cells": ("num_postprocess_cells", None, 1),
    "cells_encoder": ("num_cell_per_cond_enc", None, 0),
    "cells_decoder": ("num_cell_per_cond_dec", None, 0),
    "flows": ("num_nf", None, 0),
    "mixtures": ("num_mixture_dec", 10, 1),
    "bits": ("num_x_bits", 8, 1),
}
FLAGS: dict[str, tuple[str, bool | None]] = {
    "adaptive": ("ada_groups", False),
    "squeeze_excitation": ("use_se", None),
    "residual_posterior": ("res_dist", None),
}
_MOST_HALVINGS = 16
CONVOLUTIONS_PER_FLOW_CELL = 3
SIDES: dict[Side, tuple[str, str]] = {  # our side -> (key in arch_instance, part of the network)
    "encoder": ("normal_enc", "enc_tower"),
    "preprocess": ("normal_pre", "pre_process"),
    "decoder": ("normal_dec", "dec_tower"),
    "postprocess": ("normal_post", "post_process"),
}


def profile_of(
    args: Mapping[str, Any],
    arch_instance: Any,
    tensors: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    where: str,
) -> Profile:
    """The Profile of a checkpoint with these args, cells (a name, or lists of operations per side) and tensors.

    provenance: what is known of the file; the plain values of args are added to it.
    Raises ConfigError with every problem: options that are missing or wrong, and args that do not fit the tensors.
    """
    values = _options(args, where)
    plain = {name: value for name, value in args.items() if isinstance(name, str) and _is_plain(value)}
    dataset = str(plain.get("dataset", ""))
    model = ModelConfig(
        architecture=architecture_of(arch_instance, args.get("arch_instance"), tensors, where),
        **(values | _image(dataset, values, tensors, where)),
    )
    raise_problems([*model.problems(), *_disagreements(model, dataset, tensors, where)], where)
    batch = args.get("batch_size")
    training = TrainConfig(total_batch=batch) if type(batch) is int and 0 < batch <= _MOST else TrainConfig()
    return Profile(
        name=re.sub(r"\W", "-", f"nvlabs-{dataset[:80]}"),
        model=model,
        data=DataConfig(source=_SOURCES.get(dataset, dataset) or "unknown", flip=model.image_channels == 3),
        training=training,
        provenance={**provenance, "published_args": plain},
    )


def architecture_of(arch_instance: Any, name: Any, tensors: Mapping[str, Tensor], where: str) -> Architecture:
    """The architecture from the operations of each side, else from its name, else from the shapes of the cells.

    Raises ConfigError where no architecture fits, or shapes alone leave more than one (dilation does not show).
    """
    operations = arch_instance if isinstance(arch_instance, Mapping) else {}
    named = {side: _kind_of_operations(operations.get(key)) for side, (key, _) in SIDES.items()}
    if all(named.values()):
        fits = [a for a, row in CELLS.items() if row == named]
    else:
        fits = [a for a in CELLS if a in (arch_instance, name)]
    if not fits:
        found = {side: _kind_of_layers(tensors, part) for side, (_, part) in SIDES.items()}
        fits = [
            a for a, row in CELLS.items() if all(k is None or k == _undilated(row[side]) for side, k in found.items())
        ]
    if len(fits) != 1:
        told = f"the cells fit {', '.join(fits)} alike" if fits else "no known architecture has such cells"
        raise ConfigError(
            f"{where}: arch_instance = {arch_instance!r} and args.arch_instance = {name!r} name no architecture, and "
            f"by their tensors {told}; known: {', '.join(CELLS)}"
        )
    return fits[0]


def _options(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our fields from args alone."""
    values: dict[str, Any] = {}
    problems = []
    for field, (name, default, least) in NUMBERS.items():
        value = args.get(name, default)
        most = _MOST_HALVINGS if field in ("scales", "preprocess_blocks", "postprocess_blocks") else _MOST
        if type(value) is not int or not least <= value <= most:
            problems.append(f"args.{name} = {value!r} must be a whole number from {least} to {most}")
        values[field] = value
    for field, (name, flag_default) in FLAGS.items():
        value = args.get(name, flag_default)
        if type(value) is not bool:
            problems.append(f"args.{name} = {value!r} must be True or False")
        values[field] = bool(value)
    raise_problems(problems, where)
    return values


def _image(dataset: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Image size, channels, padding, likelihood and bits, from the tensors where they tell."""
    bits, channels = values["bits"], _convolution(tensors, "stem", where).shape[1]
    start = tensors.get(START)
    if start is not None and start.dim() == 3:
        size = start.shape[-1] << _halvings(values["preprocess_blocks"], values["scales"])
    else:
        size = size_by_name(dataset)  # a plain VAE has no learned start
    if not size:
        raise ConfigError(f"{where}: neither a tensor {START} (C, h, w) nor dataset = {dataset!r} tells the image size")
    padding = PADDING if dataset in PADDED_BINARY else 0
    likelihood: LikelihoodName = "normal" if values["mixtures"] == 1 else "logistic_mixture"
    if _convolution(tensors, "image_conditional", where).shape[0] == channels:
        likelihood, bits = "bernoulli", 1  # num_x_bits plays no part in published binary models
    return {
        "image_channels": channels, "image_size": size - 2 * padding, "padding": padding,
        "likelihood": likelihood, "bits": bits,
    }  # fmt: skip


def _is_plain(value: Any) -> bool:
    """Whether a text file can hold the value."""
    if isinstance(value, int):
        return abs(value) < 1 << 63
    return isinstance(value, float) or (isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST_TEXT)


def size_by_name(dataset: str) -> int:
    """Pixels per side inside the network by the dataset's name; 0 where the name does not tell."""
    suffix = dataset.rpartition("_")[2]
    return _NETWORK_SIZES.get(dataset, int(suffix) if re.fullmatch(r"[0-9]{1,4}", suffix) else 0)


def _disagreements(model: ModelConfig, dataset: str, tensors: Mapping[str, Tensor], where: str) -> list[str]:
    """Where args and tensors differ in a count or a width; the tensors' own shapes are checked one by one later."""
    c, groups, scales = model, model.total_groups, model.scales
    halvings = _halvings(c.preprocess_blocks, scales)
    between_scales = 0 if c.vanilla else scales - 1
    counts = {  # what args say of the modules PART.0, PART.1, ...
        "pre_process": c.preprocess_blocks * c.preprocess_cells,
        "enc_tower": 0 if c.vanilla else groups * c.cells_encoder + groups - 1 + between_scales,
        "enc_sampler": groups,
        "dec_sampler": groups - 1,
        "dec_tower": 0 if c.vanilla else (groups - 1) * c.cells_decoder + groups + between_scales,
        "post_process": c.postprocess_blocks * c.postprocess_cells,
    }
    out = [
        f"{part}: args describe {count} modules, the state_dict holds {found}"
        for part, count in counts.items()
        if (found := len(indices_of(tensors, part))) != count
    ]
    flow_convolutions = sum(layer.kind == "convolution" for layer in layers_of(tensors, "nf_cells"))
    if flow_convolutions != (expected := 2 * CONVOLUTIONS_PER_FLOW_CELL * c.flows * groups):
        out.append(
            f"nf_cells: args.num_nf = {c.flows} for {groups} groups means {expected} convolutions, "
            f"the state_dict holds {flow_convolutions}"
        )
    widths = {
        f"args.num_channels_enc = {c.channels_encoder} after {halvings} halvings": (
            "enc0", c.channels_encoder << halvings, _convolution(tensors, "enc0", where).shape[0]),
        f"args.num_channels_dec = {c.channels_decoder}": (
            "image_conditional", c.channels_decoder, _convolution(tensors, "image_conditional", where).shape[1]),
        f"args.num_latent_per_group = {c.latents}, a mean and a log sigma each,": (
            "enc_sampler.0", 2 * c.latents, _convolution(tensors, "enc_sampler.0", where).shape[0]),
    }  # fmt: skip
    out += [
        f"{what} means {count} channels, {part} has {found}"
        for what, (part, count, found) in widths.items()
        if count != found
    ]
    if (by_name := size_by_name(dataset)) not in (0, c.network_size):
        out.append(f"args.dataset = {dataset!r} means {by_name} pixels per side, {START} means {c.network_size}")
    return out


def _halvings(preprocess_blocks: int, scales: int) -> int:
    return preprocess_blocks + scales - 1


def _convolution(tensors: Mapping[str, Tensor], path: str, where: str) -> Tensor:
    """The weight (C_out, C_in, k, k) of the first convolution at `path`."""
    for layer in layers_of(tensors, path):
        if layer.kind == "convolution":
            return layer.tensors["weight"]
    raise ConfigError(f"{where}: its state_dict has no convolution {path}, so it is no published NVAE")


# --- cells ------------------------------------------------------------------------------------------------------------


def _kind_of_operations(operations: Any) -> Kind | None:
    """The cell of published operations such as ['res_bnswish', 'res_bnswish5'] or ['mconv_e6k5g0']; None: unknown.

    A trailing 5 marks a 3x3 convolution dilated by 2, which sees 5x5 pixels; g0 is depthwise.
    """
    if not isinstance(operations, (list, tuple)) or not all(isinstance(name, str) for name in operations):
        return None
    residual = [re.fullmatch(r"res_(bn)?(elu|swish)(5?)", name) for name in operations]
    if len(residual) == 2 and residual[0] and residual[1] and residual[0].group(1, 2) == residual[1].group(1, 2):
        first, second = (2 if match[3] else 1 for match in residual if match)
        return Residual(residual[0][1] is not None, residual[0][2], (first, second))
    inverted = re.fullmatch(r"mconv_e([0-9]+)k([0-9]+)g([0-9]+)", operations[0]) if len(operations) == 1 else None
    return InvertedResidual(*map(int, inverted.groups())) if inverted else None


def _kind_of_layers(tensors: Mapping[str, Tensor], part: str) -> Kind | None:
    """The undilated cell that the first cell of a part must be by its layers; None if the part has no cells."""
    for index in indices_of(tensors, part):
        operations = layers_of(tensors, f"{part}.{index}._ops")
        weights = [layer.tensors["weight"] for layer in operations if layer.kind == "convolution"]
        if len(weights) == 2:
            norm = any(layer.kind == "normalisation" for layer in operations)
            swish = any("bn_act" in layer.path for layer in operations)
            return Residual(norm, "swish" if swish else "elu")
        if len(weights) == 3:
            wide, narrow, *_ = weights[0].shape
            per_group = weights[1].shape[1]
            return InvertedResidual(
                wide // max(narrow, 1), weights[1].shape[2], 0 if per_group == 1 else wide // max(per_group, 1)
            )
    return None


def _undilated(kind: Kind) -> Kind:
    return kind._replace(dilations=(1, 1)) if isinstance(kind, Residual) else kind
