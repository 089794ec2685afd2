"""The shapes and operators that bench.compile compiles: each runs an operator's launchers forward and backward on small CPU tensors."""

from dataclasses import dataclass, replace

import torch

import ssa_kernels.sparse_attention.tensor_core.launch  # noqa: F401  imported late otherwise, with the recorder in place
from ssa_kernels.branches.autograd import CompressedAttention, WindowAttention
from ssa_kernels.decode import build_cache
from ssa_kernels.decode.append_triton import append_triton, update_means_triton
from ssa_kernels.decode.launch import decode_attention_triton, select_cached_triton
from ssa_kernels.documents import DocumentLayout, build_layout
from ssa_kernels.documents_triton import layout_arrays
from ssa_kernels.full_attention.merge_triton import merge
from ssa_kernels.full_attention.span_sums import sum_over_spans
from ssa_kernels.gate_and_align.sampled import sampled_backward, sampled_forward
from ssa_kernels.gate_and_align.triton import gate_backward, gate_forward
from ssa_kernels.gate_triton import gate_stream_backward, gate_stream_forward
from ssa_kernels.gated_sum_triton import GatedSum
from ssa_kernels.indexer.launch import choose_triton, loss_triton
from ssa_kernels.key_convolution.triton import KeyConvolution
from ssa_kernels.linear_cross_entropy.triton import probabilities_in_place, statistics
from ssa_kernels.qkv_rope.reference import QKNorm
from ssa_kernels.qkv_rope.triton import Sizes, qkv_norm_rope_backward, qkv_rope_backward, qkv_rope_forward
from ssa_kernels.queries import query_slice, query_spans
from ssa_kernels.select.launch import select_blocks_triton
from ssa_kernels.sparse_attention.autograd import sparse_attention_backward, sparse_attention_forward
from ssa_kernels.swiglu_triton import swiglu_backward, swiglu_forward

TOKENS, LONG = 1024, 16384


@dataclass(frozen=True, slots=True)
class Case:
    """Heads and blocks, and the operators to compile for them."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 16
    top_k: int = 16
    dtype: torch.dtype = torch.bfloat16
    operators: tuple[str, ...] = ("select", "sparse")


ALL = ("select", "sparse", "full", "gate", "align", "qkv_rope", "decode")
NO_HEADS = ("documents", "swiglu", "cross_entropy")
BLOCKS = ("select", "sparse", "decode")
METHODS = ("nsa", "indexer", "key_convolution")
CASES = {
    "D 64, 16 heads per list": Case(32, 2, 64, operators=(*ALL, *METHODS, *NO_HEADS)),
    "D 64, 32 heads per list": Case(32, 1, 64),
    "D 64, blocks of 128": Case(32, 2, 64, 128, operators=(*BLOCKS, "indexer")),
    "D 128, 4 heads per list": Case(32, 8, 128, operators=(*ALL, *METHODS)),
    "D 128, 16 heads per list": Case(32, 2, 128),
    "D 128, blocks of 128": Case(32, 8, 128, 128, operators=(*BLOCKS, "indexer")),
    "D 256, 8 heads per list": Case(16, 2, 256, operators=ALL),
    "D 256, 16 heads per list": Case(16, 1, 256),
    "D 256, blocks of 128": Case(16, 2, 256, 128, operators=BLOCKS),
}


# What the tests compile in seconds: (GPU, case, operators), and the kernels that come nearest to a limit.
SAMPLE = (
    ("sm_90", "D 64, 16 heads per list", ("sparse", "decode")),
    ("sm_90", "D 64, 32 heads per list", ("sparse",)),
    ("sm_90", "D 128, 4 heads per list", ("sparse",)),
    ("sm_90", "D 256, 8 heads per list", ("sparse",)),
    ("sm_100", "D 128, 4 heads per list", ("sparse",)),
    ("sm_120", "D 64, 16 heads per list", ("select",)),
    ("gfx942", "D 64, 16 heads per list", ("sparse",)),
)
SAMPLE_KERNELS = (
    "forward_kernel", "dq_kernel", "dkdv_kernel", "portable_forward_kernel", "portable_dq_kernel", "portable_dkdv_kernel",
    "softmax_sums_kernel", "importance_kernel", "append_kernel", "chosen_kernel", "split_kernel",
)  # fmt: skip


def run(case: Case, operator: str) -> None:
    """Runs an operator's launchers on tensors whose values do not matter."""
    OPERATORS[operator](case)


