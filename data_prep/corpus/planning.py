"""Files into shards: which ranges of which files make the n-th shard of each part of the corpus.

The plan depends only on the files and on `shard_mb`, not on the number of workers. So neither do the bytes written.
Large JSON-lines and Parquet files are cut into ranges and small files are put together, always in sorted order.
Compressed files cannot be cut.

Each input file is identified by its sha256. Hashing is the only step that reads everything without tokenizing it. So
the checksums are kept with size and modification time, and a file is read again only if one of them has changed.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UnreadableText
from data_prep.files import digest
from data_prep.readers import EMPTY_ARCHIVE, MAX_PROBLEM_FILES, Piece, is_compressed, open_parquet
from data_prep.sources.files import Part
from ssa_pretrain.data.indexed_format import file_sha256


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of work: pieces that become one .bin/.idx pair in each split."""

    part: str
    index: int
    pieces: tuple[Piece, ...]

    @property
    def stem(self) -> str:
        """File name of the shard, the same in each split."""
        return f"{self.part}_{self.index:05d}"

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(piece.size for piece in self.pieces)


def plan_shards(parts: list[Part], shard_mb: float) -> list[Shard]:
    """Returns the shards of all parts, in order.

    Args:
        parts: parts of the corpus.
        shard_mb: maximum MB of input per shard; a file that cannot be cut may have more. 0 takes a thirty-second of the corpus, rounded
            up to a power of two from 2 to 512 MB, so that a corpus that grows a little keeps its plan.

    Raises:
        UnreadableText: names every file that cannot be opened.
    """
    limit = max(1, int(shard_mb * 1e6)) if shard_mb else _default_limit(parts)
    shards, unreadable = [], []
    for part in parts:
        group: list[Piece] = []
        groups = [group]
        for path in part.files:
            try:
                pieces = _cut_file(path, part, limit)
            except UnreadableText as error:
                if part.on_error == "fail":
                    unreadable.append(str(error))
                pieces = [Piece(path, part.format, part.text_column, 0, 0, Path(path).stat().st_size, part.on_error)]
            for piece in pieces:
                if group and sum(p.size for p in group) + piece.size > limit:
                    group = []
                    groups.append(group)
                group.append(piece)
        shards += [Shard(part.name, index, tuple(pieces)) for index, pieces in enumerate(groups) if pieces]
    if unreadable:
        raise UnreadableText(format_problems(unreadable))
    return shards


def format_problems(problems: list[str]) -> str:
    """Returns the problems of several files as one message, one line per file."""
    if len(problems) == 1:
        return problems[0]
    hidden = len(problems) - MAX_PROBLEM_FILES
    shown = problems[:MAX_PROBLEM_FILES] + [f"and {hidden} more"] * (hidden > 0)
    return f"{len(problems)} files have text that cannot be read:\n  " + "\n  ".join(shown)


def file_checksums(shards: list[Shard], known: dict[str, Any]) -> dict[str, str]:
    """Returns the sha256 of every input file.

    Args:
        shards: the plan.
        known: size, modification time and sha256 of files that were read before. New ones are added.
    """
    paths = sorted({piece.path for shard in shards for piece in shard.pieces})
    stats = {}
    for path in paths:
        stat = Path(path).stat()
        stats[path] = [stat.st_size, stat.st_mtime_ns]
    changed = [path for path in paths if known.get(path, [None, None])[:2] != stats[path]]
    with ThreadPoolExecutor(4) as pool:
        for path, sha256 in zip(changed, pool.map(lambda p: file_sha256(Path(p)), changed), strict=True):
            known[path] = [*stats[path], sha256]
    return {path: known[path][2] for path in paths}


def input_digest(shard: Shard, checksums: dict[str, str]) -> str:
    """Returns the sha256 of a shard's text: contents and ranges of its files, not their paths."""
    pieces = [{**asdict(piece), "path": checksums[piece.path]} for piece in shard.pieces]
    for piece in pieces:
        del piece["on_error"]  # never changes the bytes: if text cannot be read, on_error=fail writes none
    return digest([shard.stem, pieces])


def _default_limit(parts: list[Part]) -> int:
    total = sum(Path(path).stat().st_size for part in parts for path in part.files)
    return min(512, 1 << max(1, math.ceil(math.log2(max(1, total / 32e6))))) * 1_000_000


def _cut_file(path: str, part: Part, limit: int) -> list[Piece]:
    size = Path(path).stat().st_size
    if part.format == "parquet":
        return _cut_parquet(path, part, limit)
    if part.format == "text" or is_compressed(path):
        if not size and part.format != "text":
            raise UnreadableText(f"{path} {EMPTY_ARCHIVE}")
        return [Piece(path, part.format, part.text_column, 0, size, size, part.on_error)]
    return [
        Piece(path, part.format, part.text_column, a, min(a + limit, size), min(limit, size - a), part.on_error)
        for a in range(0, size, limit)
    ]


def _cut_parquet(path: str, part: Part, limit: int) -> list[Piece]:
    pieces = []
    with open_parquet(path, part.text_column) as file:
        metadata = file.metadata
        start = size = 0
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= limit or group == metadata.num_row_groups - 1:
                pieces.append(Piece(path, "parquet", part.text_column, start, group + 1, size, part.on_error))
                start, size = group + 1, 0
    return pieces
