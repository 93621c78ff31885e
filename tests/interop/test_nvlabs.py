"""Published NVAE checkpoints: what we compute from them is what the published network computed."""

from __future__ import annotations

import argparse
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_checkpoint import (
    FIXTURES,
    assert_same_network,
    published_args,
    published_operations,
    published_state,
    random_model,
    save,
    save_model,
)

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.interop import nvlabs
from nvae_lowmem.interop.checkpoint_file import open_checkpoint
from nvae_lowmem.interop.nvlabs_verify import ARRAYS, TOLERANCE, outputs, published_nll, read_expected, verify
from nvae_lowmem.model.cells import CELLS
from nvae_lowmem.model.flows import FlowCell
from nvae_lowmem.model.likelihoods import make_likelihood
from nvae_lowmem.model.nvae import NVAE

NAMES = ("tiny", "tiny_rgb32_nf")
SMALL = ModelConfig(
    image_channels=3, image_size=16, likelihood="logistic_mixture", mixtures=2, channels_encoder=8, channels_decoder=8,
    scales=2, groups=2, adaptive=False, latents=2, cells_encoder=1, cells_decoder=1, preprocess_blocks=1,
    preprocess_cells=2, postprocess_blocks=1, postprocess_cells=2,
)  # fmt: skip
BINARY = {"image_channels": 1, "bits": 1, "likelihood": "bernoulli"}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"architecture": name} for name in CELLS},
    "no squeeze-and-excitation": {"squeeze_excitation": False},
    "no residual posterior": {"residual_posterior": False},
    "three scales, adaptive": {"scales": 3, "groups": 4, "adaptive": True, "preprocess_cells": 1},
    "adaptive with a minimum": {"scales": 3, "groups": 4, "adaptive": True, "min_groups": 3},
    "eleven and more cells in a tower": {"scales": 1, "groups": 5, "cells_encoder": 2, "cells_decoder": 2},
    "two flows": {"flows": 2},
    "one component": {"mixtures": 1, "likelihood": "normal"},
    "five bits": {"bits": 5},
    "binary": BINARY,
    "different towers": {"channels_encoder": 12, "channels_decoder": 8},
    "no cells in the towers": {"cells_encoder": 0, "cells_decoder": 0},
    "four blocks of one cell": {"preprocess_blocks": 3, "postprocess_blocks": 3, "preprocess_cells": 1},
}


def network(path: Path) -> NVAE:
    return nvlabs.load_published(path)[1]


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    """The tiny fixture's checkpoint as a dict, to be written again with changes."""
    return open_checkpoint(FIXTURES / "tiny" / "checkpoint.pt")


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """As little of a checkpoint as is accepted."""
    model = random_model(SMALL)
    return {"state_dict": published_state(model), "args": published_args(SMALL, "pictures_16")}


def changed(checkpoint: dict[str, Any], path: Path, state: dict[str, Any] | None = None, **args: Any) -> Path:
    """The checkpoint under `path` with other tensors (None: removed) or other args (...: removed)."""
    options = {k: v for k, v in {**vars(checkpoint["args"]), **args}.items() if v is not ...}
    tensors = {k: v for k, v in {**checkpoint["state_dict"], **(state or {})}.items() if v is not None}
    torch.save({**checkpoint, "state_dict": tensors, "args": argparse.Namespace(**options)}, path)
    return path


# --- the published network's own figures ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_published_checkpoints_give_the_published_networks_figures(name: str) -> None:
    errors = verify(network(FIXTURES / name / "checkpoint.pt"), read_expected(FIXTURES / name / "expected.npz"))
    assert set(errors) == set(ARRAYS)
    assert errors["parameters"] == 0
    assert max(errors.values()) < TOLERANCE / 10


@pytest.mark.parametrize("name", NAMES)
def test_one_layer_that_is_a_tenth_larger_shows_in_the_comparison(name: str) -> None:
    model = network(FIXTURES / name / "checkpoint.pt")
    expected = read_expected(FIXTURES / name / "expected.npz")
    with torch.no_grad():
        model.blocks["top"].conv.log_norm += 0.1
    assert max(verify(model, expected).values()) > TOLERANCE


