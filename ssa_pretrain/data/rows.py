"""Rows of tokens over indexed binaries: a row is `sequence_length + 1` consecutive tokens of one part of the corpus.

The tokens of a part are read as one sequence, file after file, and documents flow over rows. Rows are shuffled by a
keyed permutation, one per epoch, and later epochs cut the tokens at other offsets. So row n is a function of (manifest
fingerprint, seed, n). Nothing is built or cached before training, reads are contiguous, and a longer run, another batch
size or another layout moves no row. Every id that is read is compared with the vocabulary, so a flipped bit ends
training with its file, byte and document.

Under `data.packing=best_fit` a row is whole documents of one part instead, filled with padding without loss: the rows of
an index (packed_index.py), shuffled by the same permutations. A dataset packed as `official_row` gives one sequence per
row. Held-out rows are also padded if a part ends within a row. mixture.py decides how often each part is read. Files are read through
megatron-core's `IndexedDataset`. Its `GPTDataset` is not used, since its order changes with the length of the run and
it does not return document boundaries.

`ORDER` is the version of all this. A checkpoint holds the version that it was written under, and a resumed run keeps
it:
    1  parts interleaved by `PatternBlend`; the last tokens of a part, fewer than a row, are never read
    2  parts interleaved by `Blend`, by default in proportion to their rows; the second epoch ends with the last token
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ssa_pretrain.data.manifest import Manifest
from ssa_pretrain.data.mixture import Mixture, Part, Weights, is_padded
from ssa_pretrain.data.order import key_number, permute, permute_all
from ssa_pretrain.data.packed_index import PackedIndex
from ssa_pretrain.data.repair import repair_advice
from ssa_pretrain.errors import DamagedData

ORDER = 2
COUNTED_AT_ONCE = 1 << 20  # rows


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens [L + 1] and whether each begins a document, bool [L + 1]; the last `padding` tokens are padding. `part` is the training part's number."""

    tokens: np.ndarray
    starts: np.ndarray
    padding: int = 0
    part: int = 0


