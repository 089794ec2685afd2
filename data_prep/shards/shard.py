"""One shard: read its pieces, split its documents, encode them, write .bin and .idx for each split, then its record.

A worker writes the files (`write_shard`). The parent process flushes them to the disk and writes the shard's record
(`commit_shard`), a JSON file in work/shards/ with the fingerprint of all that determined the bytes. Only the record
marks a shard as finished. A shard is reused if its record has the fingerprint in the plan and its files have
the recorded sizes. What a killed run leaves has no record and is overwritten.

A shard writes no file for a split that gets none of its documents: an empty .bin cannot be mapped.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import SplitConfig
from data_prep.corpus.planning import Shard
from data_prep.corpus.splitting import is_heldout
from data_prep.files import digest, read_json, write_json
from data_prep.readers import Document, Skipped, read_piece
from data_prep.shards.binaries import TokenFile, flush_pair
from data_prep.tokenizer.encoding import Encoder, Vocabulary
from data_prep.tokenizer.parity import Sample
from ssa_pretrain.data.manifest import SPLITS, ShardInfo
from ssa_pretrain.settings.files import file_sha256, write_atomically

FORMAT_VERSION = 1  # part of every fingerprint; raise it when the same input would give different bytes

RECORD_SCHEMA = 2  # of the records; raise it when their fields change

BATCH_BYTES = 1_000_000
BATCH_DOCUMENTS = 1_000

# Bins of the histogram over documents of bytes per token: tenths from 0 to 10, and everything above.
RATIO_BINS = 101


@dataclass(frozen=True, slots=True)
class Job:
    """A shard to make, and the sha256 of all that determines its bytes."""

    shard: Shard
    fingerprint: str


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A shard with its record."""

    job: Job
    record: dict[str, Any]


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
    made_by = {key: value for key, value in asdict(vocabulary).items() if key not in ("path", "name", "row_tokens")}
    if vocabulary.row_tokens:
        made_by["row_tokens"] = vocabulary.row_tokens
    return digest([FORMAT_VERSION, input_sha256, made_by, asdict(split)])


def record_path(out: Path, stem: str) -> Path:
    """Returns the path of a finished shard's record."""
    return out / "work" / "shards" / f"{stem}.json"


def counts_path(out: Path, stem: str) -> Path:
    """Returns the path of a finished shard's token counts: unsigned integers [splits, vocab_size]."""
    return out / "work" / "shards" / f"{stem}.counts.npy"


def shard_prefix(split: str, stem: str) -> str:
    """Returns the path of a shard's files in a split, without suffix, relative to the dataset's folder."""
    return f"work/shards/{split}/{stem}"


def known_record(out: Path, stem: str, fingerprint: str) -> dict[str, Any] | None:
    """Returns the record of a shard if its fingerprint is the one in the plan; its files are not checked."""
    record = read_json(record_path(out, stem))
    if not isinstance(record, dict) or record.get("schema") != RECORD_SCHEMA:
        return None
    if record.get("fingerprint") != fingerprint or not counts_path(out, stem).is_file():
        return None
    return record


def has_files(out: Path, record: dict[str, Any], verify: bool) -> bool:
    """Returns whether a record's files exist and match its sizes and the .idx checksum; `verify` compares the .bin checksum too."""
    for info in filter(None, record["splits"].values()):
        for kind in ("bin", "idx"):
            path = out / f"{info['prefix']}.{kind}"
            if not path.is_file() or path.stat().st_size != info[f"{kind}_bytes"]:
                return False
            if (verify or kind == "idx") and file_sha256(path) != info[f"{kind}_sha256"]:
                return False
    return True


