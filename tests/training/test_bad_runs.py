"""Sixty mistakes with runs, checkpoints and flags about them: each one message, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import run, tree, write_profile

from nvae_lowmem.training import checkpoint
from nvae_lowmem.training.checkpoint_files import MODEL, STATE, TRAINING
from nvae_lowmem.training.runs import LOCK

Damage = Callable[[Path], None]
"""Does something to a run's folder, which has checkpoints of steps 1 and 2."""


# --- damages ----------------------------------------------------------------------------------------------------------


def each(change: Damage) -> Damage:
    """The same to every checkpoint."""

    def damage(folder: Path) -> None:
        for path in checkpoint.all_checkpoints(folder):
            change(path)

    return damage


def state(text: str) -> Damage:
    return each(lambda path: (path / STATE).write_text(text) and None)


def state_of_format_1(**changes: object) -> Damage:
    def change(path: Path) -> None:
        sizes = {name: (path / name).stat().st_size for name in (MODEL, TRAINING)}
        table = {"format": 1, "step": checkpoint.step_of(path), "bytes": sizes} | changes
        (path / STATE).write_text(json.dumps(table))

    return each(change)


def cut(name: str, bytes_left: int) -> Damage:
    return each(lambda path: os.truncate(path / name, bytes_left))


def flip(name: str) -> Damage:
    def change(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[-1] ^= 1
        (path / name).write_bytes(content)

    return each(change)


def tensors(edit: Callable[[dict[str, torch.Tensor]], None], name: str = TRAINING) -> Damage:
    def change(path: Path) -> None:
        found = load_file(path / name)
        edit(found)
        save_file(found, path / name)

    def damage(folder: Path) -> None:
        each(change)(folder)
        state_of_format_1()(folder)

    return damage


def first(found: dict[str, torch.Tensor], prefix: str) -> str:
    return next(key for key in sorted(found) if key.startswith(prefix))


def content(name: str, data: bytes) -> Damage:
    def damage(folder: Path) -> None:
        each(lambda path: (path / name).write_bytes(data) and None)(folder)
        state_of_format_1()(folder)

    return damage


def becomes_folder(name: str) -> Damage:
    def change(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return each(change)


def file_instead(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").write_text("no folder")


def renamed(folder: Path) -> None:
    for path in reversed(checkpoint.all_checkpoints(folder)):
        path.rename(path.with_name(f"step-{checkpoint.step_of(path) + 10:08d}"))


def config(text: bytes | None) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "config.toml").unlink()
        if text is not None:
            (folder / "config.toml").write_bytes(text)

    return damage


def config_of_another_model(folder: Path) -> None:
    path = folder / "config.toml"
    path.write_text(path.read_text().replace("latents = 2", "latents = 7"))


def lock_is_link(folder: Path) -> None:
    (folder / LOCK).unlink()
    (folder / LOCK).symlink_to(folder / "config.toml")


def lock_is_folder(folder: Path) -> None:
    (folder / LOCK).unlink()
    (folder / LOCK).mkdir()


def nothing(folder: Path) -> None:
    """The run is as it should be."""


DAMAGES: dict[str, tuple[Damage, str]] = {
    "checkpoints a file": (file_instead, "must be a folder of checkpoints"),
    "model cut": (cut(MODEL, 100), f"{MODEL} is truncated"),
    "model empty": (cut(MODEL, 0), f"{MODEL} is truncated"),
    "training cut": (cut(TRAINING, 1000), f"{TRAINING} is truncated"),
    "state cut": (cut(STATE, 20), "missing or damaged"),
    "state missing": (each(lambda path: (path / STATE).unlink()), "missing or damaged"),
    "model missing": (each(lambda path: (path / MODEL).unlink()), "missing or damaged"),
    "training missing": (each(lambda path: (path / TRAINING).unlink()), "missing or damaged"),
    "folders empty": (each(lambda path: [f.unlink() for f in path.iterdir()] and None), "missing or damaged"),  # type: ignore[func-returns-value]
    "state a folder": (becomes_folder(STATE), "missing or damaged"),
    "model a folder": (becomes_folder(MODEL), "truncated"),
    "state {}": (state("{}"), "missing or damaged"),
    "state a list": (state("[1, 2]"), "missing or damaged"),
    "state no JSON": (state("step 3"), "missing or damaged"),
    "state bytes": (each(lambda path: (path / STATE).write_bytes(b"\xff\xfe\x00") and None), "missing or damaged"),
    "state deep": (state("[" * 200_000), "missing or damaged"),
    "state long": (state(" " * (2 << 20)), "missing or damaged"),
    "state digits": (state('{"format": ' + "1" * 5000 + "}"), "missing or damaged"),
    "format 3": (state('{"format": 3}'), "use the version of nvae-lowmem that wrote it"),
    "format 2 as text": (state('{"format": "2"}'), "format '2'"),
    "format null": (state('{"format": null}'), "format None"),
    "format true": (state('{"format": true}'), "format True"),
    "state changed": (each(lambda path: (path / STATE).write_text(
        (path / STATE).read_text().replace('"figures"', '"figurez"')) and None), "missing or damaged"),
    "step infinite": (state('{"format": 1, "step": 1e400, "bytes": {"model.safetensors": 1}}'), "missing or damaged"),
    "step negative": (state_of_format_1(step=-5), "missing or damaged"),
    "step a fraction": (state_of_format_1(step=1.5), "missing or damaged"),
    "step a text": (state_of_format_1(step="1"), "missing or damaged"),
    "step huge": (state_of_format_1(step=10**30), "it was renamed"),
    "no sizes": (state_of_format_1(bytes={}), "missing or damaged"),
    "sizes a text": (state_of_format_1(bytes="none"), "missing or damaged"),
    "a file elsewhere": (state_of_format_1(bytes={MODEL: 1, "../../config.toml": 1}), "missing or damaged"),
    "folders renamed": (renamed, "it was renamed"),
    "bit of the model": (flip(MODEL), f"{MODEL} is damaged: its SHA-256"),
    "bit of the training": (flip(TRAINING), f"{TRAINING} is damaged: its SHA-256"),
    "no safetensors": (content(TRAINING, b"hello"), f"{TRAINING} cannot be read"),
    "header too long": (content(TRAINING, struct.pack("<Q", 1 << 62) + b"{}"), f"{TRAINING} cannot be read"),
    "header no JSON": (content(MODEL, struct.pack("<Q", 4) + b"[[[["), f"{MODEL} cannot be read"),
    "a weight NaN": (tensors(lambda t: t.update(bad=torch.tensor([float("nan")]))), "hold inf or NaN (first: bad)"),
    "an average inf": (tensors(lambda t: t.update(bad=torch.tensor([float("inf")])), MODEL), "hold inf or NaN"),
    "another model": (tensors(lambda t: t.update({"weight.nobody": torch.zeros(1)})), "first: weight.nobody"),
    "a state missing": (tensors(lambda t: t.pop(first(t, "exp_inf.")) is None or None),
                        "do not belong to the model"),
    "a step missing": (tensors(lambda t: t.pop(first(t, "step.")) is None or None), "first: step."),
    "another shape": (tensors(lambda t: t.update({first(t, "weight."): torch.zeros(3, 3, 3)})), "do not belong to the"),
    "a loss scale of nine": (tensors(lambda t: t.update(loss_scale=torch.ones(9))), "first: loss_scale"),
    "config missing": (config(None), "config.toml"),
    "config broken": (config(b"[model\n"), "config.toml"),
    "config bytes": (config(b"\xff\xfe\x00\x01"), "config.toml"),
    "config of another model": (config_of_another_model, "model.latents (7 -> 2)"),
    "lock a link": (lock_is_link, "nothing can be written there"),
    "lock a folder": (lock_is_folder, "nothing can be written there"),
}  # fmt: skip
FLAGS: dict[str, tuple[list[str], str]] = {
    "never resume": (["--resume", "never"], "--resume is never"),
    "no such step": (["--resume-from", "99"], "no checkpoint of that step; there are: 1, 2"),
    "a step below 0": (["--resume-from", "-1"], "no checkpoint of that step"),
    "another model": (["--set", "model.latents=3"], "model.latents (2 -> 3)"),
    "another batch that does not divide": (["--total-batch", "10"], "is not a multiple"),
    "rewinds below 0": (["--set", "training.rewinds=-1"], "training.rewinds"),
    "rewinds a word": (["--set", "training.rewinds=many"], "training.rewinds"),
    "skipped norm below 0": (["--set", "training.skip_gradient_norm=-1"], "training.skip_gradient_norm"),
    "quantile 1": (["--set", "training.skip_gradient_quantile=1"], "training.skip_gradient_quantile"),
    "rate NaN": (["--set", "training.learning_rate=nan"], "training.learning_rate"),
    "rate infinite": (["--set", "training.learning_rate=1e400"], "training.learning_rate"),
    "nothing kept": (["--set", "training.keep_last=0"], "training.keep_last"),
    "data that are gone": (["--data", "no/such/folder"], "does not exist"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("trained")
    profile = write_profile(root)
    assert run(profile, "--run-dir", str(root / "run"), "--steps", "2").code == 0
    return profile, root / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name != LOCK}


def answer(trained: tuple[Path, Path], tmp_path: Path, damage: Damage, arguments: list[str]) -> str:
    """What the training command says of a damaged copy of the run, in which it must not have changed anything."""
    profile, whole = trained
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    damage(folder)
    before = contents(folder)
    result = run(profile, "--run-dir", str(folder), "--steps", "4", *arguments)
    assert result.code == 2, result
    assert result.complained.startswith("train.py: ") and result.complained.endswith("\n")
    assert "Traceback" not in result.complained and "\n\n" not in result.complained
    assert contents(folder) == before
    return result.complained


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_run_is_answered_in_one_paragraph_and_left_as_it_is(
    trained: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    damage, words = DAMAGES[name]
    said = answer(trained, tmp_path, damage, [])
    assert words in said, said


@pytest.mark.parametrize("name", list(FLAGS))
def test_a_flag_that_cannot_be_is_answered_in_one_paragraph_and_the_run_left_as_it_is(
    trained: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    arguments, words = FLAGS[name]
    said = answer(trained, tmp_path, nothing, arguments)
    assert words in said, said


def test_going_on_from_a_step_needs_a_run(tmp_path: Path) -> None:
    result = run(write_profile(tmp_path), "--runs-dir", str(tmp_path / "runs"), "--resume-from", "2")
    assert result.code == 2 and "needs --run-dir" in result.complained and not (tmp_path / "runs").exists()
