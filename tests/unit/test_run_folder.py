"""ssa_pretrain/run_folder.py: one live run per folder, and obstacles are found before a run starts."""

import fcntl
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from ssa_pretrain import run_folder
from ssa_pretrain.run_folder import LOCK, lock_folder, require_free, space_warning, unwritable
from ssa_pretrain.settings.files import unlock
from ssa_pretrain.settings.problems import ConfigError
from support.processes import ROOT

HOLD = "import sys, time, pathlib; from ssa_pretrain.run_folder import lock_folder; held = lock_folder(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"


def held(folder: Path, report: Callable[[str], None] = print) -> TextIO:
    """Returns a folder's lock, taken by this process."""
    lock = lock_folder(folder, report)
    assert lock is not None
    return lock


def test_second_run_is_refused_and_names_the_holder_until_it_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ConfigError) as caught:
                lock_folder(tmp_path, patience=0.2)
            line = str(caught.value)
            where = f"  output_dir={tmp_path}"[:60]
            assert line.startswith(where)
            assert f"is in use by process {holder.pid} on {socket.gethostname()}, started 2" in line
            assert line.endswith("; stop that run or try another output_dir")
            assert caught.value.exit_code == 3
            before = (tmp_path / LOCK).read_text()
            with pytest.raises(ConfigError) as looked:
                require_free(tmp_path, patience=60)  # not waited for: the holder is seen to run
            assert str(looked.value) == str(caught.value)
            assert (tmp_path / LOCK).read_text() == before
        finally:
            holder.send_signal(signal.SIGKILL)
    with held(tmp_path) as lock:  # at once, although the file is still there
        assert f'"pid": {os.getpid()}' in (tmp_path / LOCK).read_text()
        assert (tmp_path / LOCK).read_text().count("\n") == 1
        assert not lock.closed


def test_only_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    kept = [
        "checkpoints/step_00000002",
        "checkpoints/.hidden",
        "metrics.jsonl",
        "metrics.jsonl.damaged-1",
        "wandb.json",
        "notes.tmp",
    ]
    left = ["checkpoints/.step_00000004.tmp", ".step_00000002.universal", "metrics.jsonl.77.tmp"]
    left += ["wandb.json.77.tmp", "config.yaml.77.tmp", "report.html.77.tmp", ".seen_77"]
    (tmp_path / "checkpoints").mkdir()
    for name in (*kept, *left):
        if "step" in name:
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).touch()
    lines: list[str] = []
    held(tmp_path, lines.append).close()
    assert all((tmp_path / name).exists() for name in kept)
    assert not any((tmp_path / name).exists() for name in left)
    assert sorted(lines) == sorted(f"removed {tmp_path / name}, which a killed run left unfinished" for name in left)


def test_refused_run_removes_nothing(tmp_path: Path) -> None:
    scratch = tmp_path / "checkpoints" / ".step_00000004.tmp"
    with held(tmp_path):
        scratch.mkdir(parents=True)  # the holder is saving
        with pytest.raises(ConfigError, match="is in use by process"):
            lock_folder(tmp_path, patience=0)
    assert scratch.exists()


def test_checking_a_free_folder_changes_nothing(tmp_path: Path) -> None:
    require_free(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    unlock(held(tmp_path))
    assert (tmp_path / LOCK).read_text() == "", "the next holder's name is not taken for this one's"
    (tmp_path / LOCK).chmod(0o444)
    with (tmp_path / LOCK).open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # another process looks at the same time
        require_free(tmp_path, patience=0)
    held(tmp_path).close()


def test_dying_holder_is_awaited(tmp_path: Path) -> None:
    lock = held(tmp_path)
    (tmp_path / LOCK).write_text('{"pid": 1, "host": "another", "started": "x"}\n')
    timer = threading.Timer(1.5, lock.close)
    timer.start()
    require_free(tmp_path, patience=60)
    timer.join()
    assert lock.closed
    with held(tmp_path):
        (tmp_path / LOCK).write_text("{")
        with pytest.raises(ConfigError, match="is in use by another process; stop that run"):
            require_free(tmp_path, patience=0)


def test_storage_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    lines: list[str] = []
    (tmp_path / LOCK).touch()
    require_free(tmp_path)
    assert lock_folder(tmp_path, lines.append) is None
    assert lines == [f"{tmp_path} lies on storage without file locks: do not start a second run in it"]


def test_operating_system_error_is_one_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written: (Not a directory|File exists); try another output_dir"):
        lock_folder(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match=r"cannot be written: (Not a directory|File exists); try another output_dir"):
        lock_folder(tmp_path / "file")


def test_conflicting_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert unwritable(tmp_path / "file") == "is a file, not a folder"
    assert unwritable(tmp_path / "file" / "a" / "b") == f"lies below {tmp_path / 'file'}, which is a file"
    assert unwritable(tmp_path / "new" / "run") is None
    assert not (tmp_path / "new").exists()
    (tmp_path / "checkpoints").touch()
    assert unwritable(tmp_path) == f"contains {tmp_path / 'checkpoints'}, which is a file"


@pytest.mark.parametrize("locked", ["run", "run/checkpoints", "."])
def test_folders_without_permission_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: str) -> None:
    """Patches os.access, because root may write everywhere."""
    if locked != ".":
        (tmp_path / locked).mkdir(parents=True)
    place = tmp_path / locked if locked != "." else tmp_path
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != place)
    assert unwritable(tmp_path / "run") == f"cannot be written: no permission to write into {place}"


def test_low_disk_space_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 3 * 2**29}))
    assert space_warning(tmp_path, 3 * 2**29) is None
    assert space_warning(tmp_path, 2**31) == (
        f"warning: {tmp_path} has 1.5 GiB free, and one checkpoint needs about 2.0 GiB; free space before the first one is due"
    )


def test_config_error_pickles_unchanged(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(ConfigError) as caught:
        lock_folder(tmp_path, patience=0)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.exit_code) == (str(caught.value), 3)
