"""Our networks as published checkpoints: written as the published code writes them, and back bit for bit."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published_checkpoint import (
    FIXTURES,
    assert_same_network,
    published_operations,
    published_state,
    random_model,
)

from nvae_lowmem.config.model import Architecture, LikelihoodName, ModelConfig
from nvae_lowmem.config.sections import DataConfig, Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.interop import nvlabs, nvlabs_export
from nvae_lowmem.interop.checkpoint_file import open_checkpoint
from nvae_lowmem.interop.nvlabs_verify import outputs, read_expected, verify

SMALL = ModelConfig(
    image_channels=3, image_size=16, mixtures=2, channels_encoder=8, channels_decoder=8, scales=2, groups=2,
    adaptive=False, latents=2, cells_encoder=1, cells_decoder=1, preprocess_blocks=1, preprocess_cells=2,
    postprocess_blocks=1, postprocess_cells=2,
)  # fmt: skip
DIGITS: dict[str, Any] = {"image_channels": 1, "image_size": 28, "padding": 2, "bits": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"architecture": name} for name in get_args(Architecture)},
    "no squeeze-and-excitation": {"squeeze_excitation": False},
    "adaptive with a minimum": {"scales": 3, "groups": 4, "adaptive": True, "min_groups": 3, "preprocess_cells": 1},
    "groups given outright": {"groups_per_scale": (3, 1)},
    "eleven and more cells in a tower": {"scales": 1, "groups": 5, "cells_encoder": 2, "cells_decoder": 2},
    "two flows": {"flows": 2, "residual_posterior": False},
    "a normal by name": {"likelihood": "normal"},
    "five bits": {"bits": 5},
    "binary": DIGITS,
    "a plain VAE": {"scales": 1, "groups": 1, "flows": 1},
}


def exported(model: Any, folder: Path, source: str = "pictures", step: int = 7) -> Path:
    profile = Profile(name="t", model=model.config, data=DataConfig(source=source))
    return nvlabs_export.save(folder / "checkpoint.pt", profile, model, step)


@pytest.mark.parametrize("name", ["tiny", "tiny_rgb32_nf"])
def test_an_imported_checkpoint_is_exported_as_it_came(name: str, tmp_path: Path) -> None:
    original = open_checkpoint(FIXTURES / name / "checkpoint.pt")
    profile, model = nvlabs.load_published(FIXTURES / name / "checkpoint.pt")
    path = nvlabs_export.save(tmp_path / "checkpoint.pt", profile, model, step=0)
    with torch.serialization.safe_globals([argparse.Namespace]):
        written = torch.load(path, weights_only=True)
    assert set(written) == set(original)
    assert set(written["state_dict"]) == set(original["state_dict"])
    tensors = {k: v for k, v in written["state_dict"].items() if not k.endswith("num_batches_tracked")}
    assert all(torch.equal(tensor, original["state_dict"][key]) for key, tensor in tensors.items())
    same = ("args", "arch_instance", "epoch", "global_step")
    assert {key: written[key] for key in same} == {key: original[key] for key in same}
    again, back = nvlabs.load_published(path)
    assert again == profile
    assert_same_network(back, model)
    assert verify(back, read_expected(FIXTURES / name / "expected.npz")) == verify(
        model, read_expected(FIXTURES / name / "expected.npz")
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_tensors_are_those_of_the_published_code(variant: str) -> None:
    model = random_model(replace(SMALL, **VARIANTS[variant]))
    expected = published_state(model)
    aside = ("weight_normalized", "num_batches_tracked")  # the fixtures have these as the published code writes them
    written = {k: v for k, v in nvlabs_export.published_state(model).items() if k.rpartition(".")[2] not in aside}
    assert set(written) == {key for key in expected if key.rpartition(".")[2] not in aside}
    assert all(torch.equal(value, expected[key]) for key, value in written.items())
    assert nvlabs_export.operations(model.config) == published_operations(model.config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_of_ours_comes_back_bit_for_bit(variant: str, tmp_path: Path) -> None:
    model = random_model(replace(SMALL, **VARIANTS[variant]))
    profile, back = nvlabs.load_published(exported(model, tmp_path))
    assert back.config.scale_groups == model.config.scale_groups
    assert back.likelihood.describe() == model.likelihood.describe()
    assert profile.provenance["global_step"] == 7
    assert_same_network(back, model)
    x = torch.rand(2, model.config.image_channels, model.config.network_size, model.config.network_size).round()
    before, after = outputs(model, x, 2), outputs(back, x, 2)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_alias_takes_no_room_in_the_file(tmp_path: Path) -> None:
    model = random_model(SMALL)
    state = nvlabs_export.published_state(model)
    assert any(key.endswith("weight_normalized") for key in state)
    written = exported(model, tmp_path).stat().st_size
    tensors = sum(tensor.nbytes for key, tensor in state.items() if not key.endswith("weight_normalized"))
    aliases = sum(tensor.nbytes for tensor in state.values()) - tensors
    torch.save(dict(state), tmp_path / "alone.pt")
    torch.save({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "copies.pt")
    assert written < (tmp_path / "copies.pt").stat().st_size - aliases // 2


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"likelihood": "squared_error"}, "model.likelihood = 'squared_error'"),
        ({"likelihood": "logistic_mixture", "mixtures": 1}, "a mixture of one logistic"),
        ({"image_channels": 1}, "model.image_channels = 1"),
        ({"image_channels": 4}, "model.image_channels = 4"),
        ({"padding": 2, "image_size": 12}, "model.padding = 2"),
        ({"bits": 1}, "binary images 3 x 16 x 16"),
        ({**DIGITS, "image_size": 32, "padding": 0}, "binary images 1 x 32 x 32 with padding 0"),
        ({"groups_per_scale": (1, 3)}, "model.groups_per_scale = [1, 3]"),
        ({"groups_per_scale": (5, 1)}, "model.groups_per_scale = [5, 1]"),
    ],
)
def test_what_the_format_cannot_hold_is_named_and_nothing_is_written(
    changed: dict[str, Any], told: str, tmp_path: Path
) -> None:
    model = random_model(replace(SMALL, **changed))
    with pytest.raises(ConfigError) as caught:
        exported(model, tmp_path)
    assert told in str(caught.value) and str(caught.value).startswith("the published format cannot hold ")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    channels=st.sampled_from([1, 3, 4]), size=st.sampled_from([8, 12, 16, 28]), padding=st.sampled_from([0, 2]),
    bits=st.sampled_from([1, 5, 8]), mixtures=st.sampled_from([1, 3]),
    likelihood=st.sampled_from(get_args(LikelihoodName)),
    groups=st.lists(st.integers(1, 3), min_size=2, max_size=2).map(tuple),
)  # fmt: skip
def test_every_network_is_refused_or_comes_back(
    tmp_path_factory: pytest.TempPathFactory, channels: int, size: int, padding: int, bits: int, mixtures: int,
    likelihood: Any, groups: tuple[int, ...],
) -> None:  # fmt: skip
    config = replace(
        SMALL, image_channels=channels, image_size=size, padding=padding, bits=bits, mixtures=mixtures,
        likelihood=likelihood, groups_per_scale=groups, preprocess_cells=1, postprocess_cells=1,
    )  # fmt: skip
    if config.problems():
        return
    model = random_model(config)
    try:
        path = exported(model, tmp_path_factory.mktemp("export"))
    except ConfigError:
        return
    back = nvlabs.load_published(path)[1]
    assert back.likelihood.describe() == model.likelihood.describe()
    sizes = ("image_channels", "image_size", "padding", "scale_groups")
    assert [getattr(back.config, name) for name in sizes] == [getattr(config, name) for name in sizes]
    assert_same_network(back, model)


@pytest.mark.parametrize(
    ("source", "changed", "dataset"),
    [
        ("mnist5k", DIGITS, "mnist"),
        ("cifar10", {"image_size": 32}, "cifar10"),
        ("/home/me/photos", {"image_size": 32}, "celeba_32"),
        ("cifar10", {"image_size": 64}, "celeba_64"),
    ],
)
def test_a_published_data_set_stands_for_the_images(source: str, changed: dict[str, Any], dataset: str) -> None:
    profile = Profile(name="t", model=replace(SMALL, **changed), data=DataConfig(source=source))
    assert nvlabs_export.dataset_name(profile) == dataset
