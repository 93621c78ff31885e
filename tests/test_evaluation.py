"""Evaluation: bounds against evidence that can be computed, KID and FID against their definitions, the command."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from nvae_lowmem.config import ConfigError, DataConfig, ModelConfig, Profile
from nvae_lowmem.evaluation import distances, evaluate
from nvae_lowmem.evaluation.bounds import elbo_of_images, importance_weighted_bound, log_mean_weight, without_padding
from nvae_lowmem.evaluation.distances import (
    Comparison,
    Distance,
    InceptionFeatures,
    PixelGaussian,
    RandomConvFeatures,
    fid,
    kid,
)
from nvae_lowmem.evaluation.report import (
    Evaluation,
    LikelihoodFigures,
    Mean,
    scale_of_groups,
    to_html,
    to_json,
    to_text,
)
from nvae_lowmem.model.latents import Given, Normal
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training import checkpoint
from nvae_lowmem.training.validation import validate

REPOSITORY = Path(__file__).resolve().parent.parent

TINY = ModelConfig(
    image_channels=1, image_size=6, padding=1, bits=1, channels_encoder=8, channels_decoder=8, scales=2, groups=2,
    adaptive=False, latents=2, cells_encoder=1, cells_decoder=1, preprocess_blocks=1, preprocess_cells=1,
    postprocess_blocks=1, postprocess_cells=1, flows=1,
)  # fmt: skip
ONE_LATENT = ModelConfig(  # a plain VAE with one latent variable in all: its evidence is an integral over a line
    image_channels=1, image_size=4, bits=1, channels_encoder=4, channels_decoder=4, scales=1, groups=1, latents=1,
    preprocess_blocks=2, preprocess_cells=1, postprocess_blocks=2, postprocess_cells=1,
)  # fmt: skip


def build(model: ModelConfig, seed: int = 0) -> NVAE:
    assert not model.problems()
    torch.manual_seed(seed)
    built = NVAE(model).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))  # away from the tidy values of the start
    return built


def images(model: ModelConfig, count: int, seed: int = 0) -> Tensor:
    """(B, C, padded, padded), random on the grid of the configuration's bits."""
    shape, top = (count, model.image_channels, model.network_size, model.network_size), 2**model.bits - 1
    return torch.randint(0, top + 1, shape, generator=torch.Generator().manual_seed(seed)) / top


# --- the importance-weighted bound ------------------------------------------------------------------------------------


class LinearGaussian:
    """z ~ N(0, I), x = A z + s e, and q a normal around the true posterior, `widening` times as wide: float64.

    Has the interface of a model's densities. Its evidence is N(x; 0, A A' + s^2 I).
    """

    def __init__(self, images: int, widening: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.a = torch.randn(5, 2, generator=generator, dtype=torch.float64)
        self.s = 0.7
        self.evidence = torch.distributions.MultivariateNormal(
            torch.zeros(5, dtype=torch.float64), self.a @ self.a.T + self.s**2 * torch.eye(5, dtype=torch.float64)
        )
        z = torch.randn(images, 2, generator=generator, dtype=torch.float64)
        self.x = z @ self.a.T + self.s * torch.randn(images, 5, generator=generator, dtype=torch.float64)
        covariance = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + self.a.T @ self.a / self.s**2)
        mean = self.x @ self.a @ covariance / self.s**2
        self.q = torch.distributions.MultivariateNormal(mean, widening**2 * covariance)
        self.calls: list[tuple[range, range]] = []

    def __call__(self, images: range, draws: range) -> tuple[Tensor, Tensor]:
        self.calls.append((images, draws))
        rows = [
            self.q.loc[i] + torch.linalg.cholesky(self.q.covariance_matrix[i]) @ self._eps(i, j)
            for i in images
            for j in draws
        ]
        z = torch.stack(rows).view(len(images), len(draws), 2)
        inside = torch.distributions.Normal(z @ self.a.T, self.s)
        log_likelihood = inside.log_prob(self.x[images.start : images.stop, None]).sum(2)
        log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(2)
        log_q = torch.stack(
            [
                torch.distributions.MultivariateNormal(self.q.loc[i], self.q.covariance_matrix[i]).log_prob(z[n])
                for n, i in enumerate(images)
            ]
        )
        return log_likelihood + log_prior, log_q

    def _eps(self, image: int, draw: int) -> Tensor:
        return torch.randn(2, generator=torch.Generator().manual_seed(1000 * image + draw), dtype=torch.float64)


