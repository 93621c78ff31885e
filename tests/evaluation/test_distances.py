"""KID and FID against their definitions, and the feature networks that they are measured with."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from generation_runs import blobs, needs_torchmetrics
from torch import Tensor, nn

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.evaluation import distances
from nvae_lowmem.evaluation.distances import Comparison, InceptionFeatures, PixelGaussian, RandomConvFeatures, fid, kid

# --- distances --------------------------------------------------------------------------------------------------------


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