def write_shard(
    out: Path, shard: Shard, fingerprint: str, encoder: Encoder, split: SplitConfig, report: Report
) -> tuple[dict[str, Any], Sample]:
    """Tokenizes a shard; returns its record for `commit_shard`, and one document of each batch with its ids.

    Args:
        out: the dataset's folder.
        shard: what to read.
        fingerprint: stored in the record.
        encoder: the tokenizer and its policy.
        split: which documents are held out.
        report: called a few times per second with the work done since the last call.

    Raises:
        InputError: the text cannot be read.
    """
    record_path(out, shard.stem).unlink(missing_ok=True)
    writers = {name: _SplitWriter(out, name, shard.stem, encoder) for name in SPLITS}
    ratios = np.zeros(RATIO_BINS, dtype=np.int64)
    text_bytes = documents = empty = 0
    sample = Sample([], [])
    skipped = Skipped()
    for batch, consumed in _batches(shard, skipped):
        full = [(text, raw) for text, raw in batch if not raw.isspace() and raw]
        empty += len(batch) - len(full)
        documents += len(full)
        sizes = np.array([len(raw) for _, raw in full], dtype=np.int64)
        tokens, lengths = _encode(full, encoder, split, writers, sample)
        ratios += _ratio_histogram(sizes, lengths)
        text_bytes += int(sizes.sum())
        report(Progress(len(full), tokens, int(sizes.sum()), consumed))
    infos = {split: writer.close(shard.part) for split, writer in writers.items()}
    _save_counts(counts_path(out, shard.stem), np.stack([writers[name].counts for name in SPLITS]))
    record = {
        "schema": RECORD_SCHEMA,
        "fingerprint": fingerprint,
        "text_bytes": text_bytes,
        "source_documents": documents,
        "empty_documents": empty,
        "skipped": {"counts": dict(skipped.counts), "problems": skipped.problems},
        "bytes_per_token_histogram": ratios.tolist(),
        "splits": {split: info and info.to_record() for split, info in infos.items()},
    }
    return record, sample


def commit_shard(out: Path, stem: str, record: dict[str, Any]) -> None:
    """Flushes a shard's files to the disk, then writes its record, which marks it as finished."""
    for info in filter(None, record["splits"].values()):
        flush_pair(out / info["prefix"])
    write_json(record_path(out, stem), record)


def _batches(shard: Shard, skipped: Skipped) -> Iterator[tuple[list[Document], int]]:
    """Yields documents in batches of bounded size, each with the bytes of input read for it."""
    consumed = size = 0
    batch: list[Document] = []

    def advance(count: int) -> None:
        nonlocal consumed
        consumed += count

    for piece in shard.pieces:
        for document in read_piece(piece, advance, skipped):
            batch.append(document)
            size += len(document[1])
            if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
                yield batch, consumed
                batch, consumed, size = [], 0, 0
    yield batch, consumed


def _encode(
    batch: list[Document], encoder: Encoder, split: SplitConfig, writers: dict[str, "_SplitWriter"], sample: Sample
) -> tuple[int, np.ndarray]:
    """Writes a batch; returns its number of tokens, BOS and EOS included, and the number of plain ids of each document."""
    texts = [text for text, _ in batch]
    encoded = encoder.encode_plain(texts)
    if encoder.name != "hf":
        sample.add_first(texts, encoded)
    numbers: dict[str, list[int]] = {name: [] for name in SPLITS}
    for number, (_, raw) in enumerate(batch):
        numbers["heldout" if is_heldout(raw, split) else "train"].append(number)
    tokens = sum(writers[name].add(*encoder.sequences(encoded, chosen)) for name, chosen in numbers.items() if chosen)
    return tokens, encoded[1]


def _ratio_histogram(sizes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    tenths = sizes * 10 // np.maximum(lengths, 1)
    return np.bincount(np.minimum(tenths, RATIO_BINS - 1), minlength=RATIO_BINS)


def _save_counts(path: Path, counts: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, counts.astype(np.min_scalar_type(counts.max())))
    write_atomically(path, content.getvalue())


class _SplitWriter:
    """Writes the files of a shard in one split; they get their final names in `close`."""

    def __init__(self, out: Path, split: str, stem: str, encoder: Encoder) -> None:
        self.counts = np.zeros(encoder.vocabulary.vocab_size, dtype=np.int64)
        self._prefix = shard_prefix(split, stem)
        self._dtype = encoder.dtype
        self._lengths: list[np.ndarray] = []
        self._file = TokenFile(out / self._prefix)

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> int:
        """Appends sequences that are concatenated in `ids`; returns their number of tokens."""
        self._file.write(ids.data.cast("B"))
        self._lengths.append(lengths.astype(np.int32))
        self.counts += np.bincount(ids, minlength=len(self.counts))
        return len(ids)

    def close(self, part: str) -> ShardInfo | None:
        """Gives the files their final names and returns their description, or None if there was no document."""
        if not self._lengths:
            self._file.discard()
            return None
        documents = sum(map(len, self._lengths))
        return self._file.close(part, self._prefix, self._dtype, self._lengths, documents, flush=False)
