"""The training command before it trains: what a dry run prints, and the answer to every mistake."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import PROFILE, run, tree, write_profile

from nvae_lowmem.config import profile_file as profiles


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to run in, so that whatever is written by default shows."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder


def test_a_dry_run_prints_the_plan_and_writes_nothing(working_directory: Path, tmp_path: Path) -> None:
    profile = write_profile(tmp_path)
    for more in ((), ("--run-dir", "mine"), ("--runs-dir", "elsewhere")):
        result = run(profile, "--dry-run", *more)
        assert result.code == 0 and "parameters" in result.said and list(working_directory.iterdir()) == []
        printed = profiles.loads(result.said[result.said.index("name = ") :])
        assert printed == profiles.loads(profiles.dumps(printed)) and printed.plan.micro_batch == 4


@pytest.mark.parametrize(
    ("arguments", "hours"), [(["--hours", "48"], 48), (["--minutes", "8"], 8 / 60), (["--steps", "9"], 0), ([], 1.5)]
)
def test_hours_and_minutes_are_one_setting_and_steps_lift_it(
    arguments: list[str], hours: float, tmp_path: Path
) -> None:
    profile = write_profile(tmp_path, steps="hours = 1.5")
    result = run(profile, "--dry-run", *arguments)
    assert profiles.loads(result.said[result.said.index("name = ") :]).training.hours == hours


def test_a_dry_run_allocates_no_weights(tmp_path: Path) -> None:
    """Those of this model would take more than 100 GB."""
    result = run(write_profile(tmp_path), "--dry-run", "--set", "model.channels_encoder=8192")
    assert result.code == 0
    parameters = next(line for line in result.said.splitlines() if " parameters" in line).split()[1]
    assert int(parameters.replace(",", "")) > 10**10


def pictures(folder: Path, mode: str = "L", size: tuple[int, int] = (20, 20), count: int = 6) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")
    return folder


def bad_inputs(tmp_path: Path) -> dict[str, tuple[list[str], list[str]]]:
    """What a user may get wrong: name -> (arguments, words that the answer has to contain)."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "typo.toml").write_text(PROFILE.replace("total_batch", "total_bach"))
    (tmp_path / "broken.toml").write_text("[model\n")
    grey = str(pictures(tmp_path / "grey"))
    coloured = str(pictures(tmp_path / "coloured", "RGB"))
    wide = str(pictures(tmp_path / "wide", size=(20, 12)))
    colour_model = ["--set", "model.image_channels=3", "--set", "model.bits=8"]
    return {
        "missing data": (["--data", "no/such/folder"], ["/no/such/folder' does not exist", "--data"]),
        "misspelt set": (["--data", "mnist5"], ["did you mean 'mnist5k'"]),
        "empty folder": (["--data", str(tmp_path / "empty")], [str(tmp_path / "empty"), "it is empty"]),
        "grey for RGB": (["--data", grey, *colour_model], ["are grey", "set model.image_channels = 1"]),
        "RGB for grey": (["--data", coloured], ["in colour", "set model.image_channels = 3"]),
        "not square": (["--data", wide, "--set", "data.crop='none'"], ["20 x 12", "data.crop = 'centre'"]),
        "too small": (["--data", wide, "--set", "data.crop_pixels=16"], ["20 x 12", "set at most 12"]),
        "unknown profile": (["--profile", "demo-mnits"], ["--profile demo-mnits", "near: demo-mnist"]),
        "nothing like it": (["--profile", "nosuch"], ["first to try is demo-mnist", "tools/profiles.py lists them"]),
        "part of a name": (["--profile", "celeba64"], ["near: 2g-celeba64, 3g-celeba64"]),
        "data to bring": (["--profile", "gtx-970-celeba64"], ["'celeba64': these images do not", "--data img_align"]),
        "broken profile": (["--profile", str(tmp_path / "broken.toml")], ["broken.toml", "not valid TOML"]),
        "unknown key": (["--profile", str(tmp_path / "typo.toml")], ["did you mean training.total_batch?"]),
        "unknown --set": (["--set", "model.latent=3"], ["did you mean model.latents?"]),
        "shapeless --set": (["--set", "latents"], ["'latents' must look like"]),
        "wrong type": (["--set", "model.latents=many"], ["model.latents = 'many' must be a whole number"]),
        "impossible model": (["--set", "model.image_size=15"], ["15 pixels cannot be halved 1 times", "use 16"]),
        "several at once": (["--set", "model.bits=9", "--set", "plan.zero_stage=5"], ["model.bits", "plan.zero_stage"]),
        "not divisible": (["--total-batch", "10"], ["total_batch = 10 is not a multiple of plan.micro_batch = 4"]),
        "no data": (["--data", ""], ["data.source is empty"]),
        "emoji": (["--data", "no/pics \U0001f600"], ["no/pics \U0001f600' does not exist"]),
        "no such block": (["--set", 'plan.keep_blocks={dec_0_9="host"}'], ["names 'dec_0_9'", "near: dec_0_"]),
        "no such block, dry run": (["--dry-run", "--set", 'plan.keep_blocks={"pst*"="host"}'], ["'pst*'", "near: "]),
        "size bomb": (["--dry-run", "--set", "model.image_size=1000000"], ["image_size = 1000000 must be from 1"]),
        "batch bomb": (["--micro-batch", "1000000"], ["plan.micro_batch = 1000000 must be from 0 to 65,536"]),
        "infinite": (["--set", "training.epochs=inf"], ["training.epochs = inf must be from 0"]),
        "two lengths": (["--hours", "2", "--minutes", "30"], ["--hours 2 and --minutes 30", "give one of them"]),
        "steps and hours": (["--hours", "2", "--steps", "9"], ["--hours 2 and --steps 9", "give one of them"]),
        "less than no time": (["--minutes", "-3"], ["--minutes -3", "must be at least 0"]),
        "no time at all": (["--hours", "nan"], ["training.hours = nan must be from 0"]),
        "no place": (["--runs-dir", str(tmp_path / "file" / "runs")], ["--runs-dir", "cannot make a run folder"]),
        "no place for one": (["--run-dir", str(tmp_path / "file")], ["--run-dir", "cannot be made"]),
    }  # fmt: skip


