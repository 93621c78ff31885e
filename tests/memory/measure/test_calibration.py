"""Calibration: from measured runs to a file that predictions take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from measured_runs import nano, on_card

from nvae_lowmem.commands.predict_memory import main as predict_memory
from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.memory.measure.assess import Assessment, SizeCount, StreamComparison
from nvae_lowmem.memory.measure.calibration import calibrate, save_calibration
from nvae_lowmem.memory.measure.convolutions import Workspaces
from nvae_lowmem.memory.measure.job import Ended, Job, Outcome
from nvae_lowmem.memory.predict.predict import predict
from nvae_lowmem.memory.predict.untraced import CALIBRATED, load_calibration
from nvae_lowmem.units import MIB
from profiles import profile_of

SOURCE = "measured on GTX 970, torch 2.7.1, 2026-01-31"


def unmatched(nbytes: int, expected: int = 0, what: str = "") -> SizeCount:
    return SizeCount("forward", nbytes, recorded=1, expected=expected, what=what)


def run(name: str, *, engine: str = "torch", workspaces: Sequence[Workspaces] | None = None,
        cublas_kept_bytes: int = 256 << 10, used_before_bytes: int | None = 380 * MIB) -> Assessment:  # fmt: skip
    """A run on a card of which everything can be told."""
    measured = on_card().measured
    assert measured is not None and measured.statistics is not None
    statistics = replace(
        measured.statistics, outside_allocator_bytes=500 * MIB, used_before_context_bytes=used_before_bytes
    )
    if workspaces is None:
        workspaces = [Workspaces("c", 0, 3 * MIB, None), Workspaces("c", MIB, 0, 0)]
    profile = nano(engine=engine)
    outcome = replace(
        on_card(), job=Job(name=name, profile=profile, device="cuda"), resolved=profile,
        measured=replace(measured, statistics=statistics, workspaces=tuple(workspaces)),
    )  # fmt: skip
    sizes = (unmatched(4096), unmatched(9 * MIB, expected=1), unmatched(3 * MIB, what="workspace"))
    stream = StreamComparison(recorded=3, expected=1, same_order=False, unknown_bytes=4096, unmatched=sizes)
    return Assessment(outcome=outcome, cublas_kept_bytes=cublas_kept_bytes, stream=stream)


def failed(name: str) -> Assessment:
    profile = nano()
    job = Job(name=name, profile=profile, device="cuda")
    return Assessment(outcome=Outcome(job=job, status="failed", ended=Ended(1, "the start", ())))


def test_the_largest_of_all_runs_is_taken_with_its_source() -> None:
    larger = run("b", workspaces=[Workspaces("c", 7 * MIB, 0, 0)], cublas_kept_bytes=512 << 10)
    found = calibrate([run("a"), larger, failed("c")], SOURCE)
    assert {name: entry.nbytes for name, entry in found.items()} == {
        "cublas-workspaces": 512 << 10,
        "cudnn-workspace": 7 * MIB,
        "reductions": 4096,
        "cuda-context": 120 * MIB,
    }
    assert found["cudnn-workspace"].source.startswith(SOURCE) and found["cudnn-workspace"].source.endswith(" b")
    assert found.keys() <= set(CALIBRATED)


def test_what_no_run_can_tell_is_left_out() -> None:
    assert calibrate([], SOURCE) == {} == calibrate([failed("a")], SOURCE)
    unknown = run("a", workspaces=[], engine="deepspeed")
    assert calibrate([unknown], SOURCE).keys() == {"cublas-workspaces", "cuda-context"}


def test_without_knowledge_of_other_programs_all_beside_the_allocator_counts() -> None:
    assert calibrate([run("a", used_before_bytes=None)], SOURCE)["cuda-context"].nbytes == 500 * MIB


def test_a_calibration_file_narrows_the_margin_of_a_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "calibration.toml"
    made = calibrate([run("a")], SOURCE)
    save_calibration(path, made, "Two lines\nof a comment")
    assert path.read_text().startswith("# Two lines\n# of a comment\n")
    loaded = load_calibration(path)
    assert {n: (e.nbytes, e.source) for n, e in loaded.items()} == {n: (e.nbytes, e.source) for n, e in made.items()}
    plain, calibrated = (predict(profile_of(), 2, calibration=c) for c in (None, loaded))
    assert plain.margin_bytes >= 64 * MIB and calibrated.margin_bytes == 0
    assert calibrated.context_bytes == 120 * MIB
    profile = tmp_path / "nano.toml"
    profiles.save(profile_of(micro_batch=2), profile)
    assert predict_memory(["--profile", str(profile), "--calibration", str(path)]) == 0
    assert SOURCE in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[cudnn-workspce]\nnbytes = 1", "did you mean 'cudnn-workspace'"),
        ("[cudnn-workspace]\nnbytes = -4", "whole number from 0"),
        ("[cudnn-workspace]\nsource = 'guessed'", "whole number from 0"),
        ("[cudnn-workspace]\nnbytes = true", "whole number from 0"),
        ("reductions = 'much'", "must be a table with nbytes"),
        ("[cudnn-workspace", "not valid TOML"),
    ],
)
def test_a_bad_calibration_file_is_one_message(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "card.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_calibration(path)
    assert predict_memory(["--recipe", "tiny", "--calibration", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("predict_memory.py: calibration file")


def test_every_problem_of_a_calibration_file_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "card.toml"
    path.write_text("[context]\nnbytes = 1\n[reductions]\nnbytes = -1\n")
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*context.*reductions"):
        load_calibration(path)
