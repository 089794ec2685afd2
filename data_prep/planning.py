"""Files into shards: which ranges of which files make the n-th shard of each part of the corpus.

The plan depends on the files and on `shard_mb` alone, never on the number of workers, so that neither do the bytes written.
Large JSON-lines and Parquet files are cut into ranges, small files are put together, always in sorted order. Compressed files
cannot be cut.

Each input file is known by its sha256. Hashing is the one step that reads everything without tokenizing it, so the sums are
remembered with size and modification time, and a file is read again only when either has changed.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import InputError, UnreadableText
from data_prep.files import digest
from data_prep.progress import Say
from data_prep.readers import EMPTY_ARCHIVE, MOST_NAMED, Piece, is_compressed, open_parquet
from ssa_pretrain.data.indexed_format import file_sha256

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".ndjson")


@dataclass(frozen=True, slots=True)
class Subset:
    """A named part of the corpus: files of one format, in the order in which they are read."""

    name: str
    format: str
    files: tuple[str, ...]
    text_column: str = "text"
    on_error: str = "fail"  # fail or skip: what becomes of text that cannot be read


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of work: pieces that become one .bin/.idx pair in each split."""

    name: str
    index: int
    pieces: tuple[Piece, ...]

    @property
    def stem(self) -> str:
        """File name of the shard, the same in each split."""
        return f"{self.name}_{self.index:05d}"

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(piece.size for piece in self.pieces)


def plan_shards(subsets: list[Subset], shard_mb: float) -> list[Shard]:
    """Returns the shards of all subsets, in order.

    Args:
        subsets: parts of the corpus.
        shard_mb: most MB of input of a shard (an uncuttable file may have more); 0 takes a thirty-second of the corpus, rounded
            up to a power of two from 2 to 512 MB, so that a corpus that grows a little keeps its plan.

    Raises:
        UnreadableText: naming every file that cannot be opened.
    """
    limit = max(1, int(shard_mb * 1e6)) if shard_mb else _default_limit(subsets)
    shards, unreadable = [], []
    for subset in subsets:
        group: list[Piece] = []
        groups = [group]
        for path in subset.files:
            try:
                pieces = _cut(path, subset, limit)
            except UnreadableText as error:
                if subset.on_error == "fail":
                    unreadable.append(str(error))
                pieces = [
                    Piece(path, subset.format, subset.text_column, 0, 0, Path(path).stat().st_size, subset.on_error)
                ]
            for piece in pieces:
                if group and sum(p.size for p in group) + piece.size > limit:
                    group = []
                    groups.append(group)
                group.append(piece)
        shards += [Shard(subset.name, index, tuple(pieces)) for index, pieces in enumerate(groups) if pieces]
    if unreadable:
        raise UnreadableText(listed(unreadable))
    return shards


def listed(problems: list[str]) -> str:
    """Returns the problems of several files as one message, a line each."""
    if len(problems) == 1:
        return problems[0]
    shown = problems[:MOST_NAMED] + [f"and {len(problems) - MOST_NAMED} more"] * (len(problems) > MOST_NAMED)
    return f"{len(problems)} files have text that cannot be read:\n  " + "\n  ".join(shown)


def expand_paths(
    paths: list[str], suffixes: tuple[str, ...], format_name: str, say: Say | None = None
) -> tuple[str, ...]:
    """Returns the files that `paths` name, sorted, each once, however many links lead to it.

    Args:
        paths: files (any suffix), folders (searched for `suffixes`, also behind links, hidden files left out) or glob patterns.
        suffixes: which files of a folder count.
        format_name: for messages.
        say: is told how many other files a folder or pattern has.

    Raises:
        InputError: a path that does not exist, leads nowhere, may not be read, or names no file.
    """
    files: set[str] = set()
    for text in paths:
        path = Path(text).expanduser()
        if path.is_dir():
            every = list(_walk(path))
            found = [p for p in every if p.name.endswith(suffixes) and p.is_file()]
            if not found:
                raise InputError(
                    f"{path} holds no {format_name} file ({', '.join(suffixes)}); name another folder or the files"
                )
        elif path.is_file():
            every = found = [path]
        elif any(c in text for c in "*?["):
            every = _glob(path)
            found = [p for p in every if _leads_somewhere(p) and p.is_file()]
            if not found:
                raise InputError(f"source.paths: the pattern {text} matches no file; try ls {text}")
        elif path.exists():
            raise InputError(f"source.paths: {path} is neither a file nor a folder; save what comes from it in a file")
        elif _leads_somewhere(path):
            raise InputError(
                f"source.paths: {path} does not exist; correct the path (relative ones start at {Path.cwd()})"
            )
        if say and len(every) > len(found):
            kinds = sorted({p.suffix or p.name for p in set(every) - set(found)})
            shown = ", ".join(kinds[:4]) + (", …" if len(kinds) > 4 else "")
            say(
                f"source.paths: {len(every) - len(found)} others in {text} ({shown}) are left out; name them to take them"
            )
        files.update(str(p.absolute()) for p in found)
    own: dict[str, str] = {}
    for name in sorted(files, key=lambda name: (os.path.islink(name), name)):
        own.setdefault(os.path.realpath(name), name)
    return tuple(sorted(own.values()))


