"""`launch/evaluate.py`: a run's newest checkpoint on held-out images of its own data: likelihood, latents, samples."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import torch
import tyro
from torch import Tensor

from nvae_lowmem import __version__
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import Precision
from nvae_lowmem.data.pipeline import evaluation_batches
from nvae_lowmem.data.sources import open_source
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.evaluation.bounds import ElboOfImages, elbo_of_images, importance_weighted_bound, without_padding
from nvae_lowmem.evaluation.distances import (
    MIN_IMAGES,
    MISSING,
    Comparison,
    InceptionFeatures,
    RandomConvFeatures,
    available,
)
from nvae_lowmem.evaluation.report import Evaluation, LikelihoodFigures, Mean, to_html, to_json, to_text
from nvae_lowmem.hardware.precision import precision_here
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.progress import Progress
from nvae_lowmem.training.open_run import RunCommand, choose_device, exit_code, open_run, writable_file
from nvae_lowmem.training.validation import ACTIVE_NATS

SHOWN_IMAGES = 24

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(RunCommand):
    """Measure a trained model on held-out images of its own data, and write figures (JSON) and a page (HTML).

    Likelihood: the ELBO and the importance-weighted bound, in nats and bits per dimension. Latents: KL and active
    channels of every group. Pictures: error of reconstructions, and KID of samples. Without --fid-weights, KID is taken
    on a fixed random network, is called KID(random-conv-features-v1), and compares with such figures only.

    Examples:
      python launch/evaluate.py --run latest
      python launch/evaluate.py --run 3 --images 0 --iw-samples 1000 --samples 0
      python launch/evaluate.py --run celeba64-4g --samples 5000 --fid-weights inception-2015-12-05.pt --json -
    """

    images: int = 500
    """Held-out images; 0: all."""
    iw_samples: int = 100
    """Draws per image of the importance-weighted bound; papers take 1000."""
    samples: int = 500
    """Generated images for KID; 0: none."""
    temperature: str = "1.0"
    """Of the samples: one number, or one per scale with commas, highest resolution first. 1.0 is the model itself."""
    likelihood: Literal["mean", "sample"] = "sample"
    """Pixels of the samples: drawn from p(x|z) as the model has it, or its mean."""
    fid_weights: str = ""
    """TorchScript file of an Inception network that takes uint8 RGB images of any size and returns features (B, d), for
    example inception-2015-12-05.pt; with it, KID and FID have their usual meaning."""
    precision: Precision = "fp32"
    """Dtype of activations; auto: what training takes on this device."""
    seed: int = 0
    """Seed of posterior draws, samples and KID's subsets."""
    out: str = ""
    """Folder for report.html and evaluation.json; empty: evaluation/ in the run's folder."""
    json: str = ""
    """Write the figures to this file instead of evaluation.json; -: print them, and everything else to stderr."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """The generated images that an evaluation asks for."""

    count: int
    temperature: str
    seed: int
    micro_batch: int
    likelihood_sample: bool


class Generation(Protocol):
    """What evaluation takes from generation, which is its neighbour and not below it: given by launch/."""

    def check(self, request: SampleRequest, model: ModelConfig) -> None:
        """Raise ConfigError if these samples cannot be drawn."""
        ...

    def samples(self, model: NVAE, checkpoint: Path, request: SampleRequest) -> Iterator[Tensor]:
        """Images (b, C, S, S) fp32 in [0, 1] on the host; the model's BatchNorm statistics may change for it."""
        ...

    def grid_png(self, images: Tensor) -> bytes:
        """Images (B, C, S, S) as one picture for people."""
        ...


def run_evaluation(argv: Sequence[str], generation: Generation) -> int:
    """Parse argv, evaluate, write, and return the exit code: 0 done, 2 bad input, 5 out of memory."""
    command = tyro.cli(EvaluateCommand, args=list(argv), prog="evaluate.py")
    return exit_code("evaluate.py", lambda: _evaluate(command, generation))


def _evaluate(command: EvaluateCommand, generation: Generation) -> None:
    _check_numbers(command)
    precision, _ = precision_here(command.precision, choose_device(command.device))
    run = open_run(command.run, command.runs_dir, command.device, command.micro_batch, precision, command.data)
    profile, model, device, micro_batch = run.profile, run.model, run.device, run.micro_batch
    request = SampleRequest(
        count=command.samples, temperature=command.temperature, seed=command.seed, micro_batch=micro_batch,
        likelihood_sample=command.likelihood == "sample",
    )  # fmt: skip
    generation.check(request, profile.model)
    comparison, notes = _comparison(command, device)
    out = Path(command.out) if command.out else run.folder / "evaluation"
    report, figures = writable_file("--out", out / "report.html"), _json_file(command, out)
    say: Say = partial(print, file=sys.stderr if command.json == "-" else sys.stdout, flush=True)

    held_out = open_source(profile.data, profile.model, log=say).test
    images = min(command.images or len(held_out), len(held_out))
    if comparison is not None and images < MIN_IMAGES:
        raise ConfigError(
            f"KID needs at least {MIN_IMAGES} held-out images, not {images}: use --samples 0, or more data"
        )
    per_pass = f"up to {micro_batch} images or draws per pass"
    say(f"{run.checkpoint}: {images} held-out images, {precision} on {device}, {per_pass}")
    batches = evaluation_batches(held_out, profile.model, profile.data, micro_batch, profile.training.seed)
    likelihood, pictures = measure_likelihood(
        model, _first(batches, images, device), command.iw_samples, micro_batch, precision, command.seed,
        Progress("likelihood", images * command.iw_samples, say), comparison,
    )  # fmt: skip
    if command.samples:
        # last of all: samples need other BatchNorm statistics than the posterior
        caption = f"samples at temperature {command.temperature}, {command.likelihood} of p(x|z)"
        pictures[caption] = _compare_samples(generation.samples(model, run.checkpoint, request), caption, comparison)
    found = Evaluation(
        run=str(run.folder),
        checkpoint=str(run.checkpoint),
        model=profile.model,
        settings=_settings(command, precision, device, comparison),
        likelihood=likelihood,
        distances=comparison.distances(command.seed) if comparison is not None else (),
        notes=notes,
        pictures={caption: generation.grid_png(images) for caption, images in pictures.items()},
    )
    report.write_text(to_html(found), encoding="utf-8")
    say(f"{to_text(found)}\nreport: {report}")
    if figures is None:
        print(to_json(found))
    else:
        figures.write_text(to_json(found) + "\n", encoding="utf-8")
        say(f"figures: {figures}")


