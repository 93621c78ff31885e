"""Does an imported network compute what the published one computed? Compared on arrays saved beside its checkpoint.

Everything is at eps = 0 in evaluation mode: with images every z0 is the posterior's mean (then the flows, if any), and
without images every z is the prior's mean. Legend: G groups, top first; B images; L latents per group; P, S: channels
and pixels per side of the network's output, padding included.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from nvae_lowmem.errors import ConfigError, raise_problems
from nvae_lowmem.model import likelihoods
from nvae_lowmem.model.latents import FromPosterior, FromPrior, NoNoise, Normal
from nvae_lowmem.model.likelihoods import Likelihood, LogisticMixture
from nvae_lowmem.model.nvae import NVAE

TOLERANCE = 1e-4
"""Largest relative error of an array that still counts as equal: float32, in other orders of summation."""

ARRAYS = (
    "logits", "kl_per_group", "kl_per_channel", "log_q", "log_p", "reconstruction_nll", "prior_logits", "parameters",
)  # fmt: skip


def read_expected(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file: `x` (B, C, S, S) in [0, 1], padded as the network wants it, and any of ARRAYS.

    Raises ConfigError for a file that is no such archive, lacks `x`, or holds nothing known to compare.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"--verify {path}: cannot be read as an .npz archive of arrays: {error}") from None
    unknown = sorted(set(arrays) - {"x", *ARRAYS})
    if "x" not in arrays or len(arrays) < 2 or unknown:
        raise ConfigError(
            f"--verify {path}: holds {', '.join(arrays) or 'nothing'}; it must hold x and at least one of "
            f"{', '.join(ARRAYS)}, and nothing else"
        )
    return arrays


def verify(model: NVAE, expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """For each expected array max|ours - expected| / max|expected|: an array's error relative to its largest value.

    (An element's own value would be the wrong yardstick: logits cross zero.) Leaves the model in evaluation mode.
    Raises ConfigError where shapes differ. An array that is not finite gives nan, which is within no tolerance.
    """
    device = next(model.parameters()).device
    c = model.config
    x = torch.as_tensor(expected["x"], dtype=torch.float32, device=device)
    wanted = (c.image_channels, c.network_size, c.network_size)
    if x.dim() != 4 or tuple(x.shape[1:]) != wanted:
        raise ConfigError(f"x has shape {tuple(x.shape)}, but this network takes (B, {', '.join(map(str, wanted))})")
    ours = outputs(model, x, len(expected["prior_logits"]) if "prior_logits" in expected else 1)
    pairs = {
        name: (ours[name].double().cpu().numpy(), np.asarray(expected[name], dtype=np.float64))
        for name in ARRAYS
        if name in expected
    }
    raise_problems(
        (
            f"{name} has shape {reference.shape}, ours has {own.shape}"
            for name, (own, reference) in pairs.items()
            if own.shape != reference.shape
        ),
        "expected arrays",
    )
    return {name: _relative_error(own, reference) for name, (own, reference) in pairs.items()}


@torch.no_grad()
def outputs(model: NVAE, x: Tensor, prior_batch: int) -> dict[str, Tensor]:
    """ARRAYS as this network computes them from x (B, C, S, S) in [0, 1].

    logits (B, P, S, S); kl_per_group (G, B) and kl_per_channel (G, L), summed over pixels, the latter averaged over
    images; log_q, log_p, reconstruction_nll (B,) in nats; prior_logits (prior_batch, P, S, S); parameters, 0-dim.
    With flows KL is log q(z0) - log p(z) at the sample, so it may be negative.
    """
    model.eval()
    head = model.blocks["head"]
    features, groups = model.top_down(FromPosterior(NoNoise(), densities=True), model.encode(x))
    prior_features, _ = model.top_down(FromPrior(NoNoise()), batch=prior_batch)
    logits = head(features).float()
    kl = torch.stack([group.kl for group in groups if group.kl is not None])  # (G, B, L)
    return {
        "logits": logits,
        "kl_per_group": kl.sum(2),
        "kl_per_channel": kl.mean(1),
        "log_q": torch.stack([group.log_q for group in groups if group.log_q is not None]).sum(0),
        "log_p": torch.stack([group.log_p for group in groups if group.log_p is not None]).sum(0),
        "reconstruction_nll": published_nll(model.likelihood, logits, x, model.config.padding),
        "prior_logits": head(prior_features).float(),
        "parameters": torch.tensor(sum(p.numel() for p in model.parameters())),
    }


def published_nll(likelihood: Likelihood, parameters: Tensor, x: Tensor, padding: int) -> Tensor:
    """-log p(x|z) (B,) by the published formula, for (B, P, S, S) and x (B, C, S, S) without their `padding`.

    It is not ours in two places. The logistic mixture has other edges, see `LogisticMixture.published_edges`. The
    normal is a density on [-1, 1], not the probability of a bin: sum of log N(2x - 1; mu, sigma^2).
    """
    inner = slice(padding, x.shape[-1] - padding)
    parameters, x = parameters[..., inner, inner], x[..., inner, inner]
    if isinstance(likelihood, likelihoods.DiscretisedNormal):
        mu, log_sigma = parameters.chunk(2, dim=1)
        return -Normal.from_parameters(mu, log_sigma).log_density(2 * x - 1).sum((1, 2, 3))
    if isinstance(likelihood, LogisticMixture):
        likelihood = LogisticMixture(
            likelihood.image_channels, likelihood.bits, likelihood.mixtures, published_edges=True
        )
    return -likelihood.log_prob(parameters, x)


def _relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    scale = np.abs(reference).max()
    difference = np.abs(ours - reference).max()
    return float(difference / scale) if scale > 0 else float(difference)
