"""The streams of each microbatch, as pure functions of (seed, step, place in the global batch). The learning rate is in rates.py.

Nothing here has state. A resumed run gets the same values at a step as an uninterrupted one. Places are counted over the global batch, so no draw
depends on the layout: tensor, pipeline and context ranks agree, recomputation repeats the draw, and more data ranks change none.

*Main stream.* Each microbatch is full with probability p = `full_ratio`. The M microbatches of a global batch form n = M / Q groups of Q neighbours,
where Q is the largest power of two that leaves at least two groups. All microbatches of a group have the same main stream. Data rank i of dp takes
the microbatches i, dp + i, 2 * dp + i, ..., so if dp divides Q, all ranks compute the same stream at the same time. A step has floor(n * p) or
ceil(n * p) full groups, and WINDOW steps together have the share p to within one group. The full groups are neighbours (the last group's neighbour
is the first one), starting at a random group: a microbatch's place does not change its probability.

*Counterpart stream.* It serves the alignment loss only, which is a mean over queries. With `counterpart_share` r < 1 the mean is estimated on a
sample of each row's queries. A sparse counterpart is cheap and a full one is not, so a query is FAVOUR times as likely to be drawn where the main
stream is full; the mean over both kinds of microbatch is r (`share_drawn`). A row is cut into 2 * P equal chunks, where P is `num_pairs`, and chunk i
is paired with chunk 2 * P - 1 - i. The cost of a query's full attention grows with its position, and the chunks of a pair mirror each other, so all
pairs of a row that is one document cost the same. A row draws its share of the P pairs, rounded down or up. The rounding is systematic over all
rows of the step with this main stream (one random offset, then equal distances), so their total lies within one pair of the share. It visits the
microbatches of a group in bit-reversed order, and those of the groups together: the microbatches of a data rank, whose places differ by a multiple of
dp, are neighbours there if dp is a power of two, so each rank also has its share. A row's pairs are a systematic sample of 0 ... P - 1, because
neighbouring pairs belong to the same context rank. All queries of a microbatch are drawn with the same probability.

Standard library only.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

from ssa_pretrain.config import AttentionConfig, Config, Method, PrecisionName, StreamDraw

MIN_PAIRS = 8  # of chunks per row: the smallest share that every row can have is 1/8
LONGEST_CHUNK = 1024  # queries, while a row has more than 2 * MIN_PAIRS chunks
FAVOUR = 3.0  # ratio of the two shares; about the square root of the ratio of the two counterparts' costs at 8k to 32k (docs/counterpart.md)
WINDOW = 8  # steps that share the rounding of the main stream
STREAM, COUNTERPART = b"ssa-stream", b"ssa-counterpart"  # separate the two draws' random numbers


def is_due(step: int, interval: int, last_step: int) -> bool:
    """Returns whether something that happens every `interval` steps (0: never) and after the last step happens after this one."""
    return step == last_step or bool(interval and step % interval == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A microbatch's place in a run.

    Attributes:
        seed: the run's seed.
        step: optimizer step, from 0.
        microbatch: index in the global batch, from 0.
        num_microbatches: microbatches of the global batch.
    """

    seed: int
    step: int
    microbatch: int
    num_microbatches: int


