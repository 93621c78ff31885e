"""Which engine a run gets, and how its processes fail to meet; what they exchange: test_deepspeed_engine.py."""

from __future__ import annotations

import importlib.util
import socket

import pytest
from zero_worker import CPU, finish, start

from nvae_lowmem.config.sections import MemoryPlan
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.training.engines import distributed

NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
INITIALISE = (
    "import torch; from nvae_lowmem.training.engines.distributed import initialise; initialise(torch.device('cpu'))"
)


@NEEDS_DEEPSPEED
def test_a_busy_port_is_named_with_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = start(["-c", INITIALISE], RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_PORT=port)
        (output,) = finish([process])
    assert process.returncode == 1
    assert f"ConfigError: port {port} (MASTER_PORT)" in output and "--master_port" in output


def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in distributed.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        distributed.initialise(CPU)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": "x"}, "RANK='x' in the environment must be a whole number from 0 to 0"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment must be a whole number from 1"),
        ({"RANK": "3", "WORLD_SIZE": "1"}, "RANK='3' in the environment must be a whole number from 0 to 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='999"),
    ],
)
def test_left_over_launcher_variables_are_refused_by_name(
    variables: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in distributed.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for ask in (distributed.launched_processes, distributed.launched_rank):
        with pytest.raises(ConfigError, match="unset RANK") as caught:
            ask()
        assert told in str(caught.value)


def test_an_empty_rank_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert not distributed.launched()
    assert (distributed.launched_processes(), distributed.launched_rank(), distributed.launched_card()) == (1, 0, 0)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_waits_for_nobody_says_so_and_gives_up(rank: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    short = "from nvae_lowmem.training.engines import distributed as d; d.SAY_SECONDS, d.GIVE_UP_SECONDS = 1, 4; "
    process = start(["-c", short + INITIALISE], RANK=rank, LOCAL_RANK="0", WORLD_SIZE="2", MASTER_PORT=port)
    (output,) = finish([process])
    assert process.returncode == 1
    assert f"process {rank} of 2 waits for the others at 127.0.0.1, port {port}" in output and "up to 4 s" in output
    assert "ConfigError: the 2 processes of this run did not meet" in output and "unset RANK" in output


# --- choosing an engine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "launched", "engine", "reason"),
    [
        ({}, False, "torch", "no launcher"),
        ({"offload_optimizer": True}, False, "torch", "no launcher"),
        ({}, True, "deepspeed", "launcher started"),
        ({"zero_stage": 3}, False, "deepspeed", "stage 3"),
        ({"zero_stage": 3, "offload_parameters": True}, False, "deepspeed", "stage 3"),
        ({"engine": "deepspeed"}, False, "deepspeed", "asks for it"),
        ({"engine": "torch"}, True, "torch", "asks for it"),
    ],
)
def test_the_engine_follows_plan_and_launcher(
    plan: dict[str, object], launched: bool, engine: str, reason: str
) -> None:
    found, text = distributed.choose_engine(MemoryPlan(**plan), launched, CPU)  # type: ignore[arg-type]
    assert found == engine and reason in text and "cpu" in text


def test_the_torch_engine_is_refused_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 were started"):
        distributed.choose_engine(MemoryPlan(engine="torch"), True, CPU)


def test_without_deepspeed_the_torch_engine_says_so_or_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for plan, launched in (
        (MemoryPlan(), True),
        (MemoryPlan(engine="deepspeed"), False),
        (MemoryPlan(zero_stage=3), False),
    ):
        engine, reason = distributed.choose_engine(plan, launched, CPU)
        assert engine == "torch" and "DeepSpeed is not installed" in reason and "pip install" in reason
    with pytest.raises(ConfigError, match=r"offload_parameters.*pip install"):
        distributed.choose_engine(MemoryPlan(zero_stage=3, offload_parameters=True), False, CPU)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes.*pip install"):
        distributed.choose_engine(MemoryPlan(), True, CPU)


@NEEDS_DEEPSPEED
def test_one_process_starts_without_a_launcher_and_ends_quietly() -> None:
    process = start(["-c", INITIALISE + "; from nvae_lowmem.training.engines.distributed import shutdown; shutdown()"])
    (output,) = finish([process])
    assert process.returncode == 0 and output == ""
