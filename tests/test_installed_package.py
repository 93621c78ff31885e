"""What is built from this tree works elsewhere: the source distribution is whole, and what is installed from it trains,
samples, fits and predicts from an empty folder, without the checkout."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
LEFT_OUT = shutil.ignore_patterns(
    ".git*", ".venv*", "venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)
Run = Callable[..., str]


def built(kind: str, tree: Path, out: Path) -> Path:
    """The distribution that setuptools builds of a tree; kind: build_sdist or build_wheel."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)], cwd=tree, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree, as a fresh clone has it."""
    copy = tmp_path_factory.mktemp("built") / "clone"
    shutil.copytree(REPOSITORY, copy, ignore=LEFT_OUT, symlinks=True)
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    return built("build_sdist", tree, tree.parent)


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel that pip would build of the source distribution."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent / "unpacked", **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    (unpacked,) = (sdist.parent / "unpacked").iterdir()
    return built("build_wheel", unpacked, sdist.parent)


def test_the_source_distribution_holds_all_that_a_clone_has(tree: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    wanted = {path for room in tree.iterdir() for path in room.rglob("*") if path.is_file()}
    wanted |= {
        tree / name for name in ("CHANGELOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.cfg")
    }
    names = {path.relative_to(tree).as_posix() for path in wanted}
    assert sorted(name for name in names - held if not name.endswith((".so", ".pyc"))) == []


def test_the_wheel_holds_modules_profiles_and_tables_and_no_tests(tree: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in held if name.endswith("/METADATA"))
    modules = {path.relative_to(tree).as_posix() for path in (tree / "nvae_lowmem").rglob("*.py")}
    profiles = {f"nvae_lowmem/profiles/{path.name}" for path in (tree / "profiles").glob("*.toml")}
    assert modules | profiles | {"nvae_lowmem/hardware/cards.toml"} <= held
    assert not [name for name in held if name.startswith(("tests/", "launch/", "tools/", "benchmarks/"))]
    assert "![" not in metadata and "<img" not in metadata  # an index has none of this tree's pictures


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Run:
    """Runs an installed command in an empty folder, with this environment's libraries but not its nvae-lowmem."""
    env, folder = wheel.parent / "env", wheel.parent / "empty"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True, timeout=100)
    python = env / "bin" / "python"
    asked = [python, "-c", "import site; print(site.getsitepackages()[0])"]
    own = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    # only paths: the .pth files in there, such as that of an editable nvae-lowmem, are not read again
    (own / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--ignore-installed", str(wheel)], check=True, timeout=200)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [str(env / "bin" / "nvae-lowmem"), *arguments], cwd=folder, env=kept, capture_output=True, text=True,
            timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout

    where = subprocess.run([python, "-c", "import nvae_lowmem; print(nvae_lowmem.__file__)"], cwd=folder, env=kept,
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert where.stdout.startswith(str(own))
    return run


def test_what_is_installed_trains_and_samples_from_an_empty_folder(installed: Run) -> None:
    small = ["--set", "training.evaluate_images=8", "training.total_batch=8", "--device", "cpu"]
    said = installed("train", "--profile", "demo-mnist", "--steps", "2", *small)
    assert "step 2/2" in said and "sample more with: nvae-lowmem sample --run runs/00000-demo-mnist" in said
    said = installed("sample", "--count", "4", "--temperature", "0.7", "--passes", "2", "--device", "cpu")
    assert "runs/00000-demo-mnist/samples/generated-t0.7.png" in said


def test_what_is_installed_fits_and_predicts_from_an_empty_folder(installed: Run) -> None:
    said = installed("fit-memory", "--recipe", "tiny", "--gpu-mem", "4G", "--out", "fitted.toml")
    assert "train with nvae-lowmem train --profile fitted.toml" in said
    assert "reserved" in installed("predict-memory", "--profile", "fitted.toml")
    assert "  nvae-lowmem predict-memory --recipe celeba64" in installed("predict-memory", "--help")