def test_the_comparison_tells_which_way_the_flows_look() -> None:
    model = network(FIXTURES / "tiny_rgb32_nf" / "checkpoint.pt")
    expected = read_expected(FIXTURES / "tiny_rgb32_nf" / "expected.npz")
    for module in model.modules():
        if isinstance(module, FlowCell):
            module.first.mask = module.first.mask.flip(2, 3)
    errors = verify(model, expected)
    assert errors["kl_per_group"] > TOLERANCE
    assert errors["prior_logits"] < TOLERANCE  # the prior has no flow


def test_arrays_that_are_not_finite_are_no_match() -> None:
    model = network(FIXTURES / "tiny" / "checkpoint.pt")
    expected = read_expected(FIXTURES / "tiny" / "expected.npz")
    with torch.no_grad():
        model.blocks["head"].conv.bias.fill_(torch.nan)
    assert not verify(model, expected)["logits"] <= TOLERANCE


def test_the_options_of_a_fixture_become_its_profile() -> None:
    profile, _ = nvlabs.load_published(FIXTURES / "tiny_rgb32_nf" / "checkpoint.pt")
    model = profile.model
    assert (model.image_size, model.padding, model.image_channels, model.bits) == (32, 0, 3, 8)
    assert (model.scale_groups, model.latents, model.flows) == ((4, 2), 6, 1)
    assert (model.architecture, model.likelihood, model.mixtures) == ("res_mbconv", "logistic_mixture", 10)
    assert (profile.data.source, profile.training.total_batch) == ("cifar10", 32)
    assert profile.provenance["global_step"] == 3456
    assert profiles.loads(profiles.dumps(profile)) == profile


def test_the_published_normal_is_a_density_on_the_cropped_image() -> None:
    likelihood = make_likelihood("normal", image_channels=3, bits=8)
    parameters, x = torch.randn(2, 6, 8, 8), torch.rand(2, 3, 8, 8)
    mu, log_sigma = (5 * torch.tanh(parameters / 5)).chunk(2, dim=1)
    density = torch.distributions.Normal(mu, log_sigma.exp() + 0.01).log_prob(2 * x - 1)
    expected = -density[:, :, 2:-2, 2:-2].sum((1, 2, 3))
    torch.testing.assert_close(published_nll(likelihood, parameters, x, padding=2), expected)


# --- every option -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_survives_the_way_there_and_back(variant: str, tmp_path: Path) -> None:
    model = random_model(replace(SMALL, **VARIANTS[variant]))
    config = model.config
    loaded = network(save_model(tmp_path / "checkpoint.pt", model, "pictures_16"))
    assert loaded.config == config
    assert not loaded.training
    assert_same_network(loaded, model)
    x = torch.rand(2, config.image_channels, 16, 16).round()
    before, after = outputs(model, x, 2), outputs(loaded, x, 2)
    assert all(torch.equal(before[name], after[name]) for name in ARRAYS)
    assert torch.isfinite(before["logits"]).all()


@pytest.mark.parametrize("unused_start", [False, True])
def test_a_plain_vae_has_no_towers(tmp_path: Path, unused_start: bool) -> None:
    model = random_model(replace(SMALL, scales=1, groups=1, flows=1))
    state = published_state(model)
    if unused_start:
        state["prior_ftr0"] = torch.rand(16, 8, 8)
    args = published_args(model.config, "pictures_16")
    loaded = network(save(tmp_path / "checkpoint.pt", state, args, "res_mbconv"))
    assert loaded.config == model.config
    assert_same_network(loaded, model)


@pytest.mark.parametrize("architecture", ["res_bnelu", "res_mbconv"])
@pytest.mark.parametrize("synchronised", ["none", "some", "all"])
def test_levels_of_synchronised_batch_norm_do_not_matter(tmp_path: Path, architecture: Any, synchronised: str) -> None:
    model = random_model(replace(SMALL, architecture=architecture))
    state, args = published_state(model, synchronised), published_args(model.config, "pictures_16")
    assert_same_network(network(save(tmp_path / "c.pt", state, args, published_operations(model.config))), model)


def test_the_prefix_of_a_parallel_run_and_half_precision_are_accepted(tmp_path: Path, tiny: dict[str, Any]) -> None:
    state = {f"module.{k}": v.half() if v.is_floating_point() else v for k, v in tiny["state_dict"].items()}
    torch.save({**tiny, "state_dict": state}, tmp_path / "checkpoint.pt")
    weights = network(tmp_path / "checkpoint.pt").state_dict()
    assert {w.dtype for w in weights.values()} == {torch.float32}
    torch.testing.assert_close(weights["blocks.start.h"], tiny["state_dict"]["prior_ftr0"], atol=1e-3, rtol=1e-3)