def test_with_the_true_posterior_one_draw_gives_the_evidence() -> None:
    toy = LinearGaussian(4, widening=1.0)
    assert torch.allclose(log_mean_weight(toy, 4, 1, 3), toy.evidence.log_prob(toy.x), rtol=0, atol=1e-10)


def test_with_many_draws_the_bound_reaches_the_evidence_from_below() -> None:
    toy = LinearGaussian(4, widening=2.0)
    evidence = toy.evidence.log_prob(toy.x)
    one, many = log_mean_weight(toy, 4, 1, 50), log_mean_weight(toy, 4, 3000, 1000)
    assert torch.allclose(many, evidence, rtol=0, atol=0.1)
    assert float((evidence - one).abs().max()) > 0.3  # what many draws had to make good


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 4), samples=st.integers(1, 9), micro_batch=st.integers(1, 12))
def test_the_split_into_passes_changes_nothing_and_no_pass_is_too_large(
    count: int, samples: int, micro_batch: int
) -> None:
    toy = LinearGaussian(count, widening=1.5)
    advanced: list[int] = []
    split = log_mean_weight(toy, count, samples, micro_batch, advanced.append)
    assert all(len(i) * len(j) <= micro_batch for i, j in toy.calls)
    pairs = [(i, j) for rows, draws in toy.calls for i in rows for j in draws]
    assert sorted(pairs) == [(i, j) for i in range(count) for j in range(samples)]
    assert sum(advanced) == len(pairs)
    whole = log_mean_weight(toy, count, samples, count * samples)
    assert torch.allclose(split, whole, rtol=0, atol=1e-12)


def test_weights_beyond_the_range_of_exp_are_no_problem() -> None:
    def densities(images: range, draws: range) -> tuple[Tensor, Tensor]:
        log_joint = torch.tensor([[-90_000.0, -90_001.0, -200_000.0]])[:, draws.start : draws.stop]
        return log_joint, torch.zeros_like(log_joint)

    expected = -90_000 + math.log1p(math.exp(-1)) - math.log(3)
    assert float(log_mean_weight(densities, 1, 3, 2)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("samples", "micro_batch", "flag"), [(0, 1, "--iw-samples 0"), (-3, 1, "-3"), (1, 0, "--micro")]
)
def test_fewer_than_one_draw_is_refused(samples: int, micro_batch: int, flag: str) -> None:
    model = build(TINY)
    with pytest.raises(ConfigError, match=flag):
        importance_weighted_bound(model, images(TINY, 2), samples, 0, micro_batch)


def evidence_of_one_latent(model: NVAE, x: Tensor) -> Tensor:
    """log integral of p(x|z) p(z) dz over a grid of z: (B,) float64. The prior is what the model's first group has."""
    prior = Normal.from_parameters(torch.zeros(1), torch.zeros(1))
    z = torch.linspace(-8, 8, 1601)
    with torch.no_grad():
        parameters, _ = model.decode(Given([z.view(-1, 1, 1, 1)]), batch=len(z))
        likelihood = torch.stack([model.likelihood.log_prob(parameters, row.expand(len(z), -1, -1, -1)) for row in x])
    return (likelihood.double() + prior.log_density(z).double()).logsumexp(1) + math.log(0.01)


def test_bound_of_a_network_with_one_latent_is_its_integrated_evidence() -> None:
    model, x = build(ONE_LATENT), images(ONE_LATENT, 3)
    assert model.latent_shapes == [(1, 1, 1)]
    exact = evidence_of_one_latent(model, x)
    bound = importance_weighted_bound(model, x, samples=3000, seed=0, micro_batch=500)
    assert torch.allclose(bound, exact, rtol=0, atol=0.02)
    elbo = elbo_of_images(model, x.repeat_interleave(200, 0), seed=0)
    mean_elbo = -(elbo.nll + elbo.kl.sum(1)).view(3, 200).mean(1)
    assert bool((mean_elbo < bound).all())
    assert float((bound - mean_elbo).max()) > 0.03  # the bound is tighter by more than the test lets it be off


