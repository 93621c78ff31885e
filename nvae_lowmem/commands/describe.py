"""Shows what a model is made of, block by block, as a table and as a picture; needs no GPU and no weights.

Exit status: 0; 2 when the command line or a file is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nvae_lowmem.config.profile_file import load, override
from nvae_lowmem.config.recipes import RECIPES, recipe
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.summary.summary import as_json, as_text, describe

PICTURE_SUFFIXES = (".svg", ".png")


def main(argv: Sequence[str] | None = None) -> int:
    """Describe the model of a recipe or a profile; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        picture = _output("--picture", arguments.picture, PICTURE_SUFFIXES)
        table = _output("--json", arguments.json if arguments.json != "-" else None)
        description = describe(_profile(arguments))
        if picture is not None:
            from nvae_lowmem.summary.drawing import draw  # matplotlib, only where it is needed

            _write("--picture", picture, draw(description, picture.suffix[1:].lower()))
        if table is not None:
            _write("--json", table, as_json(description).encode() + b"\n")
    except ConfigError as error:
        print(f"describe: {error}", file=sys.stderr)
        return 2
    print(as_json(description) if arguments.json == "-" else as_text(description, arguments.all))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--recipe", metavar="NAME", help=f"one of {', '.join(RECIPES)}")
    which.add_argument("--profile", metavar="FILE", help="a profile's TOML file, or the name of a shipped profile")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="for example model.flows=0"
    )
    parser.add_argument("--all", action="store_true", help="one row per block, also where neighbours are equal")
    parser.add_argument("--picture", metavar="FILE", help="draw the network, too: a file that ends in .svg or .png")
    parser.add_argument("--json", metavar="FILE", help="write the description as JSON, too; - prints JSON only")
    return parser


def _profile(arguments: argparse.Namespace) -> Profile:
    profile = load(arguments.profile) if arguments.profile is not None else recipe(arguments.recipe)
    return override(profile, arguments.set)


def _output(flag: str, name: str | None, suffixes: Sequence[str] = ()) -> Path | None:
    """The file to write, checked before the work begins."""
    if name is None:
        return None
    path = Path(name)
    if suffixes and path.suffix.lower() not in suffixes:
        raise ConfigError(f"{flag} {name}: the name must end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {name}: there is no folder {path.parent}; make it, or name another")
    return path


def _write(flag: str, path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(
            f"{flag} {path} cannot be written: {error.strerror}; name a file in a folder that is"
        ) from None
