"""Text that a source extracts, kept as JSON lines under out/text, so that later runs work on the same bytes.

Each part of the corpus becomes files of at most 2 MB, `{"text": …}` a line, in the order of extraction, exact duplicates dropped.
`text/index.json` is written last: without it, or with other settings in it, the extraction starts over.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    """Collects documents; `subsets` tells what has been written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[bytes] = set()
        self._files: dict[str, list[str]] = {}
        self.counts: dict[str, list[Counts]] = {}

    def add_all(self, name: str, origin: str, texts: Iterable[str]) -> Counts:
        """Appends documents to the part `name`, those seen before in any part left out; returns how many there were."""
        counts = Counts(origin)
        self.counts.setdefault(name, []).append(counts)
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

    def subsets(self) -> list[Subset]:
        """Returns the parts that have documents."""
        return [Subset(name, "jsonl", tuple(files)) for name, files in self._files.items()]

    def _write(self, name: str, lines: list[bytes]) -> None:
        files = self._files.setdefault(name, [])
        path = self._folder / f"{name}_{len(files):05d}.jsonl"
        path.write_bytes(b"".join(lines))
        files.append(str(path))


def has_other_text(folder: Path, key: dict[str, Any]) -> bool:
    """Returns whether text that was extracted with other settings lies in `folder`; extracting anew would replace it."""
    known = read_json(folder / "index.json")
    return isinstance(known, dict) and known.get("key") != key


def stored_text(
    folder: Path, key: dict[str, Any], extract: Callable[[TextStore], None]
) -> tuple[list[Subset], list[dict[str, Any]]]:
    """Returns the parts of the corpus under `folder` and, for the manifest, what each origin gave.

    The text is extracted first unless that was done with the same `key`.

    Args:
        folder: where the text lies.
        key: the settings that determine the text.
        extract: fills the store.
    """
    index = folder / "index.json"
    known = read_json(index)
    if not (isinstance(known, dict) and known.get("key") == key and all(_is_whole(folder, f) for f in known["files"])):
        folder.mkdir(parents=True, exist_ok=True)
        index.unlink(missing_ok=True)
        for old in folder.glob("*_[0-9][0-9][0-9][0-9][0-9].jsonl"):
            old.unlink()
        store = TextStore(folder)
        extract(store)
        files = [
            {"name": s.name, "file": Path(path).name, "bytes": Path(path).stat().st_size}
            for s in store.subsets()
            for path in s.files
        ]
        counts = [{"name": name, **asdict(count)} for name, group in store.counts.items() for count in group]
        known = {"key": key, "counts": counts, "files": files}
        write_json(index, known)
    names = dict.fromkeys(f["name"] for f in known["files"])
    subsets = [
        Subset(n, "jsonl", tuple(str(folder / f["file"]) for f in known["files"] if f["name"] == n)) for n in names
    ]
    return subsets, known["counts"]


def _is_whole(folder: Path, entry: dict[str, Any]) -> bool:
    path = folder / entry["file"]
    return path.is_file() and path.stat().st_size == entry["bytes"]
