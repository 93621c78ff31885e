"""Makes the virtual environment: chooses the torch that runs on this machine, installs it and the package, once.

Needs nothing but Python's standard library. A second call with nothing changed returns at once. NVAE_TORCH overrides
the choice of torch: a requirement ("torch==2.7.1"), a wheel index URL, or both ("torch==2.7.1 --index-url URL").
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
MAKE_VENV = ("-m", "venv", "--clear")
STAMP = "nvae-lowmem.json"  # in the environment: what was installed into it
LOG = "nvae-lowmem-install.log"
CONSTRAINTS = "nvae-lowmem-constraints.txt"

# The newest torch on PyPI that has what a machine needs; each PyPI build is made for one CUDA version.
CURRENT = "torch==2.13.0"  # CUDA 13.0: kernels from compute capability 7.5, driver from 580
LAST_CUDA_12 = "torch==2.10.0"  # CUDA 12.8: kernels from 7.0, driver from 525
LAST_FOR_OLD_CARDS = "torch==2.7.1"  # CUDA 12.6: kernels from 5.0, driver from 525
NEWEST_PYTHON = {LAST_FOR_OLD_CARDS: (3, 13)}
OLDEST_PYTHON = (3, 10)
CUDA_13_DRIVER = 580
CUDA_12_DRIVER = 525
SAY_TORCH = "import torch; print('torch', torch.__version__, 'CUDA' if torch.cuda.is_available() else 'CPU')"
ASKED_FOR = "asked for by NVAE_TORCH"

# Cards below compute capability 7.5, for drivers too old to say it: Maxwell, Pascal, Volta.
OLD_CARD = re.compile(
    r"\bGTX\s*(TITAN|7[45]\d|8\d\d|9\d\d|10\d\d)|\bGT\s*10\d\d|\b[89]\d0(M|MX|A)\b|\bMX\s*[123]\d0\b"
    r"|\bQuadro (K620|K1200|K2200|G[PV]100)|\b(Quadro|Tesla|GRID)\s+[MPV]\w*\d|\bTITAN (X|Xp|V)\b|\bP10[2-6]-\d",
    re.IGNORECASE,
)


# A line that names a card, and not a message such as "NVIDIA-SMI has failed".
CARD = re.compile(r"^(?!.*NVIDIA-SMI).*(NVIDIA|GeForce|Quadro|Tesla|GRID|TITAN|RTX|GTX)")


class SetupError(Exception):
    """Something the user can put right; the message says what."""


# ---- which torch -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What nvidia-smi says. `capabilities` of all cards, (major, minor); `driver` is None where it cannot be read."""

    capabilities: tuple[tuple[int, int], ...] = ()
    driver: int | None = None
    note: str = "no NVIDIA GPU found"


@dataclass(frozen=True)
class Torch:
    """What to ask pip for, and why."""

    requirement: str
    reason: str
    pip_options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.requirement, *self.pip_options))


