"""Rows of tokens over indexed binaries: a row is `sequence_length + 1` consecutive tokens of one source.

The source's binaries are read as one stream of tokens in file order; documents flow over rows. Rows are shuffled by a keyed permutation, one
an epoch, and later epochs cut the stream at another offset. So row n is a function of (manifest fingerprint, seed, n): nothing is built or cached
before training, the reads are contiguous, and a longer run, another batch size or another layout moves no row. Every id that is read is compared
with the vocabulary: a flipped bit ends training with its file, byte and document. A dataset packed as `official_row` gives one sequence a row
instead, filled with padding that bears no loss. Files are read through
megatron-core's `IndexedDataset`; its `GPTDataset` is not used, since its order changes with the length of the run and it does not return
document boundaries.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from ssa_pretrain.data.errors import DamagedData
from ssa_pretrain.data.indexed_format import Manifest
from ssa_pretrain.data.order import Blend, key_number, permute
from ssa_pretrain.data.repair import repair_advice


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

    A sequence has at most L tokens, its EOS the last. The padding begins a document of its own and bears no loss.
    """

    def __init__(self, stream: TokenStream, length: int, pad_id: int) -> None:
        self._stream, self._length, self._pad = stream, length, pad_id
        self.num_rows = stream.num_sequences

    def read(self, number: int) -> Row:
        """Return sequence `number` as a row of L + 1."""
        own = self._stream.sequence(number)
        tokens = np.full(self._length + 1, self._pad, dtype=np.int64)
        tokens[: len(own)] = own
        starts = np.zeros(self._length + 1, dtype=bool)
        starts[[0, len(own)]] = True
        return Row(tokens, starts, self._length + 1 - len(own))


class TrainingRows:
    """The endless, shuffled, blended rows of the training split."""

    def __init__(self, manifest: Manifest, *, sequence_length: int, seed: int, weights: dict[str, float]) -> None:
        self._length = sequence_length
        self._key = f"{manifest.fingerprint}:{seed}"
        self._names, self._streams = open_streams(manifest, "train", sequence_length)
        self._sequences = open_sequences(manifest, self._streams, sequence_length)
        weights = weights or {name: share for name, share in manifest.weights.items() if name in self._names}
        if unknown := sorted(set(weights) - set(self._names)):
            raise ValueError(f"data.weights={unknown} must name sources of the training split; they are {self._names}")
        shares = [
            weights.get(name, 0.0) if weights else float(s.num_tokens)
            for name, s in zip(self._names, self._streams, strict=True)
        ]
        # Shares count tokens and the blend draws rows: where a row is one sequence, a source of long ones is drawn less often.
        if self._sequences:
            shares = [share * s.num_sequences / s.num_tokens for share, s in zip(shares, self._streams, strict=True)]
        self._blend = Blend(shares)

    def row(self, index: int) -> Row:
        """Return row `index` of the run, from 0 without end."""
        source, n = self._blend.source(index)
        stream, length = self._streams[source], self._length
        per_epoch = self._sequences[source].num_rows if self._sequences else (stream.num_tokens - length) // length
        epoch, at = divmod(n, per_epoch)
        key = f"{self._key}:{self._names[source]}:{epoch}"
        if self._sequences:
            return self._sequences[source].read(permute(at, per_epoch, key))
        shift = key_number(key + ":shift", length) if epoch else 0
        return stream.read(shift + permute(at, per_epoch, key) * length, length + 1)


class HeldOutRows:
    """A fixed set of rows of the held-out split, spread evenly over its sources."""

    def __init__(self, manifest: Manifest, *, sequence_length: int, rows: int) -> None:
        self._length = sequence_length
        _, self._streams = open_streams(manifest, "heldout", sequence_length)
        self._sequences = open_sequences(manifest, self._streams, sequence_length)
        counts = [s.num_rows for s in self._sequences] or [(s.num_tokens - 1) // sequence_length for s in self._streams]
        self._ends = np.cumsum(counts)
        available = int(self._ends[-1])
        self.num_rows = min(rows or available, available)
        self._places = [i * available // self.num_rows for i in range(self.num_rows)]

    def row(self, index: int) -> Row:
        """Return held-out row `index`, below num_rows."""
        place = self._places[index]
        source = int(np.searchsorted(self._ends, place, side="right"))
        at = place - (int(self._ends[source - 1]) if source else 0)
        if self._sequences:
            return self._sequences[source].read(at)
        return self._streams[source].read(at * self._length, self._length + 1)


def open_streams(manifest: Manifest, split: str, sequence_length: int) -> tuple[list[str], list[TokenStream]]:
    """Return the names and token streams of a split's sources, in the manifest's order.

    Raises:
        ValueError: the split has no documents, or a source is shorter than two rows.
    """
    if not manifest.splits[split]:
        fraction = "below 1" if split == "train" else "above 0"
        raise ValueError(
            f"{manifest.root} has no {split} documents; choose another data.path, or prepare it with split.heldout_fraction {fraction}"
        )
    prefixes: dict[str, list[Path]] = {}
    for shard in manifest.splits[split]:
        prefixes.setdefault(shard.name, []).append(manifest.root / shard.prefix)
    streams = [TokenStream(p, manifest.tokenizer.vocab_size) for p in prefixes.values()]
    for name, stream in zip(prefixes, streams, strict=True):
        if stream.num_tokens < 2 * sequence_length + 1:
            raise ValueError(
                f"data.sequence_length={sequence_length} needs at least {2 * sequence_length + 1} tokens of each source, but {name} ({split}) "
                f"in {manifest.root} has {stream.num_tokens}; shorten the rows or prepare more text"
            )
    return list(prefixes), streams


def open_sequences(manifest: Manifest, streams: list[TokenStream], sequence_length: int) -> list[SequenceRows]:
    """Return each source's sequences as rows if the dataset is packed so, else nothing.

    Raises:
        ValueError: the dataset's rows have another length.
    """
    if manifest.policy.get("packing") != "official_row":
        return []
    if (row := manifest.policy["row_tokens"]) != sequence_length:
        raise ValueError(
            f"data.sequence_length={sequence_length} must be {row}: {manifest.root} was packed as official_row with rows of {row}; set it, or "
            f"prepare the text again with packing.row_tokens={sequence_length}"
        )
    return [SequenceRows(stream, sequence_length, manifest.tokenizer.eos_id) for stream in streams]
