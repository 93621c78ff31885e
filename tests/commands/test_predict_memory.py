"""`tools/predict_memory.py`: a table, JSON, exit codes; bad input is one message."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import Profile
from profiles import NANO, profile_of

OFFLOADED = {"keep": "input", "offload_optimizer": True, "precision": "fp16"}


def run(*arguments: str) -> int:
    path = Path(__file__).parents[2] / "tools" / "predict_memory.py"
    spec = importlib.util.spec_from_file_location("predict_memory", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code: int = module.main(arguments)
    return code


@pytest.fixture
def nano(tmp_path: Path) -> str:
    path = tmp_path / "nano.toml"
    plan = replace(profile_of(**OFFLOADED).plan, micro_batch=2)
    base = Profile(name="nano", model=NANO, plan=plan)
    profiles.save(replace(base, training=replace(base.training, total_batch=4)), path)
    return str(path)


def test_the_command_prints_a_table_and_says_whether_it_fits(nano: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--profile", nano, "--card", "gtx-970", "--os", "linux") == 0
    out, err = capsys.readouterr()
    assert "fits 3.20 GiB" in out and "2 x accumulation 2, fp16" in out
    assert "tracing" in err and " s\n" in err


def test_the_command_writes_json(nano: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert run("--profile", nano, "--micro-batch", "4", "--json", str(file)) == 0
    capsys.readouterr()
    assert run("--profile", nano, "--micro-batch", "4", "--json", "-") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(file.read_text())
    assert (printed["micro_batch"], printed["accumulation"]) == (4, 1)


def test_the_command_exits_with_3_where_it_does_not_fit(nano: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--profile", nano, "--set", "plan.cap_bytes=1048576") == 3
    assert "NO: more than the cap" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "mnits"), "did you mean 'mnist'"),
        (("--recipe", "tiny", "--micro-batch", "7"), "7"),
        (("--recipe", "tiny", "--micro-batch", "-1"), "--micro-batch -1"),
        (("--recipe", "tiny", "--card", "gtx-971"), "gtx-970"),
        (("--recipe", "tiny", "--gpu-mem", "4 apples"), "--gpu-mem"),
        (("--recipe", "tiny", "--set", "plan.keeep=all"), "plan.keep"),
        (("--recipe", "tiny", "--calibration", "absent.toml"), "cannot be read"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("predict_memory.py: ")
