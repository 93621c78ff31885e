"""The `nvae-lowmem` command: finds the scripts, in a checkout and in an installed wheel, and runs their main(argv)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nvae_lowmem import __version__, cli

SCRIPT = '''"""{title}

More about it.
"""
import sys
def main(argv=None):
    print("ran", sys.argv[0], argv)
    return {status}
'''


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with three scripts, whose package is where `cli` believes itself to be."""
    for room in ("launch", "tools", "nvae_lowmem"):
        (tmp_path / room).mkdir()
    (tmp_path / "launch" / "train.py").write_text(SCRIPT.format(title="Train a model.", status=None))
    (tmp_path / "launch" / "fit_memory.py").write_text(SCRIPT.format(title="Find settings that fit.", status=3))
    (tmp_path / "launch" / "_shared.py").write_text("raise SystemExit('not a command')\n")
    (tmp_path / "tools" / "setup_env.py").write_text("raise SystemExit('not a command')\n")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "nvae_lowmem" / "cli.py"))
    monkeypatch.setattr(sys, "argv", ["nvae-lowmem"])
    return tmp_path


def test_help_lists_every_script_with_its_first_line(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == [["fit-memory", "Find settings that fit."], ["train", "Train a model."]]


@pytest.mark.parametrize("command", ["fit-memory", "fit_memory"])
def test_command_runs_the_script_with_its_arguments_and_status(
    checkout: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert cli.main([command, "--card", "a b"]) == 3
    assert capsys.readouterr().out == f"ran nvae-lowmem {command} ['--card', 'a b']\n"


def test_script_that_returns_nothing_succeeded(checkout: Path) -> None:
    assert cli.main(["train"]) == 0


def test_installed_package_prefers_its_own_scripts(checkout: Path) -> None:
    """Beside an installed package lies all of site-packages, where a folder `launch` is somebody else's."""
    own = checkout / "nvae_lowmem" / "launch"
    own.mkdir()
    (own / "sample.py").write_text(SCRIPT.format(title="Draw samples.", status=0))
    assert cli.commands() == {"sample": own / "sample.py"}


def test_unknown_command_names_the_nearest(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "no command 'trian'; did you mean train?" in capsys.readouterr().err


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nvae-lowmem {__version__}\n"


def test_every_script_of_this_repository_is_described() -> None:
    assert [name for name, script in cli.commands().items() if not cli.summary(script)] == []
