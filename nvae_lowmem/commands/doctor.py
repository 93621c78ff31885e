"""Says what will work on this machine, what will not, and what to do about it.

Exit status: 0; 1 when a check fails; 2 when the command line is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.doctor import as_json, as_text, run_checks, worst
from nvae_lowmem.hardware.find_card import find_card


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and print the report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", metavar="NAME", help="check this torch against a card that is not here: gtx-970, ...")
    parser.add_argument(
        "--runs", metavar="DIR", default="runs", help="folder that runs will be written to (%(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON, too; - prints JSON and nothing else")
    arguments = parser.parse_args(argv)
    try:
        checks = run_checks(arguments.runs, find_card(arguments.card) if arguments.card else None)
        if arguments.json and arguments.json != "-":
            _write(Path(arguments.json), as_json(checks))
    except ConfigError as error:
        print(f"doctor: {error}", file=sys.stderr)
        return 2
    print(as_json(checks) if arguments.json == "-" else as_text(checks))
    return 1 if worst(checks) == "FAIL" else 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--json {path} cannot be written: {error.strerror}; name a file in a folder that is"
        ) from None
