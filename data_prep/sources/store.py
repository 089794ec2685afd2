"""The text that sources extract or find, and an index of it, so that later runs work on the same bytes.

Extracted text goes into files of at most 2 MB in out/text, one `{"text": …}` per line, in the order of extraction,
without exact duplicates. Files elsewhere (downloads in the cache, the user's own) are only registered and are read in
place. `text/index.json` is written last. If it is missing, has other settings, or lists a missing file, the text is
fetched again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.files import read_json, write_json
from data_prep.sources.files import Part

MAX_FILE_BYTES = 2_000_000


@dataclass(slots=True)
class Counts:
    """What one origin contributed to one part of the corpus."""

    origin: str
    documents: int = 0
    text_bytes: int = 0
    duplicates: int = 0
    overlapping: int = 0  # dropped because they share words with held-out text
    repeated: int = 0  # dropped because they repeat text of documents before them
    repeated_bytes: int = 0  # of text in those


class TextStore:
    """Collects the text of sources; `parts` returns the result.

    Attributes:
        folder: where extracted text goes. Files named like its own are removed when an extraction starts over.
        cache: folder of downloads, shared by datasets. The store never removes anything in it.
        counts: by part, what each origin contributed.
    """

    def __init__(self, folder: Path, cache: Path | None = None) -> None:
        self.folder = folder
        self.cache = cache if cache is not None else folder / "cache"
        self._seen: set[bytes] = set()
        self._files: dict[str, list[str]] = {}
        self._formats: dict[str, tuple[str, str]] = {}
        self.counts: dict[str, list[Any]] = {}

    def add_texts(
        self, part: str, origin: str, texts: Iterable[str], keeps: Callable[[bytes], bool] | None = None
    ) -> Counts:
        """Appends documents to a part, without those seen before in any part; returns how many there were.

        Args:
            part: part of the corpus; letters, digits, - and _.
            origin: where they come from, for the manifest.
            texts: the documents.
            keeps: called in order with each document (UTF-8) that is not an exact duplicate. If it returns False, the document is
                dropped and counted as repeated.
        """
        counts = Counts(origin)
        self.counts.setdefault(part, []).append(counts)
        self._check_format(part, "jsonl", "text")
        lines: list[bytes] = []
        size = 0
        for text in texts:
            raw = text.encode("utf-8", errors="replace")
            key = hashlib.blake2b(raw, digest_size=16).digest()
            if key in self._seen:
                counts.duplicates += 1
                continue
            self._seen.add(key)
            if keeps is not None and not keeps(raw):
                counts.repeated += 1
                counts.repeated_bytes += len(raw)
                continue
            counts.documents += 1
            counts.text_bytes += len(raw)
            line = json.dumps({"text": raw.decode()}, ensure_ascii=False).encode() + b"\n"
            if lines and size + len(line) > MAX_FILE_BYTES:
                self._write(part, lines)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
        if lines:
            self._write(part, lines)
        return counts

    def add_files(
        self,
        part: str,
        kind: str,
        files: Sequence[str | Path],
        text_column: str = "text",
        *,
        origin: str,
        **details: Any,
    ) -> None:
        """Appends files that are on this machine to a part. They are read in place.

        Args:
            part: part of the corpus; letters, digits, - and _.
            kind: jsonl, parquet or text, the same for all files of a part.
            files: in reading order.
            text_column: key or column of the text.
            origin: where they come from, for the manifest.
            details: more for the manifest, such as a revision or a success rate; plain JSON.
        """
        self._check_format(part, kind, text_column)
        self._files.setdefault(part, []).extend(str(path) for path in files)
        self.counts.setdefault(part, []).append({"origin": origin, "files": len(files), **details})

    def parts(self) -> list[Part]:
        """Returns the parts that have files."""
        return [Part(n, self._formats[n][0], tuple(f), self._formats[n][1]) for n, f in self._files.items()]

    def origins(self) -> list[dict[str, Any]]:
        """Returns what each origin contributed, for the manifest."""
        return [
            {"name": part, **(count if isinstance(count, dict) else asdict(count))}
            for part, counts in self.counts.items()
            for count in counts
        ]

    def _check_format(self, part: str, kind: str, column: str) -> None:
        known = self._formats.setdefault(part, (kind, column))
        if known != (kind, column):
            formats = " and of ".join(f"{one} with the text in {where}" for one, where in (known, (kind, column)))
            raise InputError(f"part {part} would have files of {formats}; give one of the sources another name for it")

    def _write(self, part: str, lines: list[bytes]) -> None:
        files = self._files.setdefault(part, [])
        path = self.folder / f"{part}_{len(files):05d}.jsonl"
        path.write_bytes(b"".join(lines))
        files.append(str(path))


def has_other_text(folder: Path, key: dict[str, Any]) -> bool:
    """Returns whether `folder` holds text extracted with other settings, which a new extraction would replace."""
    known = read_json(folder / "index.json")
    return isinstance(known, dict) and known.get("key") != key


def known_text(folder: Path, key: dict[str, Any]) -> tuple[list[Part], list[dict[str, Any]]] | None:
    """Returns the result of an earlier extraction with the same key, or None if there is no complete one."""
    known = read_json(folder / "index.json")
    if not isinstance(known, dict) or known.get("key") != key:
        return None
    if not all(_is_complete(folder, entry) for entry in known["files"]):
        return None
    return _parts(folder, known["files"]), known["counts"]


def stored_text(
    folder: Path, key: dict[str, Any], extract: Callable[[TextStore], None], cache: Path | None = None
) -> tuple[list[Part], list[dict[str, Any]]]:
    """Returns the parts of the corpus under `folder` and, for the manifest, what each origin contributed.

    Extracts the text first, unless that was done with the same `key`.

    Args:
        folder: where the text is.
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
            "name": part.name,
            "format": part.format,
            "text_column": part.text_column,
            # Relative if it is our own file, so that the dataset's folder can be moved.
            "file": Path(path).name if Path(path).parent == folder else str(Path(path).absolute()),
            "bytes": Path(path).stat().st_size,
        }
        for part in store.parts()
        for path in part.files
    ]
    write_json(index, {"key": key, "counts": store.origins(), "files": files})
    return _parts(folder, files), store.origins()


def _parts(folder: Path, files: list[dict[str, Any]]) -> list[Part]:
    paths: dict[tuple[str, str, str], list[str]] = {}
    for entry in files:
        key = (entry["name"], entry.get("format", "jsonl"), entry.get("text_column", "text"))
        paths.setdefault(key, []).append(str(folder / entry["file"]))
    return [Part(name, kind, tuple(files), column) for (name, kind, column), files in paths.items()]


def _is_complete(folder: Path, entry: dict[str, Any]) -> bool:
    path = folder / entry["file"]
    return path.is_file() and path.stat().st_size == entry["bytes"]
