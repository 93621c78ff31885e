"""How every command begins and ends: at once, with its examples, with one message and the exit code that is said."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import tyro

from nvae_lowmem import errors
from nvae_lowmem.commands import console
from nvae_lowmem.commands.command_line import exit_code
from nvae_lowmem.commands.describe import DescribeCommand
from nvae_lowmem.commands.fit_memory import FitCommand
from nvae_lowmem.commands.measure_memory import MeasureCommand
from nvae_lowmem.commands.train import TrainCommand
from nvae_lowmem.errors import ConfigError, Diverged, ExitCode, NothingFits, OutOfMemory, command_line

REPOSITORY = Path(__file__).resolve().parent.parent.parent
COMMANDS = [name for names in console.COMMANDS.values() for name in names]

# Runs every command line of a JSON list, one after the other; prints what each said and what is imported after it.
PROGRAM = """
import contextlib, io, json, os, sys
from nvae_lowmem.commands.console import main
for line in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(line)
        except SystemExit as ended:
            code = ended.code
    heavy = [name for name in ("torch", "numpy", "PIL", "matplotlib", "deepspeed") if name in sys.modules]
    print(json.dumps([code, out.getvalue(), err.getvalue(), heavy, os.environ.get("GOMP_SPINCOUNT")]))
"""


class Ended(NamedTuple):
    code: int
    said: str
    complained: str
    heavy: list[str]
    """Of the libraries that take long to import, those that have been."""
    spin_count: str | None


def run(lines: Sequence[Sequence[str]], folder: Path) -> list[Ended]:
    """What `nvae-lowmem` makes of each line, in one fresh process in that folder."""
    kept = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(lines)],
        cwd=folder, env=kept | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Ended(*json.loads(line)) for line in done.stdout.splitlines()]


def test_help_teaches_with_examples_and_waits_for_no_heavy_library(tmp_path: Path) -> None:
    for command, ended in zip(COMMANDS, run([[command, "--help"] for command in COMMANDS], tmp_path), strict=True):
        assert ended.code == 0 and ended.said.startswith(f"usage: nvae-lowmem {command} ")
        assert "Examples:" in ended.said and f"  {command_line(command)}" in ended.said
        assert ended.heavy == [] and ended.complained == "" and ended.spin_count == "100000", command


FAST_MISTAKES = {
    "train": ["--profile nosuch", "--profile bad.toml", "--profile demo-mnist --set model.latent=3",
              "--profile demo-mnist --auto-fit --gpu-mem 4X", "--profile demo-mnist --steps -1", "--nosuch"],
    "sample": ["--run nosuch", "--count 0", "--micro-batch -1", "--nosuch"],
    "reconstruct": ["--run nosuch", "--temperature nan"],
    "blend": ["--run nosuch", "a.png", "--split scale:1"],
    "traverse": ["--run nosuch"],
    "evaluate": ["--run nosuch", "--iw-samples 0", "--fid-weights x.pt --samples 0"],
    "demo": ["--run nosuch", "--port x"],
    "fit-memory": ["--recipe nosuch --gpu-mem 4G", "--profile bad.toml --gpu-mem 4G", "--recipe tiny --gpu-mem 4X",
                   "--recipe tiny", "--gpu-mem 4G", "--recipe tiny --gpu-mem 4G --picture a.gif",
                   "--recipe tiny --card gtx-971", "--recipe tiny --gpu-mem 4G --host-mem much"],
    "predict-memory": ["--recipe nosuch", "--profile bad.toml", "--recipe tiny --gpu-mem 4X",
                       "--recipe tiny --micro-batch 0"],
    "describe": ["--recipe nosuch", "--profile bad.toml", "--run nosuch", "--recipe tiny --picture a.gif", ""],
    "profiles": ["nosuch"],
    "export": ["out --run nosuch", "out --passes -1"],
    "encode": ["images out --run nosuch", "images out --images-per-file 0"],
    "decode": ["latents out --run nosuch"],
    "settings": ["nosuch"],
    "ship-profiles": ["--jobs 0", "--check --table"],
    "doctor": ["--card gtx-971", "--json no/such/folder/x.json"],
    "check": ["nosuch"],
    "measure-memory": ["", "--recipe nosuch", "--profile bad.toml", "--recipe tiny --cap 4X",
                       "--recipe tiny --timeout 0"],
    "import-nvlabs": ["", "x.pt --out full"],
}  # fmt: skip


def test_a_mistake_that_needs_no_torch_is_answered_without_it(tmp_path: Path) -> None:
    assert FAST_MISTAKES.keys() <= set(COMMANDS)
    (tmp_path / "bad.toml").write_text("[training]\ntotal_bach = 3\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    lines = [[command, *mistake.split()] for command, mistakes in FAST_MISTAKES.items() for mistake in mistakes]
    lines += [[command, "--nosuch"] for command in COMMANDS]
    for line, ended in zip(lines, run(lines, tmp_path), strict=True):
        assert ended.code == ExitCode.BAD_INPUT and ended.complained and "torch" not in ended.heavy, (line, ended)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.toml", "full"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("--count 0: no"), 2, "p.py: --count 0: no"),
        (OSError("disk full"), 2, "p.py: disk full"),
        (NothingFits("nothing fits"), 3, "p.py: nothing fits"),
        (Diverged("step 3"), 4, "p.py: step 3"),
        (OutOfMemory("out of memory in block x"), 5, "p.py: out of memory in block x"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory.\nmore"), 5, "Halve --micro-batch"),
        (KeyboardInterrupt(), 130, "p.py: stopped at once by Ctrl-C"),
    ],
)
def test_what_goes_wrong_ends_a_command_with_its_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise error

    assert exit_code("p.py", work) == code
    captured = capsys.readouterr()
    assert said in captured.err and "more" not in captured.err and not captured.out


def test_names_in_messages_reach_no_terminal_with_what_it_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise ConfigError("folder \x1b]0;x\x07\udcff holds nothing:\n  - name it")

    assert exit_code("p.py", work) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err == "p.py: folder \\x1b]0;x\\x07\\xff holds nothing:\n  - name it\n"


def test_names_that_are_no_utf_8_are_printed_escaped(tmp_path: Path) -> None:
    """In a process of its own: the output of a test takes any text."""
    program = """
