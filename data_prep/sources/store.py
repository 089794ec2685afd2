"""Text that a source extracts or finds, and the memory of it, so that later runs work on the same bytes.

Extracted text becomes files of at most 2 MB under out/text, `{"text": …}` a line, in the order of extraction, exact duplicates
dropped. Files that lie elsewhere (downloads in the cache, the user's own) are named and read where they are.
`text/index.json` is written last: without it, with other settings in it, or with a file gone, the source is asked again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.files import read_json, write_json
from data_prep.planning import Subset

PART_BYTES = 2_000_000


@dataclass(slots=True)
class Counts:
    """What one origin gave to one part of the corpus."""

    origin: str
    documents: int = 0
    text_bytes: int = 0
    duplicates: int = 0
    overlapping: int = 0  # dropped because they share words with held-out text


class TextStore:
    """Collects what a source has; `subsets` tells what that is.

    Attributes:
        folder: where extracted text goes. Files named like its own are removed when an extraction starts over.
        cache: folder of downloads, shared by datasets; nothing in it is ever removed here.
        counts: by part, what each origin gave.
    """

    def __init__(self, folder: Path, cache: Path | None = None) -> None:
        self.folder = folder
        self.cache = cache if cache is not None else folder / "cache"
        self._seen: set[bytes] = set()
        self._files: dict[str, list[str]] = {}
        self._formats: dict[str, tuple[str, str]] = {}
        self.counts: dict[str, list[Any]] = {}

    def add_all(self, name: str, origin: str, texts: Iterable[str]) -> Counts:
        """Appends documents to the part `name`, those seen before in any part left out; returns how many there were."""
        counts = Counts(origin)
        self.counts.setdefault(name, []).append(counts)
        self._claim(name, "jsonl", "text")
        lines: list[bytes] = []
        size = 0
        for text in texts:
            raw = text.encode("utf-8", errors="replace")
            key = hashlib.blake2b(raw, digest_size=16).digest()
            if key in self._seen:
                counts.duplicates += 1
                continue
            self._seen.add(key)
            counts.documents += 1
            counts.text_bytes += len(raw)
            line = json.dumps({"text": raw.decode()}, ensure_ascii=False).encode() + b"\n"
            if lines and size + len(line) > PART_BYTES:
                self._write(name, lines)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
        if lines:
            self._write(name, lines)
        return counts

    def add_files(
        self,
        name: str,
        kind: str,
        files: Sequence[str | Path],
        text_column: str = "text",
        *,
        origin: str,
        **details: Any,
    ) -> None:
        """Names files that lie on this machine as (more of) the part `name`; they are read where they are.

        Args:
            name: part of the corpus; letters, digits, - and _.
            kind: jsonl, parquet or text, the same for all files of a part.
            files: in the order in which they are read.
            text_column: key or column of the text.
            origin: where they come from, for the manifest.
            details: more for the manifest, such as a revision or a success rate; plain JSON.
        """
        self._claim(name, kind, text_column)
        self._files.setdefault(name, []).extend(str(path) for path in files)
        self.counts.setdefault(name, []).append({"origin": origin, "files": len(files), **details})

    def subsets(self) -> list[Subset]:
        """Returns the parts that have files."""
        return [Subset(n, self._formats[n][0], tuple(f), self._formats[n][1]) for n, f in self._files.items()]

    def _claim(self, name: str, kind: str, column: str) -> None:
        known = self._formats.setdefault(name, (kind, column))
        if known != (kind, column):
            formats = " and of ".join(f"{one} with the text in {where}" for one, where in (known, (kind, column)))
            raise InputError(f"part {name} would have files of {formats}; give one of the sources another name for it")

    def _write(self, name: str, lines: list[bytes]) -> None:
        files = self._files.setdefault(name, [])
        path = self.folder / f"{name}_{len(files):05d}.jsonl"
        path.write_bytes(b"".join(lines))
        files.append(str(path))


def has_other_text(folder: Path, key: dict[str, Any]) -> bool:
    """Returns whether text that was extracted with other settings lies in `folder`; extracting anew would replace it."""
    known = read_json(folder / "index.json")
    return isinstance(known, dict) and known.get("key") != key


def known_text(folder: Path, key: dict[str, Any]) -> tuple[list[Subset], list[dict[str, Any]]] | None:
    """Returns what an earlier extraction with the same key left, whole; None where it must be done."""
    known = read_json(folder / "index.json")
    if not (isinstance(known, dict) and known.get("key") == key and all(_is_whole(folder, f) for f in known["files"])):
        return None
    return _subsets(folder, known["files"]), known["counts"]


def stored_text(
    folder: Path, key: dict[str, Any], extract: Callable[[TextStore], None], cache: Path | None = None
) -> tuple[list[Subset], list[dict[str, Any]]]:
    """Returns the parts of the corpus under `folder` and, for the manifest, what each origin gave.

    The text is extracted first unless that was done with the same `key`.

    Args:
        folder: where the text lies.
        key: the settings that determine the text.
        extract: fills the store.
        cache: folder of downloads.
    """
    if known := known_text(folder, key):
        return known
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "index.json"
    index.unlink(missing_ok=True)
    for old in folder.glob("*_[0-9][0-9][0-9][0-9][0-9].jsonl"):
        old.unlink()
    store = TextStore(folder, cache)
    extract(store)
    files = [
        {
            "name": s.name,
            "format": s.format,
            "text_column": s.text_column,
            # Relative where it is ours, so that the dataset's folder can be moved.
            "file": Path(path).name if Path(path).parent == folder else str(Path(path).absolute()),
            "bytes": Path(path).stat().st_size,
        }
        for s in store.subsets()
        for path in s.files
    ]
    counts = described(store)
    write_json(index, {"key": key, "counts": counts, "files": files})
    return _subsets(folder, files), counts


def described(store: TextStore) -> list[dict[str, Any]]:
    """Returns what each origin gave, for the manifest."""
    return [
        {"name": name, **(count if isinstance(count, dict) else asdict(count))}
        for name, group in store.counts.items()
        for count in group
    ]


def _subsets(folder: Path, files: list[dict[str, Any]]) -> list[Subset]:
    parts: dict[tuple[str, str, str], list[str]] = {}
    for entry in files:
        key = (entry["name"], entry.get("format", "jsonl"), entry.get("text_column", "text"))
        parts.setdefault(key, []).append(str(folder / entry["file"]))
    return [Subset(name, kind, tuple(paths), column) for (name, kind, column), paths in parts.items()]


def _is_whole(folder: Path, entry: dict[str, Any]) -> bool:
    path = folder / entry["file"]
    return path.is_file() and path.stat().st_size == entry["bytes"]
