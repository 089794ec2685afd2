"""Which shards are joined into one file, and the record of a joined file."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep.files import read_json
from data_prep.shards.shard import FinishedShard, has_files


@dataclass(frozen=True, slots=True)
class Group:
    """Shards that become one file in each split."""

    part: str
    stem: str  # of the file
    members: tuple[FinishedShard, ...]

    @property
    def key(self) -> list[list[str]]:
        """What determines the bytes of the file."""
        return [[member.job.shard.stem, member.job.fingerprint] for member in self.members]


def group_shards(shards: list[FinishedShard], files: int) -> list[Group]:
    """Returns which shards are joined: neighbours of one part, in at most `files` groups of about equal size per part."""
    groups = []
    for part in dict.fromkeys(shard.job.shard.part for shard in shards):
        own = [shard for shard in shards if shard.job.shard.part == part]
        count = min(files, len(own))
        borders = [number * len(own) // count for number in range(count + 1)]
        for number, (start, stop) in enumerate(pairwise(borders)):
            groups.append(Group(part, f"{part}_{number:05d}", tuple(own[start:stop])))
    return groups


def joined_record(out: Path, group: Group, verify: bool) -> dict[str, Any] | None:
    """Returns the record of a group's joined file, or None if it has other members or its files do not match it.

    A record that does not match is removed, so that a later, less thorough check does not accept a damaged file.
    """
    path = joined_record_path(out, group)
    record = read_json(path)
    if isinstance(record, dict) and record["members"] == group.key and has_files(out, record, verify):
        return record
    path.unlink(missing_ok=True)
    return None


def joined_record_path(out: Path, group: Group) -> Path:
    """Returns the path of the record of a group's joined file."""
    return out / "work" / "merged" / f"{group.stem}.json"
