"""Show what a model is made of, block by block, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import ModelFlags, Switch, overridden
from nvae_lowmem.config.profile_file import load
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.files import output_file, write_output
from nvae_lowmem.training.runs import find_run

PICTURE_SUFFIXES = (".svg", ".png")


@dataclass(frozen=True, kw_only=True)
class DescribeCommand(ModelFlags):
    """Show what a model is made of, block by block: sizes, parameters, receptive fields, and if asked for a picture.

    Needs no GPU and no weights. Exit status: 0; 2 when the command line or a file is wrong.

    Examples:
      nvae-lowmem describe --recipe celeba64 --picture celeba64.svg
      nvae-lowmem describe --profile gtx-970-celeba64 --set model.flows=0
      nvae-lowmem describe --run latest --all
    """

    run: str = ""
    """The model of a trained run, by path, number or name; latest: the newest one in --runs-dir."""
    runs_dir: str = "runs"
    """Where the numbered run folders are."""
    all: Switch = False
    """One row per block, also where neighbours are equal."""
    picture: str = ""
    """Draw the network, too: a file that ends in .svg or .png."""
    json: str = ""
    """Write the description as JSON, too; - prints JSON only."""

    def described(self) -> Profile:
        """The profile whose model is asked for. Raises ConfigError unless exactly one is named."""
        if self.run and not self.recipe and not self.profile:
            return overridden(load(find_run(self.run, self.runs_dir) / "config.toml"), self.set)
        if self.run or not (self.recipe or self.profile):
            raise ConfigError("which model? Give one of --recipe NAME, --profile FILE and --run latest")
        return overridden(self.base(), self.set)


def main(argv: Sequence[str] | None = None) -> int:
    """Describe the model of a recipe, a profile or a run; returns the exit code."""
    return run_command(DescribeCommand, _describe, argv)


def _describe(command: DescribeCommand) -> None:
    picture = output_file("--picture", command.picture, PICTURE_SUFFIXES)
    table = output_file("--json", command.json)
    profile = command.described()
    from nvae_lowmem.summary.summary import as_json, as_text, describe

    description = describe(profile)
    if picture is not None:
        from nvae_lowmem.summary.drawing import draw  # matplotlib, only where it is needed

        write_output("--picture", picture, draw(description, picture.suffix[1:].lower()))
    if table is not None:
        write_output("--json", table, as_json(description) + "\n")
    print(as_json(description) if command.json == "-" else as_text(description, command.all))
