"""The number of epochs of each part of a dataset: arithmetic over the manifest, without torch and without opening a file.

An epoch of a part with T tokens is (T - L) // L rows of L tokens. The label of a row's last token is the next row's
first token. The first epoch begins with the first token, so it leaves a tail of L - 1 to 2 L - 2 tokens. The second
epoch ends with the last token. In a dataset packed as `official_row` each sequence is a row, and an epoch is all of
them. Without weights, rows are drawn in proportion to the rows of an epoch, so all parts finish their n-th epoch at the
same row of the run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ssa_pretrain.data.indexed_format import Manifest
from ssa_pretrain.data.order import Blend


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the training split, over all its files.

    Attributes:
        name: as in the manifest.
        num_tokens, num_sequences: over all files.
        rows_per_epoch: rows that the part is cut into.
        tail: tokens at the end that the first epoch leaves to the second.
    """

    name: str
    num_tokens: int
    num_sequences: int
    rows_per_epoch: int
    tail: int


@dataclass(frozen=True, slots=True)
class Reading:
    """How many rows of one part a run reads."""

    part: Part
    rows: int

    @property
    def epochs(self) -> float:
        """How many times the part is read."""
        return self.rows / self.part.rows_per_epoch


def is_padded(manifest: Manifest) -> bool:
    """Returns whether each sequence is a row of its own, padded."""
    return manifest.policy.get("packing") == "official_row"


def least_tokens(length: int) -> int:
    """Returns the minimum number of tokens per part of the training split. Held-out rows may be padded instead."""
    return 2 * length + 1


def training_parts(manifest: Manifest, length: int) -> list[Part]:
    """Returns the parts of the training split for rows of `length` tokens, in the manifest's order.

    Raises:
        ValueError: a part has fewer than `least_tokens`.
    """
    tokens: dict[str, int] = {}
    sequences: dict[str, int] = {}
    for shard in manifest.splits["train"]:
        tokens[shard.part] = tokens.get(shard.part, 0) + shard.tokens
        sequences[shard.part] = sequences.get(shard.part, 0) + shard.documents
    for name, count in tokens.items():
        if count < least_tokens(length):
            raise ValueError(
                f"data.sequence_length={length} needs at least {least_tokens(length)} tokens of each part, but {name} (train) "
                f"in {manifest.root} has {count}; shorten the rows or prepare more text"
            )
    if is_padded(manifest):
        return [Part(name, tokens[name], sequences[name], sequences[name], 0) for name in tokens]
    rows = {name: (count - length) // length for name, count in tokens.items()}
    return [
        Part(name, count, sequences[name], rows[name], count - 1 - rows[name] * length)
        for name, count in tokens.items()
    ]


def row_shares(
    manifest: Manifest, weights: Mapping[str, float], length: int, *, order: int = 2
) -> Sequence[Fraction | float]:
    """Returns each training part's share of the rows. Their sum does not matter.

    Args:
        manifest: the dataset.
        weights: share of each part in the tokens; empty: the manifest's, or else all rows equally often.
        length: tokens per row.
        order: version of the row order. Version 1 uses floats, and tokens if there are no weights. Later versions are exact.

    Raises:
        ValueError: a part is too short, a weight names no part, or the weights are not shares.
    """
    parts = training_parts(manifest, length)
    names = [part.name for part in parts]
    weights = weights or {name: share for name, share in manifest.weights.items() if name in names}
    if unknown := sorted(set(weights) - set(names)):
        raise ValueError(f"data.weights={unknown} must name parts of the training split; they are {names}")
    given = list(weights.values())
    if given and not (all(math.isfinite(w) and w >= 0 for w in given) and any(given)):
        raise ValueError(f"data.weights={dict(weights)} must be finite and not negative, and one must be above 0")
    if not weights and order > 1:
        return [Fraction(part.rows_per_epoch) for part in parts]
    number = float if order == 1 else Fraction
    shares = [number(weights.get(p.name, 0.0) if weights else p.num_tokens) for p in parts]
    if not is_padded(manifest):
        return shares
    # Shares count tokens, but the blend draws rows. If a row is one sequence, a part of long sequences is drawn less often.
    return [share * p.num_sequences / p.num_tokens for share, p in zip(shares, parts, strict=True)]


def readings(manifest: Manifest, weights: Mapping[str, float], length: int, rows: int) -> list[Reading]:
    """Returns how many of the first `rows` rows of a run come from each training part; weights and errors as in `row_shares`."""
    counts = Blend(row_shares(manifest, weights, length)).counts(rows)
    return [Reading(part, n) for part, n in zip(training_parts(manifest, length), counts, strict=True)]
