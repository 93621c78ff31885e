"""`nvae-lowmem COMMAND ...`: every script of `launch/` and `tools/` under one name.

In a checkout the scripts stand beside the package, in an installed wheel inside it (see `setup.py`). Either way they
are loaded from their files, so that `nvae-lowmem train ARGS` and `python launch/train.py ARGS` run one `main(argv)`.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nvae_lowmem import __version__

Main = Callable[[Sequence[str]], "int | None"]

ROOMS = ("launch", "tools")
NOT_COMMANDS = {"setup_env"}  # makes the environment that this command is installed in: too late to offer it here


def commands() -> dict[str, Path]:
    """The script behind each command: `fit-memory` is `launch/fit_memory.py`."""
    package = Path(__file__).resolve().parent
    found: dict[str, Path] = {}
    for room in ROOMS:
        # The package's own folder first: beside an installed package lies all of site-packages, and a `launch` or
        # `tools` there is somebody else's.
        home = next((path for path in (package / room, package.parent / room) if path.is_dir()), None)
        for script in sorted(home.glob("[a-z]*.py")) if home else ():
            if script.stem not in NOT_COMMANDS:
                found[script.stem.replace("_", "-")] = script
    return found


def summary(script: Path) -> str:
    """The first line of the script's docstring, read without running it."""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def load_main(script: Path) -> Main:
    """The `main(argv)` of the script in this file."""
    spec = importlib.util.spec_from_file_location(f"nvae_lowmem_script_{script.stem}", script)
    assert spec is not None and spec.loader is not None, script
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of the script look their module up here
    spec.loader.exec_module(module)
    return module.main


def usage(scripts: dict[str, Path]) -> str:
    width = max(map(len, scripts), default=0)
    lines = [f"  {name:<{width}}  {summary(script)}" for name, script in scripts.items()]
    return "\n".join(["usage: nvae-lowmem COMMAND [options]", "", *lines, "", "nvae-lowmem COMMAND --help says more."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: the script's own, or 2 for a command that there is not."""
    command, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    scripts = commands()
    if command in ("-h", "--help"):
        print(usage(scripts))
        return 0
    if command == "--version":
        print(f"nvae-lowmem {__version__}")
        return 0
    script = scripts.get(command.replace("_", "-"))
    if script is None:
        close = difflib.get_close_matches(command, scripts, n=1)
        hint = f"did you mean {close[0]}?" if close else "nvae-lowmem --help lists the commands."
        print(f"nvae-lowmem: there is no command {command!r}; {hint}", file=sys.stderr)
        return 2
    sys.argv = [f"nvae-lowmem {command}", *rest]  # so that the script's own usage line names this command
    return load_main(script)(rest) or 0
