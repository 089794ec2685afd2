"""How often the sources of a dataset are read: arithmetic over the manifest, without torch and without opening a file.

An epoch of a source of T tokens is (T - L) // L rows of L tokens; the label of a row's last token is the next row's first. The first epoch begins
with the first token, so it leaves a tail of L - 1 to 2 L - 2 tokens; the second ends with the last token. In a dataset packed as `official_row`
each sequence is a row, and an epoch is all of them. Without weights, rows are drawn in proportion to the rows of an epoch: all sources come to the
end of their n-th epoch at the same row of the run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ssa_pretrain.data.indexed_format import Manifest
from ssa_pretrain.data.order import Blend


@dataclass(frozen=True, slots=True)
class Source:
    """One part of the training split, over all its files.

    Attributes:
        name: as in the manifest.
        num_tokens, num_sequences: of all files.
        rows_per_epoch: rows that it is cut into.
        tail: tokens at its end that the first epoch leaves to the second.
    """

    name: str
    num_tokens: int
    num_sequences: int
    rows_per_epoch: int
    tail: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What a run reads of one source: so many of its rows."""

    source: Source
    rows: int

    @property
    def epochs(self) -> float:
        """How many times the source is read."""
        return self.rows / self.source.rows_per_epoch


def is_padded(manifest: Manifest) -> bool:
    """Return whether each sequence is a row of its own, padded."""
    return manifest.policy.get("packing") == "official_row"


def least_tokens(length: int) -> int:
    """Return the tokens that each training source needs; held-out rows may be padded."""
    return 2 * length + 1


def training_sources(manifest: Manifest, length: int) -> list[Source]:
    """Return the sources of the training split for rows of `length` tokens, in the manifest's order.

    Raises:
        ValueError: a source has fewer than `least_tokens`.
    """
    tokens: dict[str, int] = {}
    sequences: dict[str, int] = {}
    for shard in manifest.splits["train"]:
        tokens[shard.name] = tokens.get(shard.name, 0) + shard.tokens
        sequences[shard.name] = sequences.get(shard.name, 0) + shard.documents
    for name, count in tokens.items():
        if count < least_tokens(length):
            raise ValueError(
                f"data.sequence_length={length} needs at least {least_tokens(length)} tokens of each source, but {name} (train) "
                f"in {manifest.root} has {count}; shorten the rows or prepare more text"
            )
    if is_padded(manifest):
        return [Source(name, tokens[name], sequences[name], sequences[name], 0) for name in tokens]
    rows = {name: (count - length) // length for name, count in tokens.items()}
    return [
        Source(name, count, sequences[name], rows[name], count - 1 - rows[name] * length)
        for name, count in tokens.items()
    ]


def row_shares(
    manifest: Manifest, weights: Mapping[str, float], length: int, *, order: int = 2
) -> Sequence[Fraction | float]:
    """Return each training source's share of the rows; their sum does not matter.

    Args:
        manifest: the dataset.
        weights: share of each source in the tokens; empty: the manifest's, or else all rows equally often.
        length: tokens per row.
        order: row order 1 counts in floats, and without weights by tokens; later ones are exact.

    Raises:
        ValueError: a source is too short, a weight names no source, or the weights are not shares.
    """
    found = training_sources(manifest, length)
    names = [source.name for source in found]
    weights = weights or {name: share for name, share in manifest.weights.items() if name in names}
    if unknown := sorted(set(weights) - set(names)):
        raise ValueError(f"data.weights={unknown} must name sources of the training split; they are {names}")
    given = list(weights.values())
    if given and not (all(math.isfinite(w) and w >= 0 for w in given) and any(given)):
        raise ValueError(f"data.weights={dict(weights)} must be finite and not negative, and one must be above 0")
    if not weights and order > 1:
        return [Fraction(source.rows_per_epoch) for source in found]
    number = float if order == 1 else Fraction
    shares = [number(weights.get(s.name, 0.0) if weights else s.num_tokens) for s in found]
    if not is_padded(manifest):
        return shares
    # Shares count tokens and the blend draws rows: where a row is one sequence, a source of long ones is drawn less often.
    return [share * s.num_sequences / s.num_tokens for share, s in zip(shares, found, strict=True)]


def readings(manifest: Manifest, weights: Mapping[str, float], length: int, rows: int) -> list[Reading]:
    """Return what the first `rows` rows of a run read of each training source; weights and errors as in `row_shares`."""
    counts = Blend(row_shares(manifest, weights, length)).counts(rows)
    return [Reading(source, n) for source, n in zip(training_sources(manifest, length), counts, strict=True)]
