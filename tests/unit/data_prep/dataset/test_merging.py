"""Joined files are the concatenated shards and megatron-core reads them. Damaged shards are rejected. Memory stays small."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.corpus.planning import Shard
from data_prep.dataset.merging import merge
from data_prep.errors import InputError
from data_prep.run_config import MergeConfig
from data_prep.shards import binaries
from data_prep.shards.binaries import TokenFile, first_changed_bytes, write_index_file
from data_prep.shards.groups import group_shards, joined_record
from data_prep.shards.shard import FinishedShard, Job
from ssa_pretrain.data.indexed_format import check_pair, read_lengths, write_index

DTYPE = np.dtype("<u2")


def shard(out: Path, number: int, lengths: list[int], split: str = "train", name: str = "text") -> dict:
    """Writes a shard whose tokens count up from its number; returns its record."""
    stem = f"{name}_{number:05d}"
    file = TokenFile(out / f"work/shards/{split}/{stem}")
    file.write((np.arange(sum(lengths)) + 1000 * number).astype(DTYPE).tobytes())
    info = file.close(name, f"work/shards/{split}/{stem}", DTYPE, [np.array(lengths, dtype=np.int32)], len(lengths))
    return info.to_record()


def made(out: Path, counts: list[int], name: str = "text") -> list[FinishedShard]:
    shards = []
    for number, count in enumerate(counts):
        train = shard(out, number, list(range(3, 3 + count)), name=name)
        held = shard(out, number, [7], "heldout", name) if number % 2 else None
        record = {"splits": {"train": train, "heldout": held}}
        shards.append(FinishedShard(Job(Shard(name, number, ()), f"print {name} {number}"), record))
    return shards


def tokens(out: Path, prefix: str) -> np.ndarray:
    return np.fromfile(out / f"{prefix}.bin", dtype=DTYPE)


@pytest.mark.parametrize("files", [1, 3, 32])
def test_joined_tokens_are_those_of_the_shards_in_order(tmp_path, files):
    shards = made(tmp_path, [4, 1, 9, 2, 5])
    whole = np.concatenate([tokens(tmp_path, one.record["splits"]["train"]["prefix"]) for one in shards])
    lengths = np.concatenate(
        [read_lengths(tmp_path / f"{one.record['splits']['train']['prefix']}.idx") for one in shards]
    )
    splits = merge(tmp_path, shards, MergeConfig(files=files), print)
    assert len(splits["train"]) == min(files, 5)
    assert [info.prefix for info in splits["train"]] == [f"train/text_{n:05d}" for n in range(min(files, 5))]
    for split in ("train", "heldout"):
        for info in splits[split]:
            header = check_pair(tmp_path / info.prefix)
            assert (header.num_documents, header.dtype) == (info.documents, DTYPE)
    assert np.array_equal(np.concatenate([tokens(tmp_path, info.prefix) for info in splits["train"]]), whole)
    merged = np.concatenate([read_lengths(tmp_path / f"{info.prefix}.idx") for info in splits["train"]])
    assert np.array_equal(merged, lengths)
    assert sum(info.documents for info in splits["heldout"]) == 2


def test_joined_shards_are_removed_and_found_by_their_joined_file(tmp_path):
    shards = made(tmp_path, [4, 1, 9])
    before = merge(tmp_path, shards, MergeConfig(files=2), print)
    assert not (tmp_path / "work/shards/train/text_00001.bin").exists()
    assert (tmp_path / "work/shards/train/text_00000.bin").exists()  # a group of one: a hard link
    alone, group = group_shards(shards, 2)
    assert joined_record(tmp_path, group, verify=True)
    assert joined_record(tmp_path, alone, verify=True) is None
    inode = (tmp_path / "train/text_00001.bin").stat().st_ino
    assert merge(tmp_path, shards, MergeConfig(files=2), print) == before  # from its record: the shards are removed
    assert (tmp_path / "train/text_00001.bin").stat().st_ino == inode
    path = tmp_path / "train/text_00001.bin"
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)
    assert joined_record(tmp_path, group, verify=False), "a flipped bit is seen by its sha256 alone"
    assert joined_record(tmp_path, group, verify=True) is None
    assert joined_record(tmp_path, group, verify=False) is None, "and the record is gone then"


def test_joined_file_of_other_shards_is_not_reused(tmp_path):
    shards = made(tmp_path, [4, 1, 9])
    merge(tmp_path, shards, MergeConfig(files=1), print)
    (whole,) = group_shards(shards, 1)
    assert joined_record(tmp_path, whole, verify=True)
    (fewer,) = group_shards(shards[:2], 1)
    assert joined_record(tmp_path, fewer, verify=True) is None


def test_changing_the_number_of_files_removes_the_old_ones(tmp_path):
    shards = made(tmp_path, [4, 1, 9, 3])
    merge(tmp_path, shards, MergeConfig(files=4), print)
    splits = merge(tmp_path, shards, MergeConfig(files=1, keep_shards=True), print)
    assert {p.name for p in (tmp_path / "train").iterdir()} == {"text_00000.bin", "text_00000.idx", "text_00000.sums"}
    assert len(splits["train"]) == 1
    assert (tmp_path / "work/shards/train/text_00003.bin").exists()


def test_parts_are_never_joined(tmp_path):
    shards = made(tmp_path, [1, 2], "a") + made(tmp_path, [3], "b")
    assert [group.stem for group in group_shards(shards, 1)] == ["a_00000", "b_00000"]


@pytest.mark.parametrize(
    "suffix,change,message",
    [
        (".bin", lambda raw: raw[:-2], r"text_00001.bin has \d+ bytes, its .idx describes \d+, its record has \d+"),
        (".bin", lambda raw: raw[:4] + bytes([raw[4] ^ 1]) + raw[5:], r"text_00001.bin changed after it was written"),
        (
            ".idx",
            lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:],
            r"text_00001.idx changed after it was written",
        ),
        (".idx", lambda raw: raw[:20], r"text_00001.idx is cut short"),
    ],
)
def test_damaged_shard_is_not_merged(tmp_path, suffix, change, message):
    shards = made(tmp_path, [4, 6, 9])
    path = tmp_path / f"work/shards/train/text_00001{suffix}"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=r"shard text_00001 cannot be merged: .*" + message):
        merge(tmp_path, shards, MergeConfig(files=1), print)
    assert not (tmp_path / "train/text_00000.bin").exists()


def test_index_written_in_groups_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(binaries, "DOCUMENTS_AT_ONCE", 7)
    lengths = np.arange(1, 41, dtype=np.int32)
    write_index_file(tmp_path / "a.idx", [lengths[:13], lengths[13:13], lengths[13:]], 40, DTYPE)
    with open(tmp_path / "b.idx", "wb") as file:
        write_index(file, lengths, DTYPE)
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()


def test_checksums_locate_the_changed_block(tmp_path, monkeypatch):
    monkeypatch.setattr(binaries, "CRC_BYTES", 64)
    file = TokenFile(tmp_path / "x")
    for start in range(0, 300, 30):  # writes that do not end where blocks do
        file.write(bytes(range(start % 200, start % 200 + 30)))
    file.close("text", "x", DTYPE, [np.array([150], dtype=np.int32)], 1)
    assert first_changed_bytes(tmp_path / "x") is None
    raw = bytearray((tmp_path / "x.bin").read_bytes())
    raw[200] ^= 4
    (tmp_path / "x.bin").write_bytes(raw)
    assert first_changed_bytes(tmp_path / "x") == (192, 256)


MEMORY = """
import json, resource, sys
from pathlib import Path
import numpy as np
from data_prep.shards.binaries import TokenFile
from data_prep.dataset.merging import merge
from data_prep.corpus.planning import Shard
from data_prep.run_config import MergeConfig
from data_prep.shards.shard import Job, FinishedShard
out, documents, dtype = Path(sys.argv[1]), int(sys.argv[2]), np.dtype("<u2")
shards = []
for number in range(4):
    prefix = f"work/shards/train/text_{number:05d}"
    file = TokenFile(out / prefix)
    file.write(np.ones(documents // 4, dtype=dtype).tobytes())
    lengths = [np.ones(documents // 4, dtype=np.int32)]
    info = file.close("text", prefix, dtype, lengths, documents // 4)
    record = {"splits": {"train": info.to_record(), "heldout": None}}
    shards.append(FinishedShard(Job(Shard("text", number, ()), str(number)), record))
del file, lengths
child = __import__("os").fork()
if child == 0:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    base = int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])
    merge(out, shards, MergeConfig(files=1), print)
    peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
    print(json.dumps({"over_base_mb": (peak - base) / 1000}), flush=True)
    __import__("os")._exit(0)
__import__("os").wait()
"""


def test_memory_does_not_grow_with_the_documents(tmp_path):
    peaks = []
    for documents in (400_000, 4_000_000):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path / str(documents)), str(documents)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(json.loads(done.stdout.splitlines()[-1])["over_base_mb"])
    # The limit is 16 bytes per document and 64 MB; groups of a million documents keep it far below.
    assert peaks[1] < 64, peaks
