"""Blend two images in a trained model's latent groups: python launch/blend.py A.png B.png --run latest."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed, too

from nvae_lowmem.commands.blend import main

if __name__ == "__main__":
    sys.exit(main())
