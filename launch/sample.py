"""Draw images from a trained model: python launch/sample.py --run latest --temperatures 0.7 1.0."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed, too

from nvae_lowmem.threads import wait_politely


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, draw, write, and return the exit code: 0 done, 2 bad input, 5 out of memory."""
    wait_politely()  # before torch is imported
    from nvae_lowmem.generation.sample_command import run_sampling

    return run_sampling(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
