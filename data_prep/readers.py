"""Reads documents from files: JSON lines, Parquet, plain text.

A `Piece` is a range of one file that can be read independently: bytes of an uncompressed JSON-lines file (the lines
that begin in the range), row groups of a Parquet file, or a whole file. Reading yields texts in file order. Anything
that is not a document is an error with file and line. With `on_error=skip` it is left out and counted instead: a line,
a row, or a file from the damaged place on. Nothing is skipped silently.

JSON is parsed by orjson if it is installed (extra `gigatoken`), which is two to four times as fast. What orjson rejects
is parsed again by the standard library, which accepts slightly more (NaN, a byte order mark) and has clearer messages.
So documents and messages are the same with and without orjson.
"""

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data_prep.errors import InputError, UnreadableText

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

try:
    import orjson
except ImportError:
    orjson = None

READ_BYTES = 1 << 20  # of lines in memory at a time

EMPTY_ARCHIVE = "is empty, but a compressed file never is; fetch it again or leave it out"
MAX_PROBLEM_FILES = 100  # files whose first problem is kept

Advance = Callable[[int], None]
Refuse = Callable[[str, Callable[[], str], int], None]  # lines, rows or files; the reason; how many
Document = tuple[str, bytes]  # a text and its UTF-8 bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of an input file.

    `start` and `stop` count bytes for jsonl and text, row groups for parquet. `size` measures progress in bytes of the
    file on disk.
    """

    path: str
    format: str  # jsonl, parquet or text
    text_column: str
    start: int
    stop: int
    size: int
    on_error: str = "fail"  # fail or skip


@dataclass(slots=True)
class Skipped:
    """What was left out because it could not be read."""

    counts: Counter[str] = field(default_factory=Counter)  # lines, rows and files
    problems: dict[str, list[Any]] = field(default_factory=dict)  # by file: the first problem, and how many there are

    def add(self, path: str, what: str, reason: Callable[[], str], count: int) -> None:
        """Counts what was left out of a file."""
        self.counts[what] += count
        if path in self.problems:
            self.problems[path][1] += count
        elif len(self.problems) < MAX_PROBLEM_FILES:
            self.problems[path] = [reason(), count]


def format_skipped(counts: dict[str, int]) -> str:
    """Returns the counts of what was left out as text."""
    return ", ".join(f"{count:,} {what if count > 1 else what[:-1]}" for what, count in sorted(counts.items()))


def read_piece(piece: Piece, advance: Advance, skipped: Skipped | None = None) -> Iterator[Document]:
    """Yields the documents of a piece; calls `advance` with the bytes read since the last call.

    Args:
        piece: what to read.
        advance: called with the bytes of progress.
        skipped: counts what `on_error=skip` leaves out.

    Raises:
        UnreadableText: names file, position and remedy.
        InputError: the file is missing or may not be read.
    """
    counted = skipped if skipped is not None else Skipped()
    refuse = partial(counted.add, piece.path) if piece.on_error == "skip" else _refuse
    try:
        if piece.format == "jsonl":
            yield from _read_jsonl(piece, advance, refuse)
        elif piece.format == "parquet":
            yield from _read_parquet(piece, advance, refuse)
        else:
            yield from _read_text(piece, advance, refuse)
    except FileNotFoundError:
        raise InputError(f"{piece.path} no longer exists; restore it or run again without it") from None
    except PermissionError:
        raise InputError(f"{piece.path} may not be read by this user; try chmod +r") from None


def _refuse(_: str, reason: Callable[[], str], count: int) -> None:
    raise UnreadableText(reason())


def is_compressed(path: str) -> bool:
    """Returns whether a file can only be read from its start."""
    return path.endswith((".gz", ".zst"))


def _read_jsonl(piece: Piece, advance: Advance, refuse: Refuse) -> Iterator[Document]:
    if is_compressed(piece.path):
        yield from _read_compressed_jsonl(piece, advance, refuse)
        return
    with open(piece.path, "rb") as file:
        if piece.start:
            # A line belongs to the piece in which it begins. Stepping back one byte keeps a line that begins exactly at `start`
            # and skips the rest of a line that began before.
            file.seek(piece.start - 1)
            file.readline()
        position = file.tell()
        while position < piece.stop and (lines := file.readlines(READ_BYTES)):
            for line in lines:
                document = _document_or_not(line, piece, refuse, lambda at=position: _line_number(piece.path, at))
                position += len(line)
                advance(len(line))
                if document is not None:
                    yield document
                if position >= piece.stop:
                    return


def _read_compressed_jsonl(piece: Piece, advance: Advance, refuse: Refuse) -> Iterator[Document]:
    done = number = 0
    with open(piece.path, "rb") as raw:
        if not raw.seek(0, 2):
            refuse("files", lambda: f"{piece.path} {EMPTY_ARCHIVE}", 1)
        raw.seek(0)
        lines = _decompressed(piece.path, raw)
        while line := _next_line(lines, piece.path, number, refuse):
            number += 1
            document = _document_or_not(line, piece, refuse, lambda at=number: at)
            advance(raw.tell() - done)
            done = raw.tell()
            if document is not None:
                yield document


def _document_or_not(line: bytes, piece: Piece, refuse: Refuse, number: Callable[[], int]) -> Document | None:
    try:
        return _document_of(line, piece.text_column)
    except ValueError as error:
        problem = str(error)
    refuse("lines", lambda: f"{piece.path}:{number()}: {problem}", 1)
    return None


def _decompressed(path: str, raw: BinaryIO) -> io.BufferedReader:
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
    import pyarrow  # slow to import, and only .zst needs it here

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20)


def _next_line(lines: io.BufferedReader, path: str, number: int, refuse: Refuse) -> bytes:
    """Returns the next line; b"" at the end, or if the archive is damaged from here on."""
    try:
        return lines.readline()
    except (EOFError, OSError, zlib.error) as error:
        problem = f"{path} is damaged or cut short after line {number} ({_one_line(error)}); fetch it again"
    refuse("files", lambda: problem, 1)
    return b""


def _document_of(line: bytes, column: str) -> Document | None:
    """Returns the document in a line, or None for a blank line; ValueError with the problem of any other line."""
    if not line or line.isspace():
        return None
    try:
        record = _parsed(line)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the line is not UTF-8 (byte {error.start}); convert the file, e.g. with iconv -t utf-8"
        ) from None
    except RecursionError:
        raise ValueError("the line is nested too deeply for a JSON parser; fix or remove it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON ({error.msg}, column {error.colno}); fix or remove it") from None
    if not isinstance(record, dict):
        raise ValueError(f'the line is a JSON {type(record).__name__}, not an object; write {{"{column}": …}} instead')
    if column not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ValueError(f"no key {column!r}, the object has {keys}; set source.text_column to the one with the text")
    text = record[column]
    if not isinstance(text, str):
        raise ValueError(
            f"{column!r} holds {type(text).__name__}, not a string; fix the line or set source.text_column"
        )
    try:
        return text, text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{column!r} holds half a surrogate pair (\\ud800 to \\udfff), which is not a character; repair it"
        ) from None


def _parsed(line: bytes) -> Any:
    if orjson is not None:
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError:
            pass
    return json.loads(line.strip())


def _line_number(path: str, position: int) -> int:
    lines = 1
    with open(path, "rb") as file:
        while position > 0 and (block := file.read(min(position, 1 << 20))):
            lines += block.count(b"\n")
            position -= len(block)
    return lines


def _read_parquet(piece: Piece, advance: Advance, refuse: Refuse) -> Iterator[Document]:
    import pyarrow

    per_group = piece.size // max(1, piece.stop - piece.start)
    try:
        file = open_parquet(piece.path, piece.text_column)
    except UnreadableText as error:
        problem = str(error)
        refuse("files", lambda: problem, 1)
        return
    with file:
        for group in range(piece.start, piece.stop):
            row = 0
            try:
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[piece.text_column]):
                    for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                        document = _document_of_row(raw, piece, refuse, f"row {row} of row group {group}")
                        row += 1
                        if document is not None:
                            yield document
            except (pyarrow.ArrowException, OSError) as error:
                if isinstance(error, FileNotFoundError | PermissionError):
                    raise
                problem = f"{piece.path}: row group {group} is damaged ({_one_line(error)}); fetch it again"
                refuse("rows", lambda problem=problem: problem, file.metadata.row_group(group).num_rows - row)
            advance(per_group)


def _document_of_row(raw: bytes | None, piece: Piece, refuse: Refuse, where: str) -> Document | None:
    if raw is None:
        problem = f"{piece.path}: {where} has no text in column {piece.text_column!r}; drop such rows first"
    else:
        try:
            return raw.decode("utf-8"), raw
        except UnicodeDecodeError:
            problem = f"{piece.path}: {where} is not UTF-8; write the file again"
    refuse("rows", lambda: problem, 1)
    return None


def open_parquet(path: str, text_column: str) -> "pyarrow.parquet.ParquetFile":
    """Returns an open Parquet file; UnreadableText if it has no string column of that name."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise UnreadableText(f"{path} is not a readable Parquet file ({_one_line(error)}); fetch it again") from None
    check_text_column(file.schema_arrow, text_column, path)
    return file


