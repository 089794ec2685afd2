"""SSA's attention operators on packed sequences: choose blocks, attend to them, attend to everything, gate and align.

Every operator takes `[tokens, heads, head_dim]` tensors and the packed documents' `cu_seqlens`, and has two implementations of the same
mathematics: `reference` (plain PyTorch, any device; it defines correctness) and `triton` (CUDA). `impl=None` chooses by the tensors'
device, as `dispatch.py` explains. Source: SSA, arXiv 2511.20102.

Shape letters: T query tokens, S key tokens, H query heads, G kv heads, D head dim, N chosen blocks per query (top_k), K block size, R block
rows (documents.py), M model dim, F feed-forward dim, V vocabulary. Query heads per kv head: `group_size`.
"""

from . import custom_ops  # noqa: F401  registers the operators with torch.compile
from .captured_mass import captured_mass
from .decode import (
    KeyValueCache,
    append_to_cache,
    build_cache,
    decode_attention,
    decode_bytes,
    select_cached_blocks,
    update_block_means,
)
from .documents import DocumentLayout, build_layout
from .full_attention import full_attention
from .gate import gate
from .gate_and_align import gate_and_align
from .indexer import block_mass, choose_by_index, index_loss
from .key_convolution import key_convolution
from .linear_cross_entropy import linear_cross_entropy
from .qkv_rope import QKNorm, qkv_rope, rope
from .queries import SampledQueries, query_slice, query_spans, sample_queries
from .select.api import select_blocks
from .sparse_attention.api import sparse_attention
from .ssa_attention import SSAOutput, ssa_attention
from .swiglu import swiglu

__all__ = [
    "DocumentLayout",
    "KeyValueCache",
    "QKNorm",
    "SSAOutput",
    "SampledQueries",
    "append_to_cache",
    "block_mass",
    "build_cache",
    "build_layout",
    "captured_mass",
    "choose_by_index",
    "decode_attention",
    "decode_bytes",
    "full_attention",
    "gate",
    "gate_and_align",
    "index_loss",
    "key_convolution",
    "linear_cross_entropy",
    "qkv_rope",
    "query_slice",
    "query_spans",
    "rope",
    "sample_queries",
    "select_blocks",
    "select_cached_blocks",
    "sparse_attention",
    "ssa_attention",
    "swiglu",
    "update_block_means",
]
