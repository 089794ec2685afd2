"""Which stream is the main one: a pure function of (seed, step, microbatch).

The microbatch is counted over the global batch, so the draw does not depend on the layout: tensor, pipeline and context ranks agree,
recomputation and resumed runs repeat it, and splitting the batch over more data ranks moves no draw.
"""

import hashlib

from ssa_pretrain.config import AttentionConfig, Method, StreamDraw


def main_stream(attention: AttentionConfig, *, seed: int, step: int, microbatch: int) -> str:
    """Return "full" or "sparse" for a microbatch.

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


def _uniform(*key: int) -> float:
    """Return a number in [0, 1) that depends on the key alone."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8, person=b"ssa-stream").digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)
