"""The demo page: its pictures are those of the commands; in a browser, moved sliders change them; it ends cleanly."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import write_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_generation_blend import DEEP, GREY, RGB, build, picture_file

from launch.demo import main
from nvae_lowmem.config import ConfigError, DataConfig, MemoryPlan, ModelConfig, Profile
from nvae_lowmem.generation import demo_page, grids
from nvae_lowmem.generation.blend import Mode
from nvae_lowmem.generation.demo_state import DemoState, enlarged, group_names, picture, scale_names
from nvae_lowmem.generation.images import held_out_batches
from nvae_lowmem.generation.recalibrate import default_passes, recalibrated, statistics_path
from nvae_lowmem.generation.reconstruct import reconstruct
from nvae_lowmem.generation.sample import Progress, sample_images
from nvae_lowmem.generation.sample_command import RECALIBRATION_SEED
from nvae_lowmem.training.checkpoint import export_weights
from nvae_lowmem.training.commands import open_run

REPOSITORY = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
MISSING = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
MISSING += [name for name, path in (("chromium", CHROMIUM), ("chromedriver", CHROMEDRIVER)) if path is None]
PATIENCE_SECONDS = 60
MICRO_BATCH = 40


def run_of(folder: Path, model: ModelConfig = RGB, with_data: bool = True, **data: Any) -> Path:
    """A run of a random model whose latents matter; with data, of 40 pictures of which 10 are held out."""
    if with_data:
        write_folder(folder / "pictures", 40)
    settings: dict[str, Any] = {"source": str(folder / "pictures"), "test_fraction": 0.25} | data
    profile = Profile(name="t", model=model, data=DataConfig(**settings), plan=MemoryPlan(micro_batch=MICRO_BATCH))
    export_weights(folder / "run", profile, build(model).state_dict())
    return folder / "run"


def state_of(folder: Path, model: ModelConfig = RGB, **settings: Any) -> DemoState:
    (folder / "page").mkdir()
    return DemoState(open_run(str(run_of(folder, model, **settings)), "runs", "cpu"), folder / "page")


class Heard:
    """What work reported its progress."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def report(self, what: str) -> Progress:
        def progress(done: int, total: int) -> None:
            if done == total:
                self.names.append(what)

        return progress


def silent(what: str) -> Progress:
    return lambda done, total: None


def pair_of(folder: Path) -> list[str]:
    return [picture_file(folder / f"{name}.png", seed) for seed, name in enumerate("ab")]


# --- blending ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["linear", "simple"])
def test_sliders_at_0_and_1_show_the_reconstructions(tmp_path: Path, mode: Mode) -> None:
    state, paths = state_of(tmp_path, with_data=False), pair_of(tmp_path)
    images = torch.cat([state.image(path) for path in paths])
    expected = [picture(image) for image in reconstruct(state.run.model, images, 0, MICRO_BATCH).images.split(1)]
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
    model, passes = state.run.model, default_passes(torch.device("cpu"), MICRO_BATCH)
    with recalibrated(model, (0.5, 0.9), passes, MICRO_BATCH, RECALIBRATION_SEED):
        expected = sample_images(model, 8, (0.5, 0.9), 3, MICRO_BATCH)
    assert np.array_equal(state.sample([0.5, 0.9], 3, 8, silent), grids.grid(enlarged(expected, 250), 4))


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
    reconstruction = reconstruct(state.run.model, state.image(path), 0, MICRO_BATCH).images
    cell = grids.grid(enlarged(reconstruction, 250), 1, padding=0)  # 1000 pixels for three steps and their difference
    side = cell.shape[0]
    assert np.array_equal(strip[-side - 2 : -2, side + 4 : 2 * side + 4], cell)  # the middle one of -2, 0, 2 sigmas
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


def test_a_grey_picture_for_a_model_of_colours_is_noted_once(tmp_path: Path) -> None:
    colour, grey = picture_file(tmp_path / "colour.png", 0), str(tmp_path / "grey.png")
    Image.open(colour).convert("L").save(grey)
    state = state_of(tmp_path)
    (note,) = state.new_notes([colour, grey, state.examples[0]])
    assert note.startswith("image grey.png is grey, and this model was trained on RGB")
    assert state.new_notes([grey]) == []
    state.blend([colour, grey], [0.5, 0.5], "linear", silent)  # it is used all the same, as launch/blend.py does


def test_a_model_of_greys_takes_any_picture(tmp_path: Path) -> None:
    state = state_of(tmp_path, GREY, with_data=False)
    assert state.new_notes(pair_of(tmp_path)) == [] and state.image(pair_of(tmp_path)[0]).shape == (1, 1, 16, 16)


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


# --- launch/demo.py ---------------------------------------------------------------------------------------------------


def test_without_gradio_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["--run", "nobody"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "demo.py: the demo page needs gradio, which is not installed: pip install 'nvae-lowmem[demo]'"
    )
    assert error.count("\n") == 1


def test_an_old_gradio_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", type(sys)("gradio"))
    monkeypatch.setattr(sys.modules["gradio"], "__version__", "5.49.1", raising=False)
    assert main(["--run", "nobody"]) == 2
    assert "needs gradio 6 or later, not 5.49.1" in capsys.readouterr().err


def address(port: int, host: str = "127.0.0.1") -> demo_page.Address:
    return demo_page.Address(host=host, port=port, public=False)


