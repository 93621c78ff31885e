"""Say what will work on this machine, what will not, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.errors import ExitCode
from nvae_lowmem.files import output_file, write_output
from nvae_lowmem.hardware.find_card import find_card


@dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """Say what will work on this machine, what will not, and what to do about it.

    Exit status: 0; 1 when a check fails; 2 when the command line is wrong.

    Examples:
      nvae-lowmem doctor
      nvae-lowmem doctor --card gtx-970
    """

    card: str = ""
    """Check this torch against a card that is not here: gtx-970, ..."""
    runs: str = "runs"
    """Folder that runs will be written to."""
    json: str = ""
    """Write the report as JSON, too; - prints JSON and nothing else."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and print the report; returns the exit code."""
    return run_command(DoctorCommand, _doctor, argv)


def _doctor(command: DoctorCommand) -> ExitCode:
    card = find_card(command.card) if command.card else None
    file = output_file("--json", command.json)
    from nvae_lowmem.hardware.doctor import as_json, as_text, run_checks, worst

    checks = run_checks(command.runs, card)
    if file is not None:
        write_output("--json", file, as_json(checks) + "\n")
    print(as_json(checks) if command.json == "-" else as_text(checks))
    return ExitCode.CHECK_FAILED if worst(checks) == "FAIL" else ExitCode.DONE