@pytest.mark.parametrize("flows", [0, 1])
def test_one_draw_has_the_mean_of_the_elbo_and_more_draws_are_not_below_it(flows: int) -> None:
    model_config = replace(TINY, flows=flows)
    model, x = build(model_config), images(model_config, 1).expand(400, -1, -1, -1)
    elbo = elbo_of_images(model, x, seed=0)
    mean, error = Mean.of(-(elbo.nll + elbo.kl.sum(1)))
    one = Mean.of(importance_weighted_bound(model, x, 1, seed=1, micro_batch=200))
    ten = Mean.of(importance_weighted_bound(model, x[:40], 10, seed=1, micro_batch=200))
    assert abs(one.value - mean) < 4 * math.hypot(one.standard_error, error)
    assert ten.value > mean - 2 * math.hypot(ten.standard_error, error)


@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_a_draw_depends_on_image_and_number_only(micro_batch: int) -> None:
    model, x = build(TINY), images(TINY, 5)
    whole = importance_weighted_bound(model, x, 6, seed=3, micro_batch=30)
    assert torch.allclose(importance_weighted_bound(model, x, 6, 3, micro_batch), whole, rtol=0, atol=1e-4)
    later = importance_weighted_bound(model, x[2:], 6, 3, micro_batch, first_image=2)
    assert torch.allclose(later, whole[2:], rtol=0, atol=1e-4)
    assert not torch.allclose(importance_weighted_bound(model, x, 6, 4, micro_batch), whole, rtol=0, atol=1e-4)


def test_bf16_activations_leave_the_bound_close() -> None:
    model, x = build(TINY), images(TINY, 4)
    full, half = (importance_weighted_bound(model, x, 20, 0, 40, precision) for precision in ("fp32", "bf16"))
    assert not torch.equal(full, half)
    assert torch.allclose(full, half, rtol=0.05)


# --- the ELBO ---------------------------------------------------------------------------------------------------------


def test_elbo_is_the_one_that_training_reports() -> None:
    model, x = build(TINY), images(TINY, 6)
    figures, pictures = evaluate.measure_likelihood(model, x.split(4), draws=2, micro_batch=4, seed=7)
    reported = validate(model, x.split(2), seed=7)
    assert figures.nelbo.value == pytest.approx(reported.nelbo, rel=1e-5)
    assert figures.kl_of_groups == pytest.approx(reported.kl, rel=1e-5)
    assert [n / TINY.latents for n in figures.active_of_groups] == pytest.approx(reported.active)
    assert figures.nll.value + figures.kl.value == pytest.approx(figures.nelbo.value)
    assert (figures.images, figures.draws) == (6, 2)
    shown = without_padding(model, x)
    assert torch.equal(pictures["held-out images"], shown)
    error = (pictures["their reconstructions"] - shown).square().mean()
    assert figures.squared_error.value == pytest.approx(float(error), rel=1e-5)


def test_evaluating_leaves_the_model_as_it_was() -> None:
    model = build(TINY).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate.measure_likelihood(model, images(TINY, 2).split(1), draws=2, micro_batch=2)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_only_the_first_images_are_kept_as_pictures() -> None:
    x = images(TINY, evaluate.SHOWN_IMAGES + 9)
    _, pictures = evaluate.measure_likelihood(build(TINY), x.split(10), draws=1, micro_batch=10)
    assert [len(p) for p in pictures.values()] == [evaluate.SHOWN_IMAGES] * 2


def test_a_diverged_model_is_named_as_such() -> None:
    model = build(TINY)
    with torch.no_grad():
        next(model.blocks["head"].parameters()).fill_(math.nan)
    with pytest.raises(ConfigError, match="not finite"):
        evaluate.measure_likelihood(model, [images(TINY, 2)], draws=1, micro_batch=2)


# --- distances --------------------------------------------------------------------------------------------------------

needs_torchmetrics = pytest.mark.skipif(not distances.available(), reason="the extra [metrics] is not installed")


