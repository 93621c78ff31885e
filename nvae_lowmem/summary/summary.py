"""What a model is made of, read off the real modules without allocating its weights.

The network is built, and run once on one image, on fake tensors: they have shapes and dtypes but no storage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import Keep, MemoryPlan, Profile
from nvae_lowmem.model.blocks import DecoderGroup, EncoderGroup
from nvae_lowmem.model.cells import Cell
from nvae_lowmem.model.keep import apply_plan
from nvae_lowmem.model.latents import FromPosterior, NoNoise
from nvae_lowmem.model.layers import ConvUnit
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.text_table import text_table
from nvae_lowmem.units import format_bytes

Shape = tuple[int, int, int]  # channels, height, width of one image's map
Tower = Literal["encoder", "decoder"]
_PREFIXES = {
    "pre": "pre-process cell",
    "enc": "encoder group",
    "dec": "decoder group",
    "post": "post-process cell",
    "top": "encoder top",
    "start": "learned constant",
    "head": "image head",
}


@dataclass(frozen=True, kw_only=True)
class BlockSummary:
    """One block of the network."""

    name: str
    kind: str
    tower: Tower
    cells: int
    cell: str
    """What one of its cells computes, unit by unit; empty without cells."""
    input: Shape | None
    """None for the learned constant, and for the group of a plain VAE: nothing comes before them."""
    output: Shape
    latent: Shape | None
    """The z that a decoder group adds."""
    parameters: int
    parts: dict[str, int]
    """Parameters of a decoder group's parts: cells, prior, encoder_combiner, posterior, flow, combiner."""
    keep: Keep | None
    """What it keeps for the backward pass; None without a plan, and for the learned constant."""

    @property
    def size(self) -> int:
        """Pixels per side of its output: the scale that it is counted under."""
        return self.output[1]


@dataclass(frozen=True, kw_only=True)
class ScaleSummary:
    """All blocks whose output has one resolution."""

    size: int
    """Pixels per side."""
    groups: int
    latent: Shape | None
    latent_dims: int
    encoder_parameters: int
    decoder_parameters: int


@dataclass(frozen=True, kw_only=True)
class Description:
    """A model: blocks in the order of a pass, scales from the highest resolution down."""

    name: str
    architecture: str
    image: Shape
    padding: int
    bits: int
    likelihood: str
    parameters: int
    groups_per_scale: tuple[int, ...]
    latents_per_group: int
    flows: int
    residual_posterior: bool
    latent_dims: int
    scales: tuple[ScaleSummary, ...]
    blocks: tuple[BlockSummary, ...]


# ---- reading the modules ---------------------------------------------------------------------------------------------


def model_on_fake_tensors(config: ModelConfig) -> tuple[NVAE, FakeTensorMode]:
    """The model on fake tensors, in evaluation mode, and the mode to run it under."""
    # Not the meta device: the passes state their autocast explicitly, and autocast knows no such device.
    mode = FakeTensorMode()
    with mode:
        return NVAE(config).eval(), mode


