"""ssa_pretrain/checkpoint/writer.py writes core's format from threads of this process and raises the failure of any of them."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from ssa_pretrain.checkpoint import storage
from ssa_pretrain.checkpoint.weights import WeightsWriter, write_index
from ssa_pretrain.checkpoint.writer import NUM_THREADS, write
from ssa_pretrain.parallel import cpu_backend


@pytest.fixture(autouse=True)
def _one_process():
    cpu_backend.install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def state(fill: float) -> dict:
    """Tensors of several sizes, one of them a view, a sharded object and a plain value."""
    whole = torch.full((300, 1000), fill)
    tensors = {"large": whole, "view": whole[:, :7], "small": torch.full((3,), fill, dtype=torch.bfloat16)}
    tensors |= {f"more_{n}": torch.full((1000, n + 1), fill) for n in range(6)}
    shards = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}
    return {**shards, "object": ShardedObject("object", {"fill": fill}, (1,), (0,)), "plain": fill}


def save(folder: Path) -> None:
    folder.mkdir()
    write(folder, state(2.0), {})


def children() -> list[str]:
    return [pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()]


def test_core_reads_the_checkpoint_and_no_process_is_started(tmp_path):
    before = children()
    save(tmp_path / "saved")
    assert children() == before
    assert len(list((tmp_path / "saved").glob("*.distcp"))) == NUM_THREADS
    loaded = dist_checkpointing.load(state(0.0), str(tmp_path / "saved"))
    for name, shard in state(2.0).items():
        if isinstance(shard, ShardedTensor):
            torch.testing.assert_close(loaded[name], shard.data, rtol=0, atol=0)
    assert (loaded["object"], loaded["plain"]) == ({"fill": 2.0}, 2.0)


def test_full_disk_is_an_error_in_any_thread(tmp_path):
    """One of the four files exceeds the limit. Torch's own threads would omit it and continue."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
    try:
        with pytest.raises(CheckpointException) as caught:
            save(tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(caught.value)
    assert not (tmp_path / "saved" / ".metadata").exists()


def test_file_that_fails_for_a_moment_is_written_again_whole(tmp_path, monkeypatch, capsys):
    fsync, left = os.fsync, [2]

    def fails_twice(descriptor: int) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_twice)
    monkeypatch.setattr(storage, "PAUSES", (0.0,) * 5)
    save(tmp_path / "saved")
    loaded = dist_checkpointing.load(state(0.0), str(tmp_path / "saved"))
    torch.testing.assert_close(loaded["large"], torch.full((300, 1000), 2.0), rtol=0, atol=0)
    output = capsys.readouterr().out
    assert output.count("failed (Input/output error); trying again in 0 s") == 2
    assert f"of {tmp_path / 'saved'}" in output


def test_list_of_the_shards_is_written_again_after_a_failed_rename(tmp_path, monkeypatch, capsys):
    rename, left = os.rename, [2]

    def fails_twice(old, new, **options):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        rename(old, new, **options)

    monkeypatch.setattr(os, "rename", fails_twice)
    monkeypatch.setattr(storage, "PAUSES", (0.0,) * 5)
    save(tmp_path / "saved")
    dist_checkpointing.load(state(0.0), str(tmp_path / "saved"))
    assert capsys.readouterr().out.count(f"writing {tmp_path / 'saved'}/.metadata failed (Stale file handle)") == 2


def test_full_disk_has_the_systems_own_error_in_common_weights(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    writer = WeightsWriter(tmp_path, "stage_000")
    try:
        writer.add("a", torch.zeros(10_000))
        with pytest.raises(OSError, match="File too large") as caught:
            writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_file_mode_follows_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save(tmp_path / "saved")
        writer = WeightsWriter(tmp_path / "saved", "stage_000")
        writer.add("a", torch.zeros(3))
        writer.flush()
        write_index(tmp_path / "saved")
    finally:
        os.umask(before)
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "saved").iterdir()} == dict.fromkeys(
        (p.name for p in (tmp_path / "saved").iterdir()), oct(mode)
    )