def check_text_column(schema: "pyarrow.Schema", text_column: str, path: str) -> None:
    """Raises UnreadableText unless a Parquet file has one column of that name with strings or dictionary-encoded strings."""
    import pyarrow

    if text_column not in schema.names:
        names = ", ".join(map(repr, schema.names[:12]))
        raise UnreadableText(f"{path} has no column {text_column!r}, it has {names}; set source.text_column")
    if (count := schema.names.count(text_column)) > 1:
        raise UnreadableText(f"{path} has {count} columns {text_column!r}; write it again with one of that name")
    kind = plain = schema.field(text_column).type
    if pyarrow.types.is_dictionary(kind):
        plain = kind.value_type
    if str(plain) in ("binary", "large_binary", "binary_view"):
        raise UnreadableText(
            f"{path}: column {text_column!r} holds {kind}, not strings; cast it to string and write the file again"
        )
    if str(plain) not in ("string", "large_string", "string_view"):
        raise UnreadableText(f"{path}: column {text_column!r} holds {kind}, not strings; set source.text_column")


def _read_text(piece: Piece, advance: Advance, refuse: Refuse) -> Iterator[Document]:
    raw = Path(piece.path).read_bytes()
    advance(len(raw))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"{piece.path} is not UTF-8 (byte {error.start}); convert it with iconv -t utf-8, or leave it out"
        refuse("files", lambda: problem, 1)
    else:
        yield text, raw


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
