"""`import nvae_lowmem as nl`: how a person uses a trained model in a notebook."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation_runs import GREY, RGB, demo_run, responsive, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from published_checkpoint import FIXTURES

import nvae_lowmem as nl
from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.library.export import export_run, pack
from nvae_lowmem.library.images import as_batch, as_output
from nvae_lowmem.training.open_run import open_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nl.Model:
    return nl.load(write_run(tmp_path_factory.mktemp("runs") / "run", responsive(RGB)))


def images_of(count: int, seed: int = 0) -> torch.Tensor:
    """(count, 3, 16, 16) uint8."""
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --- the front door ---------------------------------------------------------------------------------------------------


def test_importing_the_library_imports_no_torch_until_a_name_is_used() -> None:
    code = "import sys, nvae_lowmem as nl; assert 'torch' not in sys.modules; nl.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_see_the_names_that_are_public() -> None:
    tree = ast.parse(Path(str(nl.__file__)).read_text(encoding="utf-8"))
    typed = {
        (alias.name, node.module)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == set(nl.PUBLIC.items())
    assert all(getattr(nl, name) is not None for name in nl.PUBLIC)


def test_a_name_that_is_not_there_says_which_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute .nothing_like_it.; its names are .*load"):
        getattr(nl, "nothing_like_it")  # noqa: B009


# --- load -------------------------------------------------------------------------------------------------------------


def test_runs_latest_is_the_newest_run(tmp_path: Path) -> None:
    for number in (0, 1):
        write_run(tmp_path / "runs" / f"{number:05d}-faces", responsive(RGB))
    assert nl.load(tmp_path / "runs" / "latest").name == "00001-faces"
    assert nl.load(0, runs_dir=tmp_path / "runs").name == "00000-faces"


def test_a_published_checkpoint_can_be_sampled(tmp_path: Path) -> None:
    published = nl.load(FIXTURES / "tiny" / "checkpoint.pt")
    size = published.config.image_size
    assert published.sample(2, passes=1).shape == (2, published.config.image_channels, size, size)


def test_an_export_and_its_zip_give_the_same_images_as_the_run(tmp_path: Path, model: nl.Model) -> None:
    folder = write_run(tmp_path / "run", responsive(RGB), source="faces-elsewhere")
    out = export_run(open_run(str(folder), ""), tmp_path / "faces", temperatures=(0.8,), licence="CC0", passes=2)
    assert {file.name for file in out.iterdir()} == {
        "model.safetensors", "config.json", "README.md", "samples.png", "bn-t0.80.safetensors"
    }  # fmt: skip
    wanted = model.sample(3, seed=5, passes=2)
    for source in (out, pack(out)):
        loaded = nl.load(source)
        assert loaded.name in ("faces", "faces.zip")
        assert torch.equal(loaded.sample(3, seed=5, passes=2), wanted)
        assert torch.equal(loaded.elbo(images_of(2)), model.elbo(images_of(2)))
    card = (out / "README.md").read_text()
    assert "CC0" in card and "samples.png" in card and str(tmp_path) not in card


def test_an_export_tells_nobody_where_things_are(tmp_path: Path) -> None:
    folder, mine = write_run(tmp_path / "run", responsive(RGB)), str(tmp_path / "mine")
    values = {"data.test_source": mine, "data.cache_dir": mine, "training.init_from": mine}
    profiles.save(profiles.override(profiles.load(folder / "config.toml"), values=values), folder / "config.toml")
    out = export_run(open_run(str(folder), ""), tmp_path / "out", temperatures=())
    assert str(tmp_path) not in (out / "config.json").read_text() + (out / "README.md").read_text()
    assert nl.load(out).profile.training.init_from == "mine"


def test_an_export_that_was_damaged_or_is_in_the_way_is_named(tmp_path: Path) -> None:
    run = open_run(str(write_run(tmp_path / "run", responsive(RGB))), "")
    out = export_run(run, tmp_path / "out", temperatures=())
    with pytest.raises(nl.ConfigError, match="not an empty folder"):
        export_run(run, out)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(nl.ConfigError, match="no complete export"):
        nl.load(out)
    (out / "config.json").write_text("[" * 100_000)
    with pytest.raises(nl.ConfigError, match="no complete export"):
        nl.load(out)


def test_an_export_shows_held_out_images_where_the_data_are(tmp_path: Path) -> None:
    out = export_run(open_run(str(demo_run(tmp_path / "run")), ""), tmp_path / "out", temperatures=())
    assert "reconstructions.png" in (out / "README.md").read_text()
    assert Image.open(out / "reconstructions.png").width > 100


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), b"<html>not found</html>"])
def test_what_is_no_model_is_refused_with_a_message(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    path.write_bytes(content)
    with pytest.raises(nl.ConfigError, match="model.zip"):
        nl.load(path)
    with pytest.raises(nl.ConfigError, match="no run folder"):
        nl.load(tmp_path / "nothing")


# --- what a model does ------------------------------------------------------------------------------------------------


def test_samples_are_a_function_of_the_seed_and_leave_the_model_as_it_was(model: nl.Model) -> None:
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    first = model.sample(5, temperature=0.7, seed=3, passes=2)
    assert torch.equal(first[:2], model.sample(2, temperature=0.7, seed=3, passes=2))
    assert not torch.equal(first, model.sample(5, temperature=0.7, seed=4, passes=2))
    assert first.shape == (5, 3, 16, 16) and first.min() >= 0 and first.max() <= 1
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())


def test_decoding_an_images_latents_is_reconstructing_it(model: nl.Model) -> None:
    images = images_of(5)
    latents = model.encode(images, posterior="mean")
    assert len(latents) == 5 and latents.kl.shape == (5, model.config.total_groups)
    torch.testing.assert_close(model.decode(latents), model.reconstruct(images, posterior="mean"))


def test_latents_come_back_from_a_file(model: nl.Model, tmp_path: Path) -> None:
    latents = model.encode(images_of(3))
    latents.save(tmp_path / "faces.safetensors")
    read = nl.Latents.load(tmp_path / "faces.safetensors")
    assert torch.equal(read.kl, latents.kl)
    assert all(torch.equal(a, b) for a, b in zip(read.z, latents.z, strict=True))
    (tmp_path / "other.safetensors").write_bytes(b"no tensors")
    with pytest.raises(nl.ConfigError, match=r"other\.safetensors"):
        nl.Latents.load(tmp_path / "other.safetensors")


def test_latents_of_another_model_are_refused(model: nl.Model) -> None:
    latents = model.encode(images_of(1))
    with pytest.raises(nl.ConfigError, match="this model has groups of shape"):
        model.decode(nl.Latents(latents.z[:-1], latents.kl))


def test_a_blend_goes_from_one_image_to_the_other(model: nl.Model) -> None:
    a, b = images_of(2)
    ends = model.reconstruct(torch.stack([a, b]))
    points = model.blend(a, b, [0.0, 0.5, [1.0] * model.config.scales])
    assert torch.equal(points[0], ends[0]) and torch.equal(points[2], ends[1])
    assert not torch.equal(points[1], ends[0])
    with pytest.raises(nl.ConfigError, match="weights"):
        model.blend(a, b, [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]])


def test_the_importance_weighted_bound_is_tighter_than_the_elbo(model: nl.Model) -> None:
    images = images_of(6)
    elbo, bound = model.elbo(images), model.log_likelihood(images, k=20)
    assert elbo.shape == bound.shape == (6,)
    assert bound.mean() > elbo.mean()


# --- images in and out ------------------------------------------------------------------------------------------------


def test_every_kind_of_image_is_the_same_batch(model: nl.Model, tmp_path: Path) -> None:
    tensor = images_of(2)
    array = tensor.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(image) for image in array]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    kinds: list[Any] = [
        tensor, tensor.float() / 255, array, array.astype(np.float64) / 255, pictures, [tensor[0], array[1]],
        [tmp_path / "0.png", str(tmp_path / "1.png")],
    ]  # fmt: skip
    expected = as_batch(tensor, model.profile)
    assert all(torch.equal(as_batch(kind, model.profile), expected) for kind in kinds)


def test_pil_images_of_any_size_and_mode_are_prepared_as_the_runs_data(model: nl.Model) -> None:
    grey = Image.new("L", (40, 30), 128)
    assert as_batch([grey, grey.convert("RGBA")], model.profile).shape == (2, 3, 16, 16)
    nothing = as_batch(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), model.profile)
    assert (nothing == 1).all()  # transparency is laid on white, as in files


def test_a_grey_model_takes_arrays_without_a_channel() -> None:
    profile = Profile(name="grey", model=GREY)
    assert as_batch(np.zeros((12, 12), np.uint8), profile).shape == (1, 1, 16, 16)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 8), "16 x 16"),
        (torch.zeros(1, 1, 16, 16), "3 channels"),
        (torch.full((1, 3, 16, 16), 2.0), "from 0 to 1"),
        (torch.full((1, 3, 16, 16), float("nan")), "from 0 to 1"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int64), "no known range"),
        (np.zeros((1, 1, 1, 1, 1)), "no image"),
        ([], "at least one"),
        (3, "int"),
        ([object()], r"images\[0\]"),
        ("missing.png", "missing.png"),
    ],
)
def test_what_is_no_image_of_the_model_is_refused(images: Any, message: str, model: nl.Model) -> None:
    with pytest.raises(nl.ConfigError, match=message):
        as_batch(images, model.profile)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 255), st.integers(1, 8))
def test_files_and_tensors_keep_the_same_bits(value: int, bits: int) -> None:
    profile = Profile(name="bits", model=replace(RGB, bits=bits))
    picture = Image.new("RGB", (16, 16), (value, value, value))
    tensor = torch.full((3, 16, 16), value, dtype=torch.uint8)
    assert torch.equal(as_batch(picture, profile), as_batch(tensor, profile))


def test_outputs_are_tensors_arrays_or_pictures() -> None:
    images = torch.rand(2, 3, 4, 4)
    assert as_output(images, "tensor") is images
    array = as_output(images, "array")
    assert array.shape == (2, 4, 4, 3) and array.dtype == np.uint8
    assert [picture.size for picture in as_output(images, "pil")] == [(4, 4)] * 2
    assert as_output(images[:, :1], "pil")[0].mode == "L"
    with pytest.raises(nl.ConfigError, match="jpeg"):
        as_output(images, "jpeg")  # type: ignore[arg-type]
