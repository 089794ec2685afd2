"""The stage `merge`: shards into a bounded number of files a part and split, each checked against its record on the way.

Neighbouring shards are joined. A shard that stays alone gets its final name by a hard link, without a copy. Before a shard is joined
the size of its .bin is compared with the lengths in its .idx, and while it is copied its sha256 with its record: behind a truncated
shard every later document would be read at a wrong place. Memory does not grow with the number of documents: indices are written
from a million lengths at a time.

A joined file has a record, work/merged/NAME.json, written last. After it the shards themselves are removed (merge.keep_shards=false).
The stream of tokens is that of the shards one after the other, however many files it lies in.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.binaries import AT_ONCE, TokenFile, temporary, with_suffix
from data_prep.errors import InputError
from data_prep.files import read_json, sync, write_json
from data_prep.progress import Say
from data_prep.run_config import MergeConfig
from data_prep.shards import Made, has_files, shard_prefix
from ssa_pretrain.data.indexed_format import HEADER, SPLITS, ShardInfo, file_sha256, read_header
from ssa_pretrain.data.repair import DatasetError, repair_advice

COPY_BYTES = 8 << 20

Splits = dict[str, tuple[ShardInfo, ...]]


@dataclass(frozen=True, slots=True)
class Group:
    """Shards that become one file in each split."""

    name: str  # of the part
    stem: str  # of the file
    members: tuple[Made, ...]

    @property
    def key(self) -> list[list[str]]:
        """What determines the bytes of the file."""
        return [[made.job.shard.stem, made.job.fingerprint] for made in self.members]


def merge(out: Path, made: list[Made], config: MergeConfig, say: Say) -> Splits:
    """Makes the files of the dataset and returns what they are, by split.

    Args:
        out: the dataset's folder.
        made: the shards, in the order of the plan.
        config: how many files.
        say: takes lines for people.

    Raises:
        InputError: a shard is not what its record says.
    """
    splits: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    groups = groups_of(made, config.files)
    joined = sum(len(group.members) > 1 for group in groups)
    if joined:
        say(f"merging {len(made)} shards into {len(groups)} files a split")
    for group in groups:
        for split, info in _file_of(out, group, config.keep_shards).items():
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


def groups_of(made: list[Made], files: int) -> list[Group]:
    """Returns which shards are joined: neighbours of one part, about as many in each of at most `files` groups."""
    groups = []
    for name in dict.fromkeys(one.job.shard.name for one in made):
        own = [one for one in made if one.job.shard.name == name]
        count = min(files, len(own))
        borders = [number * len(own) // count for number in range(count + 1)]
        for number, (start, stop) in enumerate(pairwise(borders)):
            groups.append(Group(name, f"{name}_{number:05d}", tuple(own[start:stop])))
    return groups


def joined_record(out: Path, group: Group, verify: bool) -> dict[str, Any] | None:
    """Returns the record of a group's joined file, None where there is none of just these shards or the files are not as it says.

    A record that does not hold is removed, so that what is damaged is not taken for joined later, by one who looks less closely.
    """
    path = _record_of(out, group)
    record = read_json(path)
    if isinstance(record, dict) and record["members"] == group.key and has_files(out, record, verify):
        return record
    path.unlink(missing_ok=True)
    return None


def _record_of(out: Path, group: Group) -> Path:
    return out / "work" / "merged" / f"{group.stem}.json"


def _file_of(out: Path, group: Group, keep_shards: bool) -> dict[str, ShardInfo | None]:
    if len(group.members) == 1:
        return {split: _link(out, group, split) for split in SPLITS}
    record = joined_record(out, group, verify=False)
    if record is None:
        infos = {split: _join(out, group, split) for split in SPLITS}
        record = {"members": group.key, "splits": {split: info and asdict(info) for split, info in infos.items()}}
        write_json(_record_of(out, group), record)
    if not keep_shards:
        _remove_members(out, group)
    return {split: ShardInfo(**info) if info else None for split, info in record["splits"].items()}


def _remove_members(out: Path, group: Group) -> None:
    for made in group.members:
        for split in SPLITS:
            for suffix in (".idx", ".bin", ".sums"):
                with_suffix(out / shard_prefix(split, made.job.shard.stem), suffix).unlink(missing_ok=True)


def _link(out: Path, group: Group, split: str) -> ShardInfo | None:
    """Gives a shard its final name."""
    record = group.members[0].record["splits"][split]
    if record is None:
        return None
    info = ShardInfo(**record)
    final = replace(info, prefix=f"{split}/{group.stem}")
    (out / split).mkdir(exist_ok=True)
    for suffix in (".sums", ".bin", ".idx"):
        source, target = with_suffix(out / info.prefix, suffix), with_suffix(out / final.prefix, suffix)
        if target.exists() and target.samefile(source):
            continue
        temporary(target).unlink(missing_ok=True)
        try:
            os.link(source, temporary(target))
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary(target))
        os.replace(temporary(target), target)
    sync(out / split)
    return final


def _join(out: Path, group: Group, split: str) -> ShardInfo | None:
    infos = [ShardInfo(**made.record["splits"][split]) for made in group.members if made.record["splits"][split]]
    if not infos:
        return None
    prefix = f"{split}/{group.stem}"
    file, dtype = TokenFile(out / prefix), None
    for info in infos:
        dtype = _check_sizes(out, info)
        _copy(out, info, file)
    assert dtype is not None
    return file.close(group.name, prefix, dtype, _Lengths(out, infos), sum(info.documents for info in infos))


class _Lengths:
    """The lengths of several shards, a million documents at a time."""

    def __init__(self, out: Path, infos: list[ShardInfo]) -> None:
        self._out, self._infos = out, infos

    def __iter__(self) -> Iterator[np.ndarray]:
        for info in self._infos:
            yield from lengths_of(with_suffix(self._out / info.prefix, ".idx"), info.documents)


def lengths_of(idx: Path, documents: int) -> Iterator[np.ndarray]:
    """Yields the lengths of an .idx file, [at most AT_ONCE] int32 at a time."""
    for first in range(0, documents, AT_ONCE):
        count = min(AT_ONCE, documents - first)
        yield np.fromfile(idx, dtype="<i4", count=count, offset=HEADER.size + 4 * first)


def _check_sizes(out: Path, info: ShardInfo) -> np.dtype:
    """Returns the dtype of a shard whose files fit each other and its record."""
    idx, bin_ = (with_suffix(out / info.prefix, suffix) for suffix in (".idx", ".bin"))
    try:
        header = read_header(idx)
        actual = bin_.stat().st_size
    except (OSError, DatasetError) as error:
        raise _damaged(out, info, error.what if isinstance(error, DatasetError) else str(error)) from None
    described = header.dtype.itemsize * sum(
        int(part.sum(dtype=np.int64)) for part in lengths_of(idx, header.num_sequences)
    )
    if not actual == described == info.bin_bytes or header.num_sequences != info.documents:
        raise _damaged(
            out, info, f"{bin_} has {actual} bytes, its .idx describes {described}, its record says {info.bin_bytes}"
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
