"""Which images do not belong to what a model was trained on: a score per image, and a map of where.

A likelihood alone is a poor judge: simple images of another kind can be far more likely than the data. Two questions
together judge better, and both have one answer for all data sets:

    score = |ELBO(x) - m| / s + (d(x) - m_d) / s_d

Is the image as likely as images of the data are, neither less nor more (typicality, arXiv 1906.02994)? And do its
latents of the lowest resolution lie where those of training images lie: d is the Euclidean distance of its posterior
means to the nearest of them (nearest neighbours in features, arXiv 2204.06507). m, s and m_d, s_d are means and
deviations over held-out images, so the score counts in deviations of what is usual.

Where in the image: the ELBO is compared with one whose later groups, nearest to the pixels, come from the prior given
the earlier ones, as they would for an image that the model knows well (arXiv 2102.08248),

    later groups = ELBO(x) - ELBO_k(x),
    ELBO_k(x) = E[log p(x | z) + log p(z_first) - log q(z_first | x)],   z_first ~ q(. | x),  z_later ~ p(. | z_first)

with the last k groups drawn from the prior: what those groups have to say of an image that the others did not foresee,
in nats. Per pixel it is the difference of log p(x | z), a map.
Legend: B images, G latent groups, S pixels per side without padding, S' with it, D latents of the lowest resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from nvae_lowmem.data.pipeline import without_padding
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.model.latents import (
    FirstGroups,
    FlowFunction,
    FromPosterior,
    FromPrior,
    Latent,
    NoiseStep,
    NoNoise,
    Normal,
    SeededNoise,
    Source,
)
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.progress import OnProgress
from nvae_lowmem.training.open_run import OpenRun, plain_batches
from nvae_lowmem.training.validation import evaluating

FEWEST_HELD_OUT = 10
_DRAWS_PER_IMAGE = 1 << 16


class AnomalyFigures(NamedTuple):
    """Of B images, on the host."""

    elbo: Tensor
    """(B,) nats: the plain bound."""
    later_groups: Tensor
    """(B,) nats: what the later groups have to say that the earlier ones did not foresee."""
    map: Tensor
    """(B, S, S) nats: that part of each pixel, without the KL, which has no place."""
    coarse: Tensor
    """(B, D): posterior means of the groups of the lowest resolution."""


# --- what is usual ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usual:
    """What the score measures against: training images' latents, and how held-out images lie to them."""

    references: Tensor
    """(N, D): `coarse` of training images."""
    elbo_mean: float
    elbo_deviation: float
    distance_mean: float
    distance_deviation: float

    @staticmethod
    def of(references: Tensor, held_out: AnomalyFigures) -> Usual:
        """From training images (N, D) and held-out ones. Raises ConfigError for fewer than ten of the latter."""
        _require_enough(len(held_out.elbo))
        distance = _nearest(held_out.coarse, references)
        values = [one for x in (held_out.elbo, distance) for one in (float(x.mean()), max(float(x.std()), 1e-9))]
        return Usual(references, *values)

    def score(self, of: AnomalyFigures) -> Tensor:
        """(B,) deviations: the higher, the less an image belongs; about 1 for one that does."""
        unlikely = (of.elbo - self.elbo_mean).abs() / self.elbo_deviation
        return unlikely + (self.distance(of) - self.distance_mean) / self.distance_deviation

    def distance(self, of: AnomalyFigures) -> Tensor:
        """(B,): to the nearest training image, in latents of the lowest resolution."""
        return _nearest(of.coarse, self.references)


def usual_of(
    run: OpenRun,
    groups_from_prior: int,
    draws: int = 1,
    seed: int = 0,
    references: int = 2000,
    held_out: int = 200,
    progress: Callable[[str], OnProgress] | None = None,
) -> tuple[Usual, AnomalyFigures]:
    """What is usual for a run, from so many of its training and held-out images, and the figures of the latter.

    The images are taken as files are, not with the pixels that training draws anew for one bit. progress: makes a bar
    of a name. Raises ConfigError where the run's data cannot be opened, or too few are held out.
    """
    batches, count = plain_batches(run, "test", held_out)
    _require_enough(count)
    bar = progress("held-out images") if progress else None
    images = torch.cat(list(batches))
    figures = anomaly_figures(run.model, images, groups_from_prior, draws, seed, run.micro_batch, progress=bar)
    batches, count = plain_batches(run, "train", references)
    bar = progress("training images") if progress else None
    return Usual.of(coarse_latents(run.model, batches, progress=bar, count=count), figures), figures


def _require_enough(held_out: int) -> None:
    if held_out < FEWEST_HELD_OUT:
        raise ConfigError(
            f"--compare: {held_out} held-out images do not tell what is usual: give at least {FEWEST_HELD_OUT}; where "
            "the run has fewer, --data names a folder with more"
        )


def _nearest(coarse: Tensor, references: Tensor) -> Tensor:
    """The distance of each of (B, D) to the nearest of (N, D): (B,) float64."""
    return torch.cat([torch.cdist(some, references).amin(1).double() for some in coarse.split(256)])


