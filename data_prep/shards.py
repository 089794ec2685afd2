"""One shard: read its pieces, split its documents, encode them, write .bin and .idx for each split, then its record.

Files are written as `.tmp`, flushed to the disk and renamed: first .bin, then .idx, last the shard's record, a JSON file in
work/shards/ with the fingerprint of all that determined the bytes. The record is the only sign of completion: a shard is
reused if its record has the fingerprint that the plan asks for and its files have the recorded sizes. Whatever a killed run
left behind has no record, and is overwritten.

A split that gets no document of a shard gets no file: an empty .bin cannot be mapped.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import SplitConfig
from data_prep.files import digest, read_json, sync_folder, write_atomically, write_json
from data_prep.planning import Shard
from data_prep.readers import Document, read_piece
from data_prep.splitting import is_heldout
from data_prep.tokenizer.encoding import Encoder, Vocabulary
from ssa_pretrain.data.indexed_format import SPLITS, ShardInfo, file_sha256, token_dtype, write_index

FORMAT_VERSION = 1  # part of every fingerprint; raise it when the same input would give other bytes

BATCH_BYTES = 1_000_000
BATCH_DOCUMENTS = 1_000


@dataclass(frozen=True, slots=True)
class Progress:
    """Work done since the last report."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    input_bytes: int = 0


Report = Callable[[Progress], None]


def shard_fingerprint(input_sha256: str, vocabulary: Vocabulary, split: SplitConfig) -> str:
    """Returns the sha256 of everything that determines the bytes of a shard."""
    made_by = {key: value for key, value in asdict(vocabulary).items() if key not in ("path", "name")}
    return digest([FORMAT_VERSION, input_sha256, made_by, asdict(split)])


def record_path(out: Path, shard: Shard) -> Path:
    """Returns where the record of a finished shard lies."""
    return out / "work" / "shards" / f"{shard.stem}.json"


def counts_path(out: Path, shard: Shard) -> Path:
    """Returns where the token counts of a finished shard lie: int64 [splits, vocab_size]."""
    return out / "work" / "shards" / f"{shard.stem}.counts.npy"


def finished_record(out: Path, shard: Shard, fingerprint: str, verify: bool) -> dict[str, Any] | None:
    """Returns the record of a shard that need not be made again, else None; `verify` compares checksums, too."""
    record = read_json(record_path(out, shard))
    if not isinstance(record, dict) or record.get("fingerprint") != fingerprint:
        return None
    for info in filter(None, record["splits"].values()):
        for kind in ("bin", "idx"):
            path = out / f"{info['prefix']}.{kind}"
            if not path.is_file() or path.stat().st_size != info[f"{kind}_bytes"]:
                return None
            if verify and file_sha256(path) != info[f"{kind}_sha256"]:
                return None
    return record if counts_path(out, shard).is_file() else None


def write_shard(
    out: Path, shard: Shard, fingerprint: str, encoder: Encoder, split: SplitConfig, report: Report
) -> dict[str, Any]:
    """Tokenizes a shard and returns its record, which it has also written.

    Args:
        out: the dataset's folder.
        shard: what to read.
        fingerprint: goes into the record.
        encoder: the tokenizer and its policy.
        split: which documents are held out.
        report: called a few times a second with the work done since the last call.

    Raises:
        InputError: the text cannot be read.
    """
    record_path(out, shard).unlink(missing_ok=True)
    writers = {name: _SplitWriter(out, f"{name}/{shard.stem}", encoder.vocabulary.vocab_size) for name in SPLITS}
    text_bytes = empty = 0
    for batch, consumed in _batches(shard):
        full = [(text, raw) for text, raw in batch if not raw.isspace() and raw]
        empty += len(batch) - len(full)
        tokens = _encode(full, encoder, split, writers)
        done = sum(len(raw) for _, raw in full)
        text_bytes += done
        report(Progress(len(full), tokens, done, consumed))
    splits = {name: writer.close(shard.name) for name, writer in writers.items()}
    _save_counts(counts_path(out, shard), np.stack([writers[name].counts for name in SPLITS]))
    record = {
        "fingerprint": fingerprint,
        "text_bytes": text_bytes,
        "empty_documents": empty,
        "splits": {name: info and asdict(info) for name, info in splits.items()},
    }
    write_json(record_path(out, shard), record)
    return record


def _batches(shard: Shard) -> Iterator[tuple[list[Document], int]]:
    """Yields documents in groups of bounded size, each with the bytes of input read for it."""
    consumed = size = 0
    batch: list[Document] = []

    def advance(count: int) -> None:
        nonlocal consumed
        consumed += count

    for piece in shard.pieces:
        for document in read_piece(piece, advance):
            batch.append(document)
            size += len(document[1])
            if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
                yield batch, consumed
                batch, consumed, size = [], 0, 0
    yield batch, consumed


def _encode(batch: list[Document], encoder: Encoder, split: SplitConfig, writers: dict[str, "_SplitWriter"]) -> int:
    encoded = encoder.encode([text for text, _ in batch])
    sides: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for (_, raw), ids in zip(batch, encoded, strict=True):
        sides["heldout" if is_heldout(raw, split) else "train"].append(ids)
    for name, documents in sides.items():
        writers[name].add(documents)
    return sum(map(len, encoded))


def _save_counts(path: Path, counts: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, counts)
    write_atomically(path, content.getvalue())


class _SplitWriter:
    """The two files of a shard in one split; nothing has its final name before `close`."""

    def __init__(self, out: Path, prefix: str, vocab_size: int) -> None:
        self.prefix = prefix
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self._dtype = token_dtype(vocab_size)
        self._bin = out / f"{prefix}.bin"
        self._idx = out / f"{prefix}.idx"
        self._lengths: list[int] = []
        self._sum = hashlib.sha256()
        self._bin.parent.mkdir(parents=True, exist_ok=True)
        # An old .idx beside a new .bin would open and serve wrong documents: it goes first.
        self._idx.unlink(missing_ok=True)
        self._bin.unlink(missing_ok=True)
        self._file = open(_temporary(self._bin), "wb")

    def add(self, documents: list[np.ndarray]) -> None:
        """Appends documents."""
        if not documents:
            return
        ids = np.concatenate(documents)
        raw = ids.tobytes()
        self._file.write(raw)
        self._sum.update(raw)
        self._lengths += map(len, documents)
        self.counts += np.bincount(ids, minlength=len(self.counts))

    def close(self, name: str) -> ShardInfo | None:
        """Gives both files their names; returns what they are, None where there was no document."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if not self._lengths:
            _temporary(self._bin).unlink()
            return None
        lengths = np.array(self._lengths, dtype=np.int64)
        with open(_temporary(self._idx), "wb") as file:
            write_index(file, lengths, self._dtype)
            file.flush()
            os.fsync(file.fileno())
        with open(_temporary(self._idx), "rb") as file:
            idx_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(_temporary(self._bin), self._bin)
        os.replace(_temporary(self._idx), self._idx)
        sync_folder(self._bin.parent)
        tokens = int(lengths.sum())
        return ShardInfo(
            name=name,
            prefix=self.prefix,
            documents=len(lengths),
            tokens=tokens,
            bin_bytes=tokens * self._dtype.itemsize,
            idx_bytes=self._idx.stat().st_size,
            bin_sha256=self._sum.hexdigest(),
            idx_sha256=idx_sha256,
        )


def _temporary(path: Path) -> Path:
    # With the process in its name, so that two writers never share a file, not even for the moment in which a killed run's
    # workers notice it.
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")
