"""Traversals: one group moves by sigmas of the prior and nothing else; activity per group, `launch/traverse.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import generation_runs as runs
import pytest
import torch
from generation_runs import images_for, picture_file, responsive, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from launch.traverse import main
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.reconstruct import reconstruct
from nvae_lowmem.generation.traverse import (
    Move,
    Moved,
    Recorded,
    TraversalRow,
    activity_table,
    channel_kl,
    check_channels,
    collapse_warnings,
    heat_colours,
    moves_of,
    parse_groups,
    rows_of,
    sigma_steps,
    traversal_picture,
    traverse,
)
from nvae_lowmem.model.latents import FromPosterior, NoNoise
from nvae_lowmem.model.nvae import NVAE

GREY, RGB, DIGITS = (replace(config, latents=3) for config in (runs.GREY, runs.RGB, runs.DIGITS))
MANY = replace(GREY, image_size=8, padding=0, groups_per_scale=(20, 10))


def relative_after(model: NVAE, recorded: Sequence[Tensor], moves: Sequence[Move]) -> list[Tensor]:
    """r of every group in the pass that the moves make, measured anew."""
    again = Recorded(Moved(recorded, moves))
    with torch.no_grad():
        model.top_down(again, batch=len(moves))
    return again.relative


# --- moving a group ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(
    st.lists(
        st.builds(
            Move,
            st.integers(0, 2),
            st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True).map(tuple),
            st.floats(-3, 3, width=32),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_a_move_adds_sigmas_to_its_group_and_channels_and_to_nothing_else(moves: list[Move]) -> None:
    model = responsive(GREY)
    recorded = Recorded(FromPosterior(NoNoise()))
    with torch.no_grad():
        model.top_down(recorded, model.encode(images_for(GREY, 1)))
    after = relative_after(model, recorded.relative, moves)
    for i, move in enumerate(moves):
        for group, (r, own) in enumerate(zip(after, recorded.relative, strict=True)):
            expected = own[0].clone()
            if group == move.group:
                expected[[0, 1, 2] if move.channels is None else list(move.channels)] += move.sigmas
            torch.testing.assert_close(r[i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [GREY, RGB], ids=["grey", "rgb with flows"])
@pytest.mark.parametrize("posterior", ["sample", "mean"])
def test_unmoved_is_the_reconstruction(config: ModelConfig, posterior: str) -> None:
    model, image = responsive(config), images_for(config, 1)
    unmoved = traverse(model, image, [Move(1, None, 0.0)], posterior, seed=3)
    torch.testing.assert_close(unmoved, reconstruct(model, image, 3, 1, posterior).images, rtol=0, atol=1e-5)


def test_moves_change_the_picture_the_more_the_further_and_not_by_chunks() -> None:
    model, image = responsive(RGB), images_for(RGB, 1)
    moves = [Move(group, None, sigmas) for group in range(3) for sigmas in (0.0, 1.0, 2.0)]
    seen: list[tuple[int, int]] = []
    whole = traverse(model, image, moves, micro_batch=9)
    parts = traverse(model, image, moves, micro_batch=4, progress=lambda *now: seen.append(now))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert seen == [(4, 9), (8, 9), (9, 9)]
    for group in range(3):
        still, near, far = whole[3 * group : 3 * group + 3]
        assert 1e-4 < (near - still).norm() < (far - still).norm()


# --- which groups live ------------------------------------------------------------------------------------------------


def test_channel_kl_is_the_mean_over_images_whatever_the_batches() -> None:
    model, images = responsive(GREY), images_for(GREY, 5)
    kl, count = channel_kl(model, images.split(5), seed=0)
    in_parts, _ = channel_kl(model, images.split(2), seed=0)
    assert kl.shape == (3, 3) and count == 5
    torch.testing.assert_close(in_parts, kl, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        terms = model(images[:1], NoNoise())  # the first group's KL does not depend on noise
    alone, _ = channel_kl(model, [images[:1]], seed=0)
    torch.testing.assert_close(alone[0], terms.kl[0][0].double(), rtol=1e-4, atol=1e-6)


def test_table_counts_active_channels() -> None:
    kl = torch.tensor([[0.05, 0.2, 3.0], [0.0, 0.0, 0.0], [0.11, 0.11, 0.11]])
    lines = activity_table(kl, GREY).splitlines()
    assert [line.split() for line in lines[1:]] == [
        "1 4 x 4 3.250 2 of 3".split(),
        "2 8 x 8 0.000 0 of 3".split(),
        "3 8 x 8 0.330 3 of 3".split(),
        "all 3.580 5 of 9".split(),
    ]


@given(st.lists(st.floats(0, 1), min_size=30, max_size=30))
def test_a_scale_is_said_to_have_collapsed_when_next_to_none_of_its_channels_are_active(values: list[float]) -> None:
    kl = torch.tensor(values)[:, None] * torch.ones(1, 3)
    dead = [size for size, part in ((2, kl[:10]), (4, kl[10:])) if (part > 0.1).double().mean() < 0.05]
    warnings = collapse_warnings(kl, MANY)
    assert [f"{size} x {size} pixels" in text for size, text in zip(dead, warnings, strict=True)] == [True] * len(dead)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_groups_are_counted_from_one_and_spread_where_there_are_many() -> None:
    assert parse_groups("", GREY) == [0, 1, 2] and parse_groups("3,1", GREY) == [2, 0]
    spread = parse_groups("", MANY)
    assert len(spread) == 12 and spread[0] == 0 and spread[-1] == 29 and spread == sorted(set(spread))
    for text in ("0", "4", "1,-1", "top", "1.5"):
        with pytest.raises(ConfigError, match=f"--groups {text}: "):
            parse_groups(text, GREY)


def test_rows_are_groups_or_their_most_active_channels() -> None:
    kl = torch.tensor([[0.3, 0.2, 3.0], [0.0, 0.5, 0.2], [0.1, 0.1, 0.1]])
    assert [row[:2] for row in rows_of([0, 2], 0, kl, GREY)] == [(0, None), (2, None)]
    rows = rows_of([0, 1], 2, kl, GREY)
    assert [row[:2] for row in rows] == [(0, (2,)), (0, (0,)), (1, (1,)), (1, (2,))]
    assert "group 1 of 3, 4 x 4: channel 3, KL 3.00 nats" in rows[0].caption
    moves = moves_of(rows, [-1.0, 1.0])
    assert len(moves) == 9 and moves[0].sigmas == 0 and moves[1:3] == [Move(0, (2,), -1.0), Move(0, (2,), 1.0)]


def test_sigmas_are_even_and_symmetric() -> None:
    assert sigma_steps(2.0, 5) == [-2, -1, 0, 1, 2]
    for sigmas, steps, message in ((0, 3, "--sigmas 0"), (float("nan"), 3, "--sigmas nan"), (1.0, 1, "--steps 1")):
        with pytest.raises(ConfigError, match=message):
            sigma_steps(sigmas, steps)


@pytest.mark.parametrize("count", [-1, 4])
def test_more_channels_than_a_group_has_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"--channels {count}: must be from 1 to 3"):
        check_channels(count, GREY)


def test_heat_goes_from_black_over_red_and_yellow_to_white() -> None:
    colours = heat_colours(torch.tensor([[0, 1 / 3, 2 / 3, 1]]))
    torch.testing.assert_close(colours[:, 0].T, torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]))


def test_map_is_brightest_where_the_row_differs_most() -> None:
    images = torch.full((5, 1, 60, 60), 0.5)
    images[2, 0, 10, 20], images[1, 0, 30, 30] = 0.9, 0.4  # of the first row; the second differs nowhere
    rows = [TraversalRow(0, None, "moved"), TraversalRow(1, None, "still")]
    picture = traversal_picture(rows, images, "caption", [-1.0, 1.0])
    cells, under = grids.grid(images[1:3], 2), grids.UNDER_PIXELS
    caption = grids.CAPTION_PIXELS + 2 * grids.CAPTION_MARGIN_PIXELS
    height = cells.shape[0]
    assert picture.shape[0] == 3 * (caption + height) + 2 * under
    tops = (2 * caption + height, 3 * caption + 2 * height + under)
    first, second = (picture[top:][:height, 124:186] for top in tops)
    heat = first[2:62, 2:62].astype(int)
    assert heat[10, 20].tolist() == [255, 255, 255]
    assert heat[30, 30].tolist() == pytest.approx([191, 0, 0], abs=1)  # a quarter as much: three quarters of red
    heat[10, 20] = heat[30, 30] = 0
    assert not heat.any() and not second[2:62, 2:62].any()


# --- launch/traverse.py -----------------------------------------------------------------------------------------------


def test_command_shows_every_group_around_a_held_out_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "runs" / "00000-t", responsive(DIGITS))
    assert main(["--runs-dir", str(run.parent), "--count", "6", "--steps", "3", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "over 6 images" in out and out.count(" of 3\n") == 3
    picture = Image.open(run / "samples" / "traverse-held-out-0.png")
    assert picture.height == 4 * (grids.CAPTION_PIXELS + 2 * grids.CAPTION_MARGIN_PIXELS + 60) + 3 * grids.UNDER_PIXELS


def test_without_its_data_activity_is_that_of_the_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", responsive(RGB), source=str(tmp_path / "gone"))
    path = picture_file(tmp_path / "a.png")
    assert main([path, "--run", str(run), "--groups", "2", "--channels", "2", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "KL is that of the given image" in captured.err and "over 1 image:" in captured.out
    assert (tmp_path / "traverse-a.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A", "--run", "nobody"], "--run nobody: no run folder"),
        (["gone.png"], "image gone.png: cannot be read: No such file"),
        (["A", "A"], "2 images are given: a traversal is around one"),
        (["A", "--groups", "4"], "--groups 4: every number must be from 1 to 3"),
        (["A", "--channels", "9"], "--channels 9: must be from 1 to 3"),
        (["A", "--sigmas", "0"], "--sigmas 0.0: must be larger than 0"),
        (["A", "--steps", "1"], "--steps 1: must be at least 2"),
        (["A", "--count", "-1"], "--count -1: must be at least 1"),
        (["A", "--box", "1,2,3"], "--box 1,2,3: must be x,y,w,h"),
        ([], "gone"),  # the data of the run
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_run(tmp_path / "runs" / "00000-t", responsive(RGB), source=str(tmp_path / "gone"))
    path = picture_file(tmp_path / "a.png")
    words = [path if word == "A" else word for word in arguments]
    assert main(["--runs-dir", str(tmp_path / "runs"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("traverse.py: ") and error.count("\n") == 1
