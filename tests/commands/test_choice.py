"""Images and hours instead of a profile: what train and fit-memory choose, say and refuse."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import Finished, run_command_line, write_profile

from nvae_lowmem.commands import fit_memory
from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import Profile


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to run in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A hundred small pictures in colour, some wider than high."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(4):
        pixels = generator.integers(0, 256, (16, 16 + 4 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    for number in range(4, 100):
        os.link(folder / f"{number % 4}.png", folder / f"{number}.png")
    return folder


def train(*arguments: str) -> Finished:
    return run_command_line(*arguments)


def fitted(*arguments: str) -> int:
    return fit_memory.main(arguments)


def printed(finished: Finished) -> Profile:
    """The profile that a dry run prints."""
    return profiles.loads(finished.said[finished.said.index("name = ") :])


def test_images_alone_are_trained_on_and_shown_as_training_sees_them(images: Path, working_directory: Path) -> None:
    found = train("--data", str(images), "--steps", "2", "--set", "training.total_batch=8")
    assert found.code == 0, found.complained
    assert "100 image files: 90 to train on" in found.said and "given up\n" in found.said
    run = working_directory / "runs" / "00000-pictures-16"
    with Image.open(run / "images.png") as sheet:
        assert sheet.size[0] > 16 * 56
    assert f"training sees them: {Path('runs') / run.name / 'images.png'}" in found.said
    made = profiles.load(run / "config.toml")
    assert (made.model.image_size, made.model.image_channels, made.data.flip) == (16, 3, True)
    assert made.training.cosine == "step" and made.provenance["training_images"] == 90


def test_a_run_goes_on_with_what_was_chosen_for_it(images: Path, working_directory: Path) -> None:
    first = train("--data", str(images), "--steps", "1", "--run-dir", "mine", "--set", "training.total_batch=8")
    assert first.code == 0 and "chosen\n" in first.said
    second = train("--data", str(images), "--steps", "2", "--run-dir", "mine")
    assert second.code == 0 and "chosen\n" not in second.said and "resuming mine after step 1" in second.said


def test_a_dry_run_for_a_card_prints_the_choice_and_writes_nothing(images: Path, working_directory: Path) -> None:
    found = train("--data", str(images), "--hours", "4", "--card", "gtx-970", "--size", "32", "--dry-run")
    assert found.code == 0, found.complained
    profile = printed(found)
    assert profile.model.image_size == 32 and profile.plan.cap_bytes and profile.provenance["card"] == "gtx-970"
    assert list(working_directory.iterdir()) == []


def test_what_is_set_holds_in_the_choice(images: Path) -> None:
    found = train("--data", str(images), "--card", "4g", "--dry-run", "--set", "model.bits=8", "data.test_fraction=0.5")
    profile = printed(found)
    assert profile.model.bits == 8 and profile.data.test_fraction == 0.5
    assert profile.provenance["training_images"] == 50


def test_fit_memory_chooses_writes_and_shows(images: Path, working_directory: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    arguments = ("--card", "gtx-970", "--hours", "48", "--data", str(images), "--size", "32", "--json", "answer.json")
    assert fitted(*arguments, "--out", "mine.toml") == 0
    profile, answer = profiles.load("mine.toml"), json.loads(Path("answer.json").read_text())
    assert answer["ends_before_the_hours"] and profile.training.hours == 0 and profile.training.steps == answer["steps"]
    assert answer["fits"] and answer["chosen"] and answer["given_up"] and answer["images_seen"] <= 400 * 90 + 128
    assert profile.provenance["predicted_reserved_bytes"] < profile.plan.cap_bytes
    said = capsys.readouterr().out
    assert "more images would use the time" in said and "wrote mine-images.png" in said
    assert sorted(p.name for p in working_directory.iterdir()) == ["answer.json", "mine-images.png", "mine.toml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "65"], "--size 65: models are chosen for images of an even number of pixels"),
        (["--size", "4"], "from 8 to 512"),
        (["--minutes", "0.001", "--card", "gtx-970", "--dry-run"], "give at least --minutes"),
        (["--hours", "1", "--minutes", "8"], "give one of them"),
        (["--hours", "-1"], "--hours -1.0: must be at least 0"),
        (["--card", "gtx-970"], "torch sees no GPU here to train on"),
        (["--card", "gtx-971", "--dry-run"], "gtx-971"),
        (["--auto-fit"], "--auto-fit goes with --profile"),
        (["--set", "data.crop=none"], "needs square images"),
        (["--set", "model.nosuch=1"], "model.nosuch"),
    ],
)
def test_every_mistake_is_one_message(arguments: list[str], words: str, images: Path, working_directory: Path) -> None:
    if torch.cuda.is_available() and arguments == ["--card", "gtx-970"]:
        pytest.skip("there is a GPU to train on")
    found = train("--data", str(images), *arguments)
    assert found.code == 2 and words in found.complained and "Traceback" not in found.complained
    assert list(working_directory.iterdir()) == []


def test_too_few_images_are_refused(images: Path) -> None:
    for path in list(images.iterdir())[15:]:
        path.unlink()
    found = train("--data", str(images))
    assert found.code == 2 and "at least 20 are needed" in found.complained


def test_no_images_and_no_profile_is_told_both_ways_out() -> None:
    found = train("--minutes", "8")
    assert found.code == 2 and "--profile is missing" in found.complained and "--data alone" in found.complained


@pytest.mark.parametrize("flag", [("--size", "64"), ("--card", "gtx-970")])
def test_a_profile_has_its_size_and_its_card(flag: tuple[str, str], tmp_path: Path) -> None:
    found = train("--profile", str(write_profile(tmp_path)), *flag)
    assert found.code == 2 and f"{flag[0]} {flag[1]} only means something without --profile" in found.complained


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hours", "8"], "name them with --data"),
        (["--hours", "8", "--data", "faces", "--recipe", "tiny"], "leave one out"),
        (["--hours", "8", "--data", "faces", "--total-batch", "4"], "leave one out"),
        (["--recipe", "tiny", "--data", "faces"], "only together with --hours"),
        (["--recipe", "tiny", "--size", "64"], "only together with --hours"),
        (["--hours", "8", "--data", "nowhere/at/all"], "does not exist"),
    ],
)
def test_fit_memory_refuses_halves_of_a_choice(arguments: list[str], words: str, capsys) -> None:  # type: ignore[no-untyped-def]
    assert fitted("--card", "gtx-970", *arguments) == 2
    assert words in capsys.readouterr().err
