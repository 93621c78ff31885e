"""Which tensor of a published NVAE checkpoint is which tensor of ours.

Both networks are walked in the same order, place by place (stem, every cell of a tower, ...). Inside a place the
published layers are told apart by what they hold - a normalisation has a running mean, a convolution a 4-d weight, a
linear layer a 2-d one - and taken in the order of their names. So no inner name matters: an extra `.bn` level, a shift
of indices by an upsampling layer, or another operation's attribute names change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from torch import Tensor, nn

from nvae_lowmem.errors import raise_problems
from nvae_lowmem.model.cells import Cell
from nvae_lowmem.model.layers import ConvUnit, ResidualTail
from nvae_lowmem.model.nvae import NVAE, DecoderGroup, EncoderGroup

Kind = Literal["normalisation", "convolution", "linear layer", "unknown layer"]

START = "prior_ftr0"
TOWERS = ("pre_process", "enc_tower", "enc_sampler", "dec_sampler", "nf_cells", "dec_tower", "post_process")
DECODER_STEM = "stem_decoder"
PARTS = (START, "stem", *TOWERS, "enc0", "image_conditional")
# `weight_normalized` is an alias of `weight`; the count of batches is used with a momentum of None only, ours is 0.05.
_NOT_WEIGHTS = ("weight_normalized", "num_batches_tracked")
_SHOWN_PROBLEMS = 20

# field of ours -> last part of the published name
_FIELDS: dict[str, dict[str, str]] = {
    "norm": {"gamma": "weight", "beta": "bias", "running_mean": "running_mean", "running_variance": "running_var"},
    "convolution": {"weight": "weight", "bias": "bias", "log_norm": "log_weight_norm"},
    "squeeze": {"squeeze_weight": "weight", "squeeze_bias": "bias"},
    "excite": {"excite_weight": "weight", "excite_bias": "bias"},
}


class Layer(NamedTuple):
    """One published layer: its path and its tensors by the last part of their names."""

    path: str
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> Kind:
        """What the layer is, told by the tensors that it holds."""
        weight = self.tensors.get("weight")
        if "running_mean" in self.tensors:
            return "normalisation"
        if weight is None or weight.dim() not in (2, 4):
            return "unknown layer"
        return "convolution" if weight.dim() == 4 else "linear layer"


class PublishedModule(NamedTuple):
    """A published module by its path, and our modules that share its layers, in the order of computation."""

    path: str
    modules: list[nn.Module]


def network_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published state without aliases and counters, and without the prefix of DistributedDataParallel."""
    parallel = all(key.startswith("module.") for key in state)
    named = {key.removeprefix("module.") if parallel else key: tensor for key, tensor in state.items()}
    return {key: tensor for key, tensor in named.items() if key.rpartition(".")[2] not in _NOT_WEIGHTS}


def layers_of(tensors: Mapping[str, Tensor], path: str) -> list[Layer]:
    """The layers at or below `path`, in the order of their names; numbers in names count as numbers."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, field = key.rpartition(".")
        if layer == path or layer.startswith(path + "."):
            found.setdefault(layer, {})[field] = tensor
    return [Layer(name, found[name]) for name in sorted(found, key=_natural)]


def indices_of(tensors: Mapping[str, Tensor], path: str) -> list[int]:
    """The numbers that follow `path` in names, ascending."""
    pattern = re.compile(re.escape(path) + r"\.(\d+)\.")
    return sorted({int(match[1]) for match in map(pattern.match, tensors) if match})


def translate(model: NVAE, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Our state_dict, without the power iterations' u and v, from `network_tensors`; the tensors are not copied.

    Raises ConfigError that names every tensor that is missing, left over, or of another shape.
    """
    names = {module: name for name, module in model.named_modules()}
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    sources: dict[str, str] = {}  # our key -> published key
    problems: list[str] = []
    if "start" in model.blocks:
        sources["blocks.start.h"] = START
    for place in published_modules(model, _decoder_stem(tensors)):
        paths: dict[Kind, list[str]] = {}
        for layer in layers_of(tensors, place.path):
            paths.setdefault(layer.kind, []).append(layer.path)
        pairs, lacking = pair(place, paths, names)
        sources |= pairs
        problems += lacking
    for ours, theirs in sources.items():
        if theirs not in tensors:
            problems.append(f"{theirs} is missing")
        elif tuple(tensors[theirs].shape) != shapes[ours]:
            problems.append(f"{theirs} has shape {tuple(tensors[theirs].shape)}, the network needs {shapes[ours]}")
    unused = set(tensors) - set(sources.values())
    if model.config.vanilla:
        unused.discard(START)  # published plain VAEs may carry the start of a tower that they do not have
    problems += [
        f"{key} has no place in the network that the file's args describe" for key in sorted(unused, key=_natural)
    ]
    if len(problems) > _SHOWN_PROBLEMS:
        problems[_SHOWN_PROBLEMS:] = [f"... and {len(problems) - _SHOWN_PROBLEMS} more"]
    raise_problems(problems, where)
    return {ours: tensors[theirs] for ours, theirs in sources.items()}


