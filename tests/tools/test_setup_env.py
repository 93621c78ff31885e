"""The installer, without installing: which torch it chooses for a machine, and what it does to an environment."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "tools" / "setup_env.py"

sys.path.insert(0, str(SCRIPT.parent))
import setup_env  # noqa: E402

needs_sh = pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")


def fake_nvidia_smi(folder: Path, answers: dict[str, str]) -> None:
    """A program that answers --query-gpu=FIELD as the driver's does, and fails on a field that it does not know."""
    cases = "".join(f"--query-gpu={field}) printf '%s\\n' '{answer}' ;;\n" for field, answer in answers.items())
    unknown = '*) echo "Field is not a valid field to query."; exit 2 ;;\n'
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ncase "$1" in\n{cases}{unknown}esac\n')
    program.chmod(0o755)


def dry_run(path: Path, torch: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {"PATH": str(path)} | ({} if torch is None else {"NVAE_TORCH": torch})
    command = [sys.executable, str(SCRIPT), "--dry-run", "--venv", str(path / "venv")]
    return subprocess.run(command, env=env, capture_output=True, text=True)


MACHINES = {
    "GTX 970": ({"compute_cap": "5.2", "driver_version": "535.183.01"}, "torch==2.7.1", "5.2"),
    "GTX 1050 Ti": ({"compute_cap": "6.1", "driver_version": "580.65.06"}, "torch==2.7.1", "6.1"),
    "GTX 1650": ({"compute_cap": "7.5", "driver_version": "580.65.06"}, "torch==2.13.0", "7.5"),
    "RTX 3050": ({"compute_cap": "8.6", "driver_version": "590.10"}, "torch==2.13.0", "8.6"),
    "GTX 1650, driver before CUDA 13": ({"compute_cap": "7.5", "driver_version": "535.183.01"}, "torch==2.10.0", "535"),
    "RTX 3050, driver not told": ({"compute_cap": "8.6"}, "torch==2.13.0", "8.6"),
    "GTX 970 beside RTX 3050": ({"compute_cap": "8.6\n5.2"}, "torch==2.7.1", "5.2"),
    "driver before CUDA 12": (
        {"compute_cap": "6.1", "driver_version": "515.65.01"},
        "torch==2.7.1",
        "update the driver",
    ),
    "GTX 970 by name": ({"name": "GeForce GTX 970", "driver_version": "390.157"}, "torch==2.7.1", "GeForce GTX 970"),
    "RTX 2060 by name": ({"name": "GeForce RTX 2060"}, "torch==2.13.0", "GeForce RTX 2060"),
    "capability not available": ({"compute_cap": "[N/A]", "name": "Quadro P1000"}, "torch==2.7.1", "Quadro P1000"),
    "nonsense": (
        {"compute_cap": "lorem", "name": "ipsum", "driver_version": "dolor"},
        "torch==2.13.0",
        "names no card",
    ),
    "driver not loaded": ({"name": "NVIDIA-SMI has failed"}, "torch==2.13.0", "names no card"),
    "nvidia-smi knows nothing": ({}, "torch==2.13.0", "names no card"),
    "Kepler": ({"compute_cap": "3.5"}, "torch==2.13.0", "run on the CPU"),
}


@needs_sh
@pytest.mark.parametrize("machine", MACHINES)
def test_torch_fits_the_card_and_the_reason_is_said(tmp_path: Path, machine: str) -> None:
    answers, requirement, reason = MACHINES[machine]
    fake_nvidia_smi(tmp_path, answers)
    answer = dry_run(tmp_path)
    if requirement == "torch==2.7.1" and sys.version_info >= (3, 14):
        assert answer.returncode == 1 and "allowed is 3.10 to 3.13" in answer.stderr
        return
    assert answer.returncode == 0, answer.stderr
    chosen, _, why = answer.stdout.partition(": ")
    assert chosen == requirement
    assert reason in why


def test_no_nvidia_smi_means_the_current_torch(tmp_path: Path) -> None:
    assert dry_run(tmp_path).stdout == "torch==2.13.0: no NVIDIA GPU found\n"


@needs_sh
def test_nvidia_smi_that_cannot_be_started_is_no_card(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_bytes(b"\x7fELF, but not really")
    program.chmod(0o755)
    answer = dry_run(tmp_path)
    assert answer.returncode == 0 and answer.stdout.startswith("torch==2.13.0: "), answer


OLD_NAMES = """
GeForce GTX 750 Ti; GeForce GTX 970; GeForce GTX 980M; GeForce GTX TITAN X; GeForce GTX 1050 Ti; GeForce GT 1030
GeForce 940MX; GeForce MX150; NVIDIA GeForce MX350; Quadro M2000; Quadro P1000; Quadro K2200; Quadro GP100
Tesla M60; Tesla P4; Tesla V100-SXM2-16GB; TITAN Xp; TITAN V; P106-100
"""
NEW_NAMES = """
NVIDIA GeForce GTX 1650; GeForce GTX 1660 Ti; NVIDIA T400 4GB; NVIDIA T1000; GeForce MX450; NVIDIA GeForce MX550
NVIDIA GeForce RTX 3050 Ti Laptop GPU; Quadro RTX 4000; Quadro T1000; TITAN RTX; Tesla T4; NVIDIA A10
NVIDIA RTX A2000; NVIDIA GeForce RTX 4090; NVIDIA H100 PCIe; NVIDIA GeForce RTX 5060
"""


def each(names: str) -> list[str]:
    return [name.strip() for name in names.strip().replace("\n", ";").split(";")]


@pytest.mark.parametrize("name", each(OLD_NAMES))
def test_names_of_maxwell_pascal_and_volta_are_known(name: str) -> None:
    assert setup_env.OLD_CARD.search(name) and setup_env.CARD.search(name + " (NVIDIA)")


@pytest.mark.parametrize("name", each(NEW_NAMES))
def test_names_of_turing_and_later_are_not_taken_for_old(name: str) -> None:
    assert not setup_env.OLD_CARD.search(name) and setup_env.CARD.search(name)


INDEX = "https://download.pytorch.org/whl/cu126"


@pytest.mark.parametrize(
    ("variable", "requirement", "options"),
    [
        ("torch==2.12.0", "torch==2.12.0", ()),
        ("torch >= 2.5, < 2.9", "torch >= 2.5, < 2.9", ()),
        ("torch", "torch", ()),
        (INDEX, "torch==2.13.0", ("--index-url", INDEX)),
        (f"torch==2.7.1 {INDEX}", "torch==2.7.1", ("--index-url", INDEX)),
        (f"torch==2.7.1 --index-url {INDEX}", "torch==2.7.1", ("--index-url", INDEX)),
        ("--pre", "torch==2.13.0", ("--pre",)),
        ("torch @ file:///wheels/torch.whl", "torch @ file:///wheels/torch.whl", ()),
        ("wheels/torch-2.13.0-cp311-cp311-linux_x86_64.whl", "wheels/torch-2.13.0-cp311-cp311-linux_x86_64.whl", ()),
        ("  ", "torch==2.13.0", ()),
    ],
)
def test_variable_overrides_the_choice(variable: str, requirement: str, options: tuple[str, ...]) -> None:
    torch = setup_env.choose_torch(setup_env.Machine(), variable)
    assert (torch.requirement, torch.pip_options) == (requirement, options)
    # Printed and read again it is the same: that is how it is kept from one run to the next.
    assert setup_env.choose_torch(setup_env.Machine(), str(torch)).pip_options == options


@pytest.mark.parametrize("variable", ["2.7.1", "torchvision==0.20", "numpy", "cu126"])
def test_variable_that_cannot_be_read_is_named_with_what_is_allowed(tmp_path: Path, variable: str) -> None:
    answer = dry_run(tmp_path, torch=variable)
    assert answer.returncode == 1
    assert f"NVAE_TORCH='{variable}'" in answer.stderr and "torch==2.7.1" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_python_newer_than_the_last_build_for_old_cards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old_card = setup_env.choose_torch(setup_env.Machine(((5, 2),)))
    monkeypatch.setattr(sys, "version_info", (3, 13, 0, "final", 0))
    setup_env.check_python(old_card)
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    with pytest.raises(setup_env.SetupError, match=r"3\.10 to 3\.13 for torch==2\.7\.1"):
        setup_env.check_python(old_card)


class Installs:
    """Stands in for pip alone: the environments are real folders, and what pip would have been told is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[list[str]] = []
        self.failing: set[str] = set()
        monkeypatch.setattr(setup_env, "pip", self)
        monkeypatch.setattr(setup_env, "MAKE_VENV", (*setup_env.MAKE_VENV, "--without-pip"))  # seconds less
        monkeypatch.setattr(setup_env.Environment, "ask", lambda environment, code: "2.13.0+cpu")

    def __call__(self, environment: setup_env.Environment, what: str, arguments: list[str]) -> None:
        assert environment.python.exists()
        if what in self.failing:
            raise setup_env.SetupError(f"{what} failed")
        self.commands.append(arguments)

    def run(self, folder: Path, extras: str, expect: int = 0) -> list[list[str]]:
        self.commands = []
        assert setup_env.main(["--venv", str(folder), "--extras", extras]) == expect
        return self.commands


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> Installs:
    monkeypatch.setattr(setup_env, "look_at_machine", setup_env.Machine)
    monkeypatch.delenv("NVAE_TORCH", raising=False)
    return Installs(monkeypatch)


def test_torch_comes_first_and_every_later_call_is_held_to_it(tmp_path: Path, installs: Installs) -> None:
    commands = installs.run(tmp_path / "a b", "deepspeed,test")
    torch_call = commands.index(["install", "torch==2.13.0"])
    later = commands[torch_call + 1 :]
    assert [command[-1] for command in later] == [".[test]", ".[deepspeed]"]
    for command in later:
        constraints = Path(command[command.index("--constraint") + 1])
        assert constraints.read_text() == "torch==2.13.0+cpu\n"
        assert "--no-build-isolation" in command


def test_second_run_installs_nothing_and_a_new_extra_only_adds(tmp_path: Path, installs: Installs) -> None:
    folder = tmp_path / "venv"
    assert installs.run(folder, "deepspeed,test")
    assert installs.run(folder, "deepspeed,test") == []
    assert installs.run(folder, "test") == []
    assert ".[faces,test]" in [command[-1] for command in installs.run(folder, "faces")]
    assert installs.run(folder, "deepspeed,faces,test") == []


def test_torch_asked_for_once_is_kept_until_another_is(
    tmp_path: Path, installs: Installs, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "venv"
    monkeypatch.setenv("NVAE_TORCH", f"torch==2.12.0 {INDEX}")
    assert ["install", "torch==2.12.0", "--index-url", INDEX] in installs.run(folder, "")
    monkeypatch.delenv("NVAE_TORCH")
    assert installs.run(folder, "") == []
    monkeypatch.setenv("NVAE_TORCH", "torch==2.11.0")
    commands = installs.run(folder, "")
    assert commands.index(["uninstall", "--yes", "torch"]) < commands.index(["install", "torch==2.11.0"])


def test_changed_needs_are_installed(tmp_path: Path, installs: Installs, monkeypatch: pytest.MonkeyPatch) -> None:
    installs.run(tmp_path / "venv", "")
    monkeypatch.setattr(setup_env, "fingerprint", lambda: "setup.cfg has changed")
    assert installs.run(tmp_path / "venv", "")


def test_install_that_broke_off_goes_on_at_the_next_run(
    tmp_path: Path, installs: Installs, capsys: pytest.CaptureFixture[str]
) -> None:
    installs.failing = {"torch==2.13.0"}
    installs.run(tmp_path / "venv", "", expect=1)
    assert "setup_env: torch==2.13.0 failed" in capsys.readouterr().err
    installs.failing = set()
    assert installs.run(tmp_path / "venv", "")
    assert installs.run(tmp_path / "venv", "") == []


def test_without_deepspeed_it_goes_on_and_says_so(
    tmp_path: Path, installs: Installs, capsys: pytest.CaptureFixture[str]
) -> None:
    installs.failing = {"DeepSpeed"}
    installs.run(tmp_path / "venv", "deepspeed")
    assert "training will use the torch engine" in capsys.readouterr().out
    assert installs.run(tmp_path / "venv", "deepspeed") == []
    assert "without DeepSpeed" in capsys.readouterr().out


def test_moved_environment_is_made_anew(tmp_path: Path, installs: Installs) -> None:
    installs.run(tmp_path / "here", "")
    (tmp_path / "here").rename(tmp_path / "there")
    leftover = tmp_path / "there" / "leftover"
    leftover.touch()
    assert installs.run(tmp_path / "there", "")
    assert not leftover.exists()


def test_folder_of_somebody_else_is_left_alone(
    tmp_path: Path, installs: Installs, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("five years of work")
    installs.run(tmp_path, "", expect=1)
    assert "--venv" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "five years of work"


@needs_sh
def test_scripts_start_from_a_path_with_a_space(tmp_path: Path) -> None:
    environment = setup_env.Environment(tmp_path / "with space")
    environment.bin.mkdir(parents=True)
    environment.python.symlink_to(sys.executable)
    script = environment.bin / "hello"
    script.write_text(f"#!{environment.python}\nimport sys\nprint('hello', sys.argv[1:])\n")
    script.chmod(0o755)
    other = environment.bin / "other"
    other.write_text("#!/bin/sh\necho untouched\n")
    environment.repair_shebangs()
    environment.repair_shebangs()
    assert subprocess.check_output([script, "a b"], text=True) == "hello ['a b']\n"
    assert other.read_text() == "#!/bin/sh\necho untouched\n"


def test_failing_pip_shows_its_end_and_what_to_do(tmp_path: Path) -> None:
    environment = setup_env.Environment(tmp_path)
    environment.python = Path(sys.executable)
    with pytest.raises(setup_env.SetupError, match="no such option: --nonsense") as failure:
        setup_env.pip(environment, "nothing", ["--nonsense"])
    assert "run the same command again" in str(failure.value)
    assert "--nonsense" in (tmp_path / setup_env.LOG).read_text()


def test_installer_needs_only_the_standard_library() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names
