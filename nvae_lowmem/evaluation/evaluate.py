"""`launch/evaluate.py`: a run's newest checkpoint on held-out images of its own data: likelihood, latents, samples."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
import tyro
from torch import Tensor

from nvae_lowmem import __version__
from nvae_lowmem.config import ConfigError, ModelConfig, Precision
from nvae_lowmem.data.pipeline import evaluation_batches
from nvae_lowmem.data.progress import Progress
from nvae_lowmem.data.sources import open_source
from nvae_lowmem.evaluation.bounds import ElboOfImages, elbo_of_images, importance_weighted_bound, without_padding
from nvae_lowmem.evaluation.distances import (
    MIN_IMAGES,
    MISSING,
    Comparison,
    InceptionFeatures,
    RandomConvFeatures,
    available,
)
from nvae_lowmem.evaluation.report import Evaluation, Mean, to_html, to_json, to_text
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training import checkpoint, runs
from nvae_lowmem.training.setup import choose_precision
from nvae_lowmem.training.validation import ACTIVE_NATS

EXIT_BAD_INPUT, EXIT_OUT_OF_MEMORY = 2, 5
DEFAULT_MICRO_BATCH = 16
SHOWN_IMAGES = 24

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Measure a trained model on held-out images of its own data, and write figures (JSON) and a page (HTML).

    Likelihood: the ELBO and the importance-weighted bound, in nats and bits per dimension. Latents: KL and active
    channels of every group. Pictures: error of reconstructions, and KID of samples. Without --fid-weights, KID is taken
    on a fixed random network, is called KID(random-conv-features-v1), and compares with such figures only.

    Examples:
      python launch/evaluate.py --run latest
      python launch/evaluate.py --run 3 --images 0 --iw-samples 1000 --samples 0
      python launch/evaluate.py --run celeba64-4g --samples 5000 --fid-weights inception-2015-12-05.pt --json -
    """

    run: str = "latest"
    """Run folder by path, number or name; latest: the newest one in --runs-dir."""
    runs_dir: str = "runs"
    """Where the numbered run folders are."""
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
    micro_batch: int = 0
    """Images or draws per forward pass; 0: that of the run's memory plan, or 16 if it has none."""
    seed: int = 0
    """Seed of posterior draws, samples and KID's subsets."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
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
    try:
        _evaluate(command, generation)
    except ConfigError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except torch.OutOfMemoryError as error:
        print(f"evaluate.py: out of GPU memory: {str(error).splitlines()[0]}", file=sys.stderr)
        print("Halve --micro-batch, or use --device cpu.", file=sys.stderr)
        return EXIT_OUT_OF_MEMORY
    return 0


def _evaluate(command: EvaluateCommand, generation: Generation) -> None:
    _check_numbers(command)
    device = _device(command.device)
    precision, _ = choose_precision(command.precision, device)
    run_dir = runs.find_run(command.run, command.runs_dir)
    profile, model, where = checkpoint.load_run(run_dir, device)
    micro_batch = command.micro_batch or profile.plan.micro_batch or DEFAULT_MICRO_BATCH
    request = SampleRequest(
        count=command.samples, temperature=command.temperature, seed=command.seed, micro_batch=micro_batch,
        likelihood_sample=command.likelihood == "sample",
    )  # fmt: skip
    generation.check(request, profile.model)
    comparison, notes = _comparison(command, device)
    out = _writable(Path(command.out) if command.out else run_dir / "evaluation")
    say: Say = partial(print, file=sys.stderr if command.json == "-" else sys.stdout, flush=True)

    held_out = open_source(profile.data, profile.model, log=say).test
    images = min(command.images or len(held_out), len(held_out))
    if comparison is not None and images < MIN_IMAGES:
        raise ConfigError(f"KID needs at least {MIN_IMAGES} held-out images, not {images}: use --samples 0, or more data")
    say(f"{where}: {images} held-out images, {precision} on {device}, up to {micro_batch} images or draws per pass")
    batches = evaluation_batches(held_out, profile.model, profile.data, micro_batch, profile.training.seed)
    limits = Limits(images, command.iw_samples, micro_batch, precision, command.seed)
    measured = measure(model, batches, limits, comparison, say)
    pictures = {"held-out images": measured.originals, "their reconstructions": measured.reconstructions}
    if command.samples:
        # after the likelihood, which needs the BatchNorm statistics of training
        caption = f"samples at temperature {command.temperature}, {command.likelihood} of p(x|z)"
        pictures[caption] = _compare_samples(generation.samples(model, where, request), caption, comparison)
    found = Evaluation(
        run=str(run_dir),
        checkpoint=str(where),
        model=profile.model,
        settings=_settings(command, precision, device, comparison),
        draws=command.iw_samples,
        distances=comparison.distances(command.seed) if comparison is not None else (),
        notes=notes,
        pictures={caption: generation.grid_png(shown) for caption, shown in pictures.items()},
        **measured.figures(),
    )
    say(to_text(found))
    _write(found, out, command.json, say)
