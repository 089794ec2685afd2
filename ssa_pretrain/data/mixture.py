"""The number of epochs of each part of a dataset: arithmetic over the manifest, without torch and without opening a file.

A run is a sequence of stages, each with its own weights. A stage begins at a row and starts its blend there, so its
counts are those of its weights, and a change of a later stage moves no row of an earlier one. Epochs continue across stages:
the n-th row that a part gives to the run is the same, whichever stages ask for it.

An epoch of a part with T tokens is (T - L) // L rows of L tokens. The label of a row's last token is the next row's
first token. The first epoch begins with the first token, so it leaves a tail of L - 1 to 2 L - 2 tokens. The second
epoch ends with the last token. In a dataset packed as `official_row` each sequence is a row, and an epoch is all of
them. Under `data.packing=best_fit` an epoch is the rows of its index (packed_index.py). Without weights, rows are drawn in proportion to the rows of an epoch, so all parts finish their n-th epoch at the
same row of the run.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ssa_pretrain.data.manifest import Manifest
from ssa_pretrain.data.order import Blend, PatternBlend


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


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a run's mixture.

    Attributes:
        first_row: rows of the run before it; 0 for the first.
        weights: share of each part in its tokens; empty: the manifest's, or else all rows equally often.
    """

    first_row: int
    weights: Mapping[str, float]


Weights = Mapping[str, float] | Sequence[Stage]  # of a whole run, or its stages from row 0 on


def stages_of(weights: Weights) -> Sequence[Stage]:
    """Returns the stages of a run."""
    return [Stage(0, weights)] if isinstance(weights, Mapping) else weights


def is_padded(manifest: Manifest) -> bool:
    """Returns whether each sequence is a row of its own, padded."""
    return manifest.policy.get("packing") == "official_row"


def least_tokens(length: int) -> int:
    """Returns the minimum number of tokens per part of the training split. Held-out rows may be padded instead."""
    return 2 * length + 1


def training_parts(manifest: Manifest, length: int, packed: Mapping[str, int] | None = None) -> list[Part]:
    """Returns the parts of the training split for rows of `length` tokens, in the manifest's order.

    Args:
        manifest: the dataset.
        length: tokens per row.
        packed: rows per epoch of each part under data.packing=best_fit; None under data.packing=flow.

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
    if packed is not None or is_padded(manifest):
        rows = sequences if packed is None else packed
        return [Part(name, tokens[name], sequences[name], rows[name], 0) for name in tokens]
    rows = {name: (count - length) // length for name, count in tokens.items()}
    return [
        Part(name, count, sequences[name], rows[name], count - 1 - rows[name] * length)
        for name, count in tokens.items()
    ]


def row_shares(
    parts: Sequence[Part], weights: Mapping[str, float], manifest: Manifest, *, are_padded: bool, order: int = 2
) -> Sequence[Fraction | float]:
    """Returns each training part's share of the rows. Their sum does not matter.

    Args:
        parts: of the training split.
        weights: share of each part in the tokens; empty: the manifest's, or else all rows equally often.
        manifest: the dataset.
        are_padded: whether rows hold padding.
        order: version of the row order. Version 1 uses floats, and tokens if there are no weights. Later versions are exact.

    Raises:
        ValueError: a weight names no part, or the weights are not shares.
    """
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
    if not are_padded:
        return shares
    # Shares count tokens, but the blend draws rows. A part whose rows hold more tokens than others' is drawn less often.
    return [share * p.rows_per_epoch / p.num_tokens for share, p in zip(shares, parts, strict=True)]


class Mixture:
    """Which part each row of a run comes from, over all its stages.

    Args:
        manifest: the dataset.
        weights: of the whole run, or its stages.
        length: tokens per row.
        order: version of the row order.
        packed: as in `training_parts`.

    Attributes:
        parts: of the training split, in the manifest's order.

    Raises:
        ValueError: a part is too short, a weight names no part, or the weights are not shares.
    """

    def __init__(
        self,
        manifest: Manifest,
        weights: Weights,
        length: int,
        *,
        order: int = 2,
        packed: Mapping[str, int] | None = None,
    ) -> None:
        self.parts = training_parts(manifest, length, packed)
        stages, are_padded = stages_of(weights), packed is not None or is_padded(manifest)
        self._first_rows = [stage.first_row for stage in stages]
        assert self._first_rows[0] == 0 and self._first_rows == sorted(self._first_rows)
        kind = PatternBlend if order == 1 else Blend
        self._blends = [
            kind(row_shares(self.parts, stage.weights, manifest, are_padded=are_padded, order=order))
            for stage in stages
        ]
        self._before = [[0] * len(self.parts)]  # rows of each part before each stage
        for blend, first, end in zip(self._blends, self._first_rows, self._first_rows[1:], strict=False):
            counts = blend.counts(end - first)
            self._before.append([a + b for a, b in zip(self._before[-1], counts, strict=True)])

    def locate(self, row: int) -> tuple[int, int]:
        """Maps a row of the run to (part, rows of that part before it)."""
        stage = bisect_right(self._first_rows, row) - 1
        part, number = self._blends[stage].locate(row - self._first_rows[stage])
        return part, self._before[stage][part] + number

    def counts(self, rows: int) -> list[int]:
        """Returns how many of the first `rows` rows of the run each part has."""
        stage = max(0, bisect_right(self._first_rows, rows) - 1)
        counts = self._blends[stage].counts(rows - self._first_rows[stage])
        return [a + b for a, b in zip(self._before[stage], counts, strict=True)]

    def readings(self, rows: int, first: int = 0) -> list[Reading]:
        """Returns how many rows from row `first` up to row `rows` of a run come from each training part."""
        counts = zip(self.counts(rows), self.counts(first), strict=True)
        return [Reading(part, end - begin) for part, (end, begin) in zip(self.parts, counts, strict=True)]


def readings(manifest: Manifest, weights: Weights, length: int, rows: int) -> list[Reading]:
    """Returns how many of the first `rows` rows of a run come from each training part; weights and errors as in `Mixture`."""
    return Mixture(manifest, weights, length).readings(rows)
