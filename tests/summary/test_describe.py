"""tools/describe.py: published sizes read off the real modules, the table, JSON, and the picture."""

from __future__ import annotations

import functools
import gc
import importlib.util
import itertools
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.profile_file import override
from nvae_lowmem.config.recipes import RECIPES, recipe
from nvae_lowmem.config.sections import MemoryPlan, Profile
from nvae_lowmem.model.latents import FromPosterior, NoNoise
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.summary.drawing import KEEP_COLOURS, draw
from nvae_lowmem.summary.layout import lay_out
from nvae_lowmem.summary.summary import Description, as_text, count_parameters, describe, model_on_fake_tensors, runs

slow = pytest.mark.slow
SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "describe.py"
# The published sizes: trainable parameters, groups from the highest resolution down, latent dimensions.
SIZES = [
    pytest.param("tiny", 326_826, (3, 3), 7_680, id="tiny"),
    pytest.param("mnist", 33_363_134, (10, 5), 14_400, id="mnist"),
    pytest.param("cifar10", 130_852_480, (30,), 153_600, id="cifar10", marks=slow),
    pytest.param("celeba64", 153_281_364, (20, 10, 5), 467_200, id="celeba64", marks=slow),
    pytest.param("imagenet32", 268_509_444, (28,), 143_360, id="imagenet32", marks=slow),
    pytest.param("celebahq256", 330_798_664, (16, 8, 4, 4, 4), 6_005_760, id="celebahq256", marks=slow),
    pytest.param("ffhq256", 330_798_664, (16, 8, 4, 4, 4), 6_005_760, id="ffhq256", marks=slow),
]
CELEBA64_VARIANTS = [
    pytest.param(["model.adaptive=false"], 449_563_924, id="not adaptive"),
    pytest.param(["model.flows=0"], 151_371_764, id="no flows"),
    pytest.param(["model.channels_encoder=32", "model.channels_decoder=32"], 41_306_764, id="32 channels"),
    pytest.param(["model.channels_encoder=24", "model.channels_decoder=24"], 24_662_188, id="24 channels"),
    pytest.param(["model.channels_encoder=16", "model.channels_decoder=16"], 12_548_812, id="16 channels"),
]


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    """Fake tensors are many small objects: looking for garbage among them takes a third of the time."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@functools.cache
def described(model: ModelConfig) -> Description:
    """Recipes that share a model (the two of 256 pixels) are built once."""
    return describe(Profile(name="m", model=model))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("script_describe", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "parameters", "groups", "latent_dims"), SIZES)
def test_recipes_have_their_published_sizes(
    name: str, parameters: int, groups: tuple[int, ...], latent_dims: int
) -> None:
    d = described(recipe(name).model)
    assert (d.parameters, d.groups_per_scale, d.latent_dims) == (parameters, groups, latent_dims)
    assert sum(b.parameters for b in d.blocks) == parameters
    assert sum(s.encoder_parameters + s.decoder_parameters for s in d.scales) == parameters
    assert tuple(s.groups for s in d.scales if s.groups) == groups
    assert sum(s.latent_dims for s in d.scales) == latent_dims


@pytest.mark.slow
@pytest.mark.parametrize(("assignments", "parameters"), CELEBA64_VARIANTS)
def test_variants_of_celeba64_have_their_published_sizes(assignments: list[str], parameters: int) -> None:
    config = override(recipe("celeba64"), assignments).model
    # small weights are made faster than fake ones
    model = NVAE(config) if config.channels_encoder <= 32 else model_on_fake_tensors(config)[0]
    assert count_parameters(model) == parameters


def test_every_recipe_is_in_the_table_of_sizes() -> None:
    assert {case.values[0] for case in SIZES} == set(RECIPES)


def test_no_weight_is_allocated() -> None:
    model, _ = model_on_fake_tensors(recipe("tiny").model)
    assert {type(t.data) for t in [*model.parameters(), *model.buffers()]} == {FakeTensor}


@pytest.mark.parametrize(
    "changes", [{}, {"flows": 1}, {"scales": 1, "groups": 1}, {"architecture": "mbconv_den"}], ids=str
)
def test_shapes_are_those_of_a_real_pass(changes: dict) -> None:
    config = replace(recipe("tiny").model, **changes)
    d = described(config)
    model = NVAE(config).eval()
    seen: dict[str, tuple[int, ...]] = {}
    for name, block in model.blocks.items():
        block.register_forward_hook(
            lambda _module, _args, out, name=name: seen.update(
                {name: tuple((out[0] if isinstance(out, tuple) else out).shape[1:])}
            )
        )
    with torch.no_grad():
        maps = model.encode(torch.rand(2, config.image_channels, config.network_size, config.network_size))
        _, latents = model.decode(FromPosterior(NoNoise()), maps, return_z=True)
    assert {b.name: b.output for b in d.blocks} == seen
    assert [b.latent for b in d.blocks if b.latent] == [tuple(z.shape[1:]) for z, *_ in latents if z is not None]
    inputs = {b.name: b.input for b in d.blocks}
    for tower in ("encoder", "decoder"):
        chain = [b for b in d.blocks if b.tower == tower]
        assert all(inputs[after.name] == before.output for before, after in itertools.pairwise(chain))


def test_runs_are_of_equal_neighbours_and_lose_no_block() -> None:
    d = described(recipe("tiny").model)
    found = list(runs(d.blocks))
    assert [b for run in found for b in run] == list(d.blocks)
    assert {run[0].name: len(run) for run in found if len(run) > 1} == {
        "enc_0_2": 3,
        "enc_1_2": 3,
        "dec_1_1": 2,  # the topmost group has no cells
        "dec_0_0": 3,
    }


def test_table_groups_runs_unless_all_rows_are_asked_for() -> None:
    d = described(recipe("tiny").model)
    short, long = as_text(d), as_text(d, every_row=True)
    assert "dec_0_0 ... dec_0_2  x3" in short
    assert [line.split()[0] for line in long.splitlines()[-len(d.blocks) :]] == [b.name for b in d.blocks]
    assert "keeps" not in short


def test_policy_of_every_block_is_that_of_the_plan_and_cuts_runs() -> None:
    plan = MemoryPlan(keep="input", keep_blocks={"dec_0_1": "host", "p*": "cheap"})
    d = describe(replace(recipe("tiny"), plan=plan))
    assert {b.name: b.keep for b in d.blocks} == {
        b.name: None if b.name == "start" else plan.keep_of(b.name) for b in d.blocks
    }
    assert [len(run) for run in runs(d.blocks) if run[0].name.startswith("dec_0_")] == [1, 1, 1]
    assert as_text(d).count("cheap") == 4


# ---- the command -----------------------------------------------------------------------------------------------------


def test_json_on_standard_output_has_every_key(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--recipe", "tiny", "--set", "model.latents=4", "--json", "-"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert set(table) == set(Description.__dataclass_fields__)
    assert (table["name"], table["latents_per_group"], table["latent_dims"]) == ("tiny", 4, 3_840)
    group = next(b for b in table["blocks"] if b["name"] == "dec_0_1")
    assert (group["kind"], group["cells"], group["latent"]) == ("decoder group", 2, [4, 16, 16])
    assert sum(group["parts"].values()) == group["parameters"]


def test_profile_gives_table_json_file_and_picture(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "d.json", tmp_path / "d.PNG"
    arguments = ["--profile", "demo-mnist", "--all", "--json", str(files[0]), "--picture", str(files[1])]
    assert script.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("demo-mnist: ") and "326,826 trainable" in out and "..." not in out
    assert json.loads(files[0].read_text())["parameters"] == 326_826
    assert files[1].read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "celeba"], "did you mean 'celeba64'?"),
        (["--recipe", "tiny", "--set", "model.flow=1"], "did you mean model.flows?"),
        (["--recipe", "tiny", "--set", "model.image_size=29"], "cannot be halved 2 times"),
        (["--recipe", "tiny", "--set", 'plan.keep_blocks={"dec_9_0" = "host"}'], "dec_9_0"),
        (["--profile", "demo-mnits"], "near: demo-mnist"),
        (["--recipe", "tiny", "--picture", "net.jpg"], "--picture net.jpg: the name must end in .svg or .png"),
        (
            ["--recipe", "tiny", "--json", "no/such/folder/d.json"],
            "d.json cannot be written: there is no folder",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_message_and_status_2(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert script.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("describe.py: ") and message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [[], ["--recipe", "tiny", "--profile", "demo-mnist"]])
def test_one_of_recipe_and_profile_is_needed(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert script.main(arguments) == 2
    assert "--recipe" in capsys.readouterr().err


# ---- the picture -----------------------------------------------------------------------------------------------------


def test_svg_is_xml_with_a_box_for_every_block_and_the_same_at_every_call() -> None:
    d = described(recipe("tiny").model)
    svg = draw(d, "svg")
    elements = {e.get("id", ""): e for e in ElementTree.fromstring(svg).iter()}
    assert {name for name in elements if name.startswith("block-")} == {f"block-{b.name}" for b in d.blocks}
    texts = {e.text for e in elements_with_text(svg)}
    assert {b.name for b in d.blocks} <= texts
    assert draw(d, "svg") == svg


def test_boxes_have_the_colour_of_their_policy_and_the_legend_names_those_in_use() -> None:
    plan = MemoryPlan(keep="input", keep_blocks={"dec_0_1": "host"})
    d = describe(replace(recipe("tiny"), plan=plan))
    svg = draw(d, "svg")
    boxes = {e.get("id", ""): ElementTree.tostring(e).decode().lower() for e in ElementTree.fromstring(svg).iter()}
    for block in d.blocks:
        if block.keep is not None:
            assert KEEP_COLOURS[block.keep].lower() in boxes[f"block-{block.name}"]
    legend = [text for e in elements_with_text(svg) if (text := e.text or "").split(":")[0] in KEEP_COLOURS]
    assert [text.split(":")[0] for text in legend] == ["input", "host"]


def elements_with_text(svg: bytes) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scales": 1, "groups": 1},
        {"preprocess_blocks": 3, "postprocess_blocks": 3, "preprocess_cells": 1, "postprocess_cells": 2},
        {"preprocess_blocks": 0, "postprocess_blocks": 0},
        {"scales": 4, "groups": 8, "adaptive": True},
    ],
    ids=str,
)
def test_every_block_has_a_place_of_its_own_beside_its_partner(changes: dict) -> None:
    d = described(replace(recipe("tiny").model, **changes))
    layout = lay_out(d.blocks, top=1.0, height=7.0)
    assert set(layout.y) == {b.name for b in d.blocks}
    encoder, decoder = ([layout.y[b.name] for b in d.blocks if b.tower == t] for t in ("encoder", "decoder"))
    apart = layout.row * 0.99
    assert all(below - above >= apart for below, above in itertools.pairwise(encoder))  # bottom-up
    assert all(below - above >= apart for above, below in itertools.pairwise(decoder))  # top-down
    for name, y in layout.y.items():
        assert layout.y.get(name.replace("dec_", "enc_"), y) == y
        assert 1.0 < y < layout.bottom
    assert [band.size for band in layout.bands] == sorted({b.size for b in d.blocks})
