"""A run with class labels: where its names are kept, and what it can go on with."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_runs import run, tree, write_profile

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.training import checkpoint

LEVELS = {"cat": 40, "dog": 120, "eel": 220}


def write_classes(folder: Path, count: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for name, level in LEVELS.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise = rng.integers(-20, 21, (16, 16), dtype=np.int16)
            Image.fromarray((level + noise).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(profile, images, folder of a run of four steps)."""
    root = tmp_path_factory.mktemp("labelled")
    profile, images = write_profile(root), write_classes(root / "animals")
    done = run(profile, "--data", str(images), "--labels", "--run-dir", str(root / "run"))
    assert done.code == 0 and "labels of 3 classes: cat, dog, eel" in done.said
    return profile, images, root / "run"


def test_a_run_keeps_the_names_of_its_classes(labelled: tuple[Path, Path, Path]) -> None:
    kept = profiles.load(labelled[2] / "config.toml")
    assert kept.model.classes == 3 and kept.data.class_names == tuple(LEVELS)


def test_a_stopped_run_goes_on_bit_for_bit(labelled: tuple[Path, Path, Path], tmp_path: Path) -> None:
    shutil.copytree(labelled[2], tmp_path / "run")
    last = checkpoint.all_checkpoints(tmp_path / "run")[-1]
    whole = {name: content for name, content in tree(last).items() if name.endswith(".safetensors")}
    for step in checkpoint.all_checkpoints(tmp_path / "run"):
        if checkpoint.step_of(step) > 2:
            shutil.rmtree(step)
    assert run(tmp_path / "run" / "config.toml", "--run-dir", str(tmp_path / "run")).code == 0
    assert whole and {name: tree(last)[name] for name in whole} == whole


def test_other_classes_are_refused_and_nothing_changes(labelled: tuple[Path, Path, Path], tmp_path: Path) -> None:
    profile, images, folder = labelled
    shutil.copytree(images, tmp_path / "animals")
    shutil.move(tmp_path / "animals" / "cat", tmp_path / "animals" / "ape")
    before = tree(folder)
    of_the_run = run(folder / "config.toml", "--data", str(tmp_path / "animals"), "--run-dir", str(folder))
    assert (
        of_the_run.code == 2 and "class ape is none of the model's 3 classes (cat, dog, eel)" in of_the_run.complained
    )
    anew = run(profile, "--data", str(tmp_path / "animals"), "--labels", "--run-dir", str(folder))
    assert anew.code == 2 and "data.class_names" in anew.complained and "cannot change" in anew.complained
    assert tree(folder) == before


def test_labels_of_images_that_have_none_are_one_message(tmp_path: Path) -> None:
    write_classes(tmp_path / "animals")
    for i, file in enumerate(sorted((tmp_path / "animals").rglob("*.png"))):
        shutil.move(file, tmp_path / "animals" / f"{i}.png")
    for flags in (["--labels"], ["--set", "model.classes=3"]):
        done = run(
            write_profile(tmp_path), "--data", str(tmp_path / "animals"), *flags, "--runs-dir", str(tmp_path / "r")
        )
        assert done.code == 2 and "no label" in done.complained and "Traceback" not in done.complained
    assert not (tmp_path / "r").exists()


def test_labels_of_a_chosen_model_are_in_its_profile(tmp_path: Path) -> None:
    from training_runs import run_command_line

    images = write_classes(tmp_path / "animals")
    done = run_command_line("--data", str(images), "--labels", "--minutes", "5", "--device", "cpu", "--dry-run")
    assert done.code == 0 and "classes = 3" in done.said and '"eel"' in done.said
