"""Pictures of many images: grids, labels, saved files, and what training draws as it goes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from generation_runs import GREY, changed, seasoned, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nvae_lowmem.config.sections import MemoryPlan, Profile
from nvae_lowmem.data.pipeline import without_padding
from nvae_lowmem.generation import grids


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 7), columns=st.integers(1, 5), side=st.integers(3, 70), channels=st.sampled_from([1, 3]),
    padding=st.integers(0, 3),
)  # fmt: skip
def test_grid_shows_every_image_in_its_place(count: int, columns: int, side: int, channels: int, padding: int) -> None:
    images = torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))
    picture = grids.grid(images, columns, padding)
    wide = min(columns, count)
    step = (picture.shape[1] - padding) // wide
    cell = step - padding
    assert cell >= grids.MIN_CELL_PIXELS or cell == side
    assert cell % side == 0 and picture.shape[0] == -(-count // wide) * step + padding
    for i, image in enumerate(grids.to_uint8(images)):
        top, left = padding + i // wide * step, padding + i % wide * step
        shown = picture[top : top + cell, left : left + cell]
        factor = cell // side
        assert np.array_equal(shown[factor // 2 :: factor, factor // 2 :: factor], image)
    if padding:
        assert (picture[:padding] == 255).all() and (picture[:, :padding] == 255).all()


def test_pixels_are_rounded_and_other_channels_are_shown_grey() -> None:
    two_channels = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    assert grids.to_uint8(two_channels).tolist() == [[[[128, 128, 128]]]]
    assert grids.to_uint8(torch.tensor([-0.1, 0.6 / 255, 1.2]).view(1, 3, 1, 1)).tolist() == [[[[0, 1, 255]]]]


def test_label_stands_above_the_whole_picture() -> None:
    picture = np.full((20, 30, 3), 90, np.uint8)
    out = grids.labelled(picture, "temperature 0.7")
    height = out.shape[0] - 20
    assert np.array_equal(out[height:, :30], picture)
    assert (out[:height] < 100).any() and (out[:height, -grids.CAPTION_MARGIN_PIXELS :] == 255).all()  # not cut off


def test_saved_picture_replaces_the_old_one_whole(tmp_path: Path) -> None:
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    for content in (255 - picture, picture):
        path = grids.save_png(content, tmp_path / "new" / "a.png")
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_training_pictures_are_drawn_and_leave_the_model_alone(tmp_path: Path) -> None:
    model = seasoned(GREY)
    before, draw = snapshot(model), grids.training_pictures(Profile(model=GREY, plan=MemoryPlan(micro_batch=4)))
    images = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)).round()
    pictures = draw(model, images, tmp_path, 7)
    names = ["0.7", "0.8", "0.9", "1.0"]
    assert set(pictures) == {"reconstructed", *(f"generated_{t}" for t in names)}
    assert not changed(model, before)
    written = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert set(written) == {"reals.png", "reconstructions-7.png", *(f"step-7-t{t}.png" for t in names)}
    assert np.array_equal(np.asarray(Image.open(tmp_path / "step-7-t0.7.png")), pictures["generated_0.7"])
    reals = np.asarray(Image.open(tmp_path / "reals.png"))
    assert np.array_equal(reals, grids.grid(without_padding(images, GREY), 16))
    assert np.array_equal(reals, pictures["reconstructed"][: len(reals)])  # originals above reconstructions
    draw(model, images.flip(0), tmp_path, 8)
    assert (tmp_path / "reals.png").stat().st_mtime_ns == written["reals.png"]


def test_texts_stand_below_their_cells_and_leave_the_cells_as_they_are() -> None:
    images = torch.rand(3, 3, 60, 60, generator=torch.Generator().manual_seed(0))
    bare, written = grids.grid(images, 2), grids.grid(images, 2, under=["a", "", "c"])
    assert written.shape == (bare.shape[0] + 2 * grids.UNDER_PIXELS, *bare.shape[1:])
    assert np.array_equal(written[:62], bare[:62])
    bar = written[62 : 62 + grids.UNDER_PIXELS]
    assert bar[:, 2:62].min() < 128 and bar[:, 64:124].min() == grids.BACKGROUND  # "a", and nothing