def _heads(case: Case, heads: int) -> torch.Tensor:
    return torch.zeros(TOKENS, heads, case.head_dim, dtype=case.dtype)


def _layout(case: Case) -> DocumentLayout:
    ends = torch.tensor([0, TOKENS], dtype=torch.int32)
    return build_layout(ends, num_tokens=TOKENS, block_size=case.block_size, max_length=TOKENS)


def _select(case: Case) -> None:
    layout, scale = _layout(case), case.head_dim**-0.5
    sizes = {"top_k": case.top_k, "scale": scale}
    for score in ("softmax_sum", "per_head"):
        select_blocks_triton(_heads(case, case.heads), _heads(case, case.kv_heads), layout=layout, score=score, **sizes)
    # Rows long enough for bins; documents whose lengths the host does not know.
    long = replace(layout, max_length=2**17)
    select_blocks_triton(
        _heads(case, case.heads), _heads(case, case.kv_heads), layout=long, score="softmax_sum", **sizes
    )
    q, k = (torch.zeros(LONG, heads, case.head_dim, dtype=case.dtype) for heads in (case.heads, case.kv_heads))
    ends = torch.tensor([0, TOKENS, 2 * TOKENS, LONG], dtype=torch.int32)
    unknown = build_layout(ends, num_tokens=LONG, block_size=case.block_size)
    select_blocks_triton(q, k, layout=unknown, score="softmax_sum", **sizes)


def _sparse(case: Case) -> None:
    layout, scale = _layout(case), case.head_dim**-0.5
    q, k, v = _heads(case, case.heads), _heads(case, case.kv_heads), _heads(case, case.kv_heads)
    indices = torch.zeros(TOKENS, case.kv_heads, case.top_k, dtype=torch.int32)
    o, lse = sparse_attention_forward(q, k, v, indices, layout, scale)
    sparse_attention_backward(q, k, v, indices, o, lse, o, layout, scale)
    into = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    sparse_attention_backward(q, k, v, indices, None, lse, o, layout, scale, delta=lse, add_to=into)


def _full(case: Case) -> None:
    o, k = _heads(case, case.heads), _heads(case, case.kv_heads)
    by_head, lse = torch.zeros(case.heads, TOKENS), torch.zeros(TOKENS, case.heads)
    merge(o, o, by_head, by_head, o, lse)
    segments = query_spans(_layout(case), [(128, 256), (640, 128)]).segments
    if segments is not None:
        sum_over_spans(torch.cat([k, k]), torch.cat([k, k]), k, segments)


def _gate(case: Case) -> None:
    o, logits = _heads(case, case.heads), torch.zeros(TOKENS, case.heads, dtype=case.dtype)
    gate_stream_forward(o, logits)
    gate_stream_backward(o, logits, o)


def _align(case: Case) -> None:
    o, logits = _heads(case, case.heads), torch.zeros(TOKENS, case.heads, dtype=case.dtype)
    lse, weights = torch.zeros(TOKENS, case.heads), (1.0, 1.0)
    gate_forward(o, o, logits, "full", weights, (lse[None], lse))
    gate_backward(o, o, logits, o, torch.zeros(()), "full", weights)
    places = torch.arange(TOKENS, dtype=torch.int32)
    sampled_forward(o, o, logits, places, "full", weights, lse[None], lse)
    sampled_backward(o, o, logits, places, o, torch.zeros(()), "full", weights)


