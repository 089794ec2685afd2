"""The learning rate of a step and the streams of each microbatch, as pure functions of (seed, step).

Nothing here has state. A resumed run gets the same values at a step as an uninterrupted one.

*Learning rate.* Linear warm-up, then cosine, linear or constant.

*Main stream.* A microbatch is counted over the global batch, so its draw does not depend on the layout: tensor, pipeline and context ranks agree,
recomputation repeats the draw, and more data ranks change none.

*Counterpart stream.* It serves the alignment loss only, which is a mean over queries. With `counterpart_share` r < 1 the mean is estimated on a
sample of each row's queries. A row is cut into 2 * PAIRS equal chunks, and chunk i is paired with chunk 2 * PAIRS - 1 - i. round(r * PAIRS) pairs
are drawn without replacement, rounded at random so that the expectation is r * PAIRS. Every query is drawn with the same probability, so the
sample's mean, normalised by the number of drawn queries, is an unbiased estimate of the row's mean. The cost of a query's full attention grows
with its position, and the two chunks of a pair mirror each other: every pair of a row costs the same, every microbatch takes the same time, and
no data rank waits for another because of the draw. If r * PAIRS < 1, a microbatch has no sample with probability 1 - P; the gradient of the
others is then scaled by 1 / P.

Standard library only.
"""

import hashlib
import math
from typing import Protocol

from ssa_pretrain.config import AttentionConfig, Config, OptimConfig, PrecisionName, Schedule, StreamDraw

PAIRS = 8  # of chunks per row; a share of 1/8 is one pair: two mirrored chunks of 1/16 of the row each
COUNTERPART = b"ssa-counterpart"


class Length(Protocol):
    """The length of a run, as a schedule reads it; `planning.Plan` provides it."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole schedule."""
        ...

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of its warm-up."""
        ...


def learning_rate(step: int, optim: OptimConfig, plan: Length) -> float:
    """Returns the learning rate of an optimizer step.

    With S steps of which W are warm-up, it is lr * (step + 1) / (W + 1) for step < W, lr at step W, and min_lr at step S, one past the
    last: neither the first nor the last step is wasted at zero.

    Args:
        step: optimizer steps done before this one; 0 for the first.
        optim: peak, end and shape.
        plan: the run's length.
    """
    if step < plan.warmup_steps:
        return optim.lr * (step + 1) / (plan.warmup_steps + 1)
    if optim.schedule is Schedule.constant:
        return optim.lr
    progress = min(1.0, (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps))
    share = 1.0 - progress if optim.schedule is Schedule.linear else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.min_lr + (optim.lr - optim.min_lr) * share


def is_due(step: int, interval: int, last_step: int) -> bool:
    """Returns whether something that happens every `interval` steps (0: never) and after the last step happens after this one."""
    return step == last_step or bool(interval and step % interval == 0)


def main_stream(attention: AttentionConfig, *, seed: int, step: int, microbatch: int) -> str:
    """Returns "full" or "sparse" for a microbatch.

    Args:
        attention: the method, its full_ratio and how often the stream is drawn.
        seed: the run's seed.
        step: optimizer step, from 0.
        microbatch: index in the global batch, from 0.
    """
    if len(attention.method.streams) == 1:
        return attention.method.streams[0]
    draw = microbatch if attention.stream_draw is StreamDraw.microbatch else 0
    return "full" if _uniform(seed, step, draw) < attention.full_ratio else "sparse"


def counterpart_spans(
    attention: AttentionConfig, *, seed: int, step: int, microbatch: int, rows: int, row_length: int
) -> list[tuple[int, int]]:
    """Returns (first query, number of queries) of the spans that compute the counterpart, ascending; adjacent spans are merged.

    Args:
        attention: the method and its counterpart_share.
        seed: the run's seed.
        step: optimizer step, from 0.
        microbatch: index in the global batch, from 0.
        rows: rows of the microbatch.
        row_length: tokens per row, a multiple of 2 * PAIRS.
    """
    if len(attention.method.streams) == 1 or attention.counterpart_share == 0.0:
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
    """Returns 1 / P, where P is the probability that a microbatch of `rows` rows draws any span."""
    return 1.0 / (1.0 - max(0.0, 1.0 - attention.counterpart_share * PAIRS) ** rows)


def drawn_by_microbatch(attention: AttentionConfig) -> str | None:
    """Returns the setting by which each microbatch draws its streams, such as "attention.full_ratio=0.5"; None if nothing is drawn per microbatch."""
    if len(attention.method.streams) == 1:
        return None
    if 0.0 < attention.full_ratio < 1.0 and attention.stream_draw is StreamDraw.microbatch:
        return f"attention.full_ratio={attention.full_ratio:g}"
    if 0.0 < attention.counterpart_share < 1.0:
        return f"attention.counterpart_share={attention.counterpart_share:g}"
    return None


def needs_equal_microbatches(config: Config) -> str | None:
    """Returns why a run must keep its micro-batch size; None if rows, streams and losses do not depend on it."""
    if setting := drawn_by_microbatch(config.attention):
        return f"each microbatch draws its streams at {setting}, so other microbatches would draw other streams"
    if config.precision.name is PrecisionName.fp8:
        return "precision=fp8 scales each microbatch by its own values"
    return None


def _uniform(*key: int, person: bytes = b"ssa-stream") -> float:
    """Returns a number in [0, 1) that depends only on the key."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8, person=person).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)