def main_stream(attention: AttentionConfig, place: Place) -> str:
    """Returns "full" or "sparse", the main stream of a microbatch. The method indexer begins with the full one."""
    if attention.method is Method.indexer:
        return "full" if is_warm_up(attention, place.step) else "sparse"
    if len(attention.method.streams) == 1:
        return attention.method.streams[0]
    if attention.full_ratio in (0.0, 1.0):
        return "full" if attention.full_ratio else "sparse"
    if attention.stream_draw is StreamDraw.step:
        return "full" if _uniform(place.seed, place.step, 0) < attention.full_ratio else "sparse"
    size = group_size(place.num_microbatches)
    num_groups = place.num_microbatches // size
    first, num_full = _full_groups(attention.full_ratio, num_groups, place.seed, place.step)
    return "full" if (place.microbatch // size - first) % num_groups < num_full else "sparse"


def is_warm_up(attention: AttentionConfig, step: int) -> bool:
    """Returns whether a step belongs to the warm-up of a trained scorer, which has full attention; `step` counts from 0."""
    return attention.method is Method.indexer and step < attention.indexer.warmup_steps


def group_size(num_microbatches: int) -> int:
    """Returns Q, the number of neighbouring microbatches that share a main stream: the largest power of two that leaves at least two groups."""
    power_of_two = num_microbatches & -num_microbatches
    return power_of_two if power_of_two < num_microbatches else max(1, power_of_two // 2)


def num_pairs(row_length: int) -> int:
    """Returns P, the number of pairs of chunks of a row."""
    return max(MIN_PAIRS, row_length // (2 * LONGEST_CHUNK))


def share_drawn(attention: AttentionConfig, main: str) -> float:
    """Returns the share of the queries of a microbatch with this main stream that are drawn for the other one.

    With p = full_ratio, the two shares have the ratio FAVOUR, as far as neither exceeds 1, and p * full + (1 - p) * sparse = counterpart_share.
    """
    p, share = attention.full_ratio, attention.counterpart_share
    if share == 1.0:
        return 1.0
    full = FAVOUR * share / (1.0 + (FAVOUR - 1.0) * p)
    if main == "full":
        return min(1.0, full)
    return full / FAVOUR if full <= 1.0 else (share - p) / (1.0 - p)


def counterpart_pairs(attention: AttentionConfig, place: Place, *, rows: int, row_length: int) -> list[int]:
    """Returns the number of pairs of chunks that each row of a microbatch draws: its share of P, rounded down or up.

    Args:
        attention: the method, full_ratio and counterpart_share.
        place: the microbatch's.
        rows: rows of each microbatch.
        row_length: tokens per row.
    """
    pairs, main = num_pairs(row_length), main_stream(attention, place)
    first = _place_in_kind(attention, place, rows)
    offset = _uniform(place.seed, place.step, main, person=COUNTERPART)
    mean = share_drawn(attention, main) * pairs
    return [min(pairs, _rounded(mean, position, offset)) for position in first]


def _place_in_kind(attention: AttentionConfig, place: Place, rows: int) -> list[int]:
    """Returns the places of a microbatch's rows in the order by which the rows of all microbatches with its main stream round their pairs."""
    if drawn_by_microbatch(attention) is None:
        order = _bit_reversed_order(place.num_microbatches * rows)
        return [order[place.microbatch * rows + row] for row in range(rows)]
    size = group_size(place.num_microbatches)
    num_groups = place.num_microbatches // size
    group, number = divmod(place.microbatch, size)
    first_full, num_full = _full_groups(attention.full_ratio, num_groups, place.seed, place.step)
    since = (group - first_full) % num_groups
    group, num_groups = (since, num_full) if since < num_full else (since - num_full, num_groups - num_full)
    first = (_bit_reversed_order(size)[number] * num_groups + group) * rows
    return list(range(first, first + rows))


def counterpart_spans(attention: AttentionConfig, place: Place, *, rows: int, row_length: int) -> list[tuple[int, int]]:
    """Returns (first query, number of queries) of the spans that are drawn, ascending; adjacent spans are merged.

    Args:
        attention: the method and its counterpart_share.
        place: the microbatch's.
        rows: rows of each microbatch.
        row_length: tokens per row, an even number.
    """
    if len(attention.method.streams) == 1 or attention.counterpart_share == 0.0:
        return []
    pairs = num_pairs(row_length)
    edges = [i * row_length // (2 * pairs) for i in range(pairs + 1)]
    edges += [row_length - edge for edge in reversed(edges[:-1])]
    spans: list[tuple[int, int]] = []
    counts = counterpart_pairs(attention, place, rows=rows, row_length=row_length)
    for i, count in enumerate(counts):
        start = _uniform(place.seed, place.step, place.microbatch * rows + i, person=COUNTERPART)
        drawn = [math.floor((start + j) * pairs / count) for j in range(count)]
        for chunk in sorted([*drawn, *(2 * pairs - 1 - pair for pair in drawn)]):
            first, length = i * row_length + edges[chunk], edges[chunk + 1] - edges[chunk]
            if spans and sum(spans[-1]) == first:
                spans[-1] = (spans[-1][0], spans[-1][1] + length)
            elif length:
                spans.append((first, length))
    return spans


def drawn_by_microbatch(attention: AttentionConfig) -> str | None:
    """Returns the setting by which each microbatch draws its main stream, such as "attention.full_ratio=0.5"; None if all of a step have the same."""
    if len(attention.method.streams) == 1 or attention.stream_draw is StreamDraw.step:
        return None
    return f"attention.full_ratio={attention.full_ratio:g}" if 0.0 < attention.full_ratio < 1.0 else None


def needs_equal_microbatches(config: Config) -> str | None:
    """Returns why a run must keep its micro-batch size; None if rows, streams and losses do not depend on it."""
    if setting := drawn_by_microbatch(config.attention):
        return f"each microbatch draws its streams at {setting}, so other microbatches would draw other streams"
    if config.precision.name is PrecisionName.fp8:
        return "precision=fp8 scales each microbatch by its own values"
    return None


@lru_cache(maxsize=16)
def _full_groups(ratio: float, num_groups: int, seed: int, step: int) -> tuple[int, int]:
    """Returns the first full group of a step and the number of full groups, which follow it cyclically."""
    window, place = divmod(step, WINDOW)
    order = sorted(range(WINDOW), key=lambda i: _uniform(seed, "window", window, i))
    num_full = _rounded(ratio * num_groups, order[place], _uniform(seed, "window", window))
    return math.floor(_uniform(seed, step, 0) * num_groups), num_full


def _rounded(mean: float, position: int, offset: float) -> int:
    """Returns `mean` rounded down or up: the number of whole numbers between two multiples of it, shifted by `offset` in [0, 1).

    Over a uniform offset the expectation is `mean`, and neighbouring positions sum up to within one of their means.
    """
    return math.floor((position + 1) * mean + offset) - math.floor(position * mean + offset)


@lru_cache(maxsize=4)
def _bit_reversed_order(count: int) -> tuple[int, ...]:
    """Returns the place of each of `count` numbers when they are sorted by their binary digits, the lowest digit first."""
    digits = max(1, (count - 1).bit_length())
    order = sorted(range(count), key=lambda number: f"{number:0{digits}b}"[::-1])
    places = [0] * count
    for place, number in enumerate(order):
        places[number] = place
    return tuple(places)


def _uniform(*key: int | str, person: bytes = STREAM) -> float:
    """Returns a number in [0, 1) that depends only on the key."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8, person=person).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)
