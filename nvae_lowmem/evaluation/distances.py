"""KID and FID between held-out and generated images, by torchmetrics on feature networks of our own.

KID (arXiv 1801.01401) and FID (arXiv 1706.08500) are defined on the features of one certain Inception network. With
that network's file the figures carry these names. Without it the same unbiased kernel distance is taken on a random
network that is a function of its name, `random-conv-features-v1`: good for comparing runs of this project on the same
images with each other, not with figures of papers; so it is called KID(random-conv-features-v1), and never FID.

Images here are (B, C, S, S) floats in [0, 1] without padding, of any channel count and size.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae_lowmem.data.pipeline import as_rgb
from nvae_lowmem.errors import ConfigError

RANDOM_FEATURES = "random-conv-features-v1"
KID_SUBSETS, KID_MAX_SUBSET = 100, 1000
MIN_IMAGES = 8
"""Fewer real or generated images say nothing."""
FEATURE_IMAGES = 16
"""Images that go through a feature network together: Inception networks magnify them to 299 x 299 pixels."""
PIXEL_NOISE, OTHER_HALF = "noise of the same pixel-wise mean and deviation", "one half of them with the other"
MISSING = "torchmetrics is not installed, so there are no KID and FID: pip install torchmetrics"


def available() -> bool:
    """Whether torchmetrics is installed; `MISSING` is the message where it is not."""
    return importlib.util.find_spec("torchmetrics") is not None


# --- feature networks -------------------------------------------------------------------------------------------------


class RandomConvFeatures(nn.Module):
    """A fixed random convolutional network on three resolutions: (B, C, S, S) -> (B, 768) fp32.

    Version 1 is: images as RGB on [-1, 1], resized to 32 x 32; for each of 32, 16 and 8 pixels (averages of 2 x 2) a
    network of its own, 5x5 conv to 32, ReLU, 3x3 conv to 64, ReLU, without biases; its output averaged over the four
    quadrants. Weights are normal with variance 2 / fan-in, drawn on the host from seed 1.
    """

    name = RANDOM_FEATURES
    num_features = 3 * 64 * 4

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for level in range(3):
            for layer, shape in (("first", (32, 3, 5, 5)), ("second", (64, 32, 3, 3))):
                fan_in = shape[1] * shape[2] * shape[3]
                weight = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
                self.register_buffer(f"{layer}_{level}", weight)

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(2 * as_rgb(images) - 1, size=(32, 32), mode="bilinear", antialias=True)
        out = []
        for level in range(3):
            hidden = F.relu(F.conv2d(x, self.get_buffer(f"first_{level}"), padding=2))
            hidden = F.relu(F.conv2d(hidden, self.get_buffer(f"second_{level}"), padding=1))
            out.append(F.adaptive_avg_pool2d(hidden, 2).flatten(1))
            x = F.avg_pool2d(x, 2)
        return torch.cat(out, dim=1)


class InceptionFeatures(nn.Module):
    """The features of a network from a TorchScript file: (B, C, S, S) -> (B, d) fp32.

    The file is what `torch.jit.load` reads. Its network takes (B, 3, S, S) uint8 of any size, resizes by itself, and
    returns features (B, d); if its forward has an argument `return_features`, that is set, as the Inception network of
    2015 needs in the form in which it is usually handed on (inception-2015-12-05.pt).

    Raises:
        ConfigError: there is no such file, it is no TorchScript, or its network does not do the above.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        file = Path(path)
        if not file.is_file():
            raise ConfigError(
                f"--fid-weights {path}: there is no such file; without the flag, KID uses random features"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # the format in which these networks are handed on
                self.network = torch.jit.load(str(file), map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"--fid-weights {path}: not a TorchScript file ({first_line}); a state dict holds no network: "
                "give the TorchScript form, for example inception-2015-12-05.pt"
            ) from None
        arguments = [argument.name for argument in self.network.forward.schema.arguments]
        self._options = {"return_features": True} if "return_features" in arguments else {}
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self.name = f"{file.name}, sha256 {digest[:12]}"
        self.num_features = self._try_out(path)

    def forward(self, images: Tensor) -> Tensor:
        pixels = (as_rgb(images).clamp(0, 1) * 255).round().to(torch.uint8)
        return self.network(pixels, **self._options).float()

    @torch.no_grad()
    def _try_out(self, path: str | Path) -> int:
        expects = "its network must take (B, 3, S, S) uint8 images of any size and return features (B, d)"
        try:
            features = self(torch.zeros(2, 3, 32, 32))
        except (RuntimeError, AttributeError, TypeError) as error:
            last_line = str(error).strip().splitlines()[-1]
            raise ConfigError(f"--fid-weights {path}: {expects}; it failed: {last_line}") from None
        if features.ndim != 2 or len(features) != 2:
            raise ConfigError(f"--fid-weights {path}: {expects}; two images gave {tuple(features.shape)}")
        return features.shape[1]


# --- distances --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """One distance between real images and others; lower is closer."""

    name: str
    """KID, FID, or KID(random-conv-features-v1)."""
    other: str
    """What the real images are compared with."""
    value: float
    standard_deviation: float | None
    """Of KID over its random subsets; FID has none."""
    images: tuple[int, int]
    """Real images, others."""


class Comparison:
    """Features of real images and of others, taken chunk by chunk, so that no set of images is ever held whole."""

    def __init__(self, network: RandomConvFeatures | InceptionFeatures, device: torch.device) -> None:
        self.network, self.device = network.to(device).eval(), device
        self._real: list[Tensor] = []
        self._others: dict[str, list[Tensor]] = {}
        self._noise = PixelGaussian()

    def add_real(self, images: Tensor) -> None:
        """More real images (B, C, S, S)."""
        self._real.append(self._features(images))
        self._noise.add(images)

    def add(self, name: str, images: Tensor) -> None:
        """More images (B, C, S, S) of the set called `name`."""
        self._others.setdefault(name, []).append(self._features(images))

    def distances(self, seed: int = 0) -> list[Distance]:
        """KID, and FID on a network from a file, of each set from the real images; and what to compare them with.

        These are KID of noise with the same pixel-wise mean and deviation (a model with no structure at all), and KID
        between two halves of the real images (as close as it gets). Raises ConfigError for a set of fewer than 8.
        """
        chunk = len(self._real[0])
        noise = torch.cat([self._features(x) for x in self._noise.chunks(self._noise.count, chunk, seed)])
        real = torch.cat(self._real)
        others = {name: torch.cat(rows) for name, rows in self._others.items()} | {PIXEL_NOISE: noise}
        for name, rows in {"real images": real, **others}.items():
            if len(rows) < MIN_IMAGES:
                raise ConfigError(f"KID needs at least {MIN_IMAGES} images of each kind, but {name}: {len(rows)}")
        pairs = [(name, real, rows) for name, rows in others.items()]
        # shuffled: images often come sorted, and every other one of them may be of another kind
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
        is_inception = isinstance(self.network, InceptionFeatures)
        kid_name = "KID" if is_inception else f"KID({self.network.name})"
        out = [
            Distance(kid_name, name, *kid(a, b, seed), (len(a), len(b)))
            for name, a, b in [*pairs, (OTHER_HALF, real[order[0::2]], real[order[1::2]])]
        ]
        if is_inception:
            out += [Distance("FID", name, fid(a, b), None, (len(a), len(b))) for name, a, b in pairs]
        return out

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.network(part.to(self.device)).cpu() for part in images.split(FEATURE_IMAGES)])


