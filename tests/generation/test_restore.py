"""Restoring images: what is known stays, and the result agrees with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from generation_runs import RGB, demo_run, responsive
from PIL import Image
from torch.nn import functional

from nvae_lowmem.commands import restore as command
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation.restore import KnownPixels, LowResolution, NoisyPixels, Observation, psnr, restore


def images_of(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def random_mask(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.5


def test_known_pixels_stay_as_they_are_and_others_do_not() -> None:
    images, known = images_of(), random_mask()
    restored = restore(responsive(RGB), KnownPixels(images, known), iterations=3)
    everywhere = known.expand_as(images)
    assert torch.equal(restored[everywhere], images[everywhere])
    assert not torch.equal(restored, images) and restored.min() >= 0 and restored.max() <= 1


def test_an_enlarged_image_has_the_means_that_are_known() -> None:
    small = functional.avg_pool2d(images_of(), 4) * 0.5 + 0.25  # away from the ends, where values are cut
    restored = restore(responsive(RGB), LowResolution(small, 4), iterations=3)
    assert restored.shape == (3, 3, 16, 16)
    torch.testing.assert_close(functional.avg_pool2d(restored, 4), small, atol=0.02, rtol=0)


def test_denoising_trusts_the_data_less_the_more_noise_there_is() -> None:
    images = images_of()
    near, far = (NoisyPixels(images, sigma).put_in(torch.zeros_like(images)) for sigma in (0.01, 1.0))
    assert psnr(near, images).min() > 30 > 15 > psnr(far, images).max()


@pytest.mark.parametrize(
    "measured",
    [
        KnownPixels(images_of(), random_mask()),
        NoisyPixels(images_of(), 0.2),
        LowResolution(images_of()[..., :8, :8], 2),
    ],
)
def test_the_result_does_not_depend_on_how_images_share_passes(measured: Observation) -> None:
    model = responsive(RGB)
    together, apart = (restore(model, measured, iterations=3, micro_batch=size, guesses=2) for size in (3, 1))
    torch.testing.assert_close(together, apart)


def test_too_few_iterations_are_refused() -> None:
    with pytest.raises(ConfigError, match="--iterations 1"):
        restore(responsive(RGB), NoisyPixels(images_of(), 0.1), iterations=1)


def test_the_mean_of_guesses_lies_between_them_and_is_nearer_to_all_of_them() -> None:
    measured = KnownPixels(images_of(), random_mask())
    first, more = (restore(responsive(RGB), measured, iterations=3, guesses=n) for n in (1, 4))
    again = restore(responsive(RGB), measured, iterations=3)
    others = [restore(responsive(RGB), measured, iterations=3, seed=seed) for seed in (1, 2, 3, 4)]
    assert torch.equal(first, again) and not torch.equal(first, more)
    distance = [torch.stack([psnr(x, other) for other in others]).mean() for x in (first, more)]
    assert distance[1] > distance[0]


def test_a_later_guess_begins_with_other_images_where_pixels_are_missing_and_with_those_that_are_known_elsewhere() -> (
    None
):
    begun: list[torch.Tensor] = []

    class Watched(KnownPixels):
        def put_in(self, images: torch.Tensor) -> torch.Tensor:
            begun.append(super().put_in(images))
            return begun[-1]

    restore(responsive(RGB), Watched(images_of(), random_mask()), iterations=2, guesses=3)
    known = random_mask().expand(3, 3, 16, 16)
    starts = [begun[i] for i in (-1 - 2 * 3, -1 - 3)]  # of the guesses after the first: put in, then two iterations
    assert all(torch.equal(x[known], images_of()[known]) for x in begun)
    assert (starts[0] - starts[1])[~known].abs().mean() > 0.01


def test_no_more_guesses_than_there_is_noise_for() -> None:
    with pytest.raises(ConfigError, match="--guesses 32768: must be from 1 to 21845"):
        restore(responsive(RGB), NoisyPixels(images_of(), 0.1), iterations=3, guesses=32768)


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(demo_run(tmp_path / "run"))


@pytest.mark.parametrize("task", ["inpaint", "denoise", "upscale"])
def test_held_out_images_are_damaged_and_restored(task: str, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([task, "--run", run, "--count", "2", "--iterations", "2"]) == 0
    printed = capsys.readouterr().out
    assert "restored, dB" in printed and f"restored-{task}.png" in printed
    assert len(list((Path(run) / "samples").glob(f"restored-{task}*.png"))) == 3


def test_a_mask_says_which_pixels_of_a_file_are_missing(run: str, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (255, 0, 0)).save(tmp_path / "red.png")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    mask.save(tmp_path / "mask.png")
    arguments = ["inpaint", str(tmp_path / "red.png"), "--mask", str(tmp_path / "mask.png"), "--out", str(tmp_path)]
    assert command.main([*arguments, "--run", run, "--iterations", "2"]) == 0
    restored = Image.open(tmp_path / "restored-inpaint-red.png").convert("RGB")
    assert restored.size == (16, 16) and restored.getpixel((15, 0)) == (255, 0, 0)


def test_files_of_one_name_do_not_overwrite_each_other(run: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (16, 16), "red").save(tmp_path / folder / "x.png")
    files = [str(tmp_path / folder / "x.png") for folder in ("a", "b")]
    assert command.main(["denoise", *files, "--out", str(tmp_path), "--run", run, "--iterations", "2"]) == 0
    assert {path.name for path in tmp_path.glob("*-x*.png")} == {"restored-denoise-x.png", "restored-denoise-x-2.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inpaint", "--missing", "1.5"], "--missing 1.5"),
        (["denoise", "--sigma", "0"], "--sigma 0"),
        (["denoise", "--mask", "m.png"], "belongs to inpaint"),
        (["upscale", "--iterations", "1"], "--iterations 1"),
        (["upscale", "--guesses", "0"], "--guesses 0"),
        (["inpaint", "--mask", "missing.png"], "missing.png"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str], message: str, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*arguments, "--run", run]) == 2
    assert message in capsys.readouterr().err