BAD_INPUTS = (
    "missing data", "misspelt set", "empty folder", "grey for RGB", "RGB for grey", "not square", "too small",
    "nothing like it", "part of a name", "data to bring",
    "unknown profile", "broken profile", "unknown key", "unknown --set", "shapeless --set", "wrong type",
    "impossible model", "several at once", "not divisible", "no place", "no place for one", "no data", "emoji",
    "no such block", "no such block, dry run", "size bomb", "batch bomb", "infinite", "two lengths",
    "steps and hours", "less than no time", "no time at all",
)  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_a_mistake_is_answered_in_one_paragraph_and_nothing_is_written(
    name: str, working_directory: Path, tmp_path: Path
) -> None:
    profile = write_profile(tmp_path)
    cases = bad_inputs(tmp_path)
    assert set(cases) == set(BAD_INPUTS)
    arguments, words = cases[name]
    before = tree(tmp_path)
    result = run(profile, *arguments)
    assert result.code == 2
    assert result.complained.startswith("train.py: ") and result.complained.endswith("\n")
    assert "Traceback" not in result.complained and "\n\n" not in result.complained
    assert all(word in result.complained for word in words), result.complained
    assert tree(tmp_path) == before and list(working_directory.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_mistake_too(working_directory: Path, tmp_path: Path) -> None:
    result = run(write_profile(tmp_path), "--device", "cuda")
    assert result.code == 2 and "--device cuda" in result.complained and list(working_directory.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--no-such-flag"], ["--steps", "many"], ["--resume", "perhaps"]])
def test_flags_that_there_are_not_end_with_the_same_exit_code(
    arguments: list[str], working_directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(write_profile(tmp_path), *arguments)
    assert caught.value.code == 2 and list(working_directory.iterdir()) == []


def test_a_truncated_image_is_skipped_and_counted(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", count=8)
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    result = run(write_profile(tmp_path), "--data", str(folder), "--runs-dir", str(tmp_path / "runs"), "--steps", "1")
    assert result.code == 0
    assert result.complained.startswith("warning: 9") and result.complained.count("\n") == 1  # of noise under one bit
    assert "1 images cannot be read and are skipped" in result.said and str(folder / "3.png") in result.said
    assert "1 unreadable images skipped" in result.said and "step 1/1" in result.said
