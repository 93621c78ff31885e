"""The one thing that setup.cfg cannot say: which folders are packages. All else is in setup.cfg.

The scripts and the shipped profiles stand at the top of the repository, where people look for them. In an installed
wheel they go inside the package, as `nvae_lowmem/launch/` and so on, because top-level packages named `launch` or
`tools` would collide with other people's.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

BESIDE_THE_PACKAGE = [name for name in ("profiles",) if Path(name).is_dir()]

setup(
    packages=find_packages(include=["nvae_lowmem*"]) + [f"nvae_lowmem.{name}" for name in BESIDE_THE_PACKAGE],
    package_dir={f"nvae_lowmem.{name}": name for name in BESIDE_THE_PACKAGE},
)
