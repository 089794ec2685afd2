"""Rows of tokens over indexed binaries: a row is `sequence_length + 1` consecutive tokens of one source.

The source's binaries are read as one stream of tokens in file order; documents flow over rows. Rows are shuffled by a keyed permutation, one per
epoch, and later epochs cut the stream at other offsets. So row n is a function of (manifest fingerprint, seed, n): nothing is built or cached
before training, the reads are contiguous, and a longer run, another batch size or another layout moves no row. Every id that is read is compared
with the vocabulary: a flipped bit ends training with its file, byte and document. A dataset packed as `official_row` gives one sequence per row
instead, filled with padding that bears no loss. Held-out rows are padded too where a source ends within a row. How often each source is read is
decided in mixture.py. Files are read through megatron-core's `IndexedDataset`; its `GPTDataset` is not used, since its order changes with the
length of the run and it does not return document boundaries.

`ORDER` is the version of all this. A checkpoint holds the version that it was written under, and a run that resumes keeps it:
    1  sources interleaved by `PatternBlend`; the last tokens of a source, fewer than a row, are read in no epoch
    2  sources interleaved by `Blend`, by default in proportion to their rows; the second epoch ends with the last token
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from ssa_pretrain.data.errors import DamagedData
from ssa_pretrain.data.indexed_format import Manifest
from ssa_pretrain.data.mixture import Source, is_padded, row_shares, training_sources
from ssa_pretrain.data.order import Blend, PatternBlend, key_number, permute
from ssa_pretrain.data.repair import repair_advice

ORDER = 2


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens [L + 1] and whether each begins a document, bool [L + 1]; the last `padding` tokens are none."""

    tokens: np.ndarray
    starts: np.ndarray
    padding: int = 0


