"""NSA's branches beside full attention: times of each, forward and backward, and of what a layer of NSA is made of."""

from collections.abc import Iterator

import torch

from ssa_kernels import compressed_attention, gated_sum, select_blocks, window_attention

from .cases import Problem, Row
from .shapes import BLOCK_SIZE, SHAPE_8K, SHAPE_32K, SHAPE_128K, TOP_K, Shape
from .timing import median_ms, medians_ms, repetitions_for

WINDOW = 128


def rows(quick: bool) -> Iterator[Row]:
    """Yields the times at 8k and, unless quick, at 32k and 128k."""
    for shape in (SHAPE_8K,) if quick else (SHAPE_8K, SHAPE_32K, SHAPE_128K):
        yield from times(shape)


def times(shape: Shape) -> Iterator[Row]:
    """Yields the times of the branches of a shape, in turns with full attention, without bounds."""
    problem = Problem(shape)
    logits = torch.randn(*problem.q.shape[:2], 3, device="cuda", dtype=problem.q.dtype, requires_grad=True)

    def chosen() -> torch.Tensor:
        sizes = {"block_size": BLOCK_SIZE, "top_k": TOP_K, "cu_seqlens": problem.layout}
        return select_blocks(problem.q, problem.k, score="compressed", **sizes)

    def window() -> torch.Tensor:
        return window_attention(problem.q, problem.k, problem.v, window=WINDOW, cu_seqlens=problem.layout)[0]

    def compressed() -> torch.Tensor:
        sizes = {"block_size": BLOCK_SIZE, "cu_seqlens": problem.layout}
        return compressed_attention(problem.q, problem.k, problem.v, **sizes)[0]

    def layer() -> torch.Tensor:
        return gated_sum((compressed(), problem.sparse(chosen()), window()), logits)

    indices = chosen()
    calls = {
        "full": problem.both(problem.full),
        "window": problem.both(window),
        "compressed": problem.both(compressed),
        "selected": problem.both(lambda: problem.sparse(indices)),
        "nsa layer": problem.both(layer),
    }
    expected = sum(median_ms(call, 1, 2) for call in calls.values())
    medians = medians_ms(list(calls.values()), repetitions_for(expected))
    for name, ms in zip(calls, medians, strict=True):
        yield Row(f"nsa: {name}, {shape.name}, fwd+bwd", ms, "ms", detail=f"{medians[0] / ms:.2f} x full")