# --- the work ---------------------------------------------------------------------------------------------------------


def measure_likelihood(
    model: NVAE,
    batches: Iterable[Tensor],
    draws: int,
    micro_batch: int,
    precision: str = "fp32",
    seed: int = 0,
    progress: Progress | None = None,
    comparison: Comparison | None = None,
) -> tuple[LikelihoodFigures, dict[str, Tensor]]:
    """Both bounds, KL of groups and errors over `batches` of (b, C, padded, padded), and the first images as pictures.

    The images also go to the comparison, as its real ones. Raises ConfigError for draws or micro_batch below 1, no
    images, and weights that give no finite ELBO.
    """
    parts: list[ElboOfImages] = []
    bounds: list[Tensor] = []
    originals: list[Tensor] = []
    seen = 0
    for x in batches:
        part = elbo_of_images(model, x, seed, precision, first_image=seen)
        advance = progress.advance if progress is not None else None
        bounds.append(importance_weighted_bound(model, x, draws, seed, micro_batch, precision, seen, advance))
        images, shown = without_padding(model, x), max(0, SHOWN_IMAGES - seen)
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


def _compare_samples(chunks: Iterable[Tensor], caption: str, comparison: Comparison | None) -> Tensor:
    """Give the samples to the comparison, and return the first of them."""
    shown: list[Tensor] = []
    for images in chunks:
        shown.append(images[: max(0, SHOWN_IMAGES - sum(map(len, shown)))])
        if comparison is not None:
            comparison.add(caption, images)
    return torch.cat(shown)


def _first(batches: Iterable[Tensor], count: int, device: torch.device) -> Iterator[Tensor]:
    """The first `count` images of the batches."""
    left = count
    for x in batches:
        yield x[:left].to(device)
        left -= len(x)
        if left <= 0:
            return


# --- what is asked for ------------------------------------------------------------------------------------------------


def _check_numbers(command: EvaluateCommand) -> None:
    for flag, value, lowest in (
        ("--images", command.images, 0),
        ("--iw-samples", command.iw_samples, 1),
        ("--samples", command.samples, 0),
        ("--micro-batch", command.micro_batch, 0),
    ):
        if value < lowest:
            raise ConfigError(f"{flag} {value}: must be at least {lowest}")
    if 0 < command.samples < MIN_IMAGES:
        raise ConfigError(f"--samples {command.samples}: KID needs at least {MIN_IMAGES}; 0 leaves samples out")
    if command.fid_weights and not command.samples:
        raise ConfigError("--fid-weights compares samples with images, but --samples is 0: leave one of them out")


def _comparison(command: EvaluateCommand, device: torch.device) -> tuple[Comparison | None, list[str]]:
    """What compares samples with images, and notes on how far it can be trusted; None where it is left out."""
    if not command.samples:
        return None, []
    if not available():
        if command.fid_weights:
            raise ConfigError(f"--fid-weights: {MISSING}")
        return None, [MISSING]
    if not command.fid_weights:
        return Comparison(RandomConvFeatures(), device), []
    network = InceptionFeatures(command.fid_weights)
    notes = []
    if command.samples <= network.num_features:
        notes.append(
            f"FID of {command.samples} samples on {network.num_features} features is far too high: the covariance "
            "needs more samples than features, papers take 50,000; KID has no such bias"
        )
    return Comparison(network, device), notes


def _settings(
    command: EvaluateCommand, precision: str, device: torch.device, comparison: Comparison | None
) -> dict[str, str | int]:
    settings: dict[str, str | int] = {"seed": command.seed, "precision": precision, "device": device.type}
    if comparison is not None:
        settings["features"] = comparison.network.name
    return settings | {"nvae-lowmem": __version__, "torch": torch.__version__}


# --- what is written --------------------------------------------------------------------------------------------------


def _json_file(command: EvaluateCommand, out: Path) -> Path | None:
    """Where the figures go; None: to stdout. Raises ConfigError where nothing can be written."""
    if command.json == "-":
        return None
    return writable_file("--json", Path(command.json) if command.json else out / "evaluation.json")