class PixelGaussian:
    """Images without any structure: every pixel a normal with mean and deviation of that pixel in the data."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, images: Tensor) -> None:
        """More of the data, (B, C, S, S)."""
        values = images.cpu().double()
        self.count += len(values)
        self._sum, self._squares = self._sum + values.sum(0), self._squares + values.square().sum(0)

    def chunks(self, count: int, chunk: int, seed: int = 0) -> Iterator[Tensor]:
        """`count` images, up to `chunk` at a time: (b, C, S, S) fp32 on the host, cut to [0, 1]."""
        mean = self._sum / self.count
        deviation = (self._squares / self.count - mean.square()).clamp_min(0).sqrt()
        generator = torch.Generator().manual_seed(seed)
        for first in range(0, count, chunk):
            eps = torch.randn((min(chunk, count - first), *mean.shape), generator=generator)
            yield (mean.float() + deviation.float() * eps).clamp(0, 1)


def kid(real: Tensor, other: Tensor, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of KID over 100 random subsets, from features (n, d) and (m, d).

    Subsets have half of the smaller set's images, at most 1000. Torch's global generator is left as it is. Negative
    values happen: the estimator is unbiased, and two equal distributions are at 0 on average.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    subset = min(KID_MAX_SUBSET, len(real) // 2, len(other) // 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save", category=UserWarning)
        metric = KernelInceptionDistance(_Identity(real.shape[1]), subsets=KID_SUBSETS, subset_size=subset)
    _update(metric, real, other)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # torchmetrics draws its subsets from the global generator
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def fid(real: Tensor, other: Tensor) -> float:
    """The Frechet distance of two sets of features (n, d) and (m, d): biased upwards for few images."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Identity(real.shape[1]))
    _update(metric, real, other)
    return float(metric.compute())


def _update(metric: Any, real: Tensor, other: Tensor) -> None:
    metric.update(real, real=True)
    metric.update(other, real=False)


class _Identity(nn.Module):
    """The features are computed already: torchmetrics would keep, and compute, those of a set once per comparison."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
