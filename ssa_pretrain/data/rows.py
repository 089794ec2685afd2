"""Rows of tokens over indexed binaries: a row is `sequence_length + 1` consecutive tokens of one source.

The source's binaries are read as one stream of tokens in file order; documents flow over rows. Rows are shuffled by a keyed permutation, one
an epoch, and later epochs cut the stream at another offset. So row n is a function of (manifest fingerprint, seed, n): nothing is built or cached
before training, the reads are contiguous, and a longer run, another batch size or another layout moves no row. Files are read through
megatron-core's `IndexedDataset`; its `GPTDataset` is not used, since its order changes with the length of the run and it does not return
document boundaries.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from ssa_pretrain.data.indexed_format import Manifest
from ssa_pretrain.data.order import Blend, key_number, permute


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens [L + 1] and whether each begins a document, bool [L + 1]."""

    tokens: np.ndarray
    starts: np.ndarray


class TokenStream:
    """One source's tokens over all its files, addressed by their place in the whole."""

    def __init__(self, prefixes: list[Path]) -> None:
        self._files = [IndexedDataset(str(prefix), mmap=True) for prefix in prefixes]
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
            parts.append(self._read_file(self._files[f], begin, take))
            offset, count = offset + take, count - take
        return Row(np.concatenate([p.tokens for p in parts]), np.concatenate([p.starts for p in parts]))

    @staticmethod
    def _read_file(file: IndexedDataset, begin: int, count: int) -> Row:
        size = np.dtype(file.index.dtype).itemsize
        tokens = np.array(file.bin_reader.read(file.index.dtype, count, begin * size), dtype=np.int64)
        pointers = file.index.sequence_pointers
        first, last = np.searchsorted(pointers, [begin * size, (begin + count) * size])
        starts = np.zeros(count, dtype=bool)
        starts[pointers[first:last] // size - begin] = True
        return Row(tokens, starts)


class TrainingRows:
    """The endless, shuffled, blended rows of the training split."""

    def __init__(self, manifest: Manifest, *, sequence_length: int, seed: int, weights: dict[str, float]) -> None:
        self._length = sequence_length
        self._key = f"{manifest.fingerprint}:{seed}"
        self._names, self._streams = open_streams(manifest, "train", sequence_length)
        if unknown := sorted(set(weights) - set(self._names)):
            raise ValueError(f"data.weights={unknown} must name sources of the training split; they are {self._names}")
        shares = [
            weights.get(name, 0.0) if weights else float(s.num_tokens)
            for name, s in zip(self._names, self._streams, strict=True)
        ]
        self._blend = Blend(shares)

    def row(self, index: int) -> Row:
        """Return row `index` of the run, from 0 without end."""
        source, n = self._blend.source(index)
        stream, length = self._streams[source], self._length
        per_epoch = (stream.num_tokens - length) // length
        epoch, at = divmod(n, per_epoch)
        key = f"{self._key}:{self._names[source]}:{epoch}"
        shift = key_number(key + ":shift", length) if epoch else 0
        return stream.read(shift + permute(at, per_epoch, key) * length, length + 1)


class HeldOutRows:
    """A fixed set of rows of the held-out split, spread evenly over its sources."""

    def __init__(self, manifest: Manifest, *, sequence_length: int, rows: int) -> None:
        self._length = sequence_length
        _, self._streams = open_streams(manifest, "heldout", sequence_length)
        counts = [(s.num_tokens - 1) // sequence_length for s in self._streams]
        self._ends = np.cumsum(counts)
        available = int(self._ends[-1])
        self.num_rows = min(rows or available, available)
        self._places = [i * available // self.num_rows for i in range(self.num_rows)]

    def row(self, index: int) -> Row:
        """Return held-out row `index`, below num_rows."""
        place = self._places[index]
        source = int(np.searchsorted(self._ends, place, side="right"))
        at = place - (int(self._ends[source - 1]) if source else 0)
        return self._streams[source].read(at * self._length, self._length + 1)


def open_streams(manifest: Manifest, split: str, sequence_length: int) -> tuple[list[str], list[TokenStream]]:
    """Return the names and token streams of a split's sources, in the manifest's order.

    Raises:
        ValueError: a source is shorter than two rows.
    """
    prefixes: dict[str, list[Path]] = {}
    for shard in manifest.splits[split]:
        prefixes.setdefault(shard.name, []).append(manifest.root / shard.prefix)
    streams = [TokenStream(p) for p in prefixes.values()]
    for name, stream in zip(prefixes, streams, strict=True):
        if stream.num_tokens < 2 * sequence_length + 1:
            raise ValueError(
                f"data.sequence_length={sequence_length} needs at least {2 * sequence_length + 1} tokens of each source, but {name} ({split}) "
                f"in {manifest.root} has {stream.num_tokens}; shorten the rows or prepare more text"
            )
    return list(prefixes), streams