class PartTokens:
    """The tokens of one part over all its files, addressed by their offset in the whole."""

    def __init__(self, prefixes: list[Path], vocab_size: int) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset  # takes seconds

        self._files = [IndexedDataset(str(prefix), mmap=True) for prefix in prefixes]
        self._prefixes, self._vocab_size = prefixes, vocab_size
        sizes = [int(f.sequence_lengths.sum(dtype=np.int64)) for f in self._files]
        self._ends = np.cumsum(sizes)
        self.num_tokens = int(self._ends[-1])

    def read(self, offset: int, count: int) -> Row:
        """Returns `count` tokens from `offset` on, across files if necessary."""
        pieces = []
        while count:
            f = int(np.searchsorted(self._ends, offset, side="right"))
            begin = offset - (int(self._ends[f - 1]) if f else 0)
            take = min(count, int(self._ends[f]) - offset)
            pieces.append(self._read_file(f, begin, take))
            offset, count = offset + take, count - take
        return Row(np.concatenate([p.tokens for p in pieces]), np.concatenate([p.starts for p in pieces]))

    def read_tokens(self, offset: int, count: int) -> np.ndarray:
        """Returns the tokens of `read` only, int64."""
        f = int(np.searchsorted(self._ends, offset, side="right"))
        begin = offset - (int(self._ends[f - 1]) if f else 0)
        if offset + count <= self._ends[f]:
            return self._tokens_of_file(f, begin, count)
        return self.read(offset, count).tokens

    def sequence(self, number: int) -> np.ndarray:
        """Returns the tokens of sequence `number` of the part."""
        for f, file in enumerate(self._files):
            if number < len(file.sequence_lengths):
                begin = int(file.index.sequence_pointers[number]) // np.dtype(file.index.dtype).itemsize
                return self._read_file(f, begin, int(file.sequence_lengths[number])).tokens
            number -= len(file.sequence_lengths)
        raise IndexError(number)

    @property
    def num_sequences(self) -> int:
        """Number of sequences in all files."""
        return sum(len(file.sequence_lengths) for file in self._files)

    def count_tokens(self, sequences: np.ndarray) -> int:
        """Returns the tokens of some sequences, given by their numbers."""
        total = 0
        for file in self._files:
            here = len(file.sequence_lengths)
            total += int(file.sequence_lengths[sequences[(sequences >= 0) & (sequences < here)]].sum(dtype=np.int64))
            sequences = sequences - here
        return total

    def _read_file(self, f: int, begin: int, count: int) -> Row:
        file = self._files[f]
        size = np.dtype(file.index.dtype).itemsize
        tokens, pointers = self._tokens_of_file(f, begin, count), file.index.sequence_pointers
        first, last = np.searchsorted(pointers, [begin * size, (begin + count) * size])
        starts = np.zeros(count, dtype=bool)
        starts[pointers[first:last] // size - begin] = True
        return Row(tokens, starts)

    def _tokens_of_file(self, f: int, begin: int, count: int) -> np.ndarray:
        file = self._files[f]
        size = np.dtype(file.index.dtype).itemsize
        # A copy, since a view would outlive the file if the dataset were dropped.
        tokens = np.array(file.bin_reader.read(file.index.dtype, count, begin * size), dtype=np.int64)
        pointers = file.index.sequence_pointers
        if count and (tokens.max() >= self._vocab_size or tokens.min() < 0):
            at = begin + int(np.argmax((tokens >= self._vocab_size) | (tokens < 0)))
            document = int(np.searchsorted(pointers, at * size, side="right")) - 1
            raise DamagedData(
                f"{self._prefixes[f]}.bin holds the id {tokens[at - begin]} at byte {at * size}, document {document}, but the vocabulary ends at "
                f"{self._vocab_size - 1}: the file is damaged; {repair_advice(self._prefixes[f].parents[1])}"
            )
        return tokens


class PaddedRows(Protocol):
    """The rows of one part that are read by their number, because each has documents of its own and padding."""

    def read(self, number: int) -> Row:
        """Returns a row of L + 1."""
        ...

    def num_tokens(self, numbers: np.ndarray) -> int:
        """Returns the tokens of some rows without padding."""
        ...


class SequenceRows:
    """The sequences of one part, each a padded row of its own, for a dataset packed as `official_row`.

    A sequence has at most L tokens and ends with EOS.
    """

    def __init__(self, tokens: PartTokens, length: int, pad_id: int) -> None:
        self._tokens, self._length, self._pad = tokens, length, pad_id
        self.num_rows = tokens.num_sequences

    def read(self, number: int) -> Row:
        """Returns sequence `number` as a row of L + 1."""
        own = self._tokens.sequence(number)
        starts = np.zeros(len(own), dtype=bool)
        starts[:1] = True
        return padded(Row(own, starts), self._length, self._pad)

    def num_tokens(self, numbers: np.ndarray) -> int:
        """See `PaddedRows.num_tokens`."""
        return self._tokens.count_tokens(numbers)


class BestFitRows:
    """The rows of one part in an index: whole documents, or a row's length of a long one."""

    def __init__(self, tokens: PartTokens, index: PackedIndex, number: int, pad_id: int) -> None:
        self._tokens, self._length, self._pad = tokens, index.length, pad_id
        self._pieces, self._rows = index.pieces(number)

    def read(self, number: int) -> Row:
        """Returns row `number` of the index as a row of L + 1."""
        begin, end = int(self._rows["end"][number - 1]) if number else 0, int(self._rows["end"][number])
        tokens = np.full(self._length + 1, self._pad, dtype=np.int64)
        starts = np.zeros(self._length + 1, dtype=bool)
        at = 0
        for first, count in self._pieces[begin:end].tolist():
            tokens[at : at + count] = self._tokens.read_tokens(first, count)
            starts[at] = True
            at += count
        starts[at : at + 1] = True
        return Row(tokens, starts, self._length + 1 - at)

    def num_tokens(self, numbers: np.ndarray) -> int:
        """See `PaddedRows.num_tokens`."""
        return int(self._rows["tokens"][numbers].sum(dtype=np.int64))


def padded(row: Row, length: int, pad_id: int) -> Row:
    """Returns a row of at most L tokens padded to L + 1. The padding begins a document of its own and has no loss."""
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
        weights: share of each part in the tokens, of the whole run or by stage; empty: the manifest's, or else all rows equally often.
        order: version of the order, see the module's docstring.
        packed: the index of data.packing=best_fit; None under data.packing=flow.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        sequence_length: int,
        seed: int,
        weights: Weights,
        order: int = ORDER,
        packed: PackedIndex | None = None,
    ) -> None:
        if not 1 <= order <= ORDER:
            raise ValueError(f"row order {order} is unknown; this version of ssa_pretrain has 1 to {ORDER}")
        self.order, self._length = order, sequence_length
        self._key = f"{manifest.fingerprint}:{seed}"
        self._tokens = open_parts(manifest, "train")
        self._padded: Sequence[PaddedRows] = open_sequences(manifest, self._tokens, sequence_length)
        if packed is not None:
            pad = manifest.tokenizer.eos_id
            self._padded = [BestFitRows(tokens, packed, n, pad) for n, tokens in enumerate(self._tokens)]
        rows = packed.rows_per_epoch if packed else None
        self._mixture = Mixture(manifest, weights, sequence_length, order=order, packed=rows)
        self._parts = self._mixture.parts
        self._counted = [(0, 0)] * len(self._parts)  # rows and tokens of each part at the last call of `_tokens_of`

    @property
    def part_names(self) -> list[str]:
        """The parts' names by number."""
        return [part.name for part in self._parts]

    def row(self, index: int) -> Row:
        """Returns row `index` of the run, 0 or more, without an end."""
        number, n = self._mixture.locate(index)
        part = self._parts[number]
        epoch, at = divmod(n, part.rows_per_epoch)
        key = self._epoch_key(part, epoch)
        place = permute(at, part.rows_per_epoch, key)
        if self._padded:
            return replace(self._padded[number].read(place), part=number)
        shift = self._shift(part, epoch, key + ":shift")
        return replace(self._tokens[number].read(shift + place * self._length, self._length + 1), part=number)

    def read_so_far(self, rows: int) -> dict[str, tuple[int, float]]:
        """Returns tokens without padding and epochs of each part in the first `rows` rows of the run."""
        counts = enumerate(self._mixture.counts(rows))
        return {
            self._parts[number].name: (self._tokens_of(number, n), n / self._parts[number].rows_per_epoch)
            for number, n in counts
        }

    def _tokens_of(self, number: int, rows: int) -> int:
        """Returns the tokens of the first `rows` rows of a part. If rows hold padding, it counts on from the call before."""
        if not self._padded:
            return rows * self._length
        part, (counted, tokens) = self._parts[number], self._counted[number]
        epoch = rows // part.rows_per_epoch
        if not epoch * part.rows_per_epoch <= counted <= rows:
            counted, tokens = epoch * part.rows_per_epoch, epoch * part.num_tokens
        for first in range(counted, rows, COUNTED_AT_ONCE):
            at = np.arange(first, min(rows, first + COUNTED_AT_ONCE)) - epoch * part.rows_per_epoch
            places = permute_all(at, part.rows_per_epoch, self._epoch_key(part, epoch))
            tokens += self._padded[number].num_tokens(places)
        self._counted[number] = rows, tokens
        return tokens

    def _epoch_key(self, part: Part, epoch: int) -> str:
        return f"{self._key}:{part.name}:{epoch}"

    def _shift(self, part: Part, epoch: int, key: str) -> int:
        """Returns the offset of an epoch's first row.

        It is 0 in the first epoch. In the second, the last row ends with the last token. Later it is anywhere between.
        """
        if epoch == 0:
            return 0
        if self.order == 1:
            return key_number(key, self._length)
        return part.tail if epoch == 1 else key_number(key, part.tail + 1)


