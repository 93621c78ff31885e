"""What the doctor finds, on this machine for real and on cards that are not here."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nvae_lowmem.hardware import doctor
from nvae_lowmem.hardware import gpu_facts as doctor_card
from nvae_lowmem.hardware.doctor import Check, as_json, as_text, run_checks, worst
from nvae_lowmem.hardware.find_card import find_card
from nvae_lowmem.hardware.gpu_facts import (
    GpuFacts,
    check_card,
    check_driver,
    check_fp16,
    check_kernels,
    check_memory,
    check_torch,
    has_kernels,
    read_gpu,
)
from nvae_lowmem.units import GIB, MIB

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "doctor.py"
CUDA_126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")  # torch 2.7.1 on PyPI
CUDA_130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")  # torch 2.13.0
GTX_970 = find_card("gtx-970")
WITH_970 = GpuFacts(
    torch_version="2.7.1",
    cuda_version="12.6",
    arch_flags=CUDA_126,
    card=GTX_970,
    free_bytes=GTX_970.total_bytes_linux - 100 * MIB,
    driver="580.95.05",
    driver_cards=("NVIDIA GeForce GTX 970",),
    driver_capabilities=((5, 2),),
)


def facts(**changes: object) -> GpuFacts:
    return dataclasses.replace(WITH_970, **changes)  # type: ignore[arg-type]


# ---- for real --------------------------------------------------------------------------------------------------------


def test_the_script_runs_here_and_its_json_says_the_truth(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--json", "-", "--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert done.returncode == (1 if report["status"] == "FAIL" else 0)
    assert torch.__version__ in checks["torch"]["finding"]
    assert (checks["card"]["status"] == "OK") == torch.cuda.is_available()
    assert ("memory" in checks) == torch.cuda.is_available()
    if "deepspeed" in {d.metadata["Name"] for d in metadata.distributions()}:
        assert metadata.version("deepspeed") in checks["deepspeed"]["finding"]
    assert not (tmp_path / "runs").exists()  # looking leaves nothing behind
    for check in report["checks"]:
        assert check["status"] == "OK" or check["advice"], check


def test_main_prints_the_report_writes_the_file_and_answers_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvae_lowmem.commands.doctor import main

    monkeypatch.setattr(doctor, "read_gpu", lambda: WITH_970)
    target = tmp_path / "report.json"
    assert main(["--runs", str(tmp_path), "--json", str(target)]) in (0, 1)
    assert "GTX 970 (5.2): this torch runs on it" in capsys.readouterr().out
    assert json.loads(target.read_text())["checks"][0]["name"] == "system"
    assert main(["--card", "gtx-97"]) == 2
    assert "did you mean 'gtx-970'" in capsys.readouterr().err
    assert main(["--json", str(tmp_path / "no" / "report.json")]) == 2
    assert "--json" in capsys.readouterr().err


def test_a_missing_kernel_for_the_card_here_ends_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvae_lowmem.commands.doctor import main

    monkeypatch.setattr(doctor, "read_gpu", lambda: facts(arch_flags=CUDA_130))
    assert main(["--runs", str(tmp_path)]) == 1
    assert 'pip install "torch==2.7.1"' in capsys.readouterr().out


def test_a_check_that_breaks_is_a_finding_and_the_others_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down() -> Check:
        raise OSError("no such drawer")

    monkeypatch.setattr(doctor, "check_ram", break_down)
    checks = {check.name: check for check in run_checks(tmp_path)}
    assert checks["ram"].status == "FAIL"
    assert "no such drawer" in checks["ram"].finding
    assert "faces" in checks


def test_reports_count_and_show_what_to_do() -> None:
    checks = [Check("a", "OK", "fine"), Check("bb", "WARN", "slow", "wait"), Check("c", "OK", "good")]
    assert worst(checks) == "WARN"
    assert worst([]) == "OK"
    text = as_text(checks)
    assert "WARN  bb  slow\n          -> wait" in text
    assert text.endswith("2 OK, 1 WARN, 0 FAIL: nothing stands in the way")
    assert json.loads(as_json(checks))["checks"][1] == {
        "name": "bb",
        "status": "WARN",
        "finding": "slow",
        "advice": "wait",
    }


# ---- torch and the card ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "capability", "runs"),
    [
        (CUDA_126, (5, 2), True),
        (CUDA_126, (6, 1), True),
        (CUDA_126, (8, 9), True),
        (CUDA_130, (5, 2), False),
        (CUDA_130, (6, 1), False),
        (CUDA_130, (12, 0), True),
        (("sm_61",), (6, 0), False),
        (("sm_90a", "compute_90"), (9, 0), False),
        ((), (5, 2), False),
    ],
)
def test_kernels_run_on_their_own_major_version_from_their_minor_up(
    flags: tuple[str, ...], capability: tuple[int, int], runs: bool
) -> None:
    assert has_kernels(flags, capability) is runs


def test_a_card_without_kernels_fails_with_the_exact_pip_line() -> None:
    assert check_kernels(WITH_970, None) == Check(
        "kernels", "OK", "NVIDIA GeForce GTX 970 (5.2): this torch runs on it"
    )
    check = check_kernels(facts(torch_version="2.13.0", arch_flags=CUDA_130), None)
    assert check is not None
    assert check.status == "FAIL"
    assert check.advice.startswith('pip install "torch==2.7.1"')
    assert "sm_75" in check.finding


def test_a_planned_card_is_checked_and_never_fails_this_machine() -> None:
    here = GpuFacts(torch_version="2.13.0+cpu")
    check = check_kernels(here, find_card("gtx-1050-ti"))
    assert check is not None
    assert (check.status, "no CUDA kernels" in check.finding) == ("WARN", True)
    assert 'pip install "torch==2.7.1"' in check.advice
    assert check_kernels(here, None) is None
    assert check_kernels(here, find_card("4g")) is None
    plan = check_memory(here, find_card("4g"))
    assert plan is not None
    assert plan.finding.startswith("plan: ")


@pytest.mark.parametrize(
    ("version", "status"), [("2.3.1", "FAIL"), ("2.4.0", "OK"), ("2.13.0+cu130", "OK"), ("2.16.0", "WARN")]
)
def test_torch_versions(version: str, status: str) -> None:
    assert check_torch(facts(torch_version=version)).status == status


def test_a_torch_that_cannot_be_imported_fails_with_the_line_for_the_card() -> None:
    check = check_torch(facts(torch_version=None, torch_problem="No module named 'torch'"))
    assert (check.status, check.advice) == ("FAIL", 'install it: pip install "torch==2.7.1"')
    assert "No module named 'torch'" in check.finding
    assert check_fp16(facts(torch_version=None)) is None


def test_a_card_that_only_the_driver_sees_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cpu_build = check_card(facts(card=None, cuda_version=None))
    assert (cpu_build.status, cpu_build.advice) == ("FAIL", 'pip install "torch==2.7.1"')
    old_driver = check_card(facts(card=None, torch_problem="The NVIDIA driver on your system is too old"))
    assert old_driver.status == "FAIL"
    assert "too old" in old_driver.finding
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert check_card(facts(card=None)).status == "WARN"
    assert "CUDA_VISIBLE_DEVICES='-1'" in check_card(facts(card=None)).finding
    assert check_card(GpuFacts(torch_version="2.13.0")).finding == "no CUDA card"


@pytest.mark.parametrize(
    ("driver", "cuda", "status"),
    [("580.95.05", "13.0", "OK"), ("535.183", "12.6", "OK"), ("535.183", "13.0", "FAIL"), ("470.1", "12.6", "FAIL")],
)
def test_the_driver_must_be_new_enough_for_torchs_cuda(driver: str, cuda: str, status: str) -> None:
    assert check_driver(facts(driver=driver, cuda_version=cuda)).status == status


def test_memory_names_what_is_free_and_warns_of_a_busy_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_card, "this_os", lambda: "linux")
    idle = check_memory(WITH_970, None)
    assert idle is not None
    assert idle.status == "OK"
    assert "3.84 GiB free of 3.94 GiB" in idle.finding
    assert "training may take 3.20 GiB" in idle.finding
    busy = check_memory(facts(free_bytes=3 * GIB, process_bytes=(700 * MIB, 100 * MIB)), None)
    assert busy is not None
    assert (busy.status, "close other programs" in busy.advice) == ("WARN", True)
    assert "2 other processes use 800.0 MiB" in busy.finding
    full = check_memory(facts(free_bytes=0), None)
    assert full is not None
    assert full.status == "FAIL"


def test_under_wddm_a_process_may_not_tell_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_card, "this_os", lambda: "windows")
    check = check_memory(facts(process_bytes=(None, 12 * MIB)), None)
    assert check is not None
    assert "2 other processes on it (WDDM does not tell" in check.finding
    assert "training may take 2.70 GiB" in check.finding


def test_the_driver_is_read_through_nvml_with_wddm_blanks(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    processes = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=5), SimpleNamespace(pid=1, usedGpuMemory=None)]
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: b"580.95.05")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: "NVIDIA GeForce GTX 970")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda handle: [5, 2])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda handle: processes)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetGraphicsRunningProcesses", lambda handle: processes)
    found = read_gpu()
    assert (found.driver, found.driver_cards) == ("580.95.05", ("NVIDIA GeForce GTX 970",))
    assert (found.driver_capabilities, found.process_bytes) == (((5, 2),), (None,))


def test_a_failing_fp16_selftest_names_the_precision_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_card, "fp16_convolution_selftest", lambda device: (False, f"NaN on {device}"))
    check = check_fp16(facts(card=find_card("gtx-1650")))
    assert check == Check("fp16", "WARN", "NaN on cuda", "train with --precision fp32 on this machine")
    assert "fp32 or bf16" in check_fp16(facts(card=None)).advice  # type: ignore[union-attr]


# ---- the machine around it -------------------------------------------------------------------------------------------


def test_a_missing_deepspeed_says_what_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", absent)
    check = doctor.check_deepspeed()
    assert check.status == "WARN"
    assert "plain torch engine" in check.finding
    assert "pip install" in check.advice


def test_a_deepspeed_that_does_not_import_is_reported_and_stays_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy_failure(name: str) -> None:
        print("loading", name)
        os.environ["LEFT_BEHIND"] = "1"
        raise OSError("libmpi.so.40: cannot open shared object file")

    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.19.8")
    monkeypatch.setattr(doctor.importlib, "import_module", noisy_failure)
    check = doctor.check_deepspeed()
    assert check.status == "WARN"
    assert "libmpi.so.40" in check.finding
    assert "LEFT_BEHIND" not in os.environ
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("free", "status"), [(100 * GIB, "OK"), (5 * GIB, "WARN"), (GIB // 2, "FAIL")])
def test_disk_space_is_that_of_the_folder_that_will_hold_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, status: str
) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: {tmp_path: SimpleNamespace(free=free)}[path])
    assert doctor.check_disk(tmp_path / "not" / "yet").status == status


def test_a_runs_folder_that_is_a_file_fails(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    assert doctor.check_disk(tmp_path / "runs").status == "FAIL"


@pytest.mark.parametrize(("version", "status"), [((3, 9), "FAIL"), ((3, 10), "OK"), ((3, 13), "OK"), ((3, 14), "WARN")])
def test_python_versions(version: tuple[int, int], status: str) -> None:
    assert doctor.check_python(version).status == status


def test_more_threads_than_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    assert "OMP_NUM_THREADS=" in doctor.check_threads().advice


def test_no_compiler_and_no_numactl_say_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    assert doctor.check_compiler().status == "WARN"
    numactl = doctor.check_numactl()
    assert numactl is not None
    assert (numactl.status, "--bind_cores_to_rank" in numactl.finding) == ("OK", True)


def test_little_host_memory_and_missing_extras_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_host_memory", lambda: (8 * GIB, 2 * GIB))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.check_ram().status == "WARN"
    assert "2.00 GiB available of 8.00 GiB" in doctor.check_ram().finding
    assert "pip install dicebear-core" in doctor.check_faces().advice
