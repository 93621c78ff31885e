"""Which images do not belong to what a model was trained on: a score per image, and a map of where.

A plain likelihood can be a poor judge: simple images of another kind can be more likely than the data. (On the pairs of
docs/quality.md it was a good one, so the ELBO stands beside the score.) A hierarchy tells more (arXiv 2102.08248):
compare the ELBO with one whose later groups, nearest to the pixels, come from the prior given
the earlier ones, as they would for an image that the model knows well,

    score = ELBO(x) - ELBO_k(x),
    ELBO_k(x) = E[log p(x | z) + log p(z_first) - log q(z_first | x)],   z_first ~ q(. | x),  z_later ~ p(. | z_first)

with the last k groups drawn from the prior. The score is what those groups have to say of an image that the others did
not foresee, in nats: high for what does not belong. Per pixel it is the difference of log p(x | z), a map.
Legend: B images, G latent groups, S pixels per side without padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nvae_lowmem.data.pipeline import without_padding
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.model.latents import FirstGroups, FromPosterior, FromPrior, Latent, NoiseStep, SeededNoise, Source
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.progress import OnProgress
from nvae_lowmem.training.validation import evaluating

_DRAWS_PER_IMAGE = 1 << 16


class AnomalyScores(NamedTuple):
    """Of B images, on the host."""

    score: Tensor
    """(B,) nats: the higher, the less an image belongs."""
    elbo: Tensor
    """(B,) nats: the plain bound, for comparison."""
    map: Tensor
    """(B, S, S) nats: the score's part of each pixel, without the KL, which has no place."""


@torch.no_grad()
def anomaly_scores(
    model: NVAE,
    images: Tensor,
    groups_from_prior: int,
    draws: int = 1,
    seed: int = 0,
    micro_batch: int = 16,
    precision: str = "fp32",
    progress: OnProgress | None = None,
) -> AnomalyScores:
    """Scores of images (B, C, S', S') in [0, 1], means over `draws` of the latents; image i has slots of its own.

    groups_from_prior: k, how many of the last groups (of the highest resolution) are drawn from the prior.
    Raises ConfigError for k outside 1 to G - 1, and for fewer than one draw.
    """
    groups = model.config.total_groups
    if not 1 <= groups_from_prior < groups:
        raise ConfigError(f"--groups {groups_from_prior}: must be from 1 to {groups - 1}, one less than the model has")
    if not 1 <= draws <= _DRAWS_PER_IMAGE:
        raise ConfigError(f"--draws {draws}: must be from 1 to {_DRAWS_PER_IMAGE}")
    device = next(model.parameters()).device
    parts: list[AnomalyScores] = []
    with evaluating(model, device, precision):
        for first in range(0, len(images), micro_batch):
            x = images[first : first + micro_batch].to(device)
            parts.append(_of_chunk(model, x, groups - groups_from_prior, draws, seed, first))
            if progress is not None:
                progress(min(first + micro_batch, len(images)), len(images))
    return AnomalyScores(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _of_chunk(model: NVAE, x: Tensor, first_groups: int, draws: int, seed: int, first_image: int) -> AnomalyScores:
    """The scores of images that share a pass, one draw of each at a time."""
    maps = model.encode(x)
    target = without_padding(x, model.config)
    score = elbo = pixels = torch.zeros(())
    for draw in range(draws):
        slot = draw * _DRAWS_PER_IMAGE + first_image  # images of a chunk have slots beside each other
        posterior = FromPosterior(SeededNoise(seed, NoiseStep.ANOMALY, slot))
        prior = FromPrior(SeededNoise(seed, NoiseStep.ANOMALY_OF_LATER_GROUPS, slot))
        whole, whole_kl = _log_prob(model, posterior, [*maps], target)
        part, part_kl = _log_prob(model, FirstGroups(first_groups, posterior, prior), [*maps], target)
        elbo = elbo + (whole.sum((1, 2)) - whole_kl)
        score = score + (whole.sum((1, 2)) - whole_kl) - (part.sum((1, 2)) - part_kl)
        pixels = pixels + (whole - part)
    return AnomalyScores((score / draws).cpu(), (elbo / draws).cpu(), (pixels / draws).cpu())


def _log_prob(model: NVAE, source: Source, maps: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x|z) per pixel (B, S, S) float64, and the KL of the groups that have one (B,) float64."""
    parameters, latents = model.decode(source, maps)
    kl = sum((_kl(latent) for latent in latents if latent.kl is not None), torch.zeros(()))
    return model.likelihood.log_prob_per_pixel(parameters, target).double(), kl


def _kl(latent: Latent) -> Tensor:
    assert latent.kl is not None
    return latent.kl.sum(1).double()


def auroc(normal: Tensor, anomalous: Tensor) -> float:
    """The share of pairs in which the anomalous image has the higher score, ties half: the area under the ROC curve."""
    ranks = torch.cat([normal, anomalous]).double()
    order = ranks.sort().values
    low, high = torch.searchsorted(order, anomalous.double()), torch.searchsorted(order, anomalous.double(), right=True)
    mean_rank = (low + high + 1).double() / 2  # from 1, ties share theirs
    n = len(anomalous)
    return float((mean_rank.sum() - n * (n + 1) / 2) / (n * len(normal)))