def file_sums(shards: list[Shard], known: dict[str, Any]) -> dict[str, str]:
    """Returns the sha256 of every input file.

    Args:
        shards: the plan.
        known: size, modification time and sum of files that were read before; gets those of the others.
    """
    paths = sorted({piece.path for shard in shards for piece in shard.pieces})
    stats = {}
    for path in paths:
        stat = Path(path).stat()
        stats[path] = [stat.st_size, stat.st_mtime_ns]
    new = [path for path in paths if known.get(path, [None, None])[:2] != stats[path]]
    with ThreadPoolExecutor(4) as pool:
        for path, sha256 in zip(new, pool.map(lambda p: file_sha256(Path(p)), new), strict=True):
            known[path] = [*stats[path], sha256]
    return {path: known[path][2] for path in paths}


def input_digest(shard: Shard, sums: dict[str, str]) -> str:
    """Returns the sha256 of what a shard's text is: contents and ranges, not where the files lie."""
    pieces = [{**asdict(piece), "path": sums[piece.path]} for piece in shard.pieces]
    for piece in pieces:
        del piece["on_error"]  # the bytes do not depend on it: without it there are none where text cannot be read
    return digest([shard.stem, pieces])


def _default_limit(subsets: list[Subset]) -> int:
    total = sum(Path(path).stat().st_size for subset in subsets for path in subset.files)
    return min(512, 1 << max(1, math.ceil(math.log2(max(1, total / 32e6))))) * 1_000_000


def _cut(path: str, subset: Subset, limit: int) -> list[Piece]:
    size = Path(path).stat().st_size
    if subset.format == "parquet":
        return _cut_parquet(path, subset, limit)
    if subset.format == "text" or is_compressed(path):
        if not size and subset.format != "text":
            raise UnreadableText(f"{path} {EMPTY_ARCHIVE}")
        return [Piece(path, subset.format, subset.text_column, 0, size, size, subset.on_error)]
    starts = range(0, size, limit)
    return [
        Piece(path, subset.format, subset.text_column, a, min(a + limit, size), min(limit, size - a), subset.on_error)
        for a in starts
    ]


def _cut_parquet(path: str, subset: Subset, limit: int) -> list[Piece]:
    pieces = []
    with open_parquet(path, subset.text_column) as file:
        metadata = file.metadata
        start = size = 0
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= limit or group == metadata.num_row_groups - 1:
                pieces.append(Piece(path, "parquet", subset.text_column, start, group + 1, size, subset.on_error))
                start, size = group + 1, 0
    return pieces


def _walk(top: Path) -> Iterator[Path]:
    """Yields what is visible below a folder and no folder itself; a folder to which several names lead under its own."""
    seen: set[str] = set()
    waiting = [top]
    while waiting:
        for place, folders, files in os.walk(waiting.pop(0), onerror=_unreadable):
            here, real = Path(place), os.path.realpath(place)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and real not in seen)
            waiting += [here / name for name in folders if (here / name).is_symlink()]
            if real not in seen:
                yield from (p for p in map(here.joinpath, files) if p.name[0] != "." and _leads_somewhere(p))
            seen.add(real)


def _unreadable(error: OSError) -> None:
    raise InputError(
        f"source.paths: {error.filename} cannot be read ({error.strerror}); try chmod +rx, or name the files instead"
    )


def _leads_somewhere(path: Path) -> bool:
    """Returns True; InputError for a link to nothing, which would else be text that is left out in silence."""
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"source.paths: {path} is a link to {os.readlink(path)}, which does not exist; restore it or remove the link"
        )
    return True


def _glob(pattern: Path) -> list[Path]:
    anchor = Path(pattern.anchor) if pattern.is_absolute() else Path()
    return list(anchor.glob(str(pattern.relative_to(anchor) if pattern.is_absolute() else pattern)))
