"""Anomaly scores: how far from usual an image's likelihood and its coarsest latents are, and where in it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_folder
from generation_runs import DIGITS, RGB, demo_run, images_for, responsive, write_run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nvae_lowmem.commands import anomaly as command
from nvae_lowmem.data.image_files import load_images
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.evaluation.anomaly import AnomalyFigures, Usual, anomaly_figures, auroc, coarse_latents, usual_of
from nvae_lowmem.training.open_run import open_run, plain_batches


def figures(elbo: list[float], coarse: list[list[float]]) -> AnomalyFigures:
    return AnomalyFigures(
        torch.tensor(elbo, dtype=torch.float64),
        torch.zeros(len(elbo)),
        torch.zeros(len(elbo), 1, 1),
        torch.tensor(coarse),
    )


# --- the score --------------------------------------------------------------------------------------------------------


def test_a_score_counts_deviations_of_the_elbo_either_way_and_of_the_distance_to_the_nearest() -> None:
    references = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    held_out = figures([-100.0, -110.0] * 10, [[0.0, 1.0], [10.0, 3.0]] * 10)  # distances 1 and 3
    usual = Usual.of(references, held_out)
    scored = figures([-105.0, -85.0, -125.0, -105.0], [[0.0, 2.0], [0.0, 2.0], [0.0, 2.0], [10.0, 12.0]])
    s, s_distance = usual.elbo_deviation, usual.distance_deviation
    assert usual.score(scored).tolist() == pytest.approx([0, 20 / s, 20 / s, 10 / s_distance])


def test_what_is_usual_wants_held_out_images() -> None:
    with pytest.raises(ConfigError, match="--compare: 9 held-out images do not tell"):
        Usual.of(torch.zeros(1, 2), figures([0.0] * 9, [[0.0, 0.0]] * 9))


def test_images_that_are_all_alike_leave_a_finite_score() -> None:
    usual = Usual.of(torch.zeros(1, 2), figures([-5.0] * 10, [[0.0, 0.0]] * 10))
    assert usual.score(figures([-5.0], [[0.0, 0.0]])).tolist() == [0]
    assert usual.score(figures([-6.0], [[0.0, 1.0]])).isfinite().all()


# --- figures of images ------------------------------------------------------------------------------------------------


def test_what_later_groups_have_to_say_has_a_place_but_for_its_kl() -> None:
    model, images = responsive(RGB), images_for(RGB, 4)
    found = anomaly_figures(model, images, groups_from_prior=1, draws=2)
    assert found.later_groups.shape == found.elbo.shape == (4,) and found.map.shape == (4, 16, 16)
    assert (found.later_groups < found.map.sum((1, 2))).all()  # they also pay for what they say: their KL


def test_coarse_latents_are_posterior_means_of_the_lowest_resolution_alone() -> None:
    model, images = responsive(RGB), images_for(RGB, 5)
    coarse = coarse_latents(model, images.split(2))
    groups, size = RGB.scale_groups[-1], RGB.scale_sizes[-1]
    assert coarse.shape == (5, groups * RGB.latents * size**2)
    torch.testing.assert_close(coarse, anomaly_figures(model, images, 1, seed=7).coarse)  # no noise is in them


def test_figures_do_not_depend_on_how_images_share_passes() -> None:
    model, images = responsive(RGB), images_for(RGB, 5)
    together, apart = (anomaly_figures(model, images, 1, draws=2, micro_batch=size) for size in (5, 2))
    later = anomaly_figures(model, images[3:], 1, draws=2, first_image=3)
    for a, b, c in zip(together, apart, later, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(a[3:], c, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("groups", [0, 3])
def test_as_many_groups_as_the_model_has_cannot_come_from_the_prior(groups: int) -> None:
    with pytest.raises(ConfigError, match=f"--groups {groups}: must be from 1 to 2"):
        anomaly_figures(responsive(RGB), images_for(RGB, 1), groups)


# --- AUROC ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_auroc_is_the_share_of_pairs_in_the_right_order(normal: list[int], anomalous: list[int]) -> None:
    pairs = [(a > n) + 0.5 * (a == n) for n in normal for a in anomalous]
    assert auroc(torch.tensor(normal), torch.tensor(anomalous)) == pytest.approx(sum(pairs) / len(pairs))


# --- the command ------------------------------------------------------------------------------------------------------


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "anomalies" / "scores.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_command_writes_a_table_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_IMAGES_AT_A_TIME", 3)
    run = demo_run(tmp_path / "run")
    write_folder(tmp_path / "pictures", count=5)
    arguments = [str(tmp_path / "pictures"), "--run", str(run), "--draws", "1", "--references", "20", "--shown", "4"]
    assert command.main(arguments) == 0
    rows = rows_of(run)
    assert sorted(row["image"] for row in rows) == [f"{i:03d}.png" for i in range(5)]
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert (run / "anomalies" / "anomalies.png").stat().st_size > 1000
    assert "usual, by 20 training and 10 held-out images" in capsys.readouterr().out


def test_what_is_usual_are_images_as_files_are_taken_though_training_draws_their_bits_anew(tmp_path: Path) -> None:
    (tmp_path / "grey").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(60, 200, (40, 28, 28), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "grey" / f"{i}.png")
    folder = write_run(tmp_path / "run", responsive(DIGITS), source=str(tmp_path / "grey"), test_fraction=0.5)
    run = open_run(str(folder), "runs", "cpu")
    files = load_images([str(path) for path in sorted((tmp_path / "grey").iterdir())], run.profile)
    both = torch.cat([torch.cat(list(plain_batches(run, part, 0)[0])) for part in ("train", "test")])
    assert sorted(image.numpy().tobytes() for image in both) == sorted(image.numpy().tobytes() for image in files)
    usual, held_out = usual_of(run, 1, references=8, held_out=11)
    assert len(usual.references) == 8 and len(held_out.elbo) == 11


def test_too_few_held_out_images_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = demo_run(tmp_path / "run")
    assert command.main([str(tmp_path / "run" / "pictures"), "--run", str(run), "--compare", "4"]) == 2
    assert "--compare: 4 held-out images" in capsys.readouterr().err
