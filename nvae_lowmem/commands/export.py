"""Write a trained model as a folder or ZIP to give to others, with a model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import RunFlags, Switch, at_least
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.progress import progress_bar

_OF_A_FOLDER = ("zip", "licence", "temperatures", "passes")


@dataclass(frozen=True, kw_only=True)
class ExportCommand(RunFlags):
    """Write a trained model as a folder to give to others.

    It holds the averaged weights, the configuration, BatchNorm statistics for sampling, pictures and a model card;
    nothing of the training's state, and no path of this machine. `nvae_lowmem.load(OUT)` reads it.

    --to published writes OUT/checkpoint.pt instead: the averaged weights in the format of the published NVAE code, to
    be evaluated and sampled from with it. What that format cannot hold is named, and nothing is written.

    Examples:
      nvae-lowmem export faces --run latest --licence "CC BY 4.0"
      nvae-lowmem export faces --run 3 --zip
      nvae-lowmem export faces-published --run latest --to published
    """

    out: Annotated[str, tyro.conf.Positional]
    """The folder to write; it must be new or empty."""
    to: Literal["folder", "published"] = "folder"
    """folder: everything, for nvae_lowmem; published: a checkpoint.pt for the published NVAE code."""
    zip: Switch = False
    """Also write OUT.zip."""
    licence: str = ""
    """What the model card says of the weights' licence."""
    temperatures: tuple[float, ...] = (0.7, 0.8, 0.9, 1.0)
    """Temperatures to estimate BatchNorm statistics for."""
    passes: int = 0
    """Batches of prior samples per temperature; 0: enough."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, export, and return the exit code."""
    return run_command(ExportCommand, _export, argv)


def _export(command: ExportCommand) -> None:
    at_least(0, passes=command.passes)
    if command.to == "published" and (given := [name for name in _OF_A_FOLDER if _is_given(command, name)]):
        raise ConfigError(f"--{given[0]} belongs to --to folder: a published checkpoint.pt has no place for it")
    command.find()
    from nvae_lowmem.library.export import export_published, export_run, pack
    from nvae_lowmem.training.open_run import open_run

    run = open_run(command.run, command.runs_dir, command.device, command.micro_batch, data=command.data)
    print(run.describe(), flush=True)
    if command.to == "published":
        print(export_published(run, Path(command.out)))
        return
    progress = progress_bar("statistics and samples")
    out = export_run(run, Path(command.out), command.temperatures, command.licence, command.passes, progress)
    print(out)
    if command.zip:
        print(pack(out))


def _is_given(command: ExportCommand, name: str) -> bool:
    return bool(getattr(command, name) != getattr(ExportCommand, name))
