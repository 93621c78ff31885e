"""`tools/measure_memory.py`: reports of several runs, comparing later, the matrix; bad input is one message."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measured_runs import nano, on_card, on_cpu

from nvae_lowmem.commands import measure_memory as measure_command
from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.hardware.find_card import find_card
from nvae_lowmem.memory.allocator.__main__ import main as replay_recordings
from nvae_lowmem.memory.measure import assess as assessing
from nvae_lowmem.memory.measure.assess import Assessment, assess
from nvae_lowmem.memory.measure.job import Job, Outcome
from nvae_lowmem.memory.trace import training as tracing
from nvae_lowmem.memory.trace.events import Trace
from nvae_lowmem.units import GIB


def command(*arguments: str) -> int:
    path = Path(__file__).parents[2] / "tools" / "measure_memory.py"
    spec = importlib.util.spec_from_file_location("measure_memory", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code: int = module.main(arguments)
    return code


def test_several_configurations_make_one_report_and_files_that_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[Job] = []

    def pretend(job: Job, folder: Path) -> Outcome:
        jobs.append(job)
        outcome = on_card()
        assert outcome.recording is not None
        return replace(outcome, job=job, recording=replace(outcome.recording, name=job.name))

    monkeypatch.setattr("nvae_lowmem.memory.measure.job.measure", pretend)
    monkeypatch.setattr(measure_command, "card_to_measure", lambda _: find_card("gtx-970"))
    file, out, report_file = tmp_path / "nano.toml", tmp_path / "out", tmp_path / "report.json"
    profiles.save(nano(), file)
    changes = ("--cap", "1G", "--set", "plan.keep=cheap", "--micro-batch", "1")
    code = command(
        "--profile", str(file), "--profile", str(file), *changes, "--out", str(out), "--json", str(report_file)
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert [job.name for job in jobs] == ["nano", "nano-2"]
    plans = [job.profile.plan for job in jobs]
    assert {(plan.cap_bytes, plan.keep, plan.micro_batch) for plan in plans} == {(GIB, "cheap", 1)}
    assert len(printed.out.splitlines()) == 2 + 2 and "2 of 2" in printed.err
    report = json.loads((out / "measurements.json").read_text())
    assert report == json.loads(report_file.read_text()) and len(report["runs"]) == 2
    assert {"date", "device", "versions", "card", "runs"} == report.keys()
    assert replay_recordings([str(out)]) == 0
    assert "2 traces, 8 checkpoints, mismatches: 0" in capsys.readouterr().out
    assert f"measured on {report['device']['name']}, torch" in (out / "calibration.toml").read_text()


def test_what_was_measured_can_be_compared_later_without_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nvae_lowmem.memory.measure.job.measure", lambda job, folder: on_card())
    monkeypatch.setattr(measure_command, "card_to_measure", lambda _: find_card("gtx-970"))
    out = str(tmp_path / "out")
    assert command("--recipe", "tiny", "--no-compare", "--out", out) == 0
    assert "nano: measured" in capsys.readouterr().out
    monkeypatch.undo()
    assert command("--compare", out, "--json", "-") == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert row == json.loads(json.dumps(assess(on_card(), find_card("gtx-970")).to_json()))
    assert "replay" not in Assessment(outcome=on_card()).to_json()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"card": null}', '{"card": null, "runs": [{"name": "a"}]}', "{]"])
def test_a_folder_of_another_kind_is_one_message(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--compare", str(tmp_path)) == 2
    (tmp_path / "measurements.json").write_text(text)
    assert command("--compare", str(tmp_path)) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 2 and "measurements.json cannot be read as what" in err


def test_the_command_measures_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nvae_lowmem.memory.measure.job.measure", lambda job, folder: on_cpu())
    assert command("--recipe", "tiny", "--device", "cpu", "--json", "-", "--out", str(tmp_path)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["runs"][0]["stream"]["same_order"]
    assert [path.name for path in tmp_path.iterdir()] == ["measurements.json"]  # nothing to replay or calibrate with


def test_the_matrix_spans_recipes_policies_precisions_sizes_and_engines() -> None:
    found = measure_command.matrix()
    assert len(found) >= 12 and len({name for name, _ in found}) == len(found)
    plans = [profile.plan for _, profile in found]
    assert len({profile.provenance["recipe"] for _, profile in found}) >= 6
    assert {plan.keep for plan in plans} == {"all", "cheap", "input", "host"}
    assert {plan.precision for plan in plans} >= {"auto", "fp16", "fp32"}
    assert {plan.engine for plan in plans} >= {"torch", "deepspeed"}
    assert len({plan.offload_optimizer for plan in plans}) == 2
    assert len({(profile.provenance["recipe"], profile.plan.micro_batch) for _, profile in found}) >= 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_command_says_what_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--recipe", "tiny") == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert "tools/predict_memory.py" in err and "--device cpu" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--matrix"),
        (("--recipe", "tinny"), "did you mean 'tiny'"),
        (("--profile", "absent.toml"), "--profile absent.toml"),
        (("--recipe", "tiny", "--cap", "4X"), "--cap '4X' is not a size"),
        (("--recipe", "tiny", "--cap", "0"), "larger than zero"),
        (("--recipe", "tiny", "--steps", "2"), "--steps 2 must be at least 3"),
        (("--recipe", "tiny", "--timeout", "0"), "--timeout 0"),
        (("--recipe", "tiny", "--micro-batch", "0"), "--micro-batch 0"),
        (("--recipe", "tiny", "--micro-batch", "7"), "plan.micro_batch = 7"),
        (("--recipe", "tiny", "--set", "plan.kep=all"), "plan.keep"),
        (("--recipe", "tiny", "--out", __file__ + "/results"), "cannot be written"),
        (("--recipe", "tiny", "--json", "/no/such/folder/r.json"), "there is no folder"),
    ],
)
def test_bad_input_is_one_message_before_anything_runs(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvae_lowmem.memory.measure.job.measure", lambda *_: pytest.fail("measured"))
    assert command(*arguments, "--device", "cpu") == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("measure_memory.py: ")


def test_a_refused_configuration_is_bad_input_alone_and_a_failure_among_others() -> None:
    done = Assessment(outcome=on_cpu())
    refused = Assessment(outcome=replace(on_cpu(), status="refused"))
    assert [measure_command.exit_code_of(runs) for runs in ([refused], [refused, done], [done])] == [2, 1, 0]


def test_a_run_that_cannot_be_compared_is_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    comparisons = iter([ZeroDivisionError("by nothing"), None])

    def trace_training(*arguments: Any) -> Trace:
        if (error := next(comparisons)) is not None:
            raise error
        return tracing.trace_training(*arguments)

    monkeypatch.setattr(assessing, "trace_training", trace_training)
    monkeypatch.setattr("nvae_lowmem.memory.measure.job.measure", lambda job, folder: replace(on_cpu(), job=job))
    assert command("--recipe", "tiny", "--recipe", "tiny", "--device", "cpu", "--out", str(tmp_path)) == 1
    out, err = capsys.readouterr()
    assert "tiny-2" in out and "ZeroDivisionError: by nothing" in out and "Traceback" not in err
    rows = json.loads((tmp_path / "measurements.json").read_text())["runs"]
    assert [(row["name"], row["status"], row.get("agrees")) for row in rows] == [
        ("tiny", "failed", None), ("tiny-2", "ok", True),
    ]  # fmt: skip
