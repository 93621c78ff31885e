"""Show a trained model on a web page of this machine: python launch/demo.py --run latest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from nvae_lowmem.demo import page as demo_page
from nvae_lowmem.training import open_run as commands


@dataclass(frozen=True, kw_only=True)
class DemoCommand(commands.RunCommand):
    """Sample, blend and traverse a trained model with sliders, on a web page of this machine. Ctrl+C ends it.

    Needs the extra demo: pip install 'nvae-lowmem[demo]'. The page loads nothing from the network.

    Examples:
      python launch/demo.py
      python launch/demo.py --run 3 --port 8000
      python launch/demo.py --run celeba64-4g --host 0.0.0.0
    """

    host: str = "127.0.0.1"
    """Address to serve at. 127.0.0.1: for this machine alone; 0.0.0.0: for everybody in its network."""
    port: int = 0
    """Port to serve at; 0: the first free one from 7860 up."""
    share: Literal["never", "public"] = "never"
    """public: also through a tunnel of gradio's makers, at an address that anybody who knows it can open."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, serve until Ctrl+C, and return the exit code: 0 done, 2 bad input, 5 out of memory."""
    command = tyro.cli(DemoCommand, args=argv, prog="demo.py")
    try:
        return commands.exit_code("demo.py", lambda: _demo(command))
    except KeyboardInterrupt:
        print("\nthe page is closed", flush=True)
        return 0


def _demo(command: DemoCommand) -> None:
    demo_page.check_gradio()
    address = demo_page.Address(host=command.host, port=command.port, public=command.share == "public")
    demo_page.check_address(address)
    run = commands.open_run(command.run, command.runs_dir, command.device, command.micro_batch, data=command.data)
    print(run.describe(), flush=True)
    demo_page.serve(run, address)
