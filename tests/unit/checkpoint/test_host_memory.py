"""The warning about host memory before a run that copies its state there."""

from pathlib import Path

import pytest

from ssa_pretrain.checkpoint import host_memory
from ssa_pretrain.checkpoint.host_memory import GIB, free_memory, memory_warning


def host(folder: Path, available_kib: int, limit: str, used: int) -> tuple[Path, Path]:
    """Returns the files in which a host and a container state their memory."""
    (folder / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available_kib} kB\n")
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    return folder / "meminfo", folder


@pytest.mark.parametrize(
    ("limit", "used", "wanted"), [("max", 10, 2048 * 1024), ("3000000", 1_000_000, 2_000_000), ("9" * 12, 0, 2**21)]
)
def test_free_memory_is_the_smaller_of_the_hosts_and_the_containers(tmp_path, limit, used, wanted):
    assert free_memory(*host(tmp_path, 2048, limit, used)) == wanted


def test_unknown_memory_gives_no_warning(tmp_path, monkeypatch):
    assert free_memory(tmp_path / "none", tmp_path) is None
    monkeypatch.setattr(host_memory, "free_memory", lambda: None)
    assert memory_warning(2**60) is None


def test_warning_has_both_numbers_and_the_setting(monkeypatch):
    monkeypatch.setattr(host_memory, "free_memory", lambda: 10 * GIB)
    assert memory_warning(10 * GIB) is None
    assert memory_warning(15 * GIB) == (
        "warning: this host has 10.0 GiB of free memory, and writing a checkpoint beside training may need 15.0 GiB of it: "
        "set checkpoint.asynchronous=false if it runs out"
    )
