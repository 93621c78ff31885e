"""Run folders: `runs/00003-celeba64-4g/` with config.toml, log.txt, stats.jsonl, events, samples/, checkpoints/."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nvae_lowmem.errors import ConfigError, command_line

LOCK = ".lock"
_NUMBERED = re.compile(r"(\d{5,})-.+")
_UNSAFE = re.compile(r"[^\w.+-]+")
_LONGEST_NAME = 100


def numbered_runs(runs_dir: str | os.PathLike[str]) -> list[Path]:
    """The run folders under `runs_dir`, oldest first."""
    root = Path(runs_dir)
    found = [p for p in root.iterdir() if p.is_dir() and _NUMBERED.fullmatch(p.name)] if root.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.split("-")[0]))


def new_run(runs_dir: str | os.PathLike[str], name: str) -> Path:
    """Make and return the next numbered folder for a run called `name`, of which a safe file name is made."""
    root, name = Path(runs_dir), folder_name(name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            runs = numbered_runs(root)
            number = int(runs[-1].name.split("-")[0]) + 1 if runs else 0
            folder = root / f"{number:05d}-{name}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue  # another process took this number in between
            return folder
    except OSError as error:
        raise ConfigError(f"--runs-dir {root}: cannot make a run folder there: {error.strerror or error}") from None


def folder_name(name: str) -> str:
    """The name with every character that a file system, a shell or a web page could take amiss turned into "-"."""
    return _UNSAFE.sub("-", name)[:_LONGEST_NAME].strip("-.") or "unnamed"


def remove_unused(run_dir: Path) -> None:
    """Remove the folder of a run that ended before its first line was logged: there is nothing in it to go on from."""
    if not (run_dir / "log.txt").exists() and not (run_dir / "checkpoints").exists():
        shutil.rmtree(run_dir, ignore_errors=True)


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Inside, no other process of this machine trains in this folder (POSIX; elsewhere nothing is held).

    The system drops the lock of a process that dies, so none is ever left over; the file says who held it last.
    Raises ConfigError that names the process that is inside.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"{run_dir}: nothing can be written there: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            raise ConfigError(
                f"{run_dir} is being trained in by {who}: wait until it has ended, stop it, or name another folder"
            ) from None
        except OSError as error:  # a file system that knows no locks
            print(f"{run_dir} cannot be locked ({error.strerror}): start only one training there", file=sys.stderr)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(handle, 0)
            began = time.strftime("%Y-%m-%d %H:%M:%S")
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}, since {began}\n".encode())
        yield
    finally:
        os.close(handle)


def trained_by(run_dir: Path) -> str:
    """Who trains in this folder, as `locked` wrote it down: "process 12 on host, since ..."; "" for nobody.

    Nothing is locked: whoever looks is in nobody's way. Only processes of this machine can be told from dead ones.
    """
    with contextlib.suppress(OSError, ValueError):
        text = (run_dir / LOCK).read_text(errors="replace").strip()
        who = re.fullmatch(r"process (\d{1,9}) on (\S+), since .{1,40}", text)
        if who is not None and who[2] == socket.gethostname() and os.name == "posix":
            with contextlib.suppress(PermissionError):  # another user's
                os.kill(int(who[1]), 0)
            return text
    return ""


def find_run(run: str | os.PathLike[str], runs_dir: str | os.PathLike[str] = "runs") -> Path:
    """A run folder by path, by number, by name, or "latest". Raises ConfigError with what there is."""
    given = Path(run)
    if (given / "config.toml").is_file():
        return given
    runs = [p for p in numbered_runs(runs_dir) if (p / "config.toml").is_file()]
    text = str(run)
    if text == "latest":
        if runs:
            return runs[-1]
        raise ConfigError(
            f"--run latest: there is no run in {runs_dir!s}; train one first: {command_line('train')} --help"
        )
    for folder in reversed(runs):
        number, _, name = folder.name.partition("-")
        if text in (folder.name, name) or folder_name(text) == name or (text.isdigit() and int(text) == int(number)):
            return folder
    known = ", ".join(p.name for p in runs[-5:]) or "none"
    raise ConfigError(f"--run {text}: no run folder of that path, number or name (newest in {runs_dir!s}: {known})")
