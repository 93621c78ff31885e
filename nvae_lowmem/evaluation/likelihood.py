"""The likelihood of held-out images under a trained model, what its latent groups carry, and samples to compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from nvae_lowmem.data.pipeline import without_padding
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.evaluation.bounds import ElboOfImages, elbo_of_images, importance_weighted_bound
from nvae_lowmem.evaluation.distances import Comparison
from nvae_lowmem.evaluation.report import LikelihoodFigures, Mean
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.progress import Progress
from nvae_lowmem.training.validation import ACTIVE_NATS, labels_of

SHOWN_IMAGES = 24


def measure_likelihood(
    model: NVAE,
    batches: Iterable[Tensor],
    draws: int,
    micro_batch: int,
    precision: str = "fp32",
    seed: int = 0,
    progress: Progress | None = None,
    comparison: Comparison | None = None,
    labels: np.ndarray | None = None,
) -> tuple[LikelihoodFigures, dict[str, Tensor]]:
    """Both bounds, KL of groups and errors over `batches` of (b, C, padded, padded), and the first images as pictures.

    The images also go to the comparison, as its real ones. labels: numbers of the images' classes in their order, (N,);
    with them the figures are of log p(x|y). Raises ConfigError for draws or micro_batch below 1, no
    images, and weights that give no finite ELBO.
    """
    parts: list[ElboOfImages] = []
    bounds: list[Tensor] = []
    originals: list[Tensor] = []
    seen = 0
    for x in batches:
        rows = labels_of(model, labels, seen, len(x))
        part = elbo_of_images(model, x, seed, precision, seen, rows)
        advance = progress.advance if progress is not None else None
        bounds.append(importance_weighted_bound(model, x, draws, seed, micro_batch, precision, seen, advance, rows))
        images, shown = without_padding(x, model.config), max(0, SHOWN_IMAGES - seen)
        if comparison is not None:
            comparison.add_real(images)
        # copies: views would keep all images
        parts.append(part._replace(reconstructions=part.reconstructions[:shown].clone()))
        originals.append(images[:shown].cpu().clone())
        seen += len(x)
    if not parts:
        raise ConfigError("there are no held-out images to evaluate on")
    figures = _figures(parts, torch.cat(bounds), draws)
    reconstructions = torch.cat([part.reconstructions for part in parts])
    return figures, {"held-out images": torch.cat(originals), "their reconstructions": reconstructions}


def _figures(parts: Sequence[ElboOfImages], bounds: Tensor, draws: int) -> LikelihoodFigures:
    nll, kl = torch.cat([part.nll for part in parts]), torch.cat([part.kl for part in parts])
    nelbo = nll + kl.sum(1)
    if not bool(nelbo.isfinite().all()):
        raise ConfigError(
            "the ELBO of some held-out images is not finite: training has diverged, or --precision is too low; "
            "try --precision fp32"
        )
    channel_kl = torch.stack([part.channel_kl for part in parts]).sum(0) / len(nll)  # (G, L)
    return LikelihoodFigures(
        images=len(nll),
        nelbo=Mean.of(nelbo),
        bound=Mean.of(-bounds),
        draws=draws,
        nll=Mean.of(nll),
        kl=Mean.of(kl.sum(1)),
        squared_error=Mean.of(torch.cat([part.squared_error for part in parts])),
        kl_of_groups=kl.mean(0).tolist(),
        active_of_groups=(channel_kl > ACTIVE_NATS).sum(1).tolist(),
        active_nats=ACTIVE_NATS,
    )


def compare_samples(chunks: Iterable[Tensor], caption: str, comparison: Comparison | None) -> None:
    """Give the samples (b, C, S, S) to the comparison, under this name; without one, nothing is drawn."""
    if comparison is not None:
        for images in chunks:
            comparison.add(caption, images)
