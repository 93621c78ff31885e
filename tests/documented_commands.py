"""The commands that README, docs and help texts tell people to type, as they stand there."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from nvae_lowmem.commands import console

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "tests/phantom/README.md",
    *sorted(f"docs/{page.name}" for page in (REPOSITORY / "docs").glob("*.md")),
)
COMMANDS = tuple(name for names in console.COMMANDS.values() for name in names)

_LAUNCHER = r"(?:(?:python|deepspeed(?: --num_gpus \d+)?) )?"
_OURS = re.compile(rf"{_LAUNCHER}(?:(?:launch|tools|benchmarks)/\w+\.py|nvae-lowmem [a-z])|make [a-z]")
_FENCED = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Documented(NamedTuple):
    """A line to type: `page` says it, `program` is nvae-lowmem, make or the script's path, `arguments` its own."""

    page: str
    line: str
    program: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command of nvae-lowmem that it runs, such as fit-memory; empty: none of them."""
        if self.program == "nvae-lowmem":
            return self.arguments[0]
        folder, _, script = self.program.partition("/")
        return script.removesuffix(".py").replace("_", "-") if folder in ("launch", "tools") else ""

    @property
    def flags(self) -> tuple[str, ...]:
        """The arguments of that command."""
        return self.arguments[1:] if self.program == "nvae-lowmem" else self.arguments


def documented(page: str, text: str) -> list[Documented]:
    """Every command of ours in a page: in blocks of code, a line each, and between backticks."""
    lines: list[str] = []
    for block in _FENCED.findall(text):
        lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`]+)`", _FENCED.sub("", text))
    return [_parsed(page, line) for line in (" ".join(line.split()) for line in lines) if _OURS.match(line)]


def _parsed(page: str, line: str) -> Documented:
    words = shlex.split(re.sub(r"^python |^deepspeed (--num_gpus \d+ )?| > \S+", "", line), comments=True)
    return Documented(page, line, words[0], tuple(words[1:]))


def of_pages() -> list[Documented]:
    """The commands of README, docs and CHANGELOG."""
    return [one for page in PAGES for one in documented(page, (REPOSITORY / page).read_text(encoding="utf-8"))]


def of_help_texts() -> list[Documented]:
    """The examples that every command's --help shows, read from the docstrings of its flags."""
    found = []
    for command in COMMANDS:
        source = REPOSITORY / "nvae_lowmem" / "commands" / f"{command.replace('-', '_')}.py"
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and "Examples:" in (ast.get_docstring(node) or ""):
                examples = (ast.get_docstring(node) or "").partition("Examples:")[2]
                lines = [" ".join(line.split()) for line in examples.splitlines()]
                found += [_parsed(f"{command} --help", line) for line in lines if _OURS.match(line)]
    return found
