"""What the demo page shows: its pictures are those of the commands, and bad pictures are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation_runs import DEEP, DEMO_MICRO_BATCH, GREY, RGB, demo_run, picture_file
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nvae_lowmem.config.choices import BlendMode
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.demo.state import DemoState, enlarged, group_names, picture, scale_names
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.recalibrate import RECALIBRATION_SEED, default_passes, recalibrated, statistics_path
from nvae_lowmem.generation.reconstruct import reconstruct
from nvae_lowmem.generation.sample import sample_images
from nvae_lowmem.progress import OnProgress
from nvae_lowmem.training.open_run import held_out_batches, open_run


def state_of(folder: Path, model: ModelConfig = RGB, **settings: Any) -> DemoState:
    (folder / "page").mkdir()
    return DemoState(open_run(str(demo_run(folder, model, **settings)), "runs", "cpu"), folder / "page")


class Heard:
    """What work reported its progress."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def report(self, what: str) -> OnProgress:
        def progress(done: int, total: int) -> None:
            if done == total:
                self.names.append(what)

        return progress


def silent(what: str) -> OnProgress:
    return lambda done, total: None


def pair_of(folder: Path) -> list[str]:
    return [picture_file(folder / f"{name}.png", seed) for seed, name in enumerate("ab")]


# --- blending ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["linear", "simple"])
def test_sliders_at_0_and_1_show_the_reconstructions(tmp_path: Path, mode: BlendMode) -> None:
    state, paths = state_of(tmp_path, with_data=False), pair_of(tmp_path)
    images = torch.cat([state.image(path) for path in paths])
    expected = [picture(image) for image in reconstruct(state.run.model, images, 0, DEMO_MICRO_BATCH).images.split(1)]
    for weight in (0, 1):
        a, blend, b = state.blend(paths, [weight, weight], mode, silent)
        assert np.array_equal(a, expected[0]) and np.array_equal(b, expected[1])
        assert np.array_equal(blend, expected[weight])
    assert not np.array_equal(expected[0], expected[1])


def test_every_scale_has_its_own_weight(tmp_path: Path) -> None:
    state, paths = state_of(tmp_path, with_data=False), pair_of(tmp_path)
    blends = [state.blend(paths, weights, "linear", silent)[1] for weights in ([0, 0], [0, 1], [1, 0], [1, 1])]
    assert len({blend.tobytes() for blend in blends}) == 4


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_sample_command(tmp_path: Path) -> None:
    state = state_of(tmp_path, with_data=False)
    model, passes = state.run.model, default_passes(torch.device("cpu"), DEMO_MICRO_BATCH)
    with recalibrated(model, (0.5, 0.9), passes, DEMO_MICRO_BATCH, RECALIBRATION_SEED):
        expected = sample_images(model, 8, (0.5, 0.9), 3, DEMO_MICRO_BATCH)
    assert np.array_equal(state.sample([0.5, 0.9], 3, 8, silent), grids.grid(enlarged(expected, 250), 4))


def test_a_class_and_its_guidance_reach_the_samples(tmp_path: Path) -> None:
    state = state_of(tmp_path, replace(RGB, classes=3), with_data=False)
    with torch.no_grad():
        for name, parameter in state.run.model.named_parameters():
            if "class_" in name:
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter).sin() / 10)
    asked = [{}, {"classes": (1,)}, {"classes": (1,), "guidance": 3.0}]
    drawn = [state.sample([0.5, 0.5], 0, 4, silent, **one) for one in asked]
    assert len({grid.tobytes() for grid in drawn}) == 3


def test_every_scale_has_its_own_temperature(tmp_path: Path) -> None:
    state = state_of(tmp_path, with_data=False)
    drawn = [state.sample(temperatures, 0, 4, silent) for temperatures in ([0.5, 0.5], [0.5, 1], [1, 0.5])]
    assert len({grid.tobytes() for grid in drawn}) == 3
    assert not np.array_equal(state.sample([0.5, 0.5], 1, 4, silent), drawn[0])  # another seed


def test_statistics_are_estimated_once_per_choice_of_temperatures(tmp_path: Path) -> None:
    state, heard = state_of(tmp_path, with_data=False), Heard()
    first, *_, again = (state.sample(t, 0, 2, heard.report) for t in ([0.5, 1], [0.7, 0.7], [0.5, 1]))
    named = [name for name in heard.names if name.startswith("BatchNorm")]
    assert named == [f"BatchNorm statistics at temperature {text}" for text in ("0.50,1.00", "0.70")]
    assert np.array_equal(first, again)
    # the one of a single number is shared with launch/sample.py, the others end with the page
    assert statistics_path(state.run.checkpoint, 0.7).is_file()
    assert not statistics_path(state.run.checkpoint, (0.5, 1.0)).exists()


def test_sampling_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    state, paths = state_of(tmp_path, with_data=False), pair_of(tmp_path)
    before = {name: value.clone() for name, value in state.run.model.state_dict().items()}
    state.sample([0.5, 0.5], 0, 1, silent)
    with pytest.raises(ConfigError, match="--count 0"):
        state.sample([0.6, 0.6], 0, 0, silent)
    after = state.run.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert np.array_equal(
        state.blend(paths, [1, 1], "linear", silent)[1], state.blend(paths, [0, 0], "linear", silent)[2]
    )


# --- traversing -------------------------------------------------------------------------------------------------------


