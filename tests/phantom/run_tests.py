"""`make test-cuda`: runs the tests marked cuda on this machine's card, or on a phantom where there is none.

For the phantom it makes an environment of its own, once: torch's CUDA build without NVIDIA's libraries, and the
package with what it and its tests need. Needs nothing but Python's standard library. NVAE_CUDA=phantom asks for the
phantom though there is a card. What is not a flag goes to pytest: -m "cuda and slow" runs the slow ones among them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
sys.path.insert(0, str(REPOSITORY / "tools"))
sys.path.insert(0, str(HERE))
import build  # noqa: E402
import setup_env  # noqa: E402

TORCH = setup_env.Torch("torch==2.7.1", "the phantom card stands in for CUDA 12.6")
EXTRAS = ("deepspeed", "demo", "faces", "metrics", "test")
NVIDIA = re.compile(r"^Requires-Dist: (nvidia-|triton).*\n", re.MULTILINE)
LARGEST_COPY_BYTES = "65536"  # ZeRO stage 3 reads small weights back
TELLS = {
    "phantom": (
        "on a phantom card: this shows that the CUDA paths run, and what PyTorch's allocator makes of them; it cannot "
        "show numbers, speed, or the workspaces that a real cuDNN takes"
    ),
    "real": "on this machine's card; those that were skipped want a card made to measure, which NVAE_CUDA=phantom is",
}


def set_up(environment: setup_env.Environment) -> Path:
    """Bring environment and libraries to what is wanted; the folder of the libraries. Raises SetupError."""
    home = environment.folder / "phantom"
    sources = hashlib.sha256((setup_env.fingerprint() + build.fingerprint()).encode()).hexdigest()
    wanted = {**environment.identity(), "torch": TORCH.requirement, "sources": sources}
    if wanted.items() <= environment.stamp().items():
        return home
    for program in ("g++", "readelf"):
        if shutil.which(program) is None:
            raise setup_env.SetupError(f"{program} is missing; on Debian or Ubuntu: apt-get install g++ binutils")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise setup_env.SetupError("the phantom card stands in for CUDA on x86-64 Linux only")
    setup_env.check_python(TORCH)
    print(f"setting up {environment.folder} (about 1 GB of downloads)\n  {TORCH}: {TORCH.reason}", flush=True)
    environment.make()
    environment.write_stamp(environment.identity())  # no longer what it was, and not yet what it will be
    setup_env.pip(environment, f"{TORCH}, without NVIDIA's libraries", ["install", "--no-deps", TORCH.requirement])
    packages = Path(environment.ask("import sysconfig; print(sysconfig.get_paths()['platlib'])"))
    without_nvidia(packages)
    build.build(packages / "torch" / "lib", home)
    # From here on torch is imported: DeepSpeed's setup asks it for its version.
    os.environ["LD_LIBRARY_PATH"] = str(home / "lib")
    os.environ |= {"CUDA_HOME": str(home / "cuda-home"), "DS_SKIP_CUDA_CHECK": "1"}
    without = setup_env.install(environment, TORCH, EXTRAS)
    if without:
        raise setup_env.SetupError(f"{', '.join(without)} could not be installed, and the tests are about it, too")
    environment.write_stamp(wanted)
    return home


def without_nvidia(packages: Path) -> None:
    """Take NVIDIA's libraries off the list of what the installed torch requires: the phantom has them, pip does not."""
    (metadata,) = packages.glob("torch-*.dist-info/METADATA")
    metadata.write_text(NVIDIA.sub("", metadata.read_text(encoding="utf-8")), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns pytest's exit code, or 1 where the environment could not be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default="2", help="tests at a time; on a real card it is one")
    options, pytest_arguments = parser.parse_known_args(argv)
    card = os.environ.get("NVAE_CUDA") or ("real" if setup_env.look_at_machine().capabilities else "phantom")
    if card not in TELLS:
        print(f"run_tests: NVAE_CUDA={card!r} must be phantom or real", file=sys.stderr)
        return 1
    environment = setup_env.Environment(REPOSITORY / (".venv-cuda" if card == "phantom" else ".venv"))
    pytest = [str(environment.python), "-m", "pytest", "-q"]
    try:
        if card == "phantom":
            os.environ["PHANTOM_HOME"] = str(set_up(environment))
            pytest = [str(HERE / "phantom-run"), "--copy-bytes", LARGEST_COPY_BYTES, "--", *pytest]
            pytest_arguments = ["-n", options.jobs, "--dist", "worksteal", *pytest_arguments]
        else:
            setup_env.set_up(environment, setup_env.choose_torch(setup_env.look_at_machine()), EXTRAS)
    except setup_env.SetupError as error:
        print(f"run_tests: {error}", file=sys.stderr)
        return 1
    failed = subprocess.run([*pytest, str(HERE / "check.py")], cwd=REPOSITORY).returncode
    failed = (
        failed or subprocess.run([*pytest, "-m", "cuda and not slow", *pytest_arguments], cwd=REPOSITORY).returncode
    )
    print(f"== tests marked cuda {'FAILED' if failed else 'passed'} {TELLS[card]}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