def count_parameters(module: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def describe(profile: Profile) -> Description:
    """The model of a profile and, if its plan is more than the defaults, what every block keeps.

    Raises ConfigError for a plan that names blocks which the model does not have.
    """
    c = profile.model
    model, mode = model_on_fake_tensors(c)
    plan = profile.plan if profile.plan != MemoryPlan() else None
    if plan is not None:
        apply_plan(model, plan)
    shapes = _shapes(model, mode)
    latents = dict(zip(_decoder_groups(model), model.latent_shapes, strict=True))
    names = model.block_names()
    first_of_decoder = names.index("top") + 1
    blocks = tuple(
        _block(model.blocks[name], name, "encoder" if i < first_of_decoder else "decoder", shapes, latents, plan)
        for i, name in enumerate(names)
    )
    return Description(
        name=profile.name,
        architecture=c.architecture,
        image=(c.image_channels, c.image_size, c.image_size),
        padding=c.padding,
        bits=c.bits,
        likelihood=model.likelihood.describe(),
        parameters=count_parameters(model),
        groups_per_scale=c.scale_groups,
        latents_per_group=c.latents,
        flows=c.flows,
        residual_posterior=c.residual_posterior,
        latent_dims=c.latent_dims,
        scales=_scales(blocks),
        blocks=blocks,
    )


def _decoder_groups(model: NVAE) -> list[str]:
    return [name for name in model.block_names() if isinstance(model.blocks[name], DecoderGroup)]


def _shapes(model: NVAE, mode: FakeTensorMode) -> dict[str, tuple[Shape | None, Shape]]:
    """Input and output of every block in one pass over one image: encoder, posterior latents, decoder, head."""
    c, run_block = model.config, model.run_block
    shapes: dict[str, tuple[Shape | None, Shape]] = {}

    def record(name: str, block: nn.Module, *args: Any) -> Any:
        out = run_block(name, block, *args)
        state = out[0] if isinstance(out, tuple) else out
        shapes[name] = _chw(args[0]) if args[0].shape[1] else None, _chw(state)
        return out

    model.run_block = record
    with mode, torch.no_grad():
        x = torch.empty(1, c.image_channels, c.network_size, c.network_size)
        model.decode(FromPosterior(NoNoise()), model.encode(x))
        if "start" in model.blocks:
            shapes["start"] = None, _chw(model.blocks["start"](1, x.dtype))
    return shapes


def _chw(x: Tensor) -> Shape:
    _, channels, height, width = x.shape
    return channels, height, width


def _block(
    module: nn.Module,
    name: str,
    tower: Tower,
    shapes: dict[str, tuple[Shape | None, Shape]],
    latents: dict[str, Shape],
    plan: MemoryPlan | None,
) -> BlockSummary:
    source, target = shapes[name]
    grouped = isinstance(module, (EncoderGroup, DecoderGroup))
    cells = [m for m in module.modules() if isinstance(m, Cell)]
    return BlockSummary(
        name=name,
        kind=_kind(name, grouped, source, target),
        tower=tower,
        cells=len(cells),
        cell=cell_text(cells[0]) if cells else "",
        input=source,
        output=target,
        latent=latents.get(name),
        parameters=count_parameters(module),
        parts={n: count_parameters(m) for n, m in module.named_children()} if name in latents else {},
        keep=plan.keep_of(name) if plan is not None and name != "start" else None,
    )


def _kind(name: str, grouped: bool, source: Shape | None, target: Shape) -> str:
    if not grouped and source is not None and source[1] != target[1]:
        return "down cell" if source[1] > target[1] else "up cell"
    return _PREFIXES.get(name.partition("_")[0], name)


def cell_text(cell: Cell) -> str:
    """The branch of a cell: "BN swish 3x3 -> 64, BN swish 3x3 -> 64, SE"."""
    steps = ["x2 nearest"] if cell.upsample_first else []
    steps += [_unit_text(unit) for unit in cell.units if isinstance(unit, ConvUnit)]
    steps += ["BN"] if cell.tail.gamma is not None else []
    return ", ".join(steps + (["SE"] if cell.tail.squeeze_weight is not None else []))


def _unit_text(unit: ConvUnit) -> str:
    out, per_group, kernel, _ = unit.weight.shape
    words = ["BN"] if unit.gamma is not None else []
    words += [unit.activation] if unit.activation != "none" else []
    words += ["x2 nearest"] if unit.upsample else []
    words.append(f"{kernel}x{kernel}")
    if unit.groups > 1:
        words.append("depthwise" if per_group == 1 else f"in {unit.groups} groups")
    words += ["stride 2"] if unit.stride == 2 else []
    words += [f"dilated by {unit.dilation}"] if unit.dilation > 1 else []
    return " ".join([*words, f"-> {out}"])


def _scales(blocks: Sequence[BlockSummary]) -> tuple[ScaleSummary, ...]:
    out = []
    for size in sorted({b.size for b in blocks}, reverse=True):
        here = [b for b in blocks if b.size == size]
        latents = [b.latent for b in here if b.latent is not None]
        parameters = {t: sum(b.parameters for b in here if b.tower == t) for t in ("encoder", "decoder")}
        out.append(
            ScaleSummary(
                size=size,
                groups=len(latents),
                latent=latents[0] if latents else None,
                latent_dims=sum(channels * height * width for channels, height, width in latents),
                encoder_parameters=parameters["encoder"],
                decoder_parameters=parameters["decoder"],
            )
        )
    return tuple(out)


# ---- for programs and for people -------------------------------------------------------------------------------------


def as_json(description: Description) -> str:
    """Every field of the Description, shapes as [channels, height, width]."""
    return json.dumps(asdict(description), indent=2)


def as_text(description: Description, every_row: bool = False) -> str:
    """The summary, a table of scales, a table of blocks; runs of equal blocks share a row unless every_row."""
    d = description
    groups = " + ".join(map(str, d.groups_per_scale))
    padding = f" padded by {d.padding}" if d.padding else ""
    lines = [
        f"{d.name}: {shape_text(d.image)} images of {d.bits} bit{'s' if d.bits > 1 else ''}{padding}, {d.architecture}",
        f"  parameters   {d.parameters:,} trainable, {format_bytes(4 * d.parameters)} in fp32",
        f"  groups       {groups}{f' = {sum(d.groups_per_scale)}' * (len(d.groups_per_scale) > 1)},"
        " highest resolution first",
        f"  latents      {d.latents_per_group} channels per group, {d.latent_dims:,} dimensions per image",
        f"  likelihood   {d.likelihood}",
        "",
        *text_table(*_scale_table(d.scales)),
        "",
        *text_table(*_block_table(d.blocks, every_row)),
    ]
    return "\n".join(lines)


def _scale_table(scales: Sequence[ScaleSummary]) -> tuple[str, list[tuple[str, ...]]]:
    rows: list[tuple[str, ...]] = [("scale", "groups", "z of a group", "latent dims", "encoder", "decoder")]
    for s in scales:
        latent = (str(s.groups), shape_text(s.latent), f"{s.latent_dims:,}") if s.latent else ("-", "-", "-")
        rows.append((f"{s.size} x {s.size}", *latent, f"{s.encoder_parameters:,}", f"{s.decoder_parameters:,}"))
    return "<>>>>>", rows


def _block_table(blocks: Sequence[BlockSummary], every_row: bool) -> tuple[str, list[tuple[str, ...]]]:
    planned = any(b.keep is not None for b in blocks)
    rows: list[tuple[str, ...]] = [
        ("block", "", "kind", "cells", "input", "", "output", "z", "parameters", "together", "keeps")
    ]
    for run in [[b] for b in blocks] if every_row else runs(blocks):
        b, several = run[0], len(run) > 1
        rows.append(
            (
                f"{b.name} ... {run[-1].name}" if several else b.name,
                f"x{len(run)}" if several else "",
                b.kind,
                str(b.cells or "-"),
                shape_text(b.input),
                "->",
                shape_text(b.output),
                shape_text(b.latent),
                f"{b.parameters:,}",
                f"{len(run) * b.parameters:,}" if several else "",
                b.keep or "-",
            )
        )
    unused = ({1, 9} if all(not row[1] for row in rows[1:]) else set()) | (set() if planned else {10})
    chosen = [i for i in range(11) if i not in unused]
    return "".join("<><>><>>>><"[i] for i in chosen), [tuple(row[i] for i in chosen) for row in rows]


def runs(blocks: Sequence[BlockSummary]) -> Iterator[list[BlockSummary]]:
    """Groups of neighbouring blocks that differ only in their names."""
    return (list(run) for _, run in groupby(blocks, key=lambda b: {**asdict(b), "name": None}))


def shape_text(shape: Shape | None) -> str:
    """60 x 128 x 128: channels, height, width."""
    return " x ".join(map(str, shape)) if shape else "-"
