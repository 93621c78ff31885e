"""Train an NVAE: deepspeed launch/train.py --profile PROFILE, or python launch/train.py --profile PROFILE."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed, too

from nvae_lowmem.threads import wait_politely


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, and return the exit code: 0 done, 2 bad input, 3 nothing fits, 4 diverged, 5 out of memory."""
    wait_politely()  # before torch is imported
    from nvae_lowmem.generation.grids import training_pictures
    from nvae_lowmem.memory.auto_fit import auto_fitted
    from nvae_lowmem.training.main import run_training

    return run_training(sys.argv[1:] if argv is None else argv, training_pictures, auto_fitted)


if __name__ == "__main__":
    sys.exit(main())
