"""Replays recorded allocation traces through the simulated CUDA caching allocator and lists every figure that differs.

Exit status: 0 all equal, 1 something differs, 2 DIR cannot be read as `recording.py` describes it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from nvae_lowmem.errors import ConfigError, ExitCode
from nvae_lowmem.memory.allocator.recording import load_recordings

FolderArgument = Annotated[Path, tyro.conf.arg(metavar="DIR", help="a folder that holds traces.npz and expected.json")]


def main(argv: Sequence[str] | None = None) -> int:
    """Replay the folder named on the command line, print what differs, and return the exit status."""
    return tyro.cli(_replay, args=argv, prog="python -m nvae_lowmem.memory.allocator", description=__doc__)


def _replay(folder: tyro.conf.Positional[FolderArgument]) -> int:
    try:
        recordings = load_recordings(folder)
        found = [(recording.name, difference) for recording in recordings for difference in recording.differences()]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_INPUT
    for name, difference in found:
        print(f"{name}, {difference}")
    checkpoints = sum(len(recording.checkpoints) + (recording.oom_index is not None) for recording in recordings)
    print(f"{len(recordings)} traces, {checkpoints} checkpoints, mismatches: {len(found)}")
    return ExitCode.CHECK_FAILED if found else ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
