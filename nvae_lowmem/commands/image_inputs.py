"""What the commands that send images through a trained run share: the run they open, and the images.

Legend: B images, C image channels, S pixels per side, S' = S + 2 padding pixels per side inside the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nvae_lowmem.commands.flags import RunFlags
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import DataConfig, Profile
from nvae_lowmem.data.image_files import load_images
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.files import writable_folder
from nvae_lowmem.training.open_run import OpenRun, held_out_batches, open_run


def opened(command: RunFlags) -> OpenRun:
    """Open the run of a command and print one line about it. Raises ConfigError as `open_run` does."""
    run = open_run(command.run, command.runs_dir, command.device, command.micro_batch, data=command.data)
    print(run.describe(), flush=True)
    return run


def output_folder(given: str, run: OpenRun) -> Path:
    """The folder of --out, or samples/ in the run's. Raises ConfigError where nothing can be written."""
    return writable_folder("--out", Path(given) if given else run.folder / "samples")


def given_or_held_out(run: OpenRun, paths: Sequence[str], boxes: Sequence[str], count: int) -> tuple[Tensor, list[str]]:
    """Images (B, C, S', S') on the host, and their names: the given files, or the first `count` held-out images.

    Raises ConfigError: images that cannot be used, data that cannot be opened, a count below 1.
    """
    if paths:
        return load_images(paths, run.profile, boxes), [Path(path).name for path in paths]
    if count < 1:
        raise ConfigError(f"--count {count}: must be at least 1")
    if boxes:
        raise ConfigError("--box belongs to image files, and none is given")
    images = torch.cat(list(held_out_batches(run, count)))
    return images, [f"held-out {number}" for number in range(len(images))]


def mask(path: str, size: int) -> Tensor:
    """An image file as a mask (S, S) bool of S = size pixels per side, true where it is white.

    Raises ConfigError for a file that is no image.
    """
    model = ModelConfig(image_channels=1, image_size=size, bits=8)
    values = load_images([path], Profile(name="mask", model=model, data=DataConfig(source="mask")))[0, 0]
    p = model.padding
    return (values[p:-p, p:-p] if p else values) > 0.5
