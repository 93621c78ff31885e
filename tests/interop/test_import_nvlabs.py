"""The command that imports published checkpoints: what it prints, writes and returns."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_checkpoint import FIXTURES, assert_same_network

from nvae_lowmem.interop import nvlabs
from nvae_lowmem.interop.nvlabs_verify import ARRAYS, read_expected
from nvae_lowmem.training.checkpoint import load_run


@pytest.fixture(scope="module")
def command() -> Any:
    path = Path(__file__).parents[2] / "tools" / "import_nvlabs.py"
    spec = importlib.util.spec_from_file_location("import_nvlabs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name, groups", [("tiny", "3 of 16 x 16, 3 of 8 x 8"), ("tiny_rgb32_nf", "4 of 16 x 16")])
def test_the_command_reports_each_array_and_succeeds(command: Any, capsys: Any, name: str, groups: str) -> None:
    checkpoint, arrays = (str(FIXTURES / name / file) for file in ("checkpoint.pt", "expected.npz"))
    assert command.main([checkpoint, "--verify", arrays]) == 0
    printed = capsys.readouterr().out
    assert groups in printed
    assert all(array in printed for array in ARRAYS)
    assert "DIFFERS" not in printed


def test_the_command_fails_and_writes_nothing_where_an_array_differs(command: Any, capsys: Any, tmp_path: Path) -> None:
    arrays = read_expected(FIXTURES / "tiny" / "expected.npz")
    arrays["log_q"] = arrays["log_q"] * (1 + 2e-4)
    np.savez(tmp_path / "expected.npz", **arrays)
    checkpoint = str(FIXTURES / "tiny" / "checkpoint.pt")
    run = tmp_path / "run"
    assert command.main([checkpoint, "--verify", str(tmp_path / "expected.npz"), "--out", str(run)]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "DIFFERS" in line] == ["log_q"]
    assert not run.exists()


def test_the_command_writes_a_run_folder_with_the_same_network(command: Any, tmp_path: Path) -> None:
    checkpoint, run = FIXTURES / "tiny" / "checkpoint.pt", tmp_path / "run"
    assert command.main([str(checkpoint), "--out", str(run)]) == 0
    profile, model, _ = load_run(run)
    assert profile == nvlabs.load_published(checkpoint)[0]
    assert_same_network(nvlabs.load_published(checkpoint)[1], model)


def test_the_command_tells_bad_input_in_one_message(command: Any, capsys: Any, tmp_path: Path) -> None:
    checkpoint = str(FIXTURES / "tiny" / "checkpoint.pt")
    np.savez(tmp_path / "nothing.npz", y=np.ones(3))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, told in {
        (str(tmp_path / "none.pt"),): "No such file",
        (checkpoint, "--verify", str(tmp_path / "none.npz")): "cannot be read",
        (checkpoint, "--verify", checkpoint): "must hold x",
        (checkpoint, "--verify", str(tmp_path / "nothing.npz")): "must hold x",
        (checkpoint, "--verify", str(FIXTURES / "tiny_rgb32_nf" / "expected.npz")): "x has shape (3, 3, 32, 32)",
        (checkpoint, "--out", str(tmp_path / "full")): "not an empty folder",
        (checkpoint, "--out", str(tmp_path / "nothing.npz")): "not an empty folder",
        (checkpoint, "--out", str(tmp_path / "nothing.npz" / "run")): "cannot be written",
    }.items():
        assert command.main(list(arguments)) == 2
        message = capsys.readouterr().err
        assert message.startswith("import_nvlabs.py: ") and told in message
        assert "Traceback" not in message
