"""The demo as a web page (gradio): tabs to sample, blend and traverse with sliders, and one on the training.

Nothing comes from the network.

gradio is imported where the page is made: this module can be imported without it.
"""

from __future__ import annotations

import html
import os
import random
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nvae_lowmem.demo import training_tab
from nvae_lowmem.demo.state import PICTURE_PIXELS, DemoState, Report, group_names, scale_names
from nvae_lowmem.demo.story import RunStory
from nvae_lowmem.errors import ConfigError, printable
from nvae_lowmem.generation.classes import class_names
from nvae_lowmem.progress import OnProgress
from nvae_lowmem.training.checkpoint import step_of
from nvae_lowmem.training.open_run import OpenRun
from nvae_lowmem.training.out_of_memory import is_out_of_memory

OLDEST_GRADIO = 6
INSTALL = 'pip install "gradio>=6,<7"'
MOST_SAMPLES, MOST_CHANNELS, MOST_SEED = 64, 8, 10**6
STYLE = """
.pixels img { image-rendering: pixelated; }
.gallery-item .container, .gallery-item img { width: 48px !important; height: 48px !important; }
footer { display: none !important; }
"""
MODES = [
    ("group by group, each given what the ones above became (linear)", "linear"),
    ("the latents of two independent passes (simple)", "simple"),
]
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the page is served."""

    host: str
    port: int
    """0: the first free one from 7860 up."""
    public: bool
    """Also through a tunnel of gradio's makers, at an address that anybody may open."""


def check_gradio() -> None:
    """Import gradio, silenced. Raises ConfigError with the command that installs it where it is missing or too old."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio
    except ImportError as error:
        why = "is not installed" if error.name == "gradio" else f"cannot be imported ({error})"
        raise ConfigError(f"the demo page needs gradio, which {why}: {INSTALL}") from None
    if int(gradio.__version__.partition(".")[0]) < OLDEST_GRADIO:
        raise ConfigError(f"the demo page needs gradio {OLDEST_GRADIO} or later, not {gradio.__version__}: {INSTALL}")


def check_address(address: Address) -> None:
    """Raise ConfigError unless the page can be served there: gradio would look for the port at 127.0.0.1 only."""
    if not 0 <= address.port <= 65535:
        raise ConfigError(f"--port {address.port}: must be from 1 to 65535, or 0 for the first free one from 7860 up")
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(
                f"--host {address.host} --port {address.port}: the page cannot be served there: {reason}; "
                "choose another port (0: any free one), or --host 127.0.0.1"
            ) from None


def serve(story: RunStory, run: OpenRun | None, address: Address) -> None:
    """Show the page of a run until Ctrl+C, whose KeyboardInterrupt is let out; no files of the page stay behind.

    run: None for one that has no checkpoint yet; its training is shown.
    SIGTERM interrupts in the same way. Raises OSError where the address was taken since `check_address`.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="nvae-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # what is dropped on the page
        page = build(story, None if run is None else DemoState(run, Path(folder)))
        try:
            _, local, public = page.launch(
                server_name=address.host, server_port=address.port or None, share=address.public,
                prevent_thread_lock=True, quiet=True, ssr_mode=False, run_history=False, enable_monitoring=False,
                footer_links=[], theme=_theme(), css=STYLE + training_tab.STYLE,
            )  # fmt: skip
            print(f"{public or local}  (Ctrl+C ends it)", flush=True)
            while True:
                time.sleep(1)
        finally:
            page.close(verbose=False)


def build(story: RunStory, state: DemoState | None) -> Any:
    """The page, a gradio.Blocks. state: None for a run without a checkpoint, whose training alone is shown."""
    import gradio as gr

    name, config = story.profile.name, story.profile.model
    where = "" if state is None else f", on {state.run.device}"
    with gr.Blocks(title=f"{name}: what an NVAE makes", analytics_enabled=False) as page:
        gr.Markdown(
            f"## {html.escape(name)}\n{html.escape(printable(story.folder.name))}, {config.total_groups} "
            f"latent groups on {config.scales} scales{where}"
        )
        if state is None:
            note = (
                "There is no checkpoint yet: after the first one, start the page again to sample, blend and traverse."
            )
        else:
            if state.data_problem:
                gr.Markdown(f"The run's data cannot be opened, so bring pictures: {html.escape(state.data_problem)}")
            _sample_tab(state, page)
            _blend_tab(state)
            _traverse_tab(state)
            step = step_of(state.run.checkpoint)
            note = f"The other tabs show the checkpoint of step {step:,}; start the page again for a newer one."
        training_tab.training_tab(story, page, note)
    return page