# --- passes -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def anomaly_figures(
    model: NVAE,
    images: Tensor,
    groups_from_prior: int,
    draws: int = 1,
    seed: int = 0,
    micro_batch: int = 16,
    precision: str = "fp32",
    progress: OnProgress | None = None,
    first_image: int = 0,
) -> AnomalyFigures:
    """Figures of images (B, C, S', S') in [0, 1], means over `draws` of the latents; image i has slots of its own.

    groups_from_prior: k, how many of the last groups (of the highest resolution) are drawn from the prior.
    first_image: the number of the first one. Raises ConfigError for k outside 1 to G - 1, and for fewer than one draw.
    """
    groups = model.config.total_groups
    if not 1 <= groups_from_prior < groups:
        raise ConfigError(f"--groups {groups_from_prior}: must be from 1 to {groups - 1}, one less than the model has")
    if not 1 <= draws <= _DRAWS_PER_IMAGE:
        raise ConfigError(f"--draws {draws}: must be from 1 to {_DRAWS_PER_IMAGE}")
    device = next(model.parameters()).device
    parts: list[AnomalyFigures] = []
    with evaluating(model, device, precision):
        for first in range(0, len(images), micro_batch):
            x = images[first : first + micro_batch].to(device)
            parts.append(_of_chunk(model, x, groups - groups_from_prior, draws, seed, first_image + first))
            if progress is not None:
                progress(min(first + micro_batch, len(images)), len(images))
    return AnomalyFigures(*(torch.cat(values) for values in zip(*parts, strict=True)))


@torch.no_grad()
def coarse_latents(
    model: NVAE, batches: Iterable[Tensor], precision: str = "fp32", progress: OnProgress | None = None, count: int = 0
) -> Tensor:
    """Posterior means of the groups of the lowest resolution, (N, D) on the host, of images in batches of a pass each.

    A group below another one sees that one's mean. count: of all images, for the progress.
    """
    device, found = next(model.parameters()).device, []
    with evaluating(model, device, precision):
        for x in batches:
            found.append(_coarse(model, model.encode(x.to(device))))
            if progress is not None:
                progress(sum(map(len, found)), count)
    return torch.cat(found)


def _of_chunk(model: NVAE, x: Tensor, first_groups: int, draws: int, seed: int, first_image: int) -> AnomalyFigures:
    """The figures of images that share a pass, one draw of each at a time."""
    maps = model.encode(x)
    coarse = _coarse(model, [*maps])
    target = without_padding(x, model.config)
    later = elbo = pixels = torch.zeros(())
    for draw in range(draws):
        slot = draw * _DRAWS_PER_IMAGE + first_image  # images of a chunk have slots beside each other
        posterior = FromPosterior(SeededNoise(seed, NoiseStep.ANOMALY, slot))
        prior = FromPrior(SeededNoise(seed, NoiseStep.ANOMALY_OF_LATER_GROUPS, slot))
        whole, whole_kl = _log_prob(model, posterior, [*maps], target)
        part, part_kl = _log_prob(model, FirstGroups(first_groups, posterior, prior), [*maps], target)
        elbo = elbo + (whole.sum((1, 2)) - whole_kl)
        later = later + (whole.sum((1, 2)) - whole_kl) - (part.sum((1, 2)) - part_kl)
        pixels = pixels + (whole - part)
    return AnomalyFigures((elbo / draws).cpu(), (later / draws).cpu(), (pixels / draws).cpu(), coarse)


@dataclass(frozen=True)
class _FirstMeans:
    """z is each posterior's mean; of the first `count` groups it is kept."""

    count: int
    kept: list[Tensor] = field(default_factory=list)

    def latent(self, group: int, prior: Normal, posterior: Normal | None, flow: FlowFunction | None) -> Latent:
        """The latent of group `group`."""
        latent = FromPosterior(NoNoise()).latent(group, prior, posterior, flow)
        if group < self.count and latent.z is not None:
            self.kept.append(latent.z.float().flatten(1).cpu())
        return latent


def _coarse(model: NVAE, maps: list[Tensor]) -> Tensor:
    """(B, D) on the host."""
    means = _FirstMeans(model.config.scale_groups[-1])  # of the lowest resolution, which comes last there
    model.top_down(means, maps)
    return torch.cat(means.kept, dim=1)


def _log_prob(model: NVAE, source: Source, maps: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x|z) per pixel (B, S, S) float64, and the KL of the groups that have one (B,) float64."""
    parameters, latents = model.decode(source, maps)
    kl = sum((_kl(latent) for latent in latents if latent.kl is not None), torch.zeros(()))
    return model.likelihood.log_prob_per_pixel(parameters, target).double(), kl


def _kl(latent: Latent) -> Tensor:
    assert latent.kl is not None
    return latent.kl.sum(1).double()


# --- how good a score is ----------------------------------------------------------------------------------------------


def auroc(normal: Tensor, anomalous: Tensor) -> float:
    """The share of pairs in which the anomalous image has the higher score, ties half: the area under the ROC curve."""
    ranks = torch.cat([normal, anomalous]).double()
    order = ranks.sort().values
    low, high = torch.searchsorted(order, anomalous.double()), torch.searchsorted(order, anomalous.double(), right=True)
    mean_rank = (low + high + 1).double() / 2  # from 1, ties share theirs
    n = len(anomalous)
    return float((mean_rank.sum() - n * (n + 1) / 2) / (n * len(normal)))
