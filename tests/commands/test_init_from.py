"""`train --init-from`: every name that weights go by, what is recorded, going on, and the answer to every mistake."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from published_checkpoint import FIXTURES
from safetensors.torch import load_file
from torch import Tensor
from training_runs import STEPS, Finished, run, tree, write_profile

import nvae_lowmem as nl
from nvae_lowmem.commands.import_nvlabs import main as import_nvlabs
from nvae_lowmem.commands.train import main
from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.library.export import export_run, pack
from nvae_lowmem.library.weights import find_weights
from nvae_lowmem.training import checkpoint
from nvae_lowmem.training.checkpoint_files import MODEL, TRAINING
from nvae_lowmem.training.open_run import open_run


@dataclass(frozen=True, repr=False)
class Trained:
    """A finished run, and its averaged weights and those without averaging."""

    folder: Path
    profile: Path
    averaged: dict[str, Tensor]
    last: dict[str, Tensor]

    @property
    def checkpoint(self) -> Path:
        return checkpoint.all_checkpoints(self.folder)[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    profile, folder = write_profile(root), root / "runs" / "00000-quick"
    assert run(profile, "--run-dir", str(folder)).code == 0
    path = checkpoint.all_checkpoints(folder)[-1]
    state = load_file(path / TRAINING)
    last = {name.removeprefix("weight."): value for name, value in state.items() if name.startswith("weight.")}
    return Trained(folder, profile, load_file(path / MODEL), last)


def train(*arguments: str) -> Finished:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["--device", "cpu", *arguments])
    return Finished(code, out.getvalue(), err.getvalue())


def weights_after(folder: Path) -> dict[str, Tensor]:
    state = load_file(checkpoint.all_checkpoints(folder)[-1] / TRAINING)
    return {name.removeprefix("weight."): value for name, value in state.items() if name.startswith("weight.")}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_run_alone_says_model_data_and_all_but_the_learning_rate(trained: Trained, tmp_path: Path) -> None:
    result = train("--init-from", str(trained.folder), "--run-dir", str(tmp_path / "new"), "--steps", "1")
    assert result.code == 0 and "weights from" in result.said and "averaged weights: " in result.said
    assert "0.1 of the one for random weights" in result.said and "beta 1 from the first step on" in result.said
    new, old = (profiles.load(folder / "config.toml") for folder in (tmp_path / "new", trained.folder))
    assert new.model == old.model and new.data == old.data and new.training.init_from == str(trained.folder)
    records = [json.loads(line) for line in (tmp_path / "new" / "stats.jsonl").read_text().splitlines()]
    assert [r["event"] for r in records if "event" in r] == ["weights"]
    assert next(r["kl_coeff/coeff"] for r in records if "kl_coeff/coeff" in r) == 1.0


@pytest.mark.parametrize("form", ["run", "number", "latest", "~", "checkpoint", "without averaging", "export", "zip"])
def test_every_form_of_weights_is_found_and_read(
    trained: Trained, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(trained.folder)
    if form == "~":
        monkeypatch.setenv("HOME", str(trained.folder.parent))
        source = f"~/{trained.folder.name}"
    elif form in ("number", "latest"):
        source = "0" if form == "number" else form
    elif form == "checkpoint":
        source = str(trained.checkpoint)
    elif form == "without averaging":
        source = str(trained.checkpoint / TRAINING)
    elif form in ("export", "zip"):
        folder = export_run(open_run(source, ""), tmp_path / "given", temperatures=(), passes=2)
        source = str(pack(folder) if form == "zip" else folder)
    found = find_weights(source, str(trained.folder.parent))
    expected = trained.last if form == "without averaging" else trained.averaged
    tensors = found.read().tensors
    assert found.path.is_absolute() and found.profile.model == profiles.load(trained.profile).model
    assert tensors.keys() == trained.averaged.keys() and same(expected, dict(tensors))


def test_a_profile_of_the_same_model_says_everything_else(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    profile = write_profile(tmp_path / "other", image_size="image_size = 24", steps="steps = 2")
    result = run(profile, "--init-from", str(trained.folder), "--run-dir", str(tmp_path / "new"))
    assert result.code == 0 and "learned start is scaled from 8 x 8 to 12 x 12" in result.said, result
    assert profiles.load(tmp_path / "new" / "config.toml").model.image_size == 24


def test_another_model_is_refused_field_by_field_unless_it_is_meant(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    profile = write_profile(tmp_path / "other", latents="latents = 3", groups="groups = 3")
    result = run(profile, "--init-from", str(trained.folder), "--dry-run")
    assert result.code == 2 and "Traceback" not in result.complained
    assert "model.latents 2 -> 3, groups per scale [2] -> [3]" in result.complained
    result = train("--init-from", str(trained.folder), "--dry-run", "--set", "model.groups=3")
    assert result.code == 0 and "keep their initial values" in result.said
    result = train("--init-from", str(trained.folder), "--dry-run", "--set", "model.channels_decoder=8")
    assert result.code == 2 and "too little like this model" in result.complained


def test_a_run_goes_on_from_its_own_checkpoints_also_without_the_first_weights(
    trained: Trained, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained.folder, source)
    arguments = ("--init-from", str(source), "--set", "training.learning_rate=0.01")
    assert train(*arguments, "--run-dir", str(tmp_path / "whole")).code == 0
    assert train(*arguments, "--run-dir", str(tmp_path / "halves"), "--steps", str(STEPS)).code == 0
    for path in checkpoint.all_checkpoints(tmp_path / "halves")[1:]:
        shutil.rmtree(path)
    shutil.rmtree(source)
    result = train(*arguments, "--run-dir", str(tmp_path / "halves"))
    assert result.code == 0 and "resuming" in result.said and "weights from" not in result.said
    assert same(weights_after(tmp_path / "halves"), weights_after(tmp_path / "whole"))
    again = train("--run-dir", str(tmp_path / "halves"), "--set", f"training.steps={STEPS + 1}")
    assert again.code == 0 and "weights from" not in again.said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--init-from", "nowhere"], "--init-from nowhere: is no run (by folder, number or name in runs)"),
        (["--init-from", __file__], "is no file of torch.save"),
    ],
)
def test_weights_that_are_none_end_in_one_message(arguments: list[str], told: str, tmp_path: Path) -> None:
    result = train(*arguments, "--run-dir", str(tmp_path / "new"))
    assert result.code == 2 and told in result.complained and "Traceback" not in result.complained
    assert not (tmp_path / "new").exists()


def test_a_run_that_has_begun_cannot_begin_from_other_weights(trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained.folder, folder)
    before = tree(folder)
    result = train("--run-dir", str(folder), "--init-from", str(trained.folder), "--set", "training.steps=9")
    assert result.code == 2 and "the run began from random weights" in result.complained
    assert tree(folder) == before


def test_damaged_weights_are_found_before_anything_is_written(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.folder, tmp_path / "source")
    for path in checkpoint.all_checkpoints(tmp_path / "source"):
        (path / MODEL).write_bytes((path / MODEL).read_bytes()[:-8])
    result = train("--init-from", str(tmp_path / "source"), "--run-dir", str(tmp_path / "new"))
    assert result.code == 2 and "truncated" in result.complained and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "data"), [("tiny", "mnist5k"), ("tiny_rgb32_nf", "faces")])
def test_a_published_checkpoint_trains_on(
    name: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, imported, new = FIXTURES / name / "checkpoint.pt", tmp_path / "imported", tmp_path / "new"
    if name == "tiny":  # by way of a run folder, as the import says
        assert import_nvlabs([str(source), "--out", str(imported)]) == 0
        assert f"--init-from {imported} --data" in capsys.readouterr().out
        source = imported
    result = train(
        "--init-from", str(source), "--run-dir", str(new), "--data", data, "--total-batch", "8", "--steps", "8",
        "--set", "data.faces_count=40", "training.learning_rate=0.003", "training.warmup_epochs=0",
        "training.evaluate_images=8", "training.sample_every=100",
    )  # fmt: skip
    assert result.code == 0, result.complained
    records = [json.loads(line) for line in (new / "stats.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def test_the_library_begins_from_weights_too(trained: Trained, tmp_path: Path) -> None:
    settings = {"training.steps": 1, "training.learning_rate": 1e-30}
    model = nl.train(trained.profile, init_from=trained.folder, settings=settings, runs_dir=tmp_path, device="cpu")
    assert same(dict(model.network.named_parameters()), trained.averaged)
