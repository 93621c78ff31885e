"""Measure a trained model on held-out images: likelihood, latents, samples."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nvae_lowmem import __version__
from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import RunFlags, at_least
from nvae_lowmem.config.sections import Precision
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.files import writable_file, write_output
from nvae_lowmem.progress import Progress, say

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nvae_lowmem.evaluation.distances import Comparison
    from nvae_lowmem.generation.sample import Temperature
    from nvae_lowmem.training.open_run import OpenRun


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(RunFlags):
    """Measure a trained model on held-out images of its own data, and write figures (JSON) and a page (HTML).

    Likelihood: the ELBO and the importance-weighted bound, in nats and bits per dimension. Latents: KL and active
    channels of every group. Images: error of reconstructions, and KID of samples. Without --fid-weights, KID is taken
    on a fixed random network, is called KID(random-conv-features-v1), and compares with such figures only.

    Examples:
      nvae-lowmem evaluate --run latest
      nvae-lowmem evaluate --run 3 --images 0 --iw-samples 1000 --samples 0
      nvae-lowmem evaluate --run celeba64-4g --samples 5000 --fid-weights inception-2015-12-05.pt --json -
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
    """Pixels of the samples that are compared: drawn from p(x|z) as the model has it, or its mean, which is shown."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, write, and return the exit code."""
    return run_command(EvaluateCommand, _evaluate, argv)


def _evaluate(command: EvaluateCommand) -> None:
    # What can be refused before torch is there.
    at_least(0, images=command.images, samples=command.samples)
    at_least(1, iw_samples=command.iw_samples)
    if command.fid_weights and not command.samples:
        raise ConfigError("--fid-weights compares samples with images, but --samples is 0: leave one of them out")
    command.find()
    from nvae_lowmem.data.pipeline import evaluation_batches
    from nvae_lowmem.data.sources import open_source
    from nvae_lowmem.evaluation.likelihood import SHOWN_IMAGES, compare_samples, measure_likelihood
    from nvae_lowmem.evaluation.report import Evaluation, to_html, to_json, to_text
    from nvae_lowmem.generation import grids
    from nvae_lowmem.generation.sample import group_temperatures, parse_temperature, sample_images
    from nvae_lowmem.hardware.precision import precision_here
    from nvae_lowmem.training.open_run import choose_device, open_run

    # The run, and whether everything that is asked for can be done and written.
    precision, _ = precision_here(command.precision, choose_device(command.device))
    run = open_run(command.run, command.runs_dir, command.device, command.micro_batch, precision, command.data)
    profile, model, device, micro_batch = run.profile, run.model, run.device, run.micro_batch
    temperature = parse_temperature(command.temperature)
    group_temperatures(temperature, profile.model)
    comparison, notes = _comparison(command, device)
    out = Path(command.out) if command.out else run.folder / "evaluation"
    report, figures = writable_file("--out", out / "report.html"), _json_file(command, out)
    tell = partial(print, file=sys.stderr if command.json == "-" else sys.stdout, flush=True)

    # Likelihood and latents.
    held_out = open_source(profile.data, profile.model, log=tell).test
    images = min(command.images or len(held_out), len(held_out))
    _require_enough(images, comparison)
    if profile.model.classes:
        notes.append("The model was given the class of every held-out image: likelihoods are of log p(x|y).")
    per_pass = f"up to {micro_batch} images or draws per pass"
    tell(f"{run.checkpoint}: {images} held-out images, {precision} on {device}, {per_pass}")
    batches = evaluation_batches(held_out, profile.model, profile.data, micro_batch, profile.training.seed, images)
    likelihood, shown = measure_likelihood(
        model, (x.to(device) for x in batches), command.iw_samples, micro_batch, precision, command.seed,
        Progress("likelihood", images * command.iw_samples, tell), comparison, held_out.labels,
    )  # fmt: skip

    # Samples, last of all: they need other BatchNorm statistics than the posterior.
    if command.samples:
        caption = f"samples at temperature {command.temperature}, {command.likelihood} of p(x|z)"
        _recalibrate(run, temperature)
        compare_samples(_prior_samples(run, command, temperature), caption, comparison)
        means = sample_images(model, min(SHOWN_IMAGES, command.samples), temperature, command.seed, micro_batch)
        shown[f"samples at temperature {command.temperature}, means of p(x|z)"] = means

    found = Evaluation(
        run=str(run.folder),
        checkpoint=str(run.checkpoint),
        model=profile.model,
        settings=_settings(command, precision, device, comparison),
        likelihood=likelihood,
        distances=comparison.distances(command.seed) if comparison is not None else (),
        notes=notes,
        pictures={
            caption: grids.png_bytes(grids.grid(some, grids.default_columns(some.shape[-1])))
            for caption, some in shown.items()
        },
    )
    write_output("--out", report, to_html(found))
    tell(f"{to_text(found)}\nreport: {report}")
    if figures is None:
        print(to_json(found))
    else:
        tell(f"figures: {write_output('--json', figures, to_json(found) + chr(10))}")