def published_modules(model: NVAE, decoder_stem: str = DECODER_STEM) -> Iterator[PublishedModule]:
    """Every published module except the learned start, with what it is in our network.

    decoder_stem: the name of a plain VAE's 1x1 convolution from z.
    """
    blocks = model.blocks
    groups = [block for block in blocks.values() if isinstance(block, DecoderGroup)]  # top first
    yield PublishedModule("stem", [blocks["stem"]])
    yield from _numbered("pre_process", (block for name, block in blocks.items() if name.startswith("pre_")))
    yield from _numbered("enc_tower", _encoder_tower(model))
    yield PublishedModule("enc0", [blocks["top"]])
    yield from _numbered("enc_sampler", (group.posterior for group in groups))
    yield from _numbered("dec_sampler", (group.prior for group in groups if group.prior is not None))
    yield PublishedModule("nf_cells", [group.flow for group in groups if group.flow is not None])
    if model.config.vanilla:
        yield PublishedModule(decoder_stem, [groups[0].combiner])
    else:
        yield from _numbered("dec_tower", _decoder_tower(model))
    yield from _numbered("post_process", (block for name, block in blocks.items() if name.startswith("post_")))
    yield PublishedModule("image_conditional", [blocks["head"]])


def _numbered(path: str, modules: Iterable[nn.Module]) -> Iterator[PublishedModule]:
    for index, module in enumerate(modules):
        yield PublishedModule(f"{path}.{index}", [module])


def _encoder_tower(model: NVAE) -> Iterator[nn.Module]:
    """Cells and combiners, highest resolution first. The combiner stands where its group's encoder map is made."""
    for name, block in model.blocks.items():
        if isinstance(block, EncoderGroup):
            yield from block.cells
            group = model.blocks[name.replace("enc", "dec", 1)]
            assert isinstance(group, DecoderGroup)
            if group.encoder_combiner is not None:
                yield group.encoder_combiner
        elif name.startswith("enc_"):
            yield block


def _decoder_tower(model: NVAE) -> Iterator[nn.Module]:
    """Cells and combiners, topmost group first."""
    for name, block in model.blocks.items():
        if isinstance(block, DecoderGroup):
            yield from block.cells
            yield block.combiner
        elif name.startswith("dec_"):
            yield block


def _decoder_stem(tensors: Mapping[str, Tensor]) -> str:
    """A plain VAE's 1x1 convolution from z: the one module that other networks do not have."""
    others = sorted({key.partition(".")[0] for key in tensors} - set(PARTS))
    return others[0] if len(others) == 1 else DECODER_STEM


def pair(
    place: PublishedModule, paths: Mapping[Kind, list[str]], names: Mapping[nn.Module, str]
) -> tuple[dict[str, str], list[str]]:
    """Our keys with the published ones for one place, and what the place lacks.

    paths: of the published layers of each kind, in the order of computation. names: of our modules.
    """
    queues = {kind: iter(found) for kind, found in paths.items()}
    pairs: dict[str, str] = {}
    lacking: list[str] = []
    for module in place.modules:
        for unit, kind, fields in _parameters(module):
            path = next(queues.get(kind, iter(())), None)
            if path is None:
                lacking.append(f"{place.path}: a {kind} is missing (ours: {names[unit]})")
                continue
            pairs |= {
                f"{names[unit]}.{ours}": f"{path}.{theirs}"
                for ours, theirs in fields.items()
                if getattr(unit, ours) is not None
            }
    return pairs, lacking


def _parameters(module: nn.Module) -> Iterator[tuple[nn.Module, Kind, dict[str, str]]]:
    """(our module, what holds its tensors in the published network, fields), each kind in the order of computation."""
    if isinstance(module, Cell):
        for part in (*module.units, module.tail, module.skip):
            yield from _parameters(part)
        return
    for part in module.modules():
        if isinstance(part, (ConvUnit, ResidualTail)) and part.gamma is not None:
            yield part, "normalisation", _FIELDS["norm"]
        if isinstance(part, ConvUnit):
            yield part, "convolution", _FIELDS["convolution"]
        elif isinstance(part, ResidualTail) and part.squeeze_weight is not None:
            yield part, "linear layer", _FIELDS["squeeze"]
            yield part, "linear layer", _FIELDS["excite"]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
