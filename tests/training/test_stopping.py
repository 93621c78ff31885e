"""How a training ends before its end: signals, a closed terminal or pipe, a launcher or a process that is gone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from training_runs import write_profile

from nvae_lowmem.training import checkpoint

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="sends signals"),
    pytest.mark.timeout(240),
]
REPOSITORY = Path(__file__).resolve().parents[2]
RARELY = ("--set", "training.evaluate_every=100000", "--set", "training.sample_every=100000")
LAUNCHER = """
import subprocess, sys, time
children = [subprocess.Popen(sys.argv[2:], env={**__import__("os").environ, "RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(int(sys.argv[1]))]
print(*(child.pid for child in children), flush=True)
time.sleep(600)
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that none of which outlives the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def command(folder: Path, steps: int = 100_000, *more: str) -> list[str]:
    profile = write_profile(folder, steps=f"steps = {steps}", save_every="save_every = 100000")
    script = str(REPOSITORY / "launch" / "train.py")
    run = str(folder / "run")
    return [sys.executable, script, "--profile", str(profile), "--run-dir", run, "--device", "cpu", *RARELY, *more]


def environment(processes: int = 1) -> dict[str, str]:
    several = {}
    if processes > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        several = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **several}


def start(
    arguments: Sequence[str], env: dict[str, str] | None = None, stderr: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, text=True, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True, env=env or environment()
    )


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it never happened"
        time.sleep(0.02)


def in_step(folder: Path, step: int) -> Callable[[], bool]:
    log = folder / "run" / "log.txt"
    return lambda: log.is_file() and f"step {step}/" in log.read_text()


def saved_steps(folder: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.all_checkpoints(folder / "run")]


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops_with_the_exit_code_that_shells_know(
    tmp_path: Path, started: list[subprocess.Popen[str]], number: signal.Signals, code: int
) -> None:
    started.append(child := start(command(tmp_path)))
    until(in_step(tmp_path, 2))
    child.send_signal(number)
    said, complained = child.communicate(timeout=120)
    assert child.returncode == code and complained.count("\n") == 1
    (step,) = saved_steps(tmp_path)
    assert f"stopped after step {step} by {number.name}" in said


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_does_not_stop_it(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    ignoring = [sys.executable, "-c", "import signal, os, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
                "os.execv(sys.argv[1], sys.argv[1:])"]  # fmt: skip
    started.append(child := start([*ignoring, *command(tmp_path, 12)]))
    until(in_step(tmp_path, 1))
    child.send_signal(signal.SIGHUP)
    child.communicate(timeout=120)
    assert child.returncode == 0 and saved_steps(tmp_path) == [12]


def test_a_reader_that_goes_away_does_not_stop_it(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    started.append(child := start(command(tmp_path, 4), stderr=subprocess.DEVNULL))
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.wait(120) == 0 and saved_steps(tmp_path) == [4]
    child.stdout = None


@pytest.mark.slow
def test_the_second_ctrl_c_ends_it_at_once_without_a_traceback(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    slow = ("--set", "training.total_batch=800", "--micro-batch", "8")  # a step takes long
    started.append(child := start(command(tmp_path, 1000, *slow)))
    until(in_step(tmp_path, 1))
    child.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, complained = child.communicate(timeout=120)
    assert child.returncode in (130, 143) and "Traceback" not in complained


# --- several processes ------------------------------------------------------------------------------------------------


def start_two(folder: Path, started: list[subprocess.Popen[str]], *more: str) -> list[subprocess.Popen[str]]:
    shared, asked = environment(2), command(folder, 100_000, *more)
    ranks = [start(asked, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    started.extend(ranks)
    until(in_step(folder, 2))
    return ranks


def test_two_processes_of_which_one_is_asked_stop_after_the_same_step(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    ranks = start_two(tmp_path, started)
    ranks[1].send_signal(signal.SIGTERM)
    ended = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143], ended
    (step,) = saved_steps(tmp_path)
    assert f"stopped after step {step} by SIGTERM" in ended[0][0]
    state = checkpoint.load_training(checkpoint.all_checkpoints(tmp_path / "run")[0])[1]
    assert state["rank_statistics"].shape[0] == 2 and not state["rank_statistics"][0].equal(state["rank_statistics"][1])


def test_two_processes_end_after_the_same_step_when_their_time_is_over(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    ranks = start_two(tmp_path, started, "--minutes", "0.5", "--set", "training.evaluate_every=0")
    ended = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ended
    lines = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    planned = [line["schedule/total_steps"] for line in lines if "schedule/total_steps" in line]
    assert saved_steps(tmp_path)[-1] == planned[-1] == max(line["step"] for line in lines)


def test_a_killed_process_ends_the_other_with_one_message(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    ranks = start_two(tmp_path, started)
    ranks[1].kill()
    _, complained = ranks[0].communicate(timeout=60)
    own = [line for line in complained.splitlines() if line.startswith("train.py")]
    assert ranks[0].returncode == 6 and len(own) == 1 and "lost another process of this run" in own[0]
    assert "Traceback" not in complained


def test_processes_whose_launcher_is_gone_save_and_stop(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    launcher = start([sys.executable, "-c", LAUNCHER, "2", *command(tmp_path)], env=environment(2))
    started.append(launcher)
    assert launcher.stdout is not None
    pids = [int(word) for word in launcher.stdout.readline().split()]
    until(in_step(tmp_path, 2))
    launcher.kill()
    until(lambda: not any(alive(pid) for pid in pids), 60)
    assert len(saved_steps(tmp_path)) == 1
