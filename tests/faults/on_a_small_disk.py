"""Trains on a real file system that fills up and turns read-only: run inside a mount namespace by test_real_disk.py.

unshare -rm python tests/faults/on_a_small_disk.py DISK PROFILE      # prints (exit code, complaints) of each run
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]  # run as a script

from training_runs import run  # noqa: E402

from nvae_lowmem.training import checkpoint  # noqa: E402


def mount(disk: Path, *options: str) -> None:
    """A file system of 64 MiB at `disk`, or with "remount,..." another state of it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(("size=64m", *options)), "tmpfs", str(disk)], check=True)


def fill(path: Path) -> None:
    """Take all the room there is."""
    try:
        with path.open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(1 << 16))
    except OSError:
        return


def main(disk: Path, profile: Path) -> None:
    """Train on a disk with room, a full one, one with room again, and one that cannot be written to."""
    mount(disk)
    folder, ballast = disk / "run", disk / "ballast"

    def trained(steps: int) -> dict[str, object]:
        result = run(profile, "--run-dir", str(folder), "--steps", str(steps))
        newest = checkpoint.all_checkpoints(folder)[-1]
        state = {"newest": checkpoint.step_of(newest), "whole": checkpoint.is_undamaged(newest)}
        return {"code": result.code, "complained": result.complained, **state}

    found = {"with room": trained(2)}
    fill(ballast)
    found["full"] = trained(4)
    ballast.unlink()
    found["with room again"] = trained(4)
    mount(disk, "remount", "ro")
    found["read-only"] = trained(6)
    new = run(profile, "--run-dir", str(disk / "other"))
    found["read-only, a new run"] = {"code": new.code, "complained": new.complained}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
