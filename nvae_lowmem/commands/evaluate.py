"""Measure a trained model on held-out images: python launch/evaluate.py --run latest."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.evaluation.likelihood import SampleRequest, run_evaluation
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.recalibrate import RECALIBRATION_SEED, default_passes, recalibrate_once
from nvae_lowmem.generation.sample import group_temperatures, parse_temperature, sample_chunks
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.progress import Progress


class PriorSamples:
    """Samples as launch/sample.py draws them: evaluation and generation are neighbours, and meet only here."""

    def check(self, request: SampleRequest, model: ModelConfig) -> None:
        group_temperatures(parse_temperature(request.temperature), model)

    def samples(self, model: NVAE, checkpoint: Path, request: SampleRequest) -> Iterator[Tensor]:
        temperature, micro_batch = parse_temperature(request.temperature), request.micro_batch
        passes = default_passes(next(model.parameters()).device, micro_batch)
        statistics, drawing = Progress("BatchNorm statistics", passes, _say), Progress("samples", request.count, _say)
        recalibrate_once(
            model, checkpoint, temperature, passes, micro_batch, RECALIBRATION_SEED, lambda *_: statistics.advance()
        )
        for images in sample_chunks(
            model, request.count, temperature, request.seed, micro_batch, request.likelihood_sample
        ):
            drawing.advance(len(images))
            yield images

    def grid_png(self, images: Tensor) -> bytes:
        return grids.png_bytes(grids.grid(images, grids.default_columns(images.shape[-1])))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, write, and return the exit code: 0 done, 2 bad input, 5 out of memory."""
    return run_evaluation(sys.argv[1:] if argv is None else argv, PriorSamples())
