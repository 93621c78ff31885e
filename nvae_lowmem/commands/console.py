"""`nvae-lowmem COMMAND ...`: every command under one name; `python launch/train.py ARGS` runs the same `main(argv)`."""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from nvae_lowmem import __version__
from nvae_lowmem.errors import ExitCode

COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "look at what was trained": (
        "sample",
        "reconstruct",
        "blend",
        "traverse",
        "restore",
        "anomaly",
        "evaluate",
        "demo",
    ),
    "plan before training": ("profiles", "settings", "fit-memory", "predict-memory", "describe", "ship-profiles"),
    "share": ("export", "encode", "decode"),
    "check machine, files and predictions": ("doctor", "check", "measure-memory", "import-nvlabs"),
}
"""The commands by what they are for, in the order in which a person meets them."""


def module_of(command: str) -> str:
    """The module whose `main(argv)` a command runs."""
    return f"nvae_lowmem.commands.{command.replace('-', '_')}"


def summary(command: str) -> str:
    """The first sentence of the command's module, read without running it: torch takes seconds to import."""
    spec = find_spec(module_of(command))
    assert spec is not None and spec.origin is not None, command
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def usage() -> str:
    """What `nvae-lowmem --help` prints: the commands in groups, a line each."""
    width = max(len(name) for names in COMMANDS.values() for name in names)
    lines = ["usage: nvae-lowmem COMMAND [options]"]
    for group, names in COMMANDS.items():
        lines += ["", f"{group}:", *(f"  {name:<{width}}  {summary(name)}" for name in names)]
    return "\n".join([*lines, "", "nvae-lowmem COMMAND --help says more."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: the command's own, or 2 for an unknown command."""
    command, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return ExitCode.DONE
    if command == "--version":
        print(f"nvae-lowmem {__version__}")
        return ExitCode.DONE
    names = [name for group in COMMANDS.values() for name in group]
    name = command.replace("_", "-")
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else "nvae-lowmem --help lists the commands."
        print(f"nvae-lowmem: there is no command {command!r}; {hint}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    sys.argv = [f"nvae-lowmem {name}", *rest]  # so that the command's own usage line names it
    status: int | None = importlib.import_module(module_of(name)).main(rest)
    return status or 0