def test_unmoved_picture_of_a_traversal_is_the_reconstruction(tmp_path: Path) -> None:
    state, heard = state_of(tmp_path), Heard()
    path = state.examples[1]
    strip = state.traverse(path, 2, 0, 2.0, 3, heard.report)
    reconstruction = reconstruct(state.run.model, state.image(path), 0, DEMO_MICRO_BATCH).images
    cell = grids.grid(enlarged(reconstruction, 250), 1, padding=0)  # 1000 pixels for three steps and their difference
    side, under = cell.shape[0], 2 + grids.UNDER_PIXELS
    assert np.array_equal(
        strip[-side - under : -under, side + 4 : 2 * side + 4], cell
    )  # the middle one of -2, 0, 2 sigmas
    assert not np.array_equal(strip[-side - 2 : -2, 2 : side + 2], cell)
    state.traverse(path, 0, 2, 2.0, 3, heard.report)
    assert heard.names.count("measuring KL") == 1


def test_traversal_without_the_data_measures_the_picture_itself(tmp_path: Path) -> None:
    state, heard = state_of(tmp_path, with_data=False), Heard()
    one, two = (state.traverse(path, 0, 1, 2.0, 3, heard.report) for path in pair_of(tmp_path))
    assert heard.names == ["traversing"] * 2 and not np.array_equal(one, two)


@pytest.mark.parametrize(("group", "channels"), [(3, 0), (0, 3)])
def test_a_group_or_channel_that_is_not_there_is_refused(tmp_path: Path, group: int, channels: int) -> None:
    state = state_of(tmp_path)
    with pytest.raises(ConfigError, match="must be from 1 to"):
        state.traverse(state.examples[0], group, channels, 2.0, 3, silent)


# --- pictures in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "data"),
    [(RGB, {"crop_pixels": 7}), (GREY, {"source": "mnist5k", "dynamic_binarisation": True})],
    ids=["cropped", "binarised"],
)
def test_examples_are_the_held_out_images_themselves(tmp_path: Path, model: ModelConfig, data: dict[str, Any]) -> None:
    """Not prepared a second time: neither cropped again, nor anything else."""
    state = state_of(tmp_path, model, **data)
    held_out = torch.cat(list(held_out_batches(state.run, 10)))
    assert len(state.examples) == 10
    copies = [shutil.copy(path, tmp_path / f"copy-{i}.png") for i, path in enumerate(state.examples)]
    assert torch.equal(torch.cat([state.image(str(path)) for path in copies]), held_out)


def test_without_its_data_a_run_has_no_examples_and_says_why(tmp_path: Path) -> None:
    state = state_of(tmp_path, with_data=False)
    assert state.examples == [] and "data.source" in state.data_problem and "pictures" in state.data_problem


def text(path: Path) -> None:
    path.write_text("no image")


def half(path: Path) -> None:
    picture_file(path, 0)
    path.write_bytes(path.read_bytes()[:200])


def tiny(path: Path) -> None:
    Image.new("RGB", (4, 4)).save(path)


@pytest.mark.parametrize(
    ("write", "message"), [(text, "is not an image"), (half, "dropped.png: "), (tiny, "too small to cut a square of")]
)
def test_a_bad_picture_is_refused_by_its_name_alone(
    tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    state, path = state_of(tmp_path, crop_pixels=8), tmp_path / "dropped.png"
    write(path)
    with pytest.raises(ConfigError) as caught:
        state.blend([str(path), state.examples[0]], [0.5, 0.5], "linear", silent)
    assert str(caught.value).startswith("image dropped.png") and message in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_what_is_done_to_a_picture_is_said_once_and_nothing_of_held_out_ones(tmp_path: Path) -> None:
    colour, grey, wide = (str(tmp_path / f"{name}.png") for name in ("colour", "grey", "wide"))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)  # of the model's size
    Image.fromarray(pixels).save(colour)
    Image.fromarray(pixels).convert("L").save(grey)
    Image.fromarray(pixels).resize((40, 30)).save(wide)
    state = state_of(tmp_path)
    bits = "every value is rounded to 32 steps (model.bits = 5)"
    assert state.new_notes([colour, state.examples[0], colour]) == [f"image colour.png: {bits}"]
    (note,) = state.new_notes([colour, grey])
    assert note.startswith("image grey.png: it is grey, and red, green and blue get the same values")
    cut = "a square is cut out of its 40 x 30 pixels; it is resized to 16 x 16"
    assert state.new_notes([wide]) == [f"image wide.png: {cut}; {bits}"]
    assert state.new_notes([colour, grey, wide]) == []
    state.blend([colour, grey], [0.5, 0.5], "linear", silent)  # it is used all the same, as launch/blend.py does


def test_a_binary_model_of_greys_says_that_it_binarises(tmp_path: Path) -> None:
    state, (path, _) = state_of(tmp_path, GREY, with_data=False), pair_of(tmp_path)
    (note,) = state.new_notes([path])
    assert "its colours become grey; every pixel becomes black or white" in note
    assert state.image(path).shape == (1, 1, 16, 16)


# --- what the page is made of -----------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 100))
def test_enlarging_makes_squares_of_pixels(side: int, pixels: int) -> None:
    image = torch.arange(side * side, dtype=torch.float32).view(1, 1, side, side)
    large = enlarged(image, pixels)
    factor = large.shape[-1] // side
    assert large.shape == (1, 1, factor * side, factor * side)
    assert factor == 1 if side > pixels else factor * side <= pixels < (factor + 1) * side
    assert torch.equal(large.unfold(2, factor, factor).unfold(3, factor, factor).amax((-1, -2)), image)
    assert torch.equal(large.unfold(2, factor, factor).unfold(3, factor, factor).amin((-1, -2)), image)


def test_scales_and_groups_have_names() -> None:
    assert scale_names(DEEP) == [
        "8 x 8 pixels, 4 groups (finest)", "4 x 4 pixels, 2 groups", "2 x 2 pixels, 1 group (coarsest)",
    ]  # fmt: skip
    assert group_names(DEEP)[:2] == ["group 1 of 7, 2 x 2 pixels", "group 2 of 7, 4 x 4 pixels"]