def _theme() -> Any:
    import gradio as gr

    # fonts named as plain text are those of the system; gradio's own theme would fetch some
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


# --- the tabs ---------------------------------------------------------------------------------------------------------


def _sample_tab(state: DemoState, page: Any) -> None:
    import gradio as gr

    with gr.Tab("Sample"), gr.Row():
        with gr.Column(scale=1, min_width=320):
            gr.Markdown("Temperature of each scale: lower is cleaner and more alike.")
            sliders = _per_scale(state, 0.1, 1.5, value=0.8)
            with gr.Row():
                seed = gr.Number(0, precision=0, label="seed")
                another = gr.Button("Another seed")
            count = gr.Slider(1, MOST_SAMPLES, value=32, step=1, label="images")
            asked = _class_and_guidance(state)
            button = gr.Button("Sample", variant="primary")
        with gr.Column(scale=3):
            shown = _output()

    def draw(seed: int | None, count: int, *rest: float, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        temperatures, (chosen, guidance) = rest[: len(sliders)], rest[len(sliders) :] or (-1, 1.0)
        classes = (int(chosen),) if chosen >= 0 else ()
        return _answered(lambda: state.sample(temperatures, seed or 0, count, _report(progress), classes, guidance))

    # a seed that is set in this way is drawn at once; one that is typed is drawn on Enter
    drawn = another.click(lambda: random.randrange(MOST_SEED), outputs=[seed], api_visibility="private")
    triggers = [button.click, seed.submit, *(slider.release for slider in [*sliders, count, *asked[1:]])]
    triggers += [choice.change for choice in asked[:1]]
    _listen(draw, [seed, count, *sliders, *asked], [shown], first=page.load, triggers=triggers, after=(drawn,))


def _class_and_guidance(state: DemoState) -> list[Any]:
    """Of a model with labels a choice of class and a slider of its guidance; else nothing."""
    import gradio as gr

    names = class_names(state.run.profile)
    if not names:
        return []
    choices = [("each in turn", -1), *((name, number) for number, name in enumerate(names))]
    chosen = gr.Dropdown(choices, value=-1, label="class")
    return [chosen, gr.Slider(0, 4, value=1, step=0.25, label="guidance: more is clearer and more alike")]


def _blend_tab(state: DemoState) -> None:
    import gradio as gr

    with gr.Tab("Blend") as tab:
        with gr.Row():
            a, b = (_dropped(state, name, number) for number, name in enumerate("AB"))
            with gr.Column(scale=2, min_width=320):
                gr.Markdown("Weight of B in each scale: 0 is A, 1 is B.")
                sliders = _per_scale(state, 0, 1, value=0.5)
                mode = gr.Radio(MODES, value="linear", label="how they are mixed")
                button = gr.Button("Blend", variant="primary")
        with gr.Row():
            shown = []
            for caption in ("A, reconstructed", "The blend", "B, reconstructed"):
                with gr.Column(min_width=160):
                    gr.Markdown(caption)
                    shown.append(_output(height=PICTURE_PIXELS))

    def blend(a: Any, b: Any, mode: Any, *weights: float, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        paths = [path for path in (_path(a), _path(b)) if path]
        if len(paths) < 2:
            gr.Info("Two pictures are needed: drop them on A and B.")
            return [gr.skip()] * len(shown)
        return _answered(lambda: _noted(state, paths, state.blend(paths, weights, mode, _report(progress))))

    triggers = [button.click, mode.change, *(slider.release for slider in sliders)]
    _listen(blend, [a.place, b.place, mode, *sliders], shown, first=tab.select, triggers=triggers, dropped=(a, b))


def _traverse_tab(state: DemoState) -> None:
    import gradio as gr

    config = state.run.model.config
    with gr.Tab("Traverse") as tab:
        with gr.Row():
            image = _dropped(state, "The image", 0)
            with gr.Column(scale=3, min_width=320):
                choices = [(name, number) for number, name in enumerate(group_names(config))]
                group = gr.Dropdown(choices, value=0, label="latent group that is moved")
                sigmas = gr.Slider(0.25, 6, value=2, step=0.25, label="how far either way, in sigmas of the prior")
                with gr.Row():
                    steps = gr.Slider(3, 11, value=7, step=2, label="pictures in a row")
                    rows = gr.Slider(
                        0, min(MOST_CHANNELS, config.latents), value=0, step=1,
                        label="most active channels, a row for each (0: all together)",
                    )  # fmt: skip
                button = gr.Button("Traverse", variant="primary")
        shown = _output(pixelated=False)

    def move(image: Any, group: int, sigmas: float, steps: int, rows: int, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        path = _path(image)
        if path is None:
            gr.Info("A picture is needed: drop one.")
            return gr.skip()
        return _answered(
            lambda: _noted(state, [path], state.traverse(path, group, rows, sigmas, steps, _report(progress)))
        )

    triggers = [button.click, group.change, sigmas.release, steps.release, rows.release]
    inputs = [image.place, group, sigmas, steps, rows]
    _listen(move, inputs, [shown], first=tab.select, triggers=triggers, dropped=(image,))


# --- parts of the page ------------------------------------------------------------------------------------------------


def _per_scale(state: DemoState, lowest: float, highest: float, value: float) -> list[Any]:
    """A slider for every scale, highest resolution first."""
    import gradio as gr

    return [gr.Slider(lowest, highest, value, step=0.05, label=name) for name in scale_names(state.run.model.config)]


def _output(height: int | None = None, pixelated: bool = True) -> Any:
    import gradio as gr

    return gr.Image(
        format="png", height=height, interactive=False, show_label=False, buttons=["download", "fullscreen"],
        elem_classes=["drawn", "pixels"] if pixelated else ["drawn"],
    )  # fmt: skip


@dataclass(frozen=True)
class Dropped:
    """A place for a picture, and what happens when one of the held-out images is put there (None where none are)."""

    place: Any
    chosen: Any


def _dropped(state: DemoState, caption: str, number: int) -> Dropped:
    """A place for a picture, with held-out ones to choose from; the one numbered `number` lies there already."""
    import gradio as gr

    with gr.Column(scale=1, min_width=240):
        gr.Markdown(f"{caption}: drop a picture")
        value = state.examples[number % len(state.examples)] if state.examples else None
        place = gr.Image(
            value,
            show_label=False,
            height=240,
            sources=["upload", "clipboard"],
            buttons=[],
            elem_classes=["dropped", "pixels"],
        )
        if not state.examples:
            return Dropped(place, None)
        examples = gr.Examples([[path] for path in state.examples], place, label="held-out images")
        return Dropped(place, examples.load_input_event)


def _path(dropped: Any) -> str | None:
    """The file of a picture on the page as the browser sent it; None where there is no picture.

    Listeners that take pictures run without gradio's own preprocessing: that would decode and convert a picture, other
    than the run's data were, and end in a traceback where it cannot.
    """
    return dropped["path"] if dropped else None


def _listen(
    work: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    first: Any,
    triggers: Sequence[Any],
    dropped: Sequence[Dropped] = (),
    after: Sequence[Any] = (),
) -> None:
    """One model: one piece of work at a time on the whole page. Of what waits meanwhile only the last is done.

    after: events that change an input themselves, and are followed by the work.
    """
    import gradio as gr

    options: dict[str, Any] = {
        "fn": work, "inputs": inputs, "outputs": outputs, "show_progress_on": outputs, "preprocess": not dropped,
        "concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private",
    }  # fmt: skip
    # a place's `change`, and a tab's `select`, come twice from the browser: the work would be done, or refused, twice
    gr.on([first], trigger_mode="once", **options)
    gr.on([*triggers, *(one.place.upload for one in dropped)], trigger_mode="always_last", **options)
    for event in [*after, *(one.chosen for one in dropped if one.chosen is not None)]:
        event.then(**options)


def _report(progress: Any) -> Report:
    def named(what: str) -> OnProgress:
        return lambda done, total: progress((done, total), desc=what)

    return named


def _noted(state: DemoState, paths: Sequence[str], answer: Answer) -> Answer:
    import gradio as gr

    for note in state.new_notes(paths):
        gr.Warning(html.escape(note))
    return answer


def _answered(work: Callable[[], Answer]) -> Answer:
    """The work's answer; what the user can mend is said on the page, without a traceback in the terminal."""
    import gradio as gr

    try:
        return work()
    except ConfigError as error:
        raise gr.Error(html.escape(str(error)), title="This cannot be done", print_exception=False) from None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        advice = "Start the page again with half the --micro-batch, or with --device cpu."
        raise gr.Error(advice, title="Out of memory", print_exception=False) from None
