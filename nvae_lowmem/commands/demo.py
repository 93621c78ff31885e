"""Show a trained model, or one in training, on a web page of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import RunFlags


@dataclass(frozen=True, kw_only=True)
class DemoCommand(RunFlags):
    """Sample, blend and traverse a trained model with sliders, on a web page of this machine. Ctrl+C ends it.

    A run in training is shown as it goes on: losses, KL per group, samples, memory against plan, and time left.

    Needs gradio (pip install "gradio>=6,<7"). The page loads nothing from the network.

    Examples:
      nvae-lowmem demo
      nvae-lowmem demo --run 3 --port 8000
      nvae-lowmem demo --run celeba64-4g --host 0.0.0.0
    """

    host: str = "127.0.0.1"
    """Address to serve at. 127.0.0.1: for this machine alone; 0.0.0.0: for everybody in its network."""
    port: int = 0
    """Port to serve at; 0: the first free one from 7860 up."""
    share: Literal["never", "public"] = "never"
    """public: also through a tunnel of gradio's makers, at an address that anybody who knows it can open."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, serve until Ctrl+C, and return the exit code."""
    return run_command(DemoCommand, _demo, argv)


def _demo(command: DemoCommand) -> None:
    folder = command.find()
    from nvae_lowmem.commands.image_inputs import opened
    from nvae_lowmem.demo import page as demo_page
    from nvae_lowmem.demo.story import RunStory
    from nvae_lowmem.training.checkpoint import all_checkpoints

    demo_page.check_gradio()
    address = demo_page.Address(host=command.host, port=command.port, public=command.share == "public")
    demo_page.check_address(address)
    try:
        run = opened(command) if all_checkpoints(folder) else None
        demo_page.serve(RunStory(folder), run, address)
    except KeyboardInterrupt:
        print("\nthe page is closed", flush=True)
