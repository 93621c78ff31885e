"""Draw the images of latents that encode has written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import RunFlags
from nvae_lowmem.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class DecodeCommand(RunFlags):
    """Draw the images of latents: a PNG for each, under the name that the image had.

    Images that are there already are left alone, so the same command goes on where an interrupted one stopped.

    Examples:
      nvae-lowmem decode latents pictures --run latest
      nvae-lowmem decode latents/latents-000000.safetensors pictures --run 3
    """

    latents: Annotated[str, tyro.conf.Positional]
    """A file of latents, or the folder that encode wrote to."""
    out: Annotated[str, tyro.conf.Positional]
    """The folder to write the images to."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, decode, and return the exit code."""
    return run_command(DecodeCommand, _decode, argv)


def _decode(command: DecodeCommand) -> None:
    folder = command.find()
    import nvae_lowmem as nl
    from nvae_lowmem.files import writable_folder
    from nvae_lowmem.library.latent_files import decode_files, latent_files

    files = latent_files(Path(command.latents))
    model = nl.load(folder, device=command.device)
    model.micro_batch = command.micro_batch or model.micro_batch
    out = writable_folder("OUT", Path(command.out))
    count = decode_files(model, files, out, progress_bar("decoding"))
    print(f"{out}: {count:,} images written now")