class TokenStream:
    """One source's tokens over all its files, addressed by their place in the whole."""

    def __init__(self, prefixes: list[Path], vocab_size: int) -> None:
        self._files = [IndexedDataset(str(prefix), mmap=True) for prefix in prefixes]
        self._prefixes, self._vocab_size = prefixes, vocab_size
        sizes = [int(f.sequence_lengths.sum(dtype=np.int64)) for f in self._files]
        self._ends = np.cumsum(sizes)
        self.num_tokens = int(self._ends[-1])

    def read(self, offset: int, count: int) -> Row:
        """Return `count` tokens from `offset` on, over file borders where need be."""
        parts = []
        while count:
            f = int(np.searchsorted(self._ends, offset, side="right"))
            begin = offset - (int(self._ends[f - 1]) if f else 0)
            take = min(count, int(self._ends[f]) - offset)
            parts.append(self._read_file(f, begin, take))
            offset, count = offset + take, count - take
        return Row(np.concatenate([p.tokens for p in parts]), np.concatenate([p.starts for p in parts]))

    def sequence(self, number: int) -> np.ndarray:
        """Return the tokens of sequence `number` of the whole."""
        for f, file in enumerate(self._files):
            if number < len(file.sequence_lengths):
                begin = int(file.index.sequence_pointers[number]) // np.dtype(file.index.dtype).itemsize
                return self._read_file(f, begin, int(file.sequence_lengths[number])).tokens
            number -= len(file.sequence_lengths)
        raise IndexError(number)

    @property
    def num_sequences(self) -> int:
        """Sequences of all files."""
        return sum(len(file.sequence_lengths) for file in self._files)

    def _read_file(self, f: int, begin: int, count: int) -> Row:
        file = self._files[f]
        size = np.dtype(file.index.dtype).itemsize
        # A copy: a view of the file would outlive it if the dataset were dropped.
        tokens = np.array(file.bin_reader.read(file.index.dtype, count, begin * size), dtype=np.int64)
        pointers = file.index.sequence_pointers
        if count and (tokens.max() >= self._vocab_size or tokens.min() < 0):
            at = begin + int(np.argmax((tokens >= self._vocab_size) | (tokens < 0)))
            document = int(np.searchsorted(pointers, at * size, side="right")) - 1
            raise DamagedData(
                f"{self._prefixes[f]}.bin holds the id {tokens[at - begin]} at byte {at * size}, document {document}; the vocabulary ends at "
                f"{self._vocab_size - 1}: the file is damaged; {repair_advice(self._prefixes[f].parents[1])}"
            )
        first, last = np.searchsorted(pointers, [begin * size, (begin + count) * size])
        starts = np.zeros(count, dtype=bool)
        starts[pointers[first:last] // size - begin] = True
        return Row(tokens, starts)


class SequenceRows:
    """One source's sequences, each a row of its own, padded: what a dataset packed as `official_row` gives.

    A sequence has at most L tokens, its EOS the last.
    """

    def __init__(self, stream: TokenStream, length: int, pad_id: int) -> None:
        self._stream, self._length, self._pad = stream, length, pad_id
        self.num_rows = stream.num_sequences

    def read(self, number: int) -> Row:
        """Return sequence `number` as a row of L + 1."""
        own = self._stream.sequence(number)
        starts = np.zeros(len(own), dtype=bool)
        starts[:1] = True
        return padded(Row(own, starts), self._length, self._pad)


def padded(row: Row, length: int, pad_id: int) -> Row:
    """Return a row of at most L tokens filled up to L + 1; the padding begins a document of its own and bears no loss."""
    missing = length + 1 - len(row.tokens)
    tokens = np.append(row.tokens, np.full(missing, pad_id))
    starts = np.append(row.starts, np.zeros(missing, dtype=bool))
    starts[len(row.tokens)] = True
    return Row(tokens, starts, missing)


class TrainingRows:
    """The endless, shuffled, blended rows of the training split.

    Args:
        manifest: the dataset.
        sequence_length: L.
        seed: of the shuffle.
        weights: share of each source in the tokens; empty: the manifest's, or else every source's rows equally often.
        order: version of the order, see above.
    """

    def __init__(
        self, manifest: Manifest, *, sequence_length: int, seed: int, weights: dict[str, float], order: int = ORDER
    ) -> None:
        if not 1 <= order <= ORDER:
            raise ValueError(f"row order {order} is not known; this version of ssa_pretrain has 1 to {ORDER}")
        self.order, self._length = order, sequence_length
        self._key = f"{manifest.fingerprint}:{seed}"
        self._streams = open_streams(manifest, "train")
        self._sequences = open_sequences(manifest, self._streams, sequence_length)
        self._sources = training_sources(manifest, sequence_length)
        shares = row_shares(manifest, weights, sequence_length, order=order)
        self._blend = PatternBlend(shares) if order == 1 else Blend(shares)

    def row(self, index: int) -> Row:
        """Return row `index` of the run, from 0 without end."""
        number, n = self._blend.source(index)
        source = self._sources[number]
        epoch, at = divmod(n, source.rows_per_epoch)
        key = f"{self._key}:{source.name}:{epoch}"
        place = permute(at, source.rows_per_epoch, key)
        if self._sequences:
            return self._sequences[number].read(place)
        shift = self._shift(source, epoch, key + ":shift")
        return self._streams[number].read(shift + place * self._length, self._length + 1)

    def _shift(self, source: Source, epoch: int, key: str) -> int:
        """Return where an epoch's first row begins: at the first token, then so that the last row ends with the last token, then anywhere between."""
        if epoch == 0:
            return 0
        if self.order == 1:
            return key_number(key, self._length)
        return source.tail if epoch == 1 else key_number(key, source.tail + 1)


class HeldOutRows:
    """A fixed set of rows of the held-out split, spread evenly over its sources.

    All of them hold each token of the split: where a source's last row is not full, it is padded. A smaller set is chosen among full rows.

    Attributes:
        num_rows: rows of the set.

    Raises:
        ValueError: the split has no row, or rows of another length.
    """

    def __init__(self, manifest: Manifest, *, sequence_length: int, rows: int) -> None:
        self._length, self._pad = sequence_length, manifest.tokenizer.eos_id
        self._streams = open_streams(manifest, "heldout")
        self._sequences = open_sequences(manifest, self._streams, sequence_length)
        counts = [s.num_rows for s in self._sequences] or [(s.num_tokens - 1) // sequence_length for s in self._streams]
        if not self._sequences and not 0 < rows <= sum(counts):
            counts = [-(-(s.num_tokens - 1) // sequence_length) for s in self._streams]
        self._ends = np.cumsum(counts)
        available = int(self._ends[-1])
        if not available:
            raise ValueError(
                f"{manifest.root} has no held-out source of two tokens, a token and its label; prepare more text"
            )
        self.num_rows = min(rows or available, available)
        self._places = [i * available // self.num_rows for i in range(self.num_rows)]

    def row(self, index: int) -> Row:
        """Return held-out row `index`; from num_rows on, rows of nothing but padding, which fill the last microbatches."""
        if index >= self.num_rows:
            return padded(Row(np.empty(0, dtype=np.int64), np.empty(0, dtype=bool)), self._length, self._pad)
        place = self._places[index]
        source = int(np.searchsorted(self._ends, place, side="right"))
        at = place - (int(self._ends[source - 1]) if source else 0)
        if self._sequences:
            return self._sequences[source].read(at)
        stream, begin = self._streams[source], at * self._length
        if begin + self._length < stream.num_tokens:
            return stream.read(begin, self._length + 1)
        return padded(stream.read(begin, stream.num_tokens - begin), self._length, self._pad)


def open_streams(manifest: Manifest, split: str) -> list[TokenStream]:
    """Return the token streams of a split's sources, in the manifest's order.

    Raises:
        ValueError: the split has no documents.
    """
    if not manifest.splits[split]:
        fraction = "below 1" if split == "train" else "above 0"
        raise ValueError(
            f"{manifest.root} has no {split} documents; choose another data.path, or prepare it with split.heldout_fraction {fraction}"
        )
    prefixes: dict[str, list[Path]] = {}
    for shard in manifest.splits[split]:
        prefixes.setdefault(shard.name, []).append(manifest.root / shard.prefix)
    return [TokenStream(p, manifest.tokenizer.vocab_size) for p in prefixes.values()]


def open_sequences(manifest: Manifest, streams: list[TokenStream], sequence_length: int) -> list[SequenceRows]:
    """Return each source's sequences as rows if the dataset is packed so, else nothing.

    Raises:
        ValueError: the dataset's rows have another length.
    """
    if not is_padded(manifest):
        return []
    if (row := manifest.policy["row_tokens"]) != sequence_length:
        raise ValueError(
            f"data.sequence_length={sequence_length} must be {row}: {manifest.root} was packed as official_row with rows of {row}; set it, or "
            f"prepare the text again with packing.row_tokens={sequence_length}"
        )
    return [SequenceRows(stream, sequence_length, manifest.tokenizer.eos_id) for stream in streams]
