"""The doctor: what each check finds on machines that are in order and on machines that are not, its page, its JSON and its exit code."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

from ssa_pretrain.doctor import gpus, machine, storage
from ssa_pretrain.doctor.findings import Finding, Status, as_json, exit_code, fail, ok, page, run_check, warn
from ssa_pretrain.run_folder import lock_folder
from ssa_pretrain.settings.files import unlock
from support.processes import ROOT, environment, ranks, run_ranks


def statuses(findings: list[Finding]) -> dict[str, Status]:
    return {one.name: one.status for one in findings}


def doctor(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ssa_pretrain.doctor", *arguments]
    return subprocess.run(
        command, env=environment() | variables, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_machine_without_gpus_is_in_order(tmp_path: Path) -> None:
    done = doctor(str(tmp_path / "run"), HOME=str(tmp_path))
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("doctor on ") and lines[-1].startswith("0 fail, ")
    assert {line.split()[0] for line in lines[1:-1]} <= {"ok", "warn"}
    assert len(lines) < 60
    assert list(tmp_path.iterdir()) == []  # it leaves nothing


def test_json_has_the_same_findings_and_a_failure_exits_with_1(tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, time.time() - 3600))
    done = doctor("--json", str(tmp_path), HOME=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    found = json.loads(done.stdout)
    (bad,) = [one for one in found["findings"] if one["status"] == "fail"]
    assert (done.returncode, found["exit_code"]) == (1, 1)
    assert bad["name"] == "torch_extensions" and bad["remedy"] == f"rm {lock}"
    assert "60 minutes ago" in bad["found"]


def test_wrong_arguments_exit_with_3() -> None:
    assert doctor("--no-such-flag").returncode == 3


def test_page_merges_hosts_and_names_those_that_differ() -> None:
    findings = [Finding(Status.OK, "torch", "2.13", host=host) for host in ("a", "b", "c")]
    findings += [Finding(Status.WARN, "disk", "1 GiB free", "free space", "b"), ok("collective", "right")]
    assert page(findings, "doctor").splitlines() == [
        "doctor",
        "ok    torch       2.13",
        "warn  disk        b: 1 GiB free  -> free space",
        "ok    collective  right",
        "0 fail, 1 warn, 2 ok",
    ]
    assert exit_code(findings) == 0 and exit_code([*findings, fail("x", "y", "z")]) == 1
    assert json.loads(as_json(findings))["findings"][3]["host"] == "b"


def test_check_that_raises_or_does_not_answer_is_a_finding() -> None:
    def broken() -> list[Finding]:
        raise OSError("Input/output error")

    (one,) = run_check("disk", broken)
    assert (one.status, one.name) == (Status.FAIL, "disk") and "Input/output error" in one.found
    answer = threading.Event()
    (late,) = run_check("disk", lambda: [ok("disk", "free")] * answer.wait(), seconds=0.05)
    answer.set()
    assert late.status is Status.FAIL and "no answer in 0.05 s" in late.found


def test_every_remedy_is_given_and_nothing_in_order_has_one() -> None:
    assert not ok("a", "b").remedy and warn("a", "b", "c").remedy and fail("a", "b", "c").remedy


@pytest.mark.parametrize(
    ("have", "status"), [("2.13.0+cu130", Status.OK), ("2.10.0", Status.FAIL), ("2.14.1", Status.FAIL)]
)
def test_versions_are_judged_by_the_declared_ranges(monkeypatch: pytest.MonkeyPatch, have: str, status: Status) -> None:
    monkeypatch.setattr(machine, "version", lambda name: have)
    monkeypatch.setattr(machine, "_requirements", lambda: {"torch": ">=2.11,<2.14"})
    (torch,) = [one for one in machine.python_and_packages() if one.name == "torch"]
    assert torch.status is status and (status is Status.OK or "'torch>=2.11,<2.14'" in torch.remedy)


def test_missing_package_that_is_needed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise machine.PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", nothing)
    found = statuses(machine.python_and_packages())
    assert found["torch"] is Status.FAIL and "deepspeed" not in found


def test_declared_ranges_are_read_from_the_installed_project() -> None:
    assert "0.16.1" in machine._requirements()["megatron-core"]


def test_declared_range_is_that_of_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["a==1; python_version >= '3.11'", "a>=2; python_version < '3.11'", "b>3; extra == 'deepspeed'", "c"]
    monkeypatch.setattr(machine, "requires", lambda name: lines)
    assert machine._requirements() == {"a": "==1", "b": ">3"}


def test_young_locks_empty_files_and_shared_caches_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache" / "k"
    cache.mkdir(parents=True)
    (cache / "kernel.cubin").touch()
    (cache / "lock").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(machine, "file_system", lambda path: "lustre")
    found = [one for one in machine.compiler_caches() if one.name == "triton cache"]
    assert [one.status for one in found] == [Status.WARN, Status.FAIL, Status.WARN]
    assert "holds a lock since" in found[0].found and "kernel.cubin" in found[1].found and "lustre" in found[2].found


def test_file_system_is_that_of_the_innermost_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = "/dev/a / ext4 rw 0 0\nnode:/x /shared nfs4 rw 0 0\ntmpfs /shared/fast tmpfs rw 0 0"
    monkeypatch.setattr(machine, "_read", lambda path: mounts)
    for path, kind in (("/shared/runs/a", "nfs4"), ("/shared/fast/a", "tmpfs"), ("/sharedness", "ext4")):
        assert machine.file_system(Path(path)) == kind


@pytest.mark.parametrize(
    ("limit", "value", "name", "status"),
    [
        (resource.RLIMIT_NOFILE, 256, "ulimit -n", Status.WARN),
        (resource.RLIMIT_NPROC, 100, "ulimit -u", Status.WARN),
        (resource.RLIMIT_FSIZE, 2**20, "ulimit -f", Status.FAIL),
    ],
)
def test_low_limits_are_found(
    monkeypatch: pytest.MonkeyPatch, limit: int, value: int, name: str, status: Status
) -> None:
    usual = resource.RLIM_INFINITY
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (value if which == limit else usual, usual))
    assert statuses(machine.limits()) == {name: status}


def test_small_shared_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    State = namedtuple("State", "f_blocks f_frsize f_bavail")
    monkeypatch.setattr(machine.os, "statvfs", lambda path: State(2**14, 4096, 2**14))  # 64 MiB, as Docker gives
    (one,) = machine.shared_memory()
    assert one.status is Status.WARN and "0.06 GiB" in one.found and "--ipc=host" in one.remedy


@pytest.mark.parametrize(("free", "status"), [(2**20, Status.FAIL), (10 * 2**30, Status.WARN), (2**40, Status.OK)])
def test_free_space_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, status: Status) -> None:
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(free))
    monkeypatch.setattr(storage, "PROBE_BYTES", 2**20)
    assert statuses(storage.run_folder(tmp_path))["disk"] is status
    assert list(tmp_path.iterdir()) == []


def test_folder_in_use_last_hang_and_an_unwritable_place_are_found(tmp_path: Path) -> None:
    (tmp_path / "hang.txt").write_text("2026-01-01 00:00:00 hang: rank 3 (node2, pid 7) does not move\n  detail\n")
    lock = lock_folder(tmp_path, lambda text: None)
    found = {one.name: one for one in storage.run_folder(tmp_path)}
    if lock is not None:
        unlock(lock)
    assert found["run"].status is Status.WARN and f"pid {os.getpid()}" in found["run"].found.replace("process", "pid")
    assert "rank 3 (node2, pid 7)" in found["last hang"].found
    file = tmp_path / "file"
    file.touch()
    (one,) = storage.run_folder(file)
    assert one.status is Status.FAIL and "is a file" in one.found


def test_nvidia_smi_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "{}, NVIDIA H200, 575.57, {}, 143771, {}\n"
    assert statuses(gpus.read_query(line.format(0, 3, 0) + line.format(1, 3, "[N/A]"))) == {"gpu": Status.OK}
    found = gpus.read_query(line.format(0, 90000, 0) + line.format(1, 3, 2))
    assert [one.status for one in found] == [Status.OK, Status.WARN, Status.FAIL]
    assert "GPU 0: 90000 of 143771 MiB" in found[1].found and "GPU 1: 2 uncorrected" in found[2].found


@pytest.mark.parametrize(
    ("program", "seconds", "text"),
    [
        ("echo 'Failed to initialize NVML'; exit 9", gpus.SMI_SECONDS, "Failed to initialize NVML"),
        ("exec sleep 60", 0.5, "does not answer"),
    ],
)
def test_broken_driver_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, seconds: float, text: str
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{program}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpus, "SMI_SECONDS", seconds)
    (one,) = gpus.driver()
    assert one.status is Status.FAIL and text in one.found


def test_gpus_that_the_kernels_do_not_support_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    supported = {"NVIDIA A100-SXM4-80GB": (8, 0), "NVIDIA H200": (9, 0)}
    assert gpus.unsupported(supported) == []
    (one,) = gpus.unsupported({**supported, "Tesla V100-SXM2-32GB": (7, 0)})
    assert one.status is Status.FAIL
    assert (
        one.found
        == "Tesla V100-SXM2-32GB has compute capability 7.0, and the attention kernels need 8.0 (A100) or later"
    )
    monkeypatch.setattr("torch.version.hip", "7.0")
    (one,) = gpus.unsupported({"AMD Instinct MI300X": (9, 4)})
    assert one.found == "AMD Instinct MI300X: no training run was tested on AMD's GPUs"


def test_ranks_of_a_job_print_one_page(tmp_path: Path) -> None:
    """Both ranks are on one node here, so nothing differs; two folders show what does."""
    ended = run_ranks(["-m", "ssa_pretrain.doctor", "--json", str(tmp_path)], ranks(2), timeout=300)
    assert [one.code for one in ended] == [0, 0], ended
    found = {one["name"]: one for one in json.loads(ended[0].stdout)["findings"]}
    assert ended[1].stdout == ""
    for name in ("same versions", "shared storage", "clocks", "collective"):
        assert found[name]["status"] == "ok", found[name]
    assert "4 MiB over 2 ranks" in found["collective"]["found"]


def test_ranks_that_do_not_share_the_folder_are_told(tmp_path: Path) -> None:
    variables = [more | {"PLACE": str(n)} for n, more in enumerate(ranks(2))]
    script = tmp_path / "doctor.py"
    script.write_text(
        "import os, sys; from ssa_pretrain.doctor.__main__ import main\n"
        f"main(['--json', {str(tmp_path)!r} + '/' + os.environ['PLACE']])\n"
    )
    ended = run_ranks([str(script)], variables, timeout=300)
    assert [one.code for one in ended] == [1, 1], ended
    (bad,) = [one for one in json.loads(ended[0].stdout)["findings"] if one["status"] == "fail"]
    assert bad["name"] == "shared storage" and "is not seen on" in bad["found"]
