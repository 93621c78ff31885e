"""Draw images from a trained model: python launch/sample.py --run latest --temperatures 0.7 1.0."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed, too

from nvae_lowmem.commands.sample import main

if __name__ == "__main__":
    sys.exit(main())
