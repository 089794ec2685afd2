"""The stage `merge`: joins shards into a bounded number of files per part and split, and checks each shard against its record.

Neighbouring shards are joined. A shard that is not joined gets its final name by a hard link, without a copy. Before a
shard is joined, the size of its .bin is compared with the lengths in its .idx. While it is copied, its sha256 is
compared with its record. Without these checks, all documents after a truncated shard would have wrong offsets. Memory
does not grow with the number of documents, since indices are written from a million lengths at a time.

A joined file has a record, work/merged/NAME.json, written last. Then the shards themselves are removed
(merge.keep_shards=false). The sequence of tokens is that of the shards in order, in any number of files.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep.errors import InputError
from data_prep.files import write_json
from data_prep.progress import Log
from data_prep.run_config import MergeConfig
from data_prep.shards.binaries import DOCUMENTS_AT_ONCE, TokenFile, remove_files, with_suffix
from data_prep.shards.groups import Group, group_shards, joined_record, joined_record_path
from data_prep.shards.shard import FinishedShard, shard_prefix
from ssa_pretrain.data.indexed_format import HEADER, read_header
from ssa_pretrain.data.manifest import SPLITS, ShardInfo
from ssa_pretrain.data.repair import DatasetError, repair_advice
from ssa_pretrain.settings.files import file_sha256, sync, temporary_path

COPY_BYTES = 8 << 20

Splits = dict[str, tuple[ShardInfo, ...]]


def merge(out: Path, shards: list[FinishedShard], config: MergeConfig, log: Log) -> Splits:
    """Writes the files of the dataset and returns their descriptions by split.

    Args:
        out: the dataset's folder.
        shards: in the order of the plan.
        config: how many files.
        log: prints a line for the user.

    Raises:
        InputError: a shard does not match its record.
    """
    splits: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    groups = group_shards(shards, config.files)
    joined = sum(len(group.members) > 1 for group in groups)
    if joined:
        log(f"merging {len(shards)} shards into {len(groups)} files per split")
    for group in groups:
        for split, info in _group_file(out, group, config.keep_shards).items():
            if info is not None:
                splits[split].append(info)
    for split in SPLITS:
        listed = {Path(info.prefix).name for info in splits[split]}
        for path in (out / split).glob("*.*"):
            if path.suffix in (".bin", ".idx", ".sums") and path.stem not in listed:
                path.unlink()
    for path in (out / "work" / "merged").glob("*.json"):
        if path.stem not in {group.stem for group in groups if len(group.members) > 1}:
            path.unlink()
    return {split: tuple(files) for split, files in splits.items()}


def _group_file(out: Path, group: Group, keep_shards: bool) -> dict[str, ShardInfo | None]:
    if len(group.members) == 1:
        return {split: _link(out, group, split) for split in SPLITS}
    record = joined_record(out, group, verify=False)
    if record is None:
        infos = {split: _join(out, group, split) for split in SPLITS}
        splits = {split: info and info.to_record() for split, info in infos.items()}
        record = {"members": group.key, "splits": splits}
        write_json(joined_record_path(out, group), record)
    if not keep_shards:
        _remove_members(out, group)
    return {split: ShardInfo.from_record(info) if info else None for split, info in record["splits"].items()}


def _remove_members(out: Path, group: Group) -> None:
    for member in group.members:
        for split in SPLITS:
            remove_files(out / shard_prefix(split, member.job.shard.stem))


def _link(out: Path, group: Group, split: str) -> ShardInfo | None:
    """Gives a shard that is not joined its final name."""
    record = group.members[0].record["splits"][split]
    if record is None:
        return None
    info = ShardInfo.from_record(record)
    final = replace(info, prefix=f"{split}/{group.stem}")
    (out / split).mkdir(exist_ok=True)
    for suffix in (".sums", ".bin", ".idx"):
        source, target = with_suffix(out / info.prefix, suffix), with_suffix(out / final.prefix, suffix)
        if target.exists() and target.samefile(source):
            continue
        temporary_path(target).unlink(missing_ok=True)
        try:
            os.link(source, temporary_path(target))
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary_path(target))
        os.replace(temporary_path(target), target)
    sync(out / split)
    return final


def _join(out: Path, group: Group, split: str) -> ShardInfo | None:
    records = [member.record["splits"][split] for member in group.members]
    infos = [ShardInfo.from_record(record) for record in records if record]
    if not infos:
        return None
    prefix = f"{split}/{group.stem}"
    file, dtype = TokenFile(out / prefix), None
    for info in infos:
        dtype = _check_sizes(out, info)
        _copy(out, info, file)
    assert dtype is not None
    return file.close(group.part, prefix, dtype, _Lengths(out, infos), sum(info.documents for info in infos))


class _Lengths:
    """The lengths of several shards, a million documents at a time."""

    def __init__(self, out: Path, infos: list[ShardInfo]) -> None:
        self._out, self._infos = out, infos

    def __iter__(self) -> Iterator[np.ndarray]:
        for info in self._infos:
            yield from lengths_of(with_suffix(self._out / info.prefix, ".idx"), info.documents)


def lengths_of(idx: Path, documents: int) -> Iterator[np.ndarray]:
    """Yields the lengths of an .idx file, [at most DOCUMENTS_AT_ONCE] int32 at a time."""
    for first in range(0, documents, DOCUMENTS_AT_ONCE):
        count = min(DOCUMENTS_AT_ONCE, documents - first)
        yield np.fromfile(idx, dtype="<i4", count=count, offset=HEADER.size + 4 * first)


def _check_sizes(out: Path, info: ShardInfo) -> np.dtype:
    """Returns the dtype of a shard after checking its files against each other and its record."""
    idx, bin_ = (with_suffix(out / info.prefix, suffix) for suffix in (".idx", ".bin"))
    try:
        header = read_header(idx)
        actual = bin_.stat().st_size
    except (OSError, DatasetError) as error:
        raise _damaged(out, info, error.what if isinstance(error, DatasetError) else str(error)) from None
    tokens = sum(int(lengths.sum(dtype=np.int64)) for lengths in lengths_of(idx, header.num_sequences))
    described = header.dtype.itemsize * tokens
    if not actual == described == info.bin_bytes or header.num_sequences != info.documents:
        raise _damaged(
            out, info, f"{bin_} has {actual} bytes, its .idx describes {described}, its record has {info.bin_bytes}"
        )
    if file_sha256(idx) != info.idx_sha256:
        raise _damaged(out, info, f"{idx} changed after it was written")
    return header.dtype


def _copy(out: Path, info: ShardInfo, file: TokenFile) -> None:
    checksum = hashlib.sha256()
    with open(with_suffix(out / info.prefix, ".bin"), "rb") as source:
        while block := source.read(COPY_BYTES):
            checksum.update(block)
            file.write(block)
    if checksum.hexdigest() != info.bin_sha256:
        raise _damaged(out, info, f"{out / info.prefix}.bin changed after it was written")


def _damaged(out: Path, info: ShardInfo, what: str) -> InputError:
    return InputError(f"shard {Path(info.prefix).name} cannot be merged: {what}; {repair_advice(out)}")