def test_old_files_without_the_later_options_load(tmp_path: Path, tiny: dict[str, Any]) -> None:
    lacking = dict.fromkeys(("ada_groups", "min_groups_per_scale", "num_mixture_dec"), ...)
    old, _ = nvlabs.load_published(changed(tiny, tmp_path / "checkpoint.pt", **lacking))
    assert old.model == nvlabs.load_published(FIXTURES / "tiny" / "checkpoint.pt")[0].model


@pytest.mark.parametrize("dataset, network_size, padding", [
    ("mnist", 32, 2), ("omniglot", 32, 2), ("cifar10", 32, 0), ("celeba_64", 64, 0), ("imagenet_32", 32, 0),
    ("lsun_bedroom_128", 128, 0), ("ffhq", 256, 0), ("celeba_256", 256, 0), ("stacked_mnist", 64, 0), ("", 16, 0),
])  # fmt: skip
def test_the_image_size_is_the_networks_whatever_the_dataset(
    tmp_path: Path, dataset: str, network_size: int, padding: int
) -> None:
    binary = BINARY if padding else {}
    model = random_model(replace(SMALL, image_size=network_size - 2 * padding, padding=padding, **binary))
    path = save_model(tmp_path / "checkpoint.pt", model, dataset)
    profile, _ = nvlabs.load_published(path)
    assert profile.model == model.config
    assert profile.problems() == []


@pytest.mark.parametrize("operations, name", [(None, "res35_mbconv"), ("res35_mbconv", None), ("named", "my_cells")])
def test_the_architecture_is_found_by_operations_or_by_name(tmp_path: Path, operations: Any, name: str | None) -> None:
    model = random_model(replace(SMALL, architecture="res35_mbconv"))
    operations = published_operations(model.config) if operations == "named" else operations
    args = published_args(model.config, "pictures_16", arch_instance=name)
    profile, _ = nvlabs.load_published(save(tmp_path / "checkpoint.pt", published_state(model), args, operations))
    assert profile.model.architecture == "res35_mbconv"


@pytest.mark.parametrize("architecture", ["res_elu", "res_bnelu", "res_mbconv", "mbconv_sep11", "mbconv_den"])
def test_unknown_names_leave_the_shapes_to_tell_the_architecture(tmp_path: Path, architecture: Any) -> None:
    model = random_model(replace(SMALL, architecture=architecture))
    args = published_args(model.config, "pictures_16", arch_instance="my_cells")
    path = save(tmp_path / "checkpoint.pt", published_state(model), args, {"normal_enc": ["mine"]})
    if architecture.endswith("_mbconv"):  # four differ in dilation alone, which no shape shows
        with pytest.raises(ConfigError, match="fit res_mbconv, res53_mbconv, res35_mbconv, res55_mbconv alike"):
            nvlabs.load_published(path)
    else:
        assert nvlabs.load_published(path)[0].model.architecture == architecture


# --- what is wrong with a file ----------------------------------------------------------------------------------------


def test_all_misfits_of_the_tensors_are_named_at_once(tmp_path: Path, tiny: dict[str, Any]) -> None:
    state = {"stem.bias": None, "enc_tower.3.se.se.0.weight": torch.ones(5, 16), "stem.extra": torch.ones(3)}
    with pytest.raises(ConfigError) as caught:
        nvlabs.load_published(changed(tiny, tmp_path / "checkpoint.pt", state))
    message = str(caught.value)
    assert "3 problems" in message
    assert "stem.bias is missing" in message
    assert "enc_tower.3.se.se.0.weight has shape (5, 16), the network needs (4, 16)" in message
    assert "stem.extra has no place" in message


def test_every_single_missing_tensor_is_noticed(tiny: dict[str, Any]) -> None:
    from nvae_lowmem.interop.nvlabs_weights import network_tensors, translate

    model = random_model(nvlabs.load_published(FIXTURES / "tiny" / "checkpoint.pt")[0].model)
    tensors = network_tensors(tiny["state_dict"])
    for name in list(tensors)[::37]:
        with pytest.raises(ConfigError, match="missing"):
            translate(model, {k: v for k, v in tensors.items() if k != name}, "file")