def _recalibrate(run: OpenRun, temperature: Temperature) -> None:
    """BatchNorm statistics of samples at the temperature, kept where they are known."""
    from nvae_lowmem.generation.recalibrate import RECALIBRATION_SEED, default_passes, recalibrate_once

    passes = default_passes(run.device, run.micro_batch)
    progress = Progress("BatchNorm statistics", passes, say)
    recalibrate_once(
        run.model, run.checkpoint, temperature, passes, run.micro_batch, RECALIBRATION_SEED,
        lambda *_: progress.advance(),
    )  # fmt: skip


def _prior_samples(run: OpenRun, command: EvaluateCommand, temperature: Temperature) -> Iterator[Tensor]:
    """Images (b, C, S, S) fp32 in [0, 1] on the host, as the command sample draws them."""
    from nvae_lowmem.generation.sample import sample_chunks

    progress, drawn = Progress("samples", command.samples, say), command.likelihood == "sample"
    for images in sample_chunks(run.model, command.samples, temperature, command.seed, run.micro_batch, drawn):
        progress.advance(len(images))
        yield images


# --- what is asked for ------------------------------------------------------------------------------------------------


def _require_enough(images: int, comparison: Comparison | None) -> None:
    from nvae_lowmem.evaluation.distances import MIN_IMAGES

    if comparison is not None and images < MIN_IMAGES:
        raise ConfigError(
            f"KID needs at least {MIN_IMAGES} held-out images, not {images}: use --samples 0, or more data"
        )


def _comparison(command: EvaluateCommand, device: torch.device) -> tuple[Comparison | None, list[str]]:
    """What compares samples with images, and notes on how far it can be trusted; None where it is left out."""
    from nvae_lowmem.evaluation import distances

    if not command.samples:
        return None, []
    if command.samples < distances.MIN_IMAGES:
        raise ConfigError(
            f"--samples {command.samples}: KID needs at least {distances.MIN_IMAGES}; 0 leaves samples out"
        )
    if not distances.available():
        if command.fid_weights:
            raise ConfigError(f"--fid-weights: {distances.MISSING}")
        return None, [distances.MISSING]
    if not command.fid_weights:
        return distances.Comparison(distances.RandomConvFeatures(), device), []
    network = distances.InceptionFeatures(command.fid_weights)
    notes = []
    if command.samples <= network.num_features:
        notes.append(
            f"FID of {command.samples} samples on {network.num_features} features is far too high: the covariance "
            "needs more samples than features, papers take 50,000; KID has no such bias"
        )
    return distances.Comparison(network, device), notes


def _settings(
    command: EvaluateCommand, precision: str, device: torch.device, comparison: Comparison | None
) -> dict[str, str | int]:
    import torch

    settings: dict[str, str | int] = {"seed": command.seed, "precision": precision, "device": device.type}
    if comparison is not None:
        settings["features"] = comparison.network.name
    return settings | {"nvae-lowmem": __version__, "torch": torch.__version__}


def _json_file(command: EvaluateCommand, out: Path) -> Path | None:
    """Where the figures go; None: to stdout. Raises ConfigError where nothing can be written."""
    if command.json == "-":
        return None
    return writable_file("--json", Path(command.json) if command.json else out / "evaluation.json")
