"""Transient errors of storage are tried again with growing pauses, each reported; others are raised at once."""

import errno
import os
from itertools import pairwise

import pytest
import torch.distributed as dist

from ssa_pretrain.checkpoint import integrity, storage
from ssa_pretrain.checkpoint.integrity import find_damage
from ssa_pretrain.checkpoint.publish import publish
from ssa_pretrain.checkpoint.storage import PAUSES, patiently, rename_patiently
from ssa_pretrain.errors import CheckpointError


@pytest.fixture
def slept(monkeypatch):
    """Returns the pauses, which take no time."""
    found = []
    monkeypatch.setattr(storage.time, "sleep", found.append)
    return found


def failing(times: int, number: int = errno.EIO):
    """Returns a function that fails `times` times."""
    calls = []

    def act() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return "done"

    return act


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT])
def test_transient_errors_are_tried_again_and_reported(slept, number):
    lines = []
    assert patiently(failing(2, number), "reading x", lines.append) == "done"
    assert slept == [0.5, 1.0]
    assert lines[1] == f"reading x failed ({os.strerror(number)}); trying again in 1 s (2 of 5)"


def test_last_error_is_raised_after_all_pauses(slept):
    with pytest.raises(OSError, match="Input/output error"):
        patiently(failing(99), "reading x", lambda _: None)
    assert slept == list(PAUSES)
    assert all(later > sooner for sooner, later in pairwise(slept))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENOENT, errno.EDQUOT, errno.EROFS])
def test_lasting_errors_are_raised_at_once(slept, number):
    with pytest.raises(OSError):
        patiently(failing(1, number), "reading x", pytest.fail)
    assert slept == []


def test_rename_that_was_done_although_it_failed_counts(slept, tmp_path, monkeypatch):
    """As on NFS, when the answer is lost."""
    old, new, rename = tmp_path / "old", tmp_path / "new", os.rename
    old.mkdir()

    def lost_answer(source, target):
        rename(source, target)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(storage.os, "rename", lambda *paths: lost_answer(*paths) if old.exists() else rename(*paths))
    rename_patiently(old, new, lambda _: None)
    assert new.is_dir() and len(slept) == 1
    with pytest.raises(FileNotFoundError):
        rename_patiently(old, tmp_path / "other", lambda _: None)


@pytest.fixture
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write(folder):
    (folder / "weights.bin").write_bytes(bytes(1000))


@pytest.mark.usefixtures("_one_process")
def test_save_survives_storage_that_fails_for_seconds(slept, tmp_path, monkeypatch):
    rename, lines, left = os.rename, [], [2]

    def fails_twice(*paths):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        rename(*paths)

    monkeypatch.setattr(storage.os, "rename", fails_twice)
    folder = publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True, report=lines.append)
    assert find_damage(folder) is None
    assert len(lines) == 2 and "renaming" in lines[0] and "(Stale file handle); trying again in 0.5 s" in lines[0]


@pytest.mark.usefixtures("_one_process")
def test_read_that_fails_for_seconds_is_no_damage(slept, tmp_path, monkeypatch, capsys):
    folder = publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)
    read, fails = integrity.file_sha256, failing(2)
    monkeypatch.setattr(integrity, "file_sha256", lambda path: fails() and read(path))
    assert find_damage(folder) is None
    assert len(slept) == 2 and f"checking {folder}" in capsys.readouterr().out


@pytest.mark.usefixtures("_one_process")
def test_failed_fsync_fails_the_save_and_is_not_repeated(slept, tmp_path, monkeypatch):
    """Linux would report success for the second fsync, although the data is lost."""
    publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)
    calls, fsync = [], os.fsync

    def failing_once(descriptor):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing_once)
    with pytest.raises(CheckpointError, match="Input/output error"):
        publish(tmp_path, 10, {}, write, keep=2, is_rank_0=True)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]
