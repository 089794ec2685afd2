"""The user's own files: the settings of source=jsonl, parquet and text, and the files that they name."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from data_prep.errors import InputError
from data_prep.progress import Log
from data_prep.run_config import OnError
from ssa_pretrain.settings.problems import Problem

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".ndjson")


@dataclass(kw_only=True, slots=True)
class JsonlSource:
    """JSON lines, plain or compressed (.gz, .zst): one object per line, one document per object."""

    kind: str = "jsonl"  # the kind of source, set by source=
    name: str = "text"  # name of this part of the corpus, and of its files in the dataset
    paths: list[str] = MISSING  # files, folders or glob patterns
    text_column: str = "text"  # key of the text in each object
    on_error: OnError = OnError.fail  # what happens to lines, rows and files that cannot be read as text

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        return _named_paths(self.name, self.paths) + _text_column(self.text_column)


@dataclass(kw_only=True, slots=True)
class ParquetSource:
    """Parquet files, one document per row."""

    kind: str = "parquet"  # the kind of source, set by source=
    name: str = "text"  # name of this part of the corpus, and of its files in the dataset
    paths: list[str] = MISSING  # files, folders or glob patterns
    text_column: str = "text"  # column of the text; must be a string column
    on_error: OnError = OnError.fail  # what happens to lines, rows and files that cannot be read as text

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        return _named_paths(self.name, self.paths) + _text_column(self.text_column)


@dataclass(kw_only=True, slots=True)
class TextSource:
    """Plain UTF-8 files, one document per file."""

    kind: str = "text"  # the kind of source, set by source=
    name: str = "text"  # name of this part of the corpus, and of its files in the dataset
    paths: list[str] = MISSING  # files, folders or glob patterns
    suffixes: list[str] = field(default_factory=lambda: [".txt", ".md", ".rst", ".py"])  # which files of a folder count
    on_error: OnError = OnError.fail  # what happens to lines, rows and files that cannot be read as text

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        found = _named_paths(self.name, self.paths)
        if not self.suffixes:
            found.append(Problem("source.suffixes", [], "must name at least one suffix", "try [.txt]"))
        return found


@dataclass(frozen=True, slots=True)
class Part:
    """A named part of the corpus: files of one format, in reading order."""

    name: str
    format: str  # jsonl, parquet or text
    files: tuple[str, ...]
    text_column: str = "text"
    on_error: str = "fail"  # fail or skip: what happens to text that cannot be read


def find_part(source: JsonlSource | ParquetSource | TextSource, log: Log | None = None) -> Part:
    """Returns the files that a source names and logs which others it leaves out; InputError if there are none."""
    if isinstance(source, TextSource):
        return Part(source.name, "text", expand_paths(source.paths, tuple(source.suffixes), "text", log))
    suffixes = JSONL_SUFFIXES if isinstance(source, JsonlSource) else (".parquet",)
    files = expand_paths(source.paths, suffixes, source.kind, log)
    return Part(source.name, source.kind, files, source.text_column)


def expand_paths(
    paths: list[str], suffixes: tuple[str, ...], format_name: str, log: Log | None = None
) -> tuple[str, ...]:
    """Returns the files that `paths` name, sorted. A file that several links lead to is listed once.

    Args:
        paths: files (any suffix), folders (searched for `suffixes`, through links too, without hidden files) or glob patterns.
        suffixes: which files of a folder count.
        format_name: for messages.
        log: prints how many other files a folder or pattern has.

    Raises:
        InputError: a path does not exist, is a dangling link, may not be read, or names no file.
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
            found = [p for p in every if _check_target(p) and p.is_file()]
            if not found:
                raise InputError(f"source.paths: the pattern {text} matches no file; try ls {text}")
        elif path.exists():
            raise InputError(f"source.paths: {path} is neither a file nor a folder; save its content to a file first")
        elif _check_target(path):
            raise InputError(
                f"source.paths: {path} does not exist; correct the path (relative ones start at {Path.cwd()})"
            )
        if log and len(every) > len(found):
            kinds = sorted({p.suffix or p.name for p in set(every) - set(found)})
            shown = ", ".join(kinds[:4]) + (", …" if len(kinds) > 4 else "")
            log(
                f"source.paths: {len(every) - len(found)} other files in {text} ({shown}) are left out; name them to "
                "include them"
            )
        files.update(str(p.absolute()) for p in found)
    by_target: dict[str, str] = {}
    for name in sorted(files, key=lambda name: (os.path.islink(name), name)):
        by_target.setdefault(os.path.realpath(name), name)
    return tuple(sorted(by_target.values()))


def _walk(top: Path) -> Iterator[Path]:
    """Yields the visible files below a folder; a folder that several links lead to is walked once, under its own name if it has one."""
    seen: set[str] = set()
    waiting = [top]
    while waiting:
        for place, folders, files in os.walk(waiting.pop(0), onerror=_raise_unreadable):
            here, real = Path(place), os.path.realpath(place)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and real not in seen)
            waiting += [here / name for name in folders if (here / name).is_symlink()]
            if real not in seen:
                yield from (p for p in map(here.joinpath, files) if p.name[0] != "." and _check_target(p))
            seen.add(real)


def _raise_unreadable(error: OSError) -> None:
    raise InputError(
        f"source.paths: {error.filename} cannot be read ({error.strerror}); try chmod +rx, or name the files instead"
    )


def _check_target(path: Path) -> bool:
    """Returns True; raises InputError for a dangling link, whose text would otherwise be left out silently."""
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"source.paths: {path} is a link to {os.readlink(path)}, which does not exist; restore it or remove the link"
        )
    return True


def _glob(pattern: Path) -> list[Path]:
    anchor = Path(pattern.anchor) if pattern.is_absolute() else Path()
    return list(anchor.glob(str(pattern.relative_to(anchor) if pattern.is_absolute() else pattern)))


def _named_paths(name: str, paths: list[str]) -> list[Problem]:
    found = []
    if not name or not all(c.isalnum() or c in "-_" for c in name):
        found.append(Problem("source.name", name, "must be made of letters, digits, - and _", "try text"))
    if not paths:
        advice = "try 'source.paths=[my_folder]'"
        found.append(Problem("source.paths", [], "must name at least one file, folder or pattern", advice))
    return found


def _text_column(column: str) -> list[Problem]:
    return [] if column else [Problem("source.text_column", "", "must not be empty", "try text")]
