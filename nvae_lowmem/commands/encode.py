"""Write the latents of images to files, going on where an interrupted run stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import RunFlags, at_least
from nvae_lowmem.config.choices import Posterior
from nvae_lowmem.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class EncodeCommand(RunFlags):
    """Write the latents of all images of a folder, ZIP or LMDB to files: safetensors, some images in each.

    The same command goes on where an interrupted one stopped. Images that cannot be read are said and left out.

    Examples:
      nvae-lowmem encode ~/pictures latents --run latest
      nvae-lowmem encode faces.zip latents --run 3 --posterior sample --seed 1
    """

    images: Annotated[str, tyro.conf.Positional]
    """Images in any form that training takes; of a form with two parts, those for training."""
    out: Annotated[str, tyro.conf.Positional]
    """The folder to write to."""
    posterior: Posterior = "mean"
    """z of an image: each group's mean, or a draw from q(z|x)."""
    seed: int = 0
    """Seed of the draws."""
    images_per_file: int = 1000
    """Images in each file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, encode, and return the exit code."""
    return run_command(EncodeCommand, _encode, argv)


def _encode(command: EncodeCommand) -> None:
    at_least(1, images_per_file=command.images_per_file)
    folder = command.find()
    import nvae_lowmem as nl
    from nvae_lowmem.data.sources import open_store
    from nvae_lowmem.library.latent_files import encode_store

    model = nl.load(folder, device=command.device)
    model.micro_batch = command.micro_batch or model.micro_batch
    store = open_store(command.images, model.profile.data, model.config)
    print(f"{model}\n{store.description}: {len(store):,} images", flush=True)
    count = encode_store(
        model, store, command.images, Path(command.out), posterior=command.posterior, seed=command.seed,
        images_per_file=command.images_per_file, progress=progress_bar("encoding"),
    )  # fmt: skip
    print(f"{command.out}: {count:,} images encoded now")