@pytest.mark.parametrize("args, told", [
    ({"num_latent_scales": ...}, "args.num_latent_scales = None must be a whole number"),
    ({"num_groups_per_scale": 2}, "enc_sampler: args describe 4 modules, the state_dict holds 6"),
    ({"num_channels_enc": 16}, "args.num_channels_enc = 16 after 2 halvings means 64 channels, enc0 has 32"),
    ({"num_channels_dec": 4}, "args.num_channels_dec = 4 means 4 channels"),
    ({"num_latent_per_group": 9}, "args.num_latent_per_group = 9"),
    ({"num_nf": 1}, "args.num_nf = 1 for 6 groups means 36 convolutions, the state_dict holds 0"),
    ({"num_preprocess_cells": 3}, "pre_process: args describe 3 modules, the state_dict holds 2"),
    ({"num_cell_per_cond_dec": 10**4}, "dec_tower: args describe 50007 modules"),
    ({"dataset": "celeba_64"}, "args.dataset = 'celeba_64' means 64 pixels per side, prior_ftr0 means 32"),
    ({"use_se": "yes"}, "args.use_se = 'yes' must be True or False"),
    ({"num_latent_scales": 10**12}, "must be a whole number from 1 to 16"),
])  # fmt: skip
def test_options_that_do_not_fit_the_tensors_are_told(
    tmp_path: Path, tiny: dict[str, Any], args: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        nvlabs.load_published(changed(tiny, tmp_path / "checkpoint.pt", **args))
    assert told in str(caught.value)


ANYTHING = st.one_of(st.none(), st.booleans(), st.integers(-2, 40), st.integers(), st.floats(), st.text(max_size=8))
ANYTHING |= st.sampled_from([10**30, "x" * 2000])


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(vars(published_args(SMALL, "")))), value=ANYTHING)
def test_any_option_gives_a_network_or_one_message(
    tmp_path: Path, small: dict[str, Any], name: str, value: Any
) -> None:
    path = changed(small, tmp_path / "checkpoint.pt", **{name: value})
    try:
        profile, model = nvlabs.load_published(path)
    except ConfigError as error:
        assert str(path) in str(error)
    else:
        assert model.config == profile.model == profiles.loads(profiles.dumps(profile)).model


class RunsCode:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    hostile = {"state_dict": {"stem.weight": torch.ones(1)}, "args": RunsCode(tmp_path / "executed")}
    torch.save(hostile, tmp_path / "checkpoint.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConfigError, match="refused") as caught:
        nvlabs.load_published(tmp_path / "checkpoint.pt")
    assert "weights_only" not in str(caught.value)  # no advice to switch the protection off
    assert not (tmp_path / "executed").exists()


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path: Path, tiny: dict[str, Any]) -> None:
    state = {"prior_ftr0": torch.ones(1).expand(1 << 40)}
    with pytest.raises(ConfigError, match="claim more bytes than the file has"):
        nvlabs.load_published(changed(tiny, tmp_path / "checkpoint.pt", state))


def other_files(folder: Path) -> dict[str, Path]:
    """Files that are no published checkpoints, by what they are."""
    original = (FIXTURES / "tiny" / "checkpoint.pt").read_bytes()
    contents = {
        "empty": b"", "text": b"hello", "truncated": original[: len(original) // 2], "pickle": pickle.dumps([1]),
        "damaged": original[:2000] + b"\xff" * 50 + original[2050:],
    }  # fmt: skip
    files = {name: folder / name for name in contents}
    for name, path in files.items():
        path.write_bytes(contents[name])
    saved = {
        "a list": [1],
        "no args": {"state_dict": {"a": torch.ones(1)}},
        "empty state": {"state_dict": {}, "args": argparse.Namespace()},
        "no tensors": {"state_dict": {"a": 1}, "args": argparse.Namespace()},
        "no options": {"state_dict": {"a": torch.ones(1)}, "args": argparse.Namespace()},
        "sparse": {"state_dict": {"a": torch.ones(2, 2).to_sparse()}, "args": argparse.Namespace()},
        "a module": torch.nn.Linear(1, 1),
    }
    for name, content in saved.items():
        torch.save(content, folder / name)
    return files | {name: folder / name for name in saved} | {"missing": folder / "none", "folder": folder}


def test_files_that_are_no_checkpoints_give_one_message(tmp_path: Path) -> None:
    for path in other_files(tmp_path).values():
        with pytest.raises(ConfigError) as caught:
            nvlabs.load_published(path)
        assert str(path) in str(caught.value)