def blobs(count: int, seed: int, size: int = 16, channels: int = 1) -> Tensor:
    """Images with something to see: a bright disc at a random place, (B, channels, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centre = torch.rand(count, 2, 1, 1, generator=generator) * size
    disc = ((y - centre[:, 0]).square() + (x - centre[:, 1]).square() < (size / 4) ** 2).float()
    return disc[:, None].expand(-1, channels, -1, -1)


def test_random_features_are_the_same_wherever_they_are_built() -> None:
    torch.manual_seed(5)
    first = RandomConvFeatures()(blobs(3, 0))
    torch.manual_seed(6)
    assert torch.equal(first, RandomConvFeatures()(blobs(3, 0)))
    assert first.shape == (3, RandomConvFeatures.num_features)
    assert not list(RandomConvFeatures().parameters())


def test_random_features_keep_the_values_that_their_version_stands_for() -> None:
    """A change of these numbers is another network, and needs another name."""
    features = RandomConvFeatures()(blobs(2, 0))
    assert RandomConvFeatures.name == "random-conv-features-v1"
    assert features[0, [8, 261, 515]].tolist() == pytest.approx([0.610770, 0.395315, 0.461415], rel=1e-4)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 16), (2, 40)])
def test_random_features_take_any_channels_and_size(channels: int, size: int) -> None:
    assert RandomConvFeatures()(torch.rand(2, channels, size, size)).shape == (2, 768)


def test_grey_images_have_the_features_of_the_same_image_in_rgb() -> None:
    net = RandomConvFeatures()
    assert torch.allclose(net(blobs(2, 0)), net(blobs(2, 0, channels=3)), atol=1e-6)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """The unbiased squared MMD with kernel (x y / d + 1)^3, written out (arXiv 1801.01401, equation 4)."""

    def kernel(p: np.ndarray, q: np.ndarray) -> float:
        return float((p @ q / len(p) + 1) ** 3)

    x, y = a.double().numpy(), b.double().numpy()
    n = len(x)
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j)
    across = sum(kernel(x[i], y[j]) for i in range(n) for j in range(n))
    return within / (n * (n - 1)) - 2 * across / n**2


@needs_torchmetrics
def test_kid_is_the_unbiased_kernel_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 4, generator=generator), torch.randn(20, 4, generator=generator) + 1
    # over random halves the estimate's mean is that over everything
    mean, deviation = kid(a, b)
    assert mean == pytest.approx(kernel_distance(a, b), abs=3 * deviation / math.sqrt(100))


@needs_torchmetrics
def test_kid_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    a, b = torch.rand(30, 4), torch.rand(30, 4)
    state = torch.get_rng_state()
    assert kid(a, b, seed=1) == kid(a, b, seed=1) != kid(a, b, seed=2)
    assert torch.equal(torch.get_rng_state(), state)


@needs_torchmetrics
@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_fid_of_shifted_features_is_the_squared_shift(shift: float) -> None:
    features = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert fid(features, features + shift) == pytest.approx(3 * shift**2, abs=1e-6)


@needs_torchmetrics
def test_structure_is_closer_than_noise_and_halves_are_closest() -> None:
    comparison = Comparison(RandomConvFeatures(), torch.device("cpu"))
    for chunk in blobs(120, 0).split(40):
        comparison.add_real(chunk)
    comparison.add("more of the same", blobs(120, 1))
    comparison.add("half as bright", blobs(120, 1) / 2)
    found = {d.other: d for d in comparison.distances()}
    same, dim, noise, halves = (
        found[name].value
        for name in ("more of the same", "half as bright", distances.PIXEL_NOISE, distances.OTHER_HALF)
    )
    assert max(abs(same), abs(halves)) < dim / 10
    assert dim < noise
    assert {d.name for d in found.values()} == {"KID(random-conv-features-v1)"}  # never FID, never plain KID
    assert found[distances.OTHER_HALF].images == (60, 60)


@needs_torchmetrics
def test_halves_of_images_in_a_regular_order_are_alike() -> None:
    comparison = Comparison(RandomConvFeatures(), torch.device("cpu"))
    bright_then_dim = torch.tensor([1.0, 0.5]).repeat(60)[:, None, None, None]
    comparison.add_real(blobs(120, 0) * bright_then_dim)
    sorted_apart = kid(*(RandomConvFeatures()(blobs(120, 0)[i::2] / (1 + i)) for i in range(2)))[0]
    assert abs(comparison.distances()[-1].value) < sorted_apart / 5


@needs_torchmetrics
def test_too_few_images_are_refused() -> None:
    comparison = Comparison(RandomConvFeatures(), torch.device("cpu"))
    comparison.add_real(blobs(20, 0))
    comparison.add("samples", blobs(3, 1))
    with pytest.raises(ConfigError, match="at least 8 images of each kind, but samples: 3"):
        comparison.distances()


def test_pixel_noise_has_mean_and_deviation_of_every_pixel() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.02, 0.1, 16).view(1, 1, 4, 4)
    data = 0.5 + scale * torch.randn(4000, 1, 4, 4, generator=generator)
    noise = PixelGaussian()
    for part in data.split(1500):
        noise.add(part)
    drawn = torch.cat(list(noise.chunks(4000, 999)))
    assert drawn.shape == data.shape
    assert torch.allclose(drawn.mean(0), data.mean(0), atol=0.01)
    assert torch.allclose(drawn.std(0), data.std(0), rtol=0.1)
    assert torch.equal(drawn, torch.cat(list(noise.chunks(4000, 10))))


# --- feature networks from files --------------------------------------------------------------------------------------


class ChannelMeans(nn.Module):
    """Stands for an Inception network in a TorchScript file: uint8 in, features out where they are asked for."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert x.dtype == torch.uint8
        means = x.float().mean((2, 3))
        return means if return_features else means.sum(1)