class HeldOutRows:
    """A fixed set of rows of the held-out split, spread evenly over its parts.

    All rows together hold each token of the split: if a part's last row is not full, it is padded. A smaller set is
    chosen among full rows.

    Attributes:
        num_rows: number of rows.

    Raises:
        ValueError: the split has no row, or rows of another length.
    """

    def __init__(self, manifest: Manifest, *, sequence_length: int, rows: int) -> None:
        self._length, self._pad = sequence_length, manifest.tokenizer.eos_id
        self._tokens = open_parts(manifest, "heldout")
        self._sequences = open_sequences(manifest, self._tokens, sequence_length)
        counts = [s.num_rows for s in self._sequences] or [(s.num_tokens - 1) // sequence_length for s in self._tokens]
        if not self._sequences and not 0 < rows <= sum(counts):
            counts = [-(-(s.num_tokens - 1) // sequence_length) for s in self._tokens]
        self._ends = np.cumsum(counts)
        available = int(self._ends[-1])
        if not available:
            raise ValueError(
                f"{manifest.root} has no held-out part with two tokens (a token and its label); prepare more text"
            )
        self.num_rows = min(rows or available, available)
        self._places = [i * available // self.num_rows for i in range(self.num_rows)]

    def row(self, index: int) -> Row:
        """Returns held-out row `index`. From num_rows on, rows are only padding, which fills the last microbatches."""
        if index >= self.num_rows:
            return padded(Row(np.empty(0, dtype=np.int64), np.empty(0, dtype=bool)), self._length, self._pad)
        place = self._places[index]
        part = int(np.searchsorted(self._ends, place, side="right"))
        at = place - (int(self._ends[part - 1]) if part else 0)
        if self._sequences:
            return self._sequences[part].read(at)
        tokens, begin = self._tokens[part], at * self._length
        if begin + self._length < tokens.num_tokens:
            return tokens.read(begin, self._length + 1)
        return padded(tokens.read(begin, tokens.num_tokens - begin), self._length, self._pad)


def open_parts(manifest: Manifest, split: str) -> list[PartTokens]:
    """Returns the tokens of a split's parts, in the manifest's order.

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
        prefixes.setdefault(shard.part, []).append(manifest.root / shard.prefix)
    return [PartTokens(p, manifest.tokenizer.vocab_size) for p in prefixes.values()]


def open_sequences(manifest: Manifest, parts: list[PartTokens], sequence_length: int) -> list[SequenceRows]:
    """Returns each part's sequences as rows if the dataset is packed as official_row, else an empty list.

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
    return [SequenceRows(part, sequence_length, manifest.tokenizer.eos_id) for part in parts]
