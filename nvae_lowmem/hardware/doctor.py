"""Looks at this machine and says what will work, what will not, and what to do: the logic of tools/doctor.py.

It must run where things are broken: packages are imported inside the check that needs them, and an error inside a check
is that check's finding. What it says of torch and the card is in gpu_facts.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from nvae_lowmem.hardware.budget import this_os
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.hardware.gpu_facts import (
    Check,
    Status,
    check_card,
    check_driver,
    check_fp16,
    check_kernels,
    check_memory,
    check_torch,
    first_line,
    read_gpu,
    version_numbers,
)
from nvae_lowmem.units import GIB, format_bytes

STATUSES: tuple[Status, ...] = ("OK", "WARN", "FAIL")
# The largest recipe (celebahq256) has 0.33e9 weights: 5.3 GB per checkpoint, and 6.6 GB on the host for an offloaded
# optimizer.
_ROOMY_DISK_BYTES, _LEAST_DISK_BYTES = 16 * GIB, GIB  # two checkpoints kept and one being written
_ROOMY_HOST_BYTES = 8 * GIB
_TESTED_DEEPSPEED = (0, 19)


def run_checks(runs_dir: str | os.PathLike[str] = "runs", card: Card | None = None) -> list[Check]:
    """Every check that applies here. card: one to plan for that is not in this machine; None: the one that is."""
    facts = read_gpu()
    jobs: tuple[tuple[str, Callable[[], Check | None]], ...] = (
        ("system", check_system),
        ("python", lambda: check_python(sys.version_info[:2])),
        ("torch", lambda: check_torch(facts)),
        ("card", lambda: check_card(facts)),
        ("kernels", lambda: check_kernels(facts, card)),
        ("driver", lambda: check_driver(facts)),
        ("memory", lambda: check_memory(facts, card)),
        ("fp16", lambda: check_fp16(facts)),
        ("deepspeed", check_deepspeed),
        ("compiler", check_compiler),
        ("numactl", check_numactl),
        ("tensorboard", check_tensorboard),
        ("disk", lambda: check_disk(Path(runs_dir))),
        ("ram", check_ram),
        ("threads", check_threads),
        ("faces", check_faces),
    )
    return [check for name, job in jobs if (check := _guarded(name, job)) is not None]


def _guarded(name: str, job: Callable[[], Check | None]) -> Check | None:
    try:
        return job()
    except Exception as error:
        return Check(name, "FAIL", f"this check broke: {type(error).__name__}: {first_line(error)}", "report this")


def worst(checks: Iterable[Check]) -> Status:
    """The worst status among the checks."""
    return max((check.status for check in checks), key=STATUSES.index, default="OK")


def as_text(checks: Sequence[Check]) -> str:
    """The report for people: one line per check, and an arrow to what to do."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.finding}")
        if check.advice:
            lines.append(f"{'':<4}  {'':<{width}}  -> {check.advice}")
    counts = {status: sum(check.status == status for check in checks) for status in STATUSES}
    verdict = "something has to be put right first" if counts["FAIL"] else "nothing stands in the way"
    return "\n".join([*lines, f"{counts['OK']} OK, {counts['WARN']} WARN, {counts['FAIL']} FAIL: {verdict}"])


def as_json(checks: Sequence[Check]) -> str:
    """The report for programs: {"status": worst, "checks": [{name, status, finding, advice}]}."""
    return json.dumps({"status": worst(checks), "checks": [asdict(check) for check in checks]}, indent=2)


# ---- the machine around the card -------------------------------------------------------------------------------------


def check_system() -> Check:
    """Which operating system?"""
    regime = {"linux": "headless", "desktop": "with a desktop", "windows": "WDDM driver"}[this_os()]
    finding = f"{platform.system()} {platform.release()} ({platform.machine()}), {regime}"
    if sys.platform == "darwin":
        return Check("system", "WARN", finding, "macOS has no CUDA: planning works, training runs on the CPU")
    return Check("system", "OK", finding)


def check_python(version: tuple[int, int]) -> Check:
    """Is this Python one that every supported torch has wheels for?"""
    finding = f"{version[0]}.{version[1]}, {sys.executable}"
    if version < (3, 10):
        return Check("python", "FAIL", finding, "Python 3.10 to 3.13 is needed")
    if version > (3, 13):
        return Check("python", "WARN", finding, "torch 2.7.1, the last for GTX 900 and 10xx cards, ends at Python 3.13")
    return Check("python", "OK", finding)


