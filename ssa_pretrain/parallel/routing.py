"""Which stream of a microbatch is the main one, and which microbatches compute both: pure functions of (seed, step, microbatch).

The microbatch is counted over the global batch, so the draws do not depend on the layout: tensor, pipeline and context ranks agree,
recomputation and resumed runs repeat them, and splitting the batch over more data ranks moves no draw.

The counterpart stream serves the alignment loss only, a mean over the microbatches of a step, A = (1/M) * sum of a_m. With
`counterpart_share` r < 1 a sample of n microbatches estimates it: n is r * M rounded at random to one of its neighbours so that its mean is r * M, the
sample is uniform without replacement, and each microbatch of it counts M / (n * P(n > 0)) times, P(n > 0) = min(1, r * M). Given n > 0
the sum has the mean A / P(n > 0); a step without a counterpart has none, so the mean over draws is A: the estimate is unbiased (Horvitz and
Thompson, 1952, with the ratio in place of r where n > 0, whose variance is smaller). `counterpart_tilt` t draws the two main streams apart, at
the shares r * (1 - t) where it is sparse (the counterpart is full attention then, and dear) and r * (1 + t * (1 - p) / p) where it is full.
"""

import hashlib
import math
from collections.abc import Sequence

from ssa_pretrain.config import AttentionConfig, Method, StreamDraw


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


def counterpart_shares(attention: AttentionConfig) -> dict[str, float]:
    """Returns the share of microbatches with a counterpart by their main stream."""
    share, tilt, p = attention.counterpart_share, attention.counterpart_tilt, attention.full_ratio
    if not tilt or not 0.0 < p < 1.0:
        return {"full": share, "sparse": share}
    return {"full": share * (1.0 + tilt * (1.0 - p) / p), "sparse": share * (1.0 - tilt)}


def counterpart_factors(attention: AttentionConfig, *, seed: int, step: int, streams: Sequence[str]) -> list[float]:
    """Returns for every microbatch of a step the factor on its alignment's gradient; 0 where it computes no counterpart.

    Args:
        attention: the method, its counterpart_share and counterpart_tilt.
        seed: the run's seed.
        step: optimizer step, from 0.
        streams: the main stream of each microbatch of the global batch, in its order.
    """
    factors = [0.0] * len(streams)
    if attention.method is not Method.ssa:
        return factors
    every = range(len(streams))
    strata = [(every, attention.counterpart_share)]
    if attention.counterpart_tilt:
        shares = counterpart_shares(attention)
        strata = [([m for m in every if streams[m] == stream], share) for stream, share in shares.items()]
    for number, (members, share) in enumerate(strata):
        wanted = share * len(members)
        count = math.floor(wanted + _uniform(seed, step, number, person=b"ssa-counterparts"))
        order = sorted(members, key=lambda m: _uniform(seed, step, number, m, person=b"ssa-counterparts"))
        for m in order[:count]:
            factors[m] = len(members) / (count * min(1.0, wanted))
    return factors


def _uniform(*key: int, person: bytes = b"ssa-stream") -> float:
    """Returns a number in [0, 1) that depends on the key only."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8, person=person).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)