def test_an_address_that_cannot_be_served_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: the page cannot be served there: .*choose another port"):
            demo_page.check_address(address(port))
    demo_page.check_address(address(0))
    with pytest.raises(ConfigError, match="--port 65536: must be from 1 to 65535"):
        demo_page.check_address(address(65536))
    with pytest.raises(ConfigError, match="--host 203.0.113.1 "):  # an address of documentation: nobody's
        demo_page.check_address(address(0, "203.0.113.1"))


@pytest.mark.skipif("gradio" in MISSING, reason="needs gradio: pip install 'nvae-lowmem[demo]'")
def test_a_run_that_is_not_there_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", "nobody", "--runs-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("demo.py: --run nobody: no run folder") and error.count("\n") == 1


# --- in a browser -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition: Callable[[], Any], what: str) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"not seen within {PATIENCE_SECONDS} seconds: {what}")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return page.status == 200
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def served(run: Path, folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(URL, process) of the real command; its words are in folder/out.txt."""
    port = free_port()
    command = [sys.executable, str(REPOSITORY / "launch" / "demo.py"), "--run", str(run), "--port", str(port)]
    temporary = folder / "temporary"
    temporary.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    with open(folder / "out.txt", "wb") as out:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=out, stderr=out, env=environment)
    try:
        url = f"http://127.0.0.1:{port}/"
        until(lambda: answers(url) or process.poll() is not None, "the page")
        assert process.poll() is None, (folder / "out.txt").read_text()
        yield url, process
    finally:
        process.kill()
        process.wait()


def ends_cleanly(process: subprocess.Popen[bytes], signal_number: int, folder: Path) -> None:
    process.send_signal(signal_number)
    assert process.wait(PATIENCE_SECONDS) == 0
    said = (folder / "out.txt").read_text()
    assert "Traceback" not in said and said.endswith("the page is closed\n")
    assert list((folder / "temporary").glob("nvae-demo-*")) == []


@pytest.mark.skipif("gradio" in MISSING, reason="needs gradio: pip install 'nvae-lowmem[demo]'")
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGTERM")
def test_page_loads_nothing_from_elsewhere_and_ends_with_its_process(tmp_path: Path) -> None:
    with served(run_of(tmp_path, with_data=False), tmp_path) as (url, process):
        with urllib.request.urlopen(url, timeout=5) as page:
            html = page.read().decode()
        assert "t: what an NVAE makes" in html
        assert "fonts.googleapis.com" not in html and '"analytics_enabled":false' in html
        ends_cleanly(process, signal.SIGTERM, tmp_path)


class Page:
    """What a user does with the page, in a browser without a window."""

    def __init__(self, url: str) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER)))
        self.url = url
        self.driver.get(url)

    def find(self, css: str) -> list[Any]:
        """The visible elements."""
        from selenium.common.exceptions import StaleElementReferenceException

        found = []
        for element in self.driver.find_elements("css selector", css):
            with contextlib.suppress(StaleElementReferenceException):  # replaced while we looked
                if element.is_displayed():
                    found.append(element)
        return found

    def open_tab(self, name: str) -> None:
        tab = until(lambda: [e for e in self.find("button[role=tab]") if e.text == name], f"tab {name}")
        tab[0].click()

    def outputs(self) -> list[str]:
        """URLs of the pictures that the model drew; gradio names them by their content."""
        from selenium.common.exceptions import StaleElementReferenceException

        try:
            return [e.get_attribute("src") or "" for e in self.find(".drawn img")]
        except StaleElementReferenceException:
            return []

    def move_to_the_right_end(self, slider: int) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        element = self.find("input[type=range]")[slider]
        end = element.size["width"] // 2 - 1
        middle = ActionChains(self.driver).move_to_element(element)
        middle.click_and_hold().move_by_offset(end // 2, 0).move_by_offset(end - end // 2, 0).release().perform()

    def drop(self, place: int, path: Path) -> None:
        self.driver.find_elements("css selector", ".dropped input[type=file]")[place].send_keys(str(path))

    def requested(self) -> set[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}


@pytest.mark.slow  # a browser and the command, both from cold: more than 20 seconds on a busy machine
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_in_a_browser_moved_sliders_change_the_picture(tmp_path: Path) -> None:
    run, bad = run_of(tmp_path), tmp_path / "bad.png"
    bad.write_text("no image")
    with served(run, tmp_path) as (url, process):
        page = Page(url)
        try:
            (samples,) = until(page.outputs, "samples, without a click")
            page.move_to_the_right_end(0)
            until(lambda: page.outputs() not in ([], [samples]), "other samples after the slider was moved")

            page.open_tab("Blend")
            a, blend, b = until(lambda: len(page.outputs()) == 3 and page.outputs(), "a blend of two held-out images")
            assert len({a, blend, b}) == 3
            for slider in (0, 1):
                page.move_to_the_right_end(slider)
            until(lambda: page.outputs() == [a, b, b], "B where all sliders are at 1")

            page.drop(1, bad)
            until(lambda: "image bad.png: is not an image" in page.driver.page_source, "what is wrong with the picture")

            page.open_tab("Traverse")
            until(page.outputs, "a traversal")
            assert all(wanted.startswith((url, "data:", "blob:")) for wanted in page.requested())
            ends_cleanly(process, signal.SIGINT, tmp_path)
        finally:
            page.driver.quit()
