"""What setup.cfg cannot say: which folders are packages, and the README without what only a checkout has.

The scripts and the shipped profiles stand at the top of the repository, where people look for them. In an installed
wheel they go inside the package, as `nvae_lowmem/launch/` and so on, because top-level packages named `launch` or
`tools` would collide with other people's.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

BESIDE_THE_PACKAGE = [name for name in ("profiles",) if Path(name).is_dir()]


def readme() -> str:
    """README.md for a package index, which has neither this tree's pictures nor the files that it links to."""
    text = Path("README.md").read_text(encoding="utf-8")
    without_pictures = re.sub(r"^!\[[^\]]*\]\([^)]*\)\n", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", without_pictures)


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["nvae_lowmem*"]) + [f"nvae_lowmem.{name}" for name in BESIDE_THE_PACKAGE],
    package_dir={f"nvae_lowmem.{name}": name for name in BESIDE_THE_PACKAGE},
)
