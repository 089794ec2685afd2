"""The benchmark's decoding case: the attention of one new token per sequence, sparse over full, at several contexts and batch sizes.

A CUDA graph of the attention calls of some layers is timed, each layer with a cache of its own, as in a model: together the caches exceed the
L2 cache several times where memory allows. A time is the graph's, divided by its layers. Lengths are one below the capacity, pages are in random order.

torch's best is the fastest of its fused attention (FlashAttention-2, cuDNN) and plain matrix products on a contiguous cache whose length is
known on the host, which spares it masks. Bytes are those that have to be read and written (`decode_bytes`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssa_kernels import KeyValueCache, append_to_cache, build_cache, decode_attention, decode_bytes

from .cases import Row
from .shapes import BLOCK_SIZE, TOP_K
from .timing import median_ms

HEADS, KV_HEADS, HEAD_DIM = 32, 2, 64  # of the 1B model
LAYERS = 16
CACHE_BYTES = 24e9  # of all layers together
MUST, AIM = 0.35, 0.25  # sparse over full at 32k


@dataclass(frozen=True, slots=True)
class Step:
    """One new token of each sequence, at some layers."""

    q: torch.Tensor
    caches: list[KeyValueCache]
    length: int

    def paged(self, mode: str) -> Callable[[], object]:
        """Returns a call of all layers' attention."""
        return lambda: [decode_attention(self.q, cache, mode=mode, top_k=TOP_K) for cache in self.caches]

    def by_torch(self, attend: Callable) -> Callable[[], object]:
        """Returns a call of all layers' full attention by torch; each cache's pages are read as one contiguous cache."""
        shape = (len(self.q), -1, KV_HEADS, HEAD_DIM)
        views = [[x.view(shape)[:, : self.length].transpose(1, 2) for x in (c.k, c.v)] for c in self.caches]
        q = self.q.transpose(1, 2)
        return lambda: [attend(q, k, v) for k, v in views]

    def bytes(self, top_k: int | None) -> int:
        """Returns the bytes that one layer must move."""
        return decode_bytes(self.q, self.caches[0], [self.length] * len(self.q), top_k=top_k)


def rows(quick: bool) -> Iterator[Row]:
    """Yields times, bandwidths and ratios: batch 1 and 32, at 8k, 32k and (unless quick) 128k of context."""
    for batch in (1, 32):
        for context in (8192, 32768) if quick else (8192, 32768, 131072):
            yield from _shape(batch, context)


def failures() -> list[str]:
    """Returns a sentence per wrong result: both modes against the reference in float64, on a small ragged batch."""
    lengths = torch.tensor([1, 17, 300, 2049], dtype=torch.int32, device="cuda")
    exact = build_cache((4, 2100, KV_HEADS, HEAD_DIM), block_size=BLOCK_SIZE, dtype=torch.float64, device="cuda")
    cache = build_cache((4, 2100, KV_HEADS, HEAD_DIM), block_size=BLOCK_SIZE, dtype=torch.bfloat16, device="cuda")
    generator = torch.Generator("cuda").manual_seed(7)
    k, v = (_draw((4, 2049, KV_HEADS, HEAD_DIM), generator) for _ in range(2))
    q = _draw((4, 1, HEADS, HEAD_DIM), generator)
    for x, dtype in ((cache, torch.bfloat16), (exact, torch.float64)):
        x.seq_lens.copy_(lengths)
        append_to_cache(x, k.to(dtype), v.to(dtype), num_new=lengths, impl="reference")
    exact.means.copy_(cache.means)  # selection scores means in the keys' dtype
    found = []
    for mode in ("sparse", "full"):
        ours, _ = decode_attention(q, cache, mode=mode)
        want, _ = decode_attention(q.double(), exact, mode=mode, impl="reference")
        error = float((ours.double() - want).norm() / want.norm())
        if not error <= 6e-3:
            found.append(f"decode_attention, {mode}: output is off by {error:.1e} > 6.0e-03")
    return found


def _shape(batch: int, context: int) -> Iterator[Row]:
    """Yields the rows of one batch size and context."""
    step = _step(batch, context)
    layers = len(step.caches)
    sparse, full = (1e3 * _graph_ms(step.paged(mode)) / layers for mode in ("sparse", "full"))
    name = f"batch {batch}, {context // 1024}k"
    for mode, us, top_k in (("sparse", sparse, TOP_K), ("full", full, None)):
        moved = step.bytes(top_k)
        detail = f"{moved / 1e6:.2f} MB, {moved / us / 1e6:.3f} TB/s"
        yield Row(f"decode {mode}, {name}", us, "us", detail=detail)
    must, aim = (MUST, AIM) if context == 32768 else (None, None)
    detail = f"{sparse:.1f} / {full:.1f} us per layer, {layers} layers"
    yield Row(f"decode sparse / full, {name}", sparse / full, "x", must, aim, False, detail)
    best, us = _best_of_torch(step)
    yield Row(f"decode sparse / torch's best full, {name}", sparse / us, "x", detail=f"{us:.1f} us by {best}")


def _best_of_torch(step: Step) -> tuple[str, float]:
    """Returns the name and the time per layer, in microseconds, of torch's fastest full attention."""

    def fused(backend: SDPBackend) -> Callable:
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return attend

    def products(q, k, v):
        q = q.reshape(len(q), KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        return torch.softmax(q @ k.transpose(2, 3) * HEAD_DIM**-0.5, -1) @ v

    ways = {
        "FlashAttention-2": fused(SDPBackend.FLASH_ATTENTION),
        "cuDNN": fused(SDPBackend.CUDNN_ATTENTION),
        "matrix products": products,
    }
    times = {}
    for name, attend in ways.items():
        try:
            times[name] = 1e3 * _graph_ms(step.by_torch(attend)) / len(step.caches)
        except RuntimeError:  # a backend that does not take these shapes
            continue
    best = min(times, key=times.__getitem__)
    return best, times[best]


def _step(batch: int, context: int) -> Step:
    """Returns random queries and caches, written in place of appended tokens: only the amount of data matters here, and that means are means."""
    per_layer = 2 * batch * context * KV_HEADS * HEAD_DIM * 2
    layers = max(2, min(LAYERS, int(CACHE_BYTES / per_layer)))
    generator = torch.Generator("cuda").manual_seed(batch + context)
    blocks = context // BLOCK_SIZE
    shape = (batch, context, KV_HEADS, HEAD_DIM)
    caches = []
    for _ in range(layers):
        cache = build_cache(shape, block_size=BLOCK_SIZE, dtype=torch.bfloat16, device="cuda", num_pages=batch * blocks)
        cache.k.normal_(generator=generator)
        cache.v.normal_(generator=generator)
        cache.means.copy_(cache.k.float().mean(1))
        cache.page_table.copy_(torch.randperm(batch * blocks, device="cuda", generator=generator).view(batch, blocks))
        cache.seq_lens.fill_(context - 1)
        caches.append(cache)
    return Step(_draw((batch, 1, HEADS, HEAD_DIM), generator), caches, context - 1)


def _graph_ms(call: Callable[[], object]) -> float:
    """Returns the median time of a CUDA graph of the call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    time = median_ms(graph.replay, 20)
    del held
    return time


def _draw(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, device="cuda", generator=generator, dtype=torch.bfloat16)
