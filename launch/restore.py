"""Restore images with a trained model: python launch/restore.py inpaint photo.png --mask mask.png."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed, too

from nvae_lowmem.commands.restore import main

if __name__ == "__main__":
    sys.exit(main())
