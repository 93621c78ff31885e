"""List the settings of a profile, with types, ranges, defaults and what they do."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from nvae_lowmem.commands.command_line import WIDEST_HELP, run_command
from nvae_lowmem.commands.flags import Switch
from nvae_lowmem.config.settings import SECTIONS, Setting, settings
from nvae_lowmem.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SettingsCommand:
    """List the settings of a profile, all of them or those that have a word in their name or text.

    Each is a key of a profile's TOML file, and of --set of the commands that take a profile.

    Examples:
      nvae-lowmem settings
      nvae-lowmem settings learning_rate
      nvae-lowmem settings plan.
    """

    word: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WORD")] = ""
    """What to look for in names and texts; nothing: all settings."""
    markdown: Switch = False
    """As tables in Markdown: this is how docs/settings.md is made."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the settings; returns the exit code."""
    return run_command(SettingsCommand, _settings, argv)


def _settings(command: SettingsCommand) -> None:
    word = command.word.lower()
    found = [s for s in settings() if word in s.key.lower() or word in s.text.lower()]
    if not found:
        raise ConfigError(f"no setting has {command.word!r} in its name or text; without a word all of them are listed")
    print(as_markdown(found) if command.markdown else as_text(found))


def as_text(found: Sequence[Setting]) -> str:
    """The settings for a terminal: key and default, what is allowed, what it does."""
    width = min(WIDEST_HELP, shutil.get_terminal_size().columns)
    lines = []
    for setting in found:
        lines.append(f"{setting.key} = {setting.default}" if setting.default else setting.key)
        lines += textwrap.wrap(f"{setting.kind}", width, initial_indent="    ", subsequent_indent="    ")
        lines += textwrap.wrap(setting.text, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def as_markdown(found: Sequence[Setting]) -> str:
    """docs/settings.md: a table for each section of a profile."""
    lines = [
        "# Settings",
        "",
        "Every key of a profile, made by `python tools/settings.py --markdown > docs/settings.md` from the docstrings",
        "of the configuration. A profile's TOML file has a table for each section; `--set SECTION.KEY=VALUE` of a",
        "command sets one key; `nvae-lowmem settings WORD` looks one up.",
    ]
    for section, kind in SECTIONS.items():
        rows = list(_rows([setting for setting in found if setting.section == section]))
        if rows:
            about = (inspect.getdoc(kind) or "").replace("\n", " ")
            head = ["| key | default | what it does | allowed |", "|---|---|---|---|"]
            lines += ["", f"## [{section}]", "", about, "", *head, *rows]
    return "\n".join(lines)


def _rows(found: Sequence[Setting]) -> Iterator[str]:
    for setting in found:
        default = f"`{setting.default}`" if setting.default else "none"
        cells = (f"`{setting.name}`", default, setting.text, setting.kind)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