def check_deepspeed() -> Check:
    """Is DeepSpeed there, and does it import?"""
    without = "the plain torch engine trains; parameter offload (ZeRO stage 3) and several cards need DeepSpeed"
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return Check("deepspeed", "WARN", f"not installed: {without}", 'pip install "deepspeed>=0.19,<0.20"')
    try:
        with _quiet_import():
            importlib.import_module("deepspeed")
    except Exception as error:
        finding = f"{version}, but importing it fails: {type(error).__name__}: {first_line(error)}"
        return Check("deepspeed", "WARN", finding, f"set plan.engine = 'torch' ({without}), or reinstall deepspeed")
    if version_numbers(version)[:2] != _TESTED_DEEPSPEED:
        return Check("deepspeed", "WARN", f"{version}: only 0.19 is tested", 'pip install "deepspeed>=0.19,<0.20"')
    return Check("deepspeed", "OK", version)


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Swallow what a package prints while it is imported, and take back what it sets in the environment."""
    environment = dict(os.environ)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)


def check_compiler() -> Check:
    """Is there a C++ compiler?"""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        finding = "no C++ compiler: DeepSpeed cannot build its compiled operators (ZeRO with Adamax needs none)"
        return Check("compiler", "WARN", finding, "install g++ (Linux) or the Visual Studio Build Tools (Windows)")
    return Check("compiler", "OK", found)


def check_numactl() -> Check | None:
    """Is numactl there? Linux only, and optional."""
    if not sys.platform.startswith("linux"):
        return None
    return Check(
        "numactl", "OK", shutil.which("numactl") or "not installed; only deepspeed --bind_cores_to_rank needs it"
    )


def check_tensorboard() -> Check:
    """Can TensorBoard event files be written?"""
    try:
        with _quiet_import():
            importlib.import_module("torch.utils.tensorboard")
        return Check("tensorboard", "OK", metadata.version("tensorboard"))
    except Exception as error:
        finding = f"event files cannot be written: {first_line(error)}"
        return Check("tensorboard", "WARN", finding, "pip install tensorboard")


def check_disk(runs_dir: Path) -> Check:
    """Is there room in the folder of runs?"""
    home = runs_dir.absolute()
    while not home.exists():
        home = home.parent
    if not home.is_dir() or not os.access(home, os.W_OK):
        return Check(
            "disk", "FAIL", f"{runs_dir}: {home} is not a folder that can be written to", "choose another folder"
        )
    free = shutil.disk_usage(home).free
    finding = f"{format_bytes(free)} free for {runs_dir}"
    if free < _ROOMY_DISK_BYTES:
        status: Status = "FAIL" if free < _LEAST_DISK_BYTES else "WARN"
        return Check("disk", status, finding, "make room: checkpoints of the largest recipe take 5.3 GB each")
    return Check("disk", "OK", finding)


def check_ram() -> Check:
    """Is there host memory for an offloaded optimizer?"""
    total, available = _host_memory()
    finding = f"{format_bytes(available)} available of {format_bytes(total)}"
    if available < _ROOMY_HOST_BYTES:
        advice = "enough for the small recipes; the optimizer of the largest one takes 6.6 GB of host memory"
        return Check("ram", "WARN", finding, advice)
    return Check("ram", "OK", finding)


def _host_memory() -> tuple[int, int]:
    """(total, available) bytes of host memory, within this container's limit where there is one."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    with contextlib.suppress(OSError, ValueError):  # no such file outside of a cgroup; "max" is no number
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return total, available


def check_threads() -> Check:
    """How many CPU threads may torch use?"""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    finding = f"{usable} usable"
    if "torch" in sys.modules:
        threads = sys.modules["torch"].get_num_threads()
        finding += f", torch takes {threads}"
        if threads > usable:
            return Check("threads", "WARN", finding, f"set OMP_NUM_THREADS={usable}: more threads than cores slow down")
    return Check("threads", "OK", finding)


def check_faces() -> Check:
    """Can the embedded set of drawn faces be made?"""
    missing = [name for name in ("dicebear", "dicebear_styles", "resvg_py") if importlib.util.find_spec(name) is None]
    if missing:
        finding = f"data.source = 'faces' cannot be drawn: {', '.join(missing)} not installed"
        return Check("faces", "WARN", finding, "pip install dicebear-core dicebear-styles resvg-py")
    return Check("faces", "OK", "data.source = 'faces' can be drawn")