from dataclasses import dataclass
from nvae_lowmem.commands.command_line import run_command
@dataclass
class Flags:
    pass
run_command(Flags, lambda _: print("run\\udcff"), [])
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, timeout=99
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"run\\udcff\n", b"")


def test_mistakes_in_the_code_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code("p.py", lambda: print(1 // 0))
    assert exit_code("p.py", lambda: None) == ExitCode.DONE
    assert exit_code("p.py", lambda: ExitCode.CHECK_FAILED) == 1


def test_values_are_set_together_and_one_by_one() -> None:
    sets = ["--set", "model.flows=1", "model.latents=3", "--set", "plan.keep=host"]
    commands = [
        tyro.cli(TrainCommand, args=["--profile", "demo-mnist", *sets]).asked(),
        tyro.cli(DescribeCommand, args=["--recipe", "tiny", *sets]).described(),
        tyro.cli(FitCommand, args=["--recipe", "tiny", *sets]).unplanned(),
        tyro.cli(MeasureCommand, args=["--recipe", "tiny", *sets]).wanted()[0][1],
    ]
    for profile in commands:
        assert (profile.model.flows, profile.model.latents, profile.plan.keep) == (1, 3, "host")


MAY_NAME_SCRIPTS = {
    "commands/fit_memory.py": "the provenance of a plan",
    "commands/auto_fit.py": "the provenance of a plan",
    "memory/catalogue/catalogue.py": "the provenance of a shipped plan",
    "memory/catalogue/table.py": "the mark in the documents",
    "commands/settings.py": "the first lines of docs/settings.md",
    "commands/measure_memory.py": "the header of a calibration file",
}


def test_messages_name_scripts_only_where_there_are_scripts() -> None:
    """`python launch/sample.py` is nothing where the package is installed alone: messages take it of command_line."""
    named = set()
    for path in (REPOSITORY / "nvae_lowmem").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        plain = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in plain]
        if any(isinstance(text, str) and re.search(r"(launch|tools)/\w+\.py", text) for text in texts):
            named.add(path.relative_to(REPOSITORY / "nvae_lowmem").as_posix())
    assert named == MAY_NAME_SCRIPTS.keys()


def test_a_command_is_named_as_it_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert command_line("sample") == "python launch/sample.py"
    assert command_line("fit-memory") == "python tools/fit_memory.py"
    monkeypatch.setattr(errors, "_CHECKOUT", tmp_path)
    assert command_line("sample") == "nvae-lowmem sample"
