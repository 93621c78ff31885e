"""The `nvae-lowmem` command: lists the commands in groups and runs their main(argv)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from nvae_lowmem import __version__
from nvae_lowmem.commands import console

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, list[str]]]:
    """What was run instead of the real commands: (module, sys.argv[0], arguments)."""
    calls: list[tuple[str, str, list[str]]] = []

    def imported(name: str) -> SimpleNamespace:
        def main(argv: list[str]) -> int | None:
            calls.append((name, sys.argv[0], argv))
            return 3 if "--fail" in argv else None

        return SimpleNamespace(main=main)

    monkeypatch.setattr(console.importlib, "import_module", imported)
    monkeypatch.setattr(sys, "argv", ["nvae-lowmem"])
    return calls


def test_help_lists_every_command_in_its_group_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main([]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.endswith(":")] == [f"{group}:" for group in console.COMMANDS]
    listed = dict(line.split(maxsplit=1) for line in printed if line.startswith("  "))
    assert listed.keys() == {name for names in console.COMMANDS.values() for name in names}
    assert all(len(sentence) > 20 for sentence in listed.values())


@pytest.mark.parametrize("command", ["fit-memory", "fit_memory"])
def test_command_runs_its_module_with_its_arguments_and_status(
    ran: list[tuple[str, str, list[str]]], command: str
) -> None:
    assert console.main([command, "--fail", "a b"]) == 3
    assert ran == [("nvae_lowmem.commands.fit_memory", "nvae-lowmem fit-memory", ["--fail", "a b"])]


def test_command_that_returns_nothing_succeeded(ran: list[tuple[str, str, list[str]]]) -> None:
    assert console.main(["train"]) == 0


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["trian"]) == 2
    assert "no command 'trian'; did you mean train?" in capsys.readouterr().err


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nvae-lowmem {__version__}\n"


def test_every_script_is_a_command_and_every_command_a_script() -> None:
    scripts = {path.stem.replace("_", "-") for room in ("launch", "tools") for path in (ROOT / room).glob("*.py")}
    assert scripts - {"setup-env"} == {name for names in console.COMMANDS.values() for name in names}


def test_every_command_is_a_module_with_a_main() -> None:
    for names in console.COMMANDS.values():
        for name in names:
            module: ModuleType = __import__(console.module_of(name), fromlist=["main"])
            assert callable(module.main)
