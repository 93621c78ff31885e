"""What README, docs and help texts tell people to type is understood: no command, flag, setting, profile, recipe or
card in them is unknown. test_documented_commands_run.py, which is slow, runs those lines."""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import pytest
import tyro
from documented_commands import COMMANDS, PAGES, REPOSITORY, Documented, documented, of_help_texts, of_pages

from nvae_lowmem.commands import console
from nvae_lowmem.commands.flags import ModelFlags, overridden
from nvae_lowmem.commands.train import TrainCommand
from nvae_lowmem.hardware.budget import chosen_card, this_os

ALL = [*of_pages(), *of_help_texts()]
OTHERS_FLAGS = {"--index-url", "--no-build-isolation", "--logdir", "--num_gpus", "--help", "--version"}
"""Of pip, TensorBoard, deepspeed, and those that everything has."""
ONCE = {one.line: one for one in ALL}.values()


def ids(one: Documented) -> str:
    return f"{one.page}: {one.line}"


@pytest.fixture
def parsed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command returns what it made of its arguments, and does nothing."""
    monkeypatch.chdir(REPOSITORY)
    for command in COMMANDS:
        module = importlib.import_module(console.module_of(command))
        monkeypatch.setattr(module, "run_command", lambda flags, work, argv: tyro.cli(flags, args=argv))


def parsed(one: Documented) -> Any:
    try:
        return importlib.import_module(console.module_of(one.command)).main(list(one.flags))
    except SystemExit as ended:
        pytest.fail(f"{one.page} says {one.line!r}, which ends with exit code {ended.code}")


def test_commands_are_found_in_blocks_and_in_tables() -> None:
    text = "`python launch/sample.py --run latest`, `launch/` and\n"
    text += "```\nnvae-lowmem train --set \\\n  a=1   # why\nls\n```\n"
    found = [(one.command, one.flags) for one in documented("page", text)]
    assert found == [("train", ("--set", "a=1")), ("sample", ("--run", "latest"))]
    assert {"README.md", "docs/quality.md", "docs/library.md", "train --help"} <= {one.page for one in ALL}


@pytest.mark.parametrize("one", ONCE, ids=ids)
def test_the_named_script_exists(one: Documented) -> None:
    if one.program == "nvae-lowmem":
        assert one.command in COMMANDS
    elif one.program == "make":
        assert f"\n{one.arguments[0]}:" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    else:
        assert (REPOSITORY / one.program).is_file()


@pytest.mark.usefixtures("parsed_only")
@pytest.mark.parametrize("one", [one for one in ONCE if one.command in COMMANDS and one.flags], ids=ids)
def test_the_command_knows_every_flag_and_value(one: Documented) -> None:
    command = parsed(one)
    if isinstance(command, TrainCommand) and _given(command.profile) and not command.init_from:
        command.asked()
    elif isinstance(command, ModelFlags) and (command.recipe or _given(command.profile)):
        overridden(command.base(), command.set)
    card, gpu_mem = getattr(command, "card", ""), getattr(command, "gpu_mem", "")
    if (card or gpu_mem) and card != "auto":
        assert chosen_card(card or None, gpu_mem or None, this_os()) is not None


def _given(profile: str) -> bool:
    """Whether a profile is more than a placeholder: a shipped one, and no file that the reader is to make."""
    return profile.startswith("profiles/") or bool(re.fullmatch(r"[a-z0-9-]+", profile))


class Parsed(Exception):
    """A benchmark understood its arguments."""


@pytest.mark.parametrize("one", [one for one in ONCE if one.program.startswith("benchmarks/")], ids=ids)
def test_the_benchmark_knows_every_flag(one: Documented, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, args: Sequence[str] | None = None) -> NoReturn:
        parse(self, args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")  # as Python does for a script
    monkeypatch.setattr(sys, "argv", [one.program, *(one.arguments or ("--help",))])
    with pytest.raises((Parsed, SystemExit)) as ended:
        runpy.run_path(str(REPOSITORY / one.program), run_name="__main__")
    assert ended.type is Parsed or ended.value.code == 0, one


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_prose_is_a_flag_of_something(page: str) -> None:
    scripts = ("nvae_lowmem/commands/*.py", "benchmarks/*.py", "tests/phantom/*", "tests/faults/*.py", "tools/*.py")
    scripts_of_ours = (path for pattern in scripts for path in REPOSITORY.glob(pattern) if path.suffix in (".py", ""))
    known = set(OTHERS_FLAGS)
    for text in (path.read_text(encoding="utf-8") for path in scripts_of_ours if path.is_file()):
        known |= set(re.findall(r"(?<=[\"| ])(--[a-z][a-z0-9-]*)(?=[\"|)])", text))  # argparse, and cases of a shell
        known |= {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): ", text, re.MULTILINE)}
        known |= {f"--{name}" for name in re.findall(r"tyro\.conf\.arg\(name=\"([\w-]+)\"", text)}
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", (REPOSITORY / page).read_text(encoding="utf-8")))
    assert sorted(said - known) == []