def _qkv_rope(case: Case) -> None:
    group = case.heads // case.kv_heads
    mixed = torch.zeros(TOKENS, case.kv_heads * ((group + 2) * case.head_dim + group), dtype=case.dtype)
    angles, positions = torch.zeros(TOKENS, case.head_dim // 2), torch.zeros(TOKENS, dtype=torch.int32)
    sizes = Sizes(case.kv_heads, group, case.head_dim, group)
    grads = qkv_rope_forward(mixed, angles, positions, sizes)
    qkv_rope_backward(grads, angles, positions, sizes)
    norm = QKNorm(*torch.zeros(2, case.head_dim, dtype=case.dtype), 1e-6)
    qkv_rope_forward(mixed, angles, positions, sizes, norm)
    qkv_norm_rope_backward(grads, angles, positions, sizes, mixed, norm)


def _decode(case: Case) -> None:
    for tokens, pages in ((1, None), (4, 64)):
        sizes = {"block_size": case.block_size, "dtype": case.dtype, "num_pages": pages}
        cache = build_cache((2, 8192, case.kv_heads, case.head_dim), **sizes)
        q = torch.zeros(2, tokens, case.heads, case.head_dim, dtype=case.dtype)
        k = torch.zeros(2, tokens, case.kv_heads, case.head_dim, dtype=case.dtype)
        append_triton(cache, k, k, None)
        update_means_triton(cache, tokens, None)
        sizes = {"scale": case.head_dim**-0.5, "score": "softmax_sum"}
        decode_attention_triton(q, cache, None, top_k=case.top_k, **sizes)
        decode_attention_triton(q, cache, None, top_k=None, **sizes)
        select_cached_triton(q, cache, None, top_k=case.top_k, **sizes)


def _nsa(case: Case) -> None:
    layout, scale, window = _layout(case), case.head_dim**-0.5, 128
    q, k, v = (_heads(case, n).requires_grad_() for n in (case.heads, case.kv_heads, case.kv_heads))
    near, _ = WindowAttention.apply(q, k, v, layout, window, scale)  # pyright: ignore[reportGeneralTypeIssues]
    far, _ = CompressedAttention.apply(q, k, v, layout, scale)  # pyright: ignore[reportGeneralTypeIssues]
    logits = torch.zeros(TOKENS, case.heads, 3, dtype=case.dtype).requires_grad_()
    GatedSum.apply(near, far, near, logits).sum().backward()  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]


def _indexer(case: Case) -> None:
    layout, scale = _layout(case), case.head_dim**-0.5
    q, k = _heads(case, case.heads), _heads(case, case.kv_heads)
    choose_triton(k, k, layout=layout, top_k=case.top_k, scale=scale)
    scales = {"scales": (scale, scale), "with_gradients": True}
    for queries in (TOKENS, 16):  # large tiles and small ones
        own = query_slice(layout, slice(0, queries))
        loss_triton(k[:queries], k, q[:queries], k, layout=own, top_k=case.top_k, **scales)
    two = _heads(case, 2 * case.kv_heads)  # index heads
    loss_triton(two, k, q, k, layout=layout, top_k=case.top_k, **scales)


def _key_convolution(case: Case) -> None:
    k = _heads(case, case.kv_heads).requires_grad_()
    for taps in (3, 5):
        weight = torch.zeros(case.kv_heads * case.head_dim, 1, taps, dtype=case.dtype).requires_grad_()
        out = KeyConvolution.apply(k, weight, torch.zeros(TOKENS, dtype=torch.int32))
        out.sum().backward()  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]


def _documents(case: Case) -> None:
    ends = torch.tensor([0, TOKENS], dtype=torch.int32)
    layout_arrays(ends, num_tokens=TOKENS, block_size=case.block_size, num_block_rows=TOKENS // case.block_size)


def _swiglu(case: Case) -> None:
    x = torch.zeros(8, 2 * 8192, dtype=case.dtype)
    swiglu_backward(x, swiglu_forward(x))


def _cross_entropy(case: Case) -> None:
    logits, labels = torch.zeros(8, 128256, dtype=case.dtype), torch.zeros(8, dtype=torch.int64)
    lse, _ = statistics(logits, labels, 0, overwrite=True)
    statistics(logits, labels, 0, overwrite=False)
    probabilities_in_place(logits, labels, 0, lse)


OPERATORS = {
    "select": _select,
    "sparse": _sparse,
    "full": _full,
    "gate": _gate,
    "align": _align,
    "qkv_rope": _qkv_rope,
    "decode": _decode,
    "nsa": _nsa,
    "indexer": _indexer,
    "key_convolution": _key_convolution,
    "documents": _documents,
    "swiglu": _swiglu,
    "cross_entropy": _cross_entropy,
}
