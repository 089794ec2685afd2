"""ssa_pretrain/monitor/environment.py: the origin of code and data."""

import subprocess
from pathlib import Path

from ssa_pretrain.monitor.environment import provenance


def test_provenance_of_a_checkout_and_of_a_bare_folder(tmp_path: Path) -> None:
    assert provenance(tmp_path, None) == {"git_commit": None, "git_dirty": None, "data_manifest_sha256": None}
    run = {"cwd": tmp_path, "check": True, "capture_output": True}
    subprocess.run(["git", "init", "-q"], **run)
    (tmp_path / "manifest.json").write_text("{}")
    subprocess.run(["git", "add", "manifest.json"], **run)
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "x"], **run)
    found = provenance(tmp_path, tmp_path)
    assert len(found["git_commit"]) == 12 and found["git_dirty"] is False
    assert found["data_manifest_sha256"] == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    (tmp_path / "manifest.json").write_text("{ }")
    assert provenance(tmp_path, None)["git_dirty"] is True
