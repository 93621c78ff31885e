"""Kills trainings, at random and at the worst moments, and holds what becomes of them against undisturbed runs.

    python tests/faults/campaign.py --kills 200          make test-faults

Every run is trained to its end by one process (or two) after another, each ended by SIGKILL: after a random time, or
right before its n-th file operation (a rename, a sync, a removal: within a save, between the renames, while pruning).
A run is lost when it can no longer be trained to its end, or its final state is not bit-equal to the undisturbed one.
Processes are forked from one that has imported everything, which takes seconds that nobody wants to wait 200 times.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]  # run as a script

from training_runs import write_profile  # noqa: E402

from nvae_lowmem.commands.train import main as train  # noqa: E402
from nvae_lowmem.training import checkpoint  # noqa: E402

STEPS = 6
LONGEST_SECONDS = 120.0
"""A process that takes longer hangs."""
FILE_OPERATIONS = ("os.replace", "os.fsync", "os.unlink", "os.mkdir", "shutil.rmtree")
OPERATIONS_OF_A_RUN = 140
"""About how many there are: a kill is placed at one of them at random."""


@dataclass(frozen=True)
class Kind:
    """One kind of training."""

    name: str
    arguments: tuple[str, ...]
    processes: int = 1

    @property
    def deepspeed(self) -> bool:
        return self.processes > 1 or "deepspeed" in self.arguments


def _zero(stage: int, *more: str) -> tuple[str, ...]:
    return ("--engine", "deepspeed", "--set", f"plan.zero_stage={stage}", *more)


KINDS = (
    Kind("torch fp32", ("--engine", "torch")),
    Kind("torch fp16", ("--engine", "torch", "--precision", "fp16")),
    Kind("torch fp32, host", ("--engine", "torch", "--set", "plan.offload_optimizer=true")),
    Kind("ZeRO 1 fp32", _zero(1)),
    Kind("ZeRO 2 fp32, host", _zero(2, "--set", "plan.offload_optimizer=true")),
    Kind("ZeRO 3 fp32", _zero(3)),
    Kind("ZeRO 2 fp16", _zero(2, "--precision", "fp16")),
    Kind("ZeRO 2 fp32, two processes", _zero(2), processes=2),
    Kind("ZeRO 3 fp32, two processes", _zero(3), processes=2),
)


@dataclass
class Outcome:
    """What became of the runs of one kind."""

    kind: Kind
    kills: int = 0
    runs: int = 0
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0


# --- processes --------------------------------------------------------------------------------------------------------


def start(kind: Kind, profile: Path, folder: Path, kill_before: int = 0) -> list[int]:
    """Fork the training's processes; their ids. kill_before: the number of the file operation that rank 0 dies at."""
    port = _free_port()
    return [_fork(kind, profile, folder, rank, port, kill_before if rank == 0 else 0) for rank in range(kind.processes)]