def ask_nvidia_smi(field: str) -> list[str]:
    """One line per card; none where there is no nvidia-smi, or it fails, or it does not know the field."""
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if program is None:
        return []
    command = [program, f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def look_at_machine() -> Machine:
    """Read the cards by compute capability, or by name where the driver is too old to know its capability."""
    if shutil.which("nvidia-smi") is None and shutil.which("nvidia-smi", path="/usr/lib/wsl/lib") is None:
        return Machine()
    readable = [re.fullmatch(r"(\d{1,2})\.(\d)", line) for line in ask_nvidia_smi("compute_cap")]
    capabilities = [(int(match[1]), int(match[2])) for match in readable if match]
    if capabilities:
        note = "compute capability " + ", ".join(f"{major}.{minor}" for major, minor in capabilities)
    else:
        names = [name for name in ask_nvidia_smi("name") if CARD.search(name)]
        if not names:
            return Machine(note="nvidia-smi is there but names no card (is the driver loaded?)")
        capabilities = [(5, 0) if OLD_CARD.search(name) else (7, 5) for name in names]
        note = ", ".join(names) + ", by name: the driver does not tell the compute capability"
    drivers = [re.match(r"(\d{3})\.\d+", line) for line in ask_nvidia_smi("driver_version")]
    driver = next((int(match[1]) for match in drivers if match), None)
    return Machine(tuple(capabilities), driver, note)


def choose_torch(machine: Machine, override: str = "") -> Torch:
    """The torch for this machine, or the one that NVAE_TORCH asks for. Raises SetupError if that cannot be read."""
    if not machine.capabilities:
        choice = Torch(CURRENT, machine.note)
    elif max(machine.capabilities) < (5, 0):
        choice = Torch(CURRENT, f"{machine.note}: no supported torch has kernels below 5.0, so it will run on the CPU")
    elif min(machine.capabilities) < (7, 5) and max(machine.capabilities) < (10, 0):  # 10.0 and up: from CUDA 12.8
        choice = Torch(LAST_FOR_OLD_CARDS, f"{machine.note}: the last build on PyPI for cards below 7.5")
    elif machine.driver is not None and machine.driver < CUDA_13_DRIVER:
        why = f"driver {machine.driver} is older than {CUDA_13_DRIVER}, which newer builds (CUDA 13) need"
        choice = Torch(LAST_CUDA_12, f"{machine.note}; {why}")
    else:
        choice = Torch(CURRENT, machine.note)
    if machine.driver is not None and machine.driver < CUDA_12_DRIVER:
        choice = replace(choice, reason=f"{choice.reason}; but update the driver to {CUDA_12_DRIVER} or newer")
    return parse_override(override, choice) if override.strip() else choice


def parse_override(override: str, choice: Torch) -> Torch:
    """NVAE_TORCH: a requirement, pip options, a bare index URL, in this order; what is missing is as chosen."""
    words = shlex.split(override)
    starts_options = [word.startswith(("-", "https://", "http://")) for word in words]
    first_option = starts_options.index(True) if True in starts_options else len(words)
    requirement = " ".join(words[:first_option])
    options = words[first_option:]
    if options and not options[0].startswith("-"):
        options = ["--index-url", *options]
    is_torch = re.match(r"torch\s*($|[=<>!~@\[])", requirement) or requirement.endswith(".whl")
    if requirement and not is_torch:
        raise SetupError(
            f"NVAE_TORCH={override!r} cannot be read: it takes a requirement such as 'torch==2.7.1', a wheel index "
            "URL such as https://download.pytorch.org/whl/cu126, or 'torch==2.7.1 --index-url URL'."
        )
    return Torch(requirement or choice.requirement, ASKED_FOR, tuple(options))


def check_python(torch: Torch) -> None:
    """Raise SetupError if this Python cannot run the package, or the chosen torch has no build for it."""
    version = sys.version_info[:2]
    newest = NEWEST_PYTHON.get(torch.requirement)
    if version >= OLDEST_PYTHON and (newest is None or version <= newest):
        return
    allowed = f"3.10 to {newest[0]}.{newest[1]} for {torch.requirement}" if newest else "3.10 to 3.13"
    raise SetupError(
        f"Python {version[0]}.{version[1]} ({sys.executable}) will not do; allowed is {allowed}. "
        "Name another: make PYTHON=python3.12 ..."
    )


# ---- the environment -------------------------------------------------------------------------------------------------


class Environment:
    """The folder of a virtual environment, and the stamp that says what was installed into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.bin = self.folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / ("python.exe" if os.name == "nt" else "python")

    def stamp(self) -> dict[str, Any]:
        try:
            stamp = json.loads((self.folder / STAMP).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def write_stamp(self, stamp: Mapping[str, Any]) -> None:
        (self.folder / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")

    def identity(self) -> dict[str, str]:
        """What an environment cannot change later: its scripts name its path, its packages are for one Python."""
        return {"folder": str(self.folder), "python": "{}.{}".format(*sys.version_info)}

    def make(self) -> bool:
        """Create the folder unless a usable one is there; says if it did. Raises SetupError where that fails."""
        mine = self.stamp()
        if self.python.exists() and (not mine or self.identity().items() <= mine.items()):
            return False
        if self.folder.exists() and not mine and any(self.folder.iterdir()):
            raise SetupError(f"{self.folder} is there and this installer did not make it: move it away, or give --venv")
        answer = subprocess.run(
            [sys.executable, *MAKE_VENV, str(self.folder)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        if answer.returncode != 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise SetupError(
                f"python -m venv failed:\n{tail(answer.stdout)}\n"
                "On Debian and Ubuntu it is a package of its own: sudo apt install python3-venv"
            )
        self.write_stamp(self.identity())
        return True

    def ask(self, code: str) -> str:
        """What this Python prints for this code. Raises SetupError if it fails."""
        answer = subprocess.run(
            [self.python, "-c", code], cwd=self.folder, capture_output=True, text=True, errors="replace"
        )
        if answer.returncode != 0:
            raise SetupError(
                f"the environment does not work:\n{tail(answer.stderr)}\nRemove {self.folder}; start again."
            )
        return answer.stdout.strip()

    def repair_shebangs(self) -> None:
        """Give scripts that the kernel cannot start (a space in the path, or a long one) a first line that works.

        pip does so for entry points only; DeepSpeed installs its launcher as a plain script.
        """
        direct = f"#!{self.python}"
        if os.name == "nt" or (" " not in direct and len(direct) < 127):
            return
        # To the shell: exec python on this file. To Python: a string that nobody uses.
        start_by_shell = f"#!/bin/sh\n'''exec' \"{self.python}\" \"$0\" \"$@\"\n' '''\n".encode()
        for script in self.bin.iterdir():
            if script.is_file() and not script.is_symlink():
                first, _, rest = script.read_bytes().partition(b"\n")
                if first.startswith(f"#!{self.bin}".encode()):
                    script.write_bytes(start_by_shell + rest)


def tail(text: str, lines: int = 15) -> str:
    """The last lines of a text, indented."""
    return "\n".join("    " + line for line in text.rstrip().splitlines()[-lines:])


def pip(environment: Environment, what: str, arguments: Sequence[str]) -> None:
    """Run one pip command, one line of output. Raises SetupError with the end of pip's output."""
    print(f"  {what} ... ", end="", flush=True)
    started = time.monotonic()
    answer = subprocess.run(
        [environment.python, "-m", "pip", *arguments],
        cwd=REPOSITORY, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        # PIP_USER, common on shared machines, is an error inside an environment.
        env={**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "DS_BUILD_OPS": "0"},
    )  # fmt: skip
    with (environment.folder / LOG).open("a", encoding="utf-8") as log:
        log.write(f"$ pip {shlex.join(arguments)}\n{answer.stdout}\n")
    if answer.returncode != 0:
        print("failed")
        raise SetupError(
            f"pip failed at {what}; its last lines:\n{tail(answer.stdout)}\n"
            f"All of them: {environment.folder / LOG}. Check the network and the room on the disk, then run the same "
            "command again: it goes on from here. NVAE_TORCH picks another torch (see --help)."
        )
    print(f"{time.monotonic() - started:.0f} s", flush=True)


def install(environment: Environment, torch: Torch, extras: Sequence[str]) -> list[str]:
    """Install torch, then the package and its extras around it. Returns the extras that could not be had."""
    pip(environment, "setuptools, wheel", ["install", "pip>=23", "setuptools>=68", "wheel"])
    pip(environment, str(torch), ["install", torch.requirement, *torch.pip_options])
    # Every later call is held to this very torch: a dependency that wants another would pull gigabytes.
    constraints = environment.folder / CONSTRAINTS
    version = environment.ask("from importlib.metadata import version; print(version('torch'))")
    constraints.write_text(f"torch=={version}\n", encoding="utf-8")
    # DeepSpeed is a source package whose setup imports torch: no build isolation.
    around_torch = ["install", "--no-build-isolation", "--constraint", str(constraints), "--editable"]
    plain = [extra for extra in extras if extra != "deepspeed"]
    pip(environment, f"nvae-lowmem[{','.join(plain)}]" if plain else "nvae-lowmem", [*around_torch, package(plain)])
    without = []
    if "deepspeed" in extras:
        try:
            pip(environment, "DeepSpeed", [*around_torch, package(["deepspeed"])])
        except SetupError as problem:
            without.append("deepspeed")
            print(f"{problem}\nDeepSpeed cannot be installed here: training will use the torch engine instead.")
    environment.repair_shebangs()
    return without


def package(extras: Sequence[str]) -> str:
    """This package for pip, with extras: ".[deepspeed,test]"."""
    return f".[{','.join(extras)}]" if extras else "."


def fingerprint() -> str:
    """Changes when the package's own list of needs does."""
    return hashlib.sha256(b"".join((REPOSITORY / name).read_bytes() for name in ("setup.cfg", "setup.py"))).hexdigest()


def set_up(environment: Environment, torch: Torch, extras: Sequence[str]) -> None:
    """Bring the environment to what is asked for; does nothing where it is already. Raises SetupError."""
    old = environment.stamp()
    wanted = {**environment.identity(), "torch": str(torch), "needs": fingerprint()}
    if wanted.items() <= old.items() and set(extras) <= set(old["extras"]) and environment.python.exists():
        if "deepspeed" in extras and "deepspeed" in old["without"]:
            print("without DeepSpeed, which could not be installed: training uses the torch engine")
        return
    print(f"setting up {environment.folder}\n  {torch}: {torch.reason}", flush=True)
    is_new = environment.make()
    if not is_new and old.get("torch", str(torch)) != str(torch):
        pip(environment, "removing the torch that was there", ["uninstall", "--yes", "torch"])
    extras = sorted({*extras, *old.get("extras", ())})
    environment.write_stamp(environment.identity())  # no longer what it was, and not yet what it will be
    without = install(environment, torch, extras)
    environment.write_stamp({**wanted, "reason": torch.reason, "extras": extras, "without": without})
    print(f"ready: {environment.ask(SAY_TORCH)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the environment; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=REPOSITORY / ".venv", help="the environment's folder")
    parser.add_argument("--extras", default="deepspeed", help="comma-separated: deepspeed, faces, metrics, demo, test")
    parser.add_argument("--dry-run", action="store_true", help="say which torch would be installed, and why")
    options = parser.parse_args(argv)
    try:
        environment = Environment(options.venv)
        machine = look_at_machine()
        old = environment.stamp()
        # What was asked for once stays, so that the next command without the variable does not undo it.
        kept = old["torch"] if old.get("reason") == ASKED_FOR else ""
        torch = choose_torch(machine, os.environ.get("NVAE_TORCH", kept))
        check_python(torch)
        if options.dry_run:
            print(f"{torch}: {torch.reason}")
        else:
            set_up(environment, torch, [extra for extra in options.extras.split(",") if extra])
        if os.name == "nt" and machine.capabilities and not torch.pip_options:
            index = "https://download.pytorch.org/whl/cu126"
            print(f"PyPI's builds for Windows leave the card idle: set NVAE_TORCH={index}")
    except SetupError as problem:
        print(f"setup_env: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup_env: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
