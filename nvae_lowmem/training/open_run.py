"""A trained run opened for work without gradients, and the held-out images of its data.

How many images such a command takes per forward pass follows from the run's memory plan: without gradients nothing is
kept from block to block but the encoder's maps, so as many images as training takes per pass fit where training did.
A pass in fp32 in a run whose plan is for a half type takes half as many, because its activations are twice as wide.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nvae_lowmem.config.choices import DeviceChoice
from nvae_lowmem.config.profile_file import override
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.data.pipeline import evaluation_batches, to_network
from nvae_lowmem.data.sources import open_source
from nvae_lowmem.errors import ConfigError, command_line
from nvae_lowmem.hardware import cuda_memory
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import AUTOCAST_DTYPES
from nvae_lowmem.progress import OnProgress
from nvae_lowmem.training import checkpoint, runs
from nvae_lowmem.training.build import prepare_for_inference
from nvae_lowmem.training.engines import distributed

MOST_UNPLANNED_IMAGES = 16
"""Images per pass where the plan leaves the micro-batch open, if a step has that many."""


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A trained model in evaluation mode, and what work with it needs to know."""

    folder: Path
    checkpoint: Path
    profile: Profile
    model: NVAE
    device: torch.device
    micro_batch: int
    """Images per forward pass."""

    def describe(self) -> str:
        """One line for people."""
        groups = self.model.config.total_groups
        return f"{self.checkpoint}: {groups} latent groups, on {self.device}, {self.micro_batch} images per pass"


def open_run(
    run: str,
    runs_dir: str,
    device: DeviceChoice = "auto",
    micro_batch: int = 0,
    precision: str = "fp32",
    data: str | None = None,
) -> OpenRun:
    """The newest checkpoint of a run, under the run's memory plan.

    micro_batch: images per pass. Where it is given, the plan's cap is not applied, since more images may need more of
    the card. 0: as many as the plan has room for in `precision`.
    data: takes the place of the run's data.source.
    Raises ConfigError: no such run, no whole checkpoint, one of another version, no GPU though asked for.
    """
    if micro_batch < 0:
        raise ConfigError(f"--micro-batch {micro_batch}: must be at least 1, or 0 for the one of the run's memory plan")
    where = choose_device(device)
    folder = runs.find_run(run, runs_dir)
    profile, model, saved = checkpoint.load_run(folder, say=_complain)
    if data is not None:
        profile = override(profile, values={"data.source": data}).with_absolute_paths()
    cuda_memory.prepare_environment(profile.plan)
    if not micro_batch:
        cuda_memory.apply_memory_cap(profile.plan, where)
    prepare_for_inference(model, profile)
    return OpenRun(
        folder=folder,
        checkpoint=saved,
        profile=profile,
        model=model.to(where),
        device=where,
        micro_batch=micro_batch or images_per_pass(profile, precision),
    )


def _complain(text: str) -> None:
    print(text, file=sys.stderr)


def images_per_pass(profile: Profile, precision: str = "fp32") -> int:
    """Images of a pass without gradients that take no more than a training step of the profile's plan."""
    plan = profile.plan
    images = profile.micro_batch() if plan.micro_batch else min(MOST_UNPLANNED_IMAGES, profile.micro_batch())
    planned_half = AUTOCAST_DTYPES.get(plan.precision) is not None  # "auto" has not been decided: nobody trained so
    computes_half = AUTOCAST_DTYPES.get(precision) is not None
    return max(1, images // 2) if planned_half and not computes_half else images


def choose_device(wanted: DeviceChoice) -> torch.device:
    """The device of --device; with several GPUs, the one that the launcher gave this process.

    Raises ConfigError for a GPU that is not there.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device cuda: torch sees no CUDA GPU here; use --device cpu, or ask {command_line('doctor')} why"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", distributed.launched_card())  # torch caps the memory of a numbered device only


def held_out_batches(run: OpenRun, count: int, progress: OnProgress | None = None) -> Iterator[Tensor]:
    """The first `count` held-out images of the run's data, (b, C, S', S') each, on the host; 0: all of them.

    Raises ConfigError when the data cannot be opened, at once and not with the first batch.
    """
    profile = run.profile
    held_out = open_source(profile.data, profile.model).test
    wanted = min(count, len(held_out)) if count else len(held_out)

    def batches() -> Iterator[Tensor]:
        done, seed = 0, profile.training.seed
        for x in evaluation_batches(held_out, profile.model, profile.data, run.micro_batch, seed, wanted):
            yield x
            done += len(x)
            if progress is not None:
                progress(done, wanted)

    return batches()


def plain_batches(run: OpenRun, part: Literal["train", "test"], count: int) -> tuple[Iterator[Tensor], int]:
    """`count` images of a part of the run's data, evenly spread, (b, C, S', S') each, on the host, and how many.

    They are as image files would be: one bit is a threshold, not a draw. Fewer where there are fewer; 0: all of them.
    Raises ConfigError when the data cannot be opened.
    """
    profile = run.profile
    datasets = open_source(profile.data, profile.model)
    dataset = datasets.train if part == "train" else datasets.test
    wanted = min(count, len(dataset)) if count else len(dataset)
    numbers = np.linspace(0, len(dataset) - 1, wanted).round().astype(np.int64)

    def batches() -> Iterator[Tensor]:
        for first in range(0, wanted, run.micro_batch):
            yield to_network(dataset.images(numbers[first : first + run.micro_batch]), profile.model, None)

    return batches(), wanted