def _fork(kind: Kind, profile: Path, folder: Path, rank: int, port: int, kill_before: int) -> int:
    sys.stdout.flush()
    if (child := os.fork()) > 0:
        return child
    code = 70
    try:  # the child never returns from here
        with (folder.parent / f"{folder.name}.out").open("a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        if kind.processes > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(kind.processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        if kill_before:
            _die_before(kill_before)
        code = train(["--profile", str(profile), "--device", "cpu", "--run-dir", str(folder), *kind.arguments])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _die_before(number: int) -> None:
    """Let this process die right before its file operation of that number."""
    done = 0

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def operation(*args: object, **kwargs: object) -> object:
            nonlocal done
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return operation

    for name in FILE_OPERATIONS:
        module, function = (sys.modules[name.partition(".")[0]], name.partition(".")[2])
        setattr(module, function, counted(getattr(module, function)))


def wait(children: Sequence[int], seconds: float = LONGEST_SECONDS) -> list[int]:
    """Their exit codes, as a shell has them; none outlives this. Raises TimeoutError after killing those that hang."""
    codes: dict[int, int] = {}
    give_up = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if len(codes) < len(children) and time.monotonic() > give_up:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
            raise TimeoutError(f"hung for {seconds:.0f} s: {[c for c in children if c not in codes]}")
        time.sleep(0.005)
    return [codes[child] for child in children]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# --- one run ----------------------------------------------------------------------------------------------------------


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint."""
    newest = checkpoint.all_checkpoints(folder)[-1]
    step, training, weights = checkpoint.load_training(newest)
    if step != STEPS:
        raise AssertionError(f"{folder} ended at step {step}")
    return training | {f"model.{name}": t for name, t in weights.items()}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """The tensors in which two states are not bit-equal."""
    names = sorted(first.keys() | second.keys())
    return [n for n in names if n not in first or n not in second or not torch.equal(first[n], second[n])]


def undisturbed(kind: Kind, profile: Path, folder: Path) -> tuple[dict[str, torch.Tensor], float]:
    """(final state of a run that nobody kills, seconds it took)."""
    began = time.monotonic()
    codes = wait(start(kind, profile, folder))
    if any(codes):
        raise AssertionError(f"{kind.name}: an undisturbed run ended with {codes}:\n{said(folder)}")
    return final_state(folder), time.monotonic() - began


def said(folder: Path) -> str:
    """The end of what the processes of a run printed."""
    return (folder.parent / f"{folder.name}.out").read_text()[-3000:]


def killed_until_done(
    kind: Kind, profile: Path, folder: Path, seconds: float, most_kills: int, noise: random.Random
) -> tuple[int, str]:
    """(kills, what went wrong or ""): train a run to its end, killing up to `most_kills` of its processes' lives."""
    kills = 0
    while True:
        at_operation = noise.random() < 0.6
        alive = most_kills > kills
        children = start(kind, profile, folder, noise.randint(1, OPERATIONS_OF_A_RUN) if alive and at_operation else 0)
        if alive and not at_operation:
            time.sleep(noise.uniform(0.2, 1.0) * seconds)
            victims = children if noise.random() < 0.5 else [noise.choice(children)]
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
        try:
            codes = wait(children)
        except TimeoutError as error:
            return kills, str(error)
        if -signal.SIGKILL in codes:
            kills += 1
        elif any(codes):
            return kills, f"ended with {codes}: {said(folder)}"
        else:
            return kills, ""


def campaign(kinds: Sequence[Kind], kills: int, seconds: float, seed: int, work: Path) -> Iterator[Outcome]:
    """Kill runs of every kind until there are `kills` altogether, or the time is over."""
    noise, give_up = random.Random(seed), time.monotonic() + seconds
    profile = write_profile(
        work, steps=f"steps = {STEPS}", keep_last="keep_last = 1", ema_decay="ema_decay = 0.5",
        evaluate_every="evaluate_every = 3", sample_every="sample_every = 1000",
    )  # fmt: skip
    for number, kind in enumerate(kinds):
        began, outcome = time.monotonic(), Outcome(kind)
        kind_gives_up = began + (give_up - began) / (len(kinds) - number)
        share = kills // len(kinds) + (number < kills % len(kinds))
        expected, duration = undisturbed(kind, profile, work / f"{number}-undisturbed")
        while outcome.kills < share and time.monotonic() < kind_gives_up:
            folder = work / f"{number}-{outcome.runs}"
            found, wrong = killed_until_done(kind, profile, folder, duration, min(6, share - outcome.kills), noise)
            if not wrong:
                different = differing(expected, final_state(folder))
                wrong = f"{len(different)} tensors differ, first {different[0]}" if different else ""
            outcome.kills += found
            outcome.runs += 1
            if wrong:
                outcome.lost.append(f"{folder}: {wrong}")
            else:
                shutil.rmtree(folder)
        outcome.seconds = time.monotonic() - began
        yield outcome


def prepare(kinds: Sequence[Kind]) -> None:
    """Import what the children need, once."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    importlib.import_module("nvae_lowmem.commands.training_run")
    importlib.import_module("torch.utils.tensorboard")

    if any(kind.deepspeed for kind in kinds):
        from nvae_lowmem.training.engines import distributed

        with contextlib.redirect_stdout(sys.stderr):
            distributed._import_deepspeed(torch.device("cpu"))


def main() -> int:
    """Run the campaign and print a line per kind; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="altogether, over all kinds of training")
    parser.add_argument("--seconds", type=float, default=900.0, help="stop after so many seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    arguments = parser.parse_args()
    kinds = [kind for kind in KINDS if arguments.only in kind.name]
    prepare(kinds)
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"{'training':<28} {'kills':>5} {'runs':>5} {'lost':>5} {'seconds':>8}")
    total = lost = 0
    for outcome in campaign(kinds, arguments.kills, arguments.seconds, arguments.seed, work):
        total, lost = total + outcome.kills, lost + len(outcome.lost)
        figures = f"{outcome.kills:>5} {outcome.runs:>5} {len(outcome.lost):>5} {outcome.seconds:>8.0f}"
        print(f"{outcome.kind.name:<28} {figures}", *outcome.lost, sep="\n  ", flush=True)
    print(f"{total} kills, {lost} lost")
    if not lost:
        shutil.rmtree(work)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
