"""Which stream of a microbatch is the main one, and which microbatches compute both: pure functions of (seed, step, microbatch).

The microbatch is counted over the global batch, so the draws do not depend on the layout: tensor, pipeline and context ranks agree,
recomputation and resumed runs repeat them, and splitting the batch over more data ranks moves no draw.

The counterpart stream serves the alignment loss only, a mean over queries. With `counterpart_share` r < 1 a sample of the queries of
every row estimates it: a row is cut into 2 * PAIRS equal chunks, chunk i is paired with chunk 2 * PAIRS - 1 - i, and round(r * PAIRS) pairs are
drawn without replacement, rounded at random so that the mean is r * PAIRS. Every query is drawn with the same probability, so the mean over the
sample is an unbiased estimate of the mean over the row, normalised by the queries that had a counterpart. A query's full attention costs what lies
before it, and the two chunks of a pair lie mirrored: each pair of a row costs the same, every microbatch takes the same time, and no data rank
waits for another because of the draw. Where r * PAIRS < 1 a microbatch may have no sample at all, with probability 1 - P; the others' gradient
then counts 1 / P times.
"""

import hashlib
import math

from ssa_pretrain.config import AttentionConfig, Config, Method, PrecisionName, StreamDraw

PAIRS = 8  # of chunks per row: a share of 1/8 is one pair, 1/16 of the row at each end's distance
COUNTERPART = b"ssa-counterpart"


def main_stream(attention: AttentionConfig, *, seed: int, step: int, microbatch: int) -> str:
    """Returns "full" or "sparse" for a microbatch.

    Args:
        attention: the method, its full_ratio and how often the stream is drawn.
        seed: the run's seed.
        step: optimizer step, from 0.
        microbatch: index in the global batch, from 0.
    """
    if attention.method is not Method.ssa:
        return "full" if attention.method is Method.full else "sparse"
    draw = microbatch if attention.stream_draw is StreamDraw.microbatch else 0
    return "full" if _uniform(seed, step, draw) < attention.full_ratio else "sparse"


def counterpart_spans(
    attention: AttentionConfig, *, seed: int, step: int, microbatch: int, rows: int, row_length: int
) -> list[tuple[int, int]]:
    """Returns (first query, number of queries) of the spans of a microbatch that compute the counterpart, ascending; neighbours are joined.

    Args:
        attention: the method and its counterpart_share.
        seed: the run's seed.
        step: optimizer step, from 0.
        microbatch: index in the global batch, from 0.
        rows: rows of the microbatch.
        row_length: tokens per row, a multiple of 2 * PAIRS.
    """
    if attention.method is not Method.ssa or attention.counterpart_share == 0.0:
        return []
    chunk, spans = row_length // (2 * PAIRS), []
    for row in range(rows):
        key = (seed, step, microbatch, row)
        count = math.floor(attention.counterpart_share * PAIRS + _uniform(*key, person=COUNTERPART))
        pairs = sorted(range(PAIRS), key=lambda pair: _uniform(*key, pair, person=COUNTERPART))[:count]
        for number in sorted([*pairs, *(2 * PAIRS - 1 - pair for pair in pairs)]):
            first = row * row_length + number * chunk
            if spans and sum(spans[-1]) == first:
                spans[-1] = (spans[-1][0], spans[-1][1] + chunk)
            else:
                spans.append((first, chunk))
    return spans


def counterpart_factor(attention: AttentionConfig, *, rows: int) -> float:
    """Returns 1 / P, P being the probability that a microbatch of `rows` rows draws any span."""
    return 1.0 / (1.0 - max(0.0, 1.0 - attention.counterpart_share * PAIRS) ** rows)


def drawn_by_microbatch(attention: AttentionConfig) -> str | None:
    """Returns the setting, such as "attention.full_ratio=0.5", by which a microbatch draws streams, so that other microbatches draw others; or None."""
    if attention.method is not Method.ssa:
        return None
    if 0.0 < attention.full_ratio < 1.0 and attention.stream_draw is StreamDraw.microbatch:
        return f"attention.full_ratio={attention.full_ratio:g}"
    if 0.0 < attention.counterpart_share < 1.0:
        return f"attention.counterpart_share={attention.counterpart_share:g}"
    return None


def needs_equal_microbatches(config: Config) -> str | None:
    """Returns why a run must keep its micro-batch size; None where rows, streams and losses do not depend on it."""
    if setting := drawn_by_microbatch(config.attention):
        return f"each microbatch draws its streams at {setting}, so other microbatches would draw others"
    if config.precision.name is PrecisionName.fp8:
        return "precision=fp8 scales each microbatch by its own values"
    return None


def _uniform(*key: int, person: bytes = b"ssa-stream") -> float:
    """Returns a number in [0, 1) that depends on the key only."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8, person=person).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)
