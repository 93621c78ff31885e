"""What README, docs and help texts tell people to type runs, as written, in a clone with an environment of its own.

Placeholders become files of that kind, long work is cut short by flags at the end of the line, and the lines that need
what is not here are listed with the reason. Slow: `make test-slow`."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from data_files import write_folder
from documented_commands import REPOSITORY, Documented, of_help_texts, of_pages
from generation_runs import picture_file
from PIL import Image

Run = Callable[..., str]

NOT_HERE = {
    r"^make ": "makes an environment of its own from a package index; it is how this suite is run",
    r"benchmarks/": "takes hours; what they print is in benchmarks/results",
    r"demo( |$)|demo\.py": "serves until it is stopped; tests/demo opens the page in a browser",
    r"measure.memory.*(--matrix|celeba64)": "measures a CUDA card; tests/cuda",
    r"train.*gtx-970|train.*--auto-fit": "trains a model of hundreds of millions of parameters on a CUDA card",
    r"--num_gpus 2": "needs two CUDA cards",
    r"--init-from": "goes on from a run that trained for hours; tests/training",
    r"--card auto": "asks the CUDA card in this machine",
    r"ship.profiles": "plans for every card, which takes hours; tests/memory/catalogue",
    r"--fid-weights": "needs the weights of an Inception network",
    r"--verify": "needs arrays of the published network; tests/interop",
    r"--run-dir runs/00003": "goes on with a run that has ended; tests/training",
    r"memory\.py (?!.*--(recipe|profile|matrix))": "names a flag and no model: no whole command",
}
"""What a line contains -> why it is not run here."""

SHORT = {
    "train": "--steps 2 --device cpu --runs-dir trained --set training.total_batch=8 training.evaluate_images=8",
    "sample": "--passes 2",
    "evaluate": "--images 4 --iw-samples 2 --samples 0",
    "traverse": "--count 8",
    "export": "--passes 2",
    "restore": "--iterations 2",
    "anomaly": "--draws 1 --compare 20 --references 20",
}
"""Flags at the end of a line; the last one of a kind holds."""

ARGUMENTS = {
    "P": "profiles/demo-mnist.toml", "RUN": "runs/00000-demo-mnist", "WORD": "seed",
    "FOLDER": "pictures", "FOLDER_OR_ZIP": "pictures.zip", "IMAGES": "pictures", "LATENTS": "latents",
    "~/pictures": "pictures", "parts.zip": "pictures.zip", "faces.zip": "pictures.zip", "mine.toml": "mine.toml",
    "runs/00003-celeba64-4g": "latest",
    "10000": "20", "0.7,0.8,1.0": "0.7,1.0", "0,1,1": "0,1",  # for each of two scales
}  # fmt: skip
"""What stands for something of the reader's -> the same here."""

NEW_FOLDERS = ("OUT", "faces", "faces-published", "runs/imported", "drawn")
"""What a command makes and must not find: a new folder for each line."""


def reason(line: str) -> str:
    """Why a line is not run here; empty: it is."""
    return next((why for pattern, why in NOT_HERE.items() if re.search(pattern, line)), "")


ALL = [one for one in [*of_pages(), *of_help_texts()] if one.arguments and one.page != "CHANGELOG.md"]


def shortened(one: Documented) -> list[str]:
    """The flags that cut a line short, as far as it takes them."""
    words = SHORT.get(one.command, "").split()
    if {"--hours", "--minutes"} & set(one.arguments):  # they say how long, in place of steps
        words = [*words[2:], one.arguments[-2], "0.01"]
    return [] if one.command == "export" and "published" in one.arguments else words


LINES = list({one.line: one for one in ALL}.values())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a line in a copy of this tree, with this environment's libraries but not its nvae-lowmem."""
    clone = tmp_path_factory.mktemp("documented") / "a clone"
    left_out = shutil.ignore_patterns(".git*", ".venv*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY, clone, ignore=left_out, symlinks=True)
    env = clone / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True, timeout=100)
    own = next((env / "lib").glob("python*")) / "site-packages"
    (own / "libraries.pth").write_text("\n".join([str(clone), *site.getsitepackages()]))
    starter = "import sys\nfrom nvae_lowmem.commands.console import main\nsys.exit(main())\n"
    (clone / "nvae-lowmem").write_text(starter)  # what pip makes of the entry point
    path = os.pathsep.join([str(env / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    kept |= {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=clone, env=kept, capture_output=True, text=True, timeout=580)
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-4000:])
        return done.stdout

    write_folder(clone / "pictures", 40)
    shutil.make_archive(str(clone / "pictures"), "zip", clone / "pictures")
    for name in ("A.png", "B.png", "a.png", "b.png", "b.jpg", "photo.png", "photo.jpg", "small.png", "face.png"):
        picture_file(clone / name)
    with Image.open(clone / "photo.jpg") as photo:
        photo.resize((400, 200)).save(clone / "photo.jpg")
    Image.new("L", (28, 28), 255).save(clone / "mask.png")
    nvae = ("python", "nvae-lowmem")
    run(*nvae, "train", "--profile", "demo-mnist", *SHORT["train"].split(), "--runs-dir", "runs")
    run(*nvae, "export", "published", "--to", "published")
    shutil.copy(clone / "published" / "checkpoint.pt", clone / "checkpoint.pt")
    run(*nvae, "fit-memory", "--recipe", "tiny", "--gpu-mem", "4G", "--out", "mine.toml")
    run(*nvae, "encode", "pictures", "latents")
    return run


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("one", LINES, ids=lambda one: one.line)
def test_the_line_runs_as_written(one: Documented, run: Run, tmp_path: Path) -> None:
    if why := reason(one.line):
        pytest.skip(why)
    arguments = ARGUMENTS | {name: str(tmp_path / "out") for name in NEW_FOLDERS}
    words = [arguments.get(word, word) for word in one.arguments]
    words = ["latest" if before == "--run" else word for before, word in zip(("", *words), words, strict=False)]
    launcher = one.line.split(" ")[0] if one.line.startswith("deepspeed") else "python"
    run(launcher, one.program, *words, *shortened(one))


def test_a_good_part_of_the_lines_is_run() -> None:
    commands = {one.command for one in LINES if not reason(one.line)}
    assert len(commands) >= 17, sorted(commands)
    assert all(any(re.search(pattern, one.line) for one in LINES) for pattern in NOT_HERE), (
        "an exception without a case"
    )
