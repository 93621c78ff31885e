"""The demo page as it is served: refused clearly, alive in a browser, ended cleanly."""

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from generation_runs import RGB, demo_run

from launch.demo import main
from nvae_lowmem.demo import page as demo_page
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.training.monitor import Monitor

REPOSITORY = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
MISSING = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
MISSING += [name for name, path in (("chromium", CHROMIUM), ("chromedriver", CHROMEDRIVER)) if path is None]
PATIENCE_SECONDS = 60


# --- launch/demo.py ---------------------------------------------------------------------------------------------------


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r'gradio, which is not installed: pip install "gradio>=6,<7"$'):
        demo_page.check_gradio()


def test_an_old_gradio_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", type(sys)("gradio"))
    monkeypatch.setattr(sys.modules["gradio"], "__version__", "5.49.1", raising=False)
    with pytest.raises(ConfigError, match="needs gradio 6 or later, not 5.49.1"):
        demo_page.check_gradio()


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
    with served(demo_run(tmp_path, with_data=False), tmp_path) as (url, process):
        with urllib.request.urlopen(url, timeout=5) as page:
            html = page.read().decode()
        assert "t: what an NVAE makes" in html
        assert "fonts.googleapis.com" not in html and '"analytics_enabled":false' in html
        ends_cleanly(process, signal.SIGTERM, tmp_path)


@pytest.mark.skipif("gradio" in MISSING, reason="needs gradio: pip install 'nvae-lowmem[demo]'")
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGTERM")
def test_a_run_without_a_checkpoint_shows_its_training_alone(tmp_path: Path) -> None:
    run = demo_run(tmp_path, with_data=False)
    shutil.rmtree(run / "checkpoints")
    with served(run, tmp_path) as (url, process):
        with urllib.request.urlopen(f"{url}config", timeout=5) as config:
            tabs = [c["props"]["label"] for c in json.load(config)["components"] if c["type"] == "tabitem"]
        assert tabs == ["Training"]
        ends_cleanly(process, signal.SIGTERM, tmp_path)


@pytest.mark.skipif("gradio" in MISSING, reason="needs gradio: pip install 'nvae-lowmem[demo]'")
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGTERM")
def test_a_model_with_labels_has_a_choice_of_classes(tmp_path: Path) -> None:
    run = demo_run(tmp_path, replace(RGB, classes=2), with_data=False, class_names=("cat", "dog"))
    with served(run, tmp_path) as (url, process):
        with urllib.request.urlopen(f"{url}config", timeout=5) as config:
            parts = [c["props"] for c in json.load(config)["components"] if c["type"] == "dropdown"]
        (choice,) = (part for part in parts if part["label"] == "class")
        assert [name for name, _ in choice["choices"]] == ["each in turn", "cat", "dog"]
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

    def charts(self) -> list[str]:
        return [e.get_attribute("src") or "" for e in self.find(".chart img")]

    def row(self, what: str) -> str:
        """The value of a row of the training's table; "" while there is none."""
        cells = [cell.text for cell in self.find(".figures td")]
        return cells[cells.index(what) + 1] if what in cells else ""

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


def tell(monitor: Monitor, step: int) -> None:
    """The figures of a step, as training writes them."""
    kl = {f"kl_vals/layer_{i}": float(step + i) for i in range(RGB.total_groups)}
    monitor.scalars(step, {"train/nelbo_iter": 1e4 / step, "train/loss": 9e3 / step, **kl})


@pytest.mark.slow  # a browser and the command, both from cold: more than 20 seconds on a busy machine
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_in_a_browser_moved_sliders_change_the_picture(tmp_path: Path) -> None:
    run, bad = demo_run(tmp_path), tmp_path / "bad.png"
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

            page.open_tab("Training")
            with Monitor(run, total_steps=700) as monitor:  # another process's training, as far as the page can tell
                tell(monitor, 40)
                charts = until(lambda: len(page.charts()) == 2 and page.charts(), "losses and KL")
                assert "40" in page.row("step") and "no figures" not in page.row("state")
                with (run / "stats.jsonl").open("a") as file:
                    file.write('{"step": 41, "train/nel')
                tell(monitor, 80)
                until(lambda: page.row("step").startswith("80"), "the next figures, without a click")
                until(lambda: not set(charts) & set(page.charts()), "other charts")
            assert all(wanted.startswith((url, "data:", "blob:")) for wanted in page.requested())
            ends_cleanly(process, signal.SIGINT, tmp_path)
        finally:
            page.driver.quit()