class NoFeatures(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


@pytest.fixture
def scripted(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "network.pt"
    torch.jit.script(request.param()).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("scripted", [ChannelMeans], indirect=True)
def test_a_network_from_a_file_makes_real_kid_and_fid(scripted: Path) -> None:
    network = InceptionFeatures(scripted)
    assert network.num_features == 3
    assert network(torch.full((2, 1, 9, 9), 0.2)).tolist() == [[51.0] * 3] * 2
    if distances.available():
        comparison = Comparison(network, torch.device("cpu"))
        comparison.add_real(torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
        comparison.add("samples", torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
        found = comparison.distances()
        assert {d.name for d in found} == {"KID", "FID"}
        assert [d.other for d in found if d.name == "FID"] == ["samples", distances.PIXEL_NOISE]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("scripted", [NoFeatures], indirect=True)
def test_a_network_that_returns_no_features_is_refused(scripted: Path) -> None:
    with pytest.raises(ConfigError, match=r"two images gave \(2, 3, 32, 32\)"):
        InceptionFeatures(scripted)


def test_a_missing_file_and_a_state_dict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        InceptionFeatures(tmp_path / "none.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "state.pt")
    with pytest.raises(ConfigError, match="not a TorchScript file"):
        InceptionFeatures(tmp_path / "state.pt")


# --- the report -------------------------------------------------------------------------------------------------------


def evaluation(**changes: Any) -> Evaluation:
    figures = LikelihoodFigures(
        images=1, nelbo=Mean(36 * math.log(2), math.nan), bound=Mean(20.0, math.nan), draws=5, nll=Mean(10.0, 1.0),
        kl=Mean(1.0, 0.1), squared_error=Mean(0.25, 0.0), kl_of_groups=[1.0, 2.0, 3.0, 4.0],
        active_of_groups=[2, 1, 0, 2], active_nats=0.1,
    )  # fmt: skip
    base = {
        "run": "runs/00001-x",
        "checkpoint": "step-1",
        "model": TINY,
        "settings": {"seed": 0},
        "likelihood": figures,
    }
    return Evaluation(**{**base, **changes})


def test_json_has_both_units_and_null_for_what_one_image_cannot_tell() -> None:
    table = json.loads(to_json(evaluation()))
    assert table["negative_elbo"]["bits_per_dim"] == pytest.approx(1.0)  # 36 channel values, 36 ln 2 nats
    assert table["negative_elbo"]["nats_standard_error"] is None
    assert [group["size"] for group in table["groups"]] == [2, 2, 4, 4]
    assert (table["active_channels"], table["latent_channels"]) == (5, 8)


def test_groups_are_counted_from_the_top() -> None:
    assert scale_of_groups(TINY) == [2, 2, 4, 4]


def test_page_holds_its_pictures_and_loads_nothing() -> None:
    png = io.BytesIO()
    Image.new("RGB", (3, 2)).save(png, format="PNG")
    page = to_html(evaluation(pictures={"samples <1>": png.getvalue()}, notes=["a & b"]))
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2  # KL of groups, and the samples
    decoded = [Image.open(io.BytesIO(base64.b64decode(s.removeprefix("data:image/png;base64,")))) for s in sources]
    assert decoded[1].size == (3, 2)
    assert not re.search(r"https?:|<script|<link|url\(", page)
    assert "samples &lt;1&gt;" in page and "a &amp; b" in page


def test_text_names_every_distance() -> None:
    kid_line = Distance("KID(x)", "samples", 0.0123, 0.001, (10, 12))
    text = to_text(evaluation(distances=[kid_line], notes=["look out"]))
    assert re.search(r"KID\(x\): samples +0\.0123 ± 0\.001 over subsets \(10 and 12 images\)", text)
    assert "note: look out" in text


# --- the command ------------------------------------------------------------------------------------------------------


def load_launch() -> Any:
    spec = importlib.util.spec_from_file_location("launch_evaluate", REPOSITORY / "launch" / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


launch = load_launch()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an untrained network on a folder of pictures."""
    root = tmp_path_factory.mktemp("evaluation")
    model = replace(TINY, image_size=8, padding=0, bits=8, mixtures=2)
    for name, count in (("train", 12), ("test", 12)):
        (root / name).mkdir()
        for i, picture in enumerate((blobs(count, 3, size=8)[:, 0] * 255).to(torch.uint8).numpy()):
            Image.fromarray(picture).save(root / name / f"{i:02d}.png")
    data = DataConfig(source=str(root / "train"), test_source=str(root / "test"), cache_dir=str(root / "cache"))
    profile = Profile(name="tiny", model=model, data=data)
    checkpoint.export_weights(root / "run", profile, build(model).state_dict())
    return root / "run"


def arguments(run_dir: Path, *more: str) -> Sequence[str]:
    return [
        "--run",
        str(run_dir),
        "--device",
        "cpu",
        "--images",
        "10",
        "--iw-samples",
        "3",
        "--micro-batch",
        "8",
        *more,
    ]


@needs_torchmetrics
def test_command_writes_figures_and_a_page(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(arguments(run_dir, "--samples", "10")) == 0
    table = json.loads((run_dir / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert (table["images"], table["importance_weighted_bound"]["draws"]) == (10, 3)
    assert [d["images"] for d in table["distances"]] == [[10, 10], [10, 10], [5, 5]]
    page = (run_dir / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 4  # KL of groups, images, reconstructions, samples
    assert "-ELBO" in capsys.readouterr().out


def test_command_without_samples_prints_json_and_nothing_else(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(arguments(run_dir, "--samples", "0", "--json", "-", "--out", str(tmp_path))) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["distances"] == [] and table["negative_elbo"]["nats"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_without_torchmetrics_the_extra_is_named_and_the_rest_is_done(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "available", lambda: False)
    assert launch.main(arguments(run_dir, "--samples", "8", "--out", str(tmp_path))) == 0
    assert "nvae-lowmem[metrics]" in capsys.readouterr().out
    table = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert table["distances"] == [] and "metrics" in table["notes"][0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--iw-samples", "0"], "--iw-samples 0: must be at least 1"),
        (["--images", "-1"], "--images -1"),
        (["--samples", "3"], "--samples 3"),
        (["--micro-batch", "-1"], "--micro-batch -1"),
        (["--temperature", "hot"], "--temperature hot"),
        (["--temperature", "0.7,0.8,0.9"], "3 temperatures for a model of 2 scales"),
        (["--fid-weights", "no/such/file.pt"], "--fid-weights no/such/file.pt"),
        (["--fid-weights", "x.pt", "--samples", "0"], "--samples is 0"),
        (["--run", "no-such-run"], "--run no-such-run"),
        (["--images", "4"], "at least 8 held-out images, not 4"),
        (["--json", "."], "is a folder"),
    ],
)
@needs_torchmetrics
def test_bad_input_ends_in_one_message_and_exit_code_2(
    run_dir: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(run_dir, "--samples", "10", "--runs-dir", str(tmp_path), "--out", str(tmp_path), *more)
    assert launch.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
