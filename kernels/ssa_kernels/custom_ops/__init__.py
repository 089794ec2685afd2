"""The public operators as torch custom ops, so that torch.compile traverses them without a graph break, forward and backward.

Outside torch.compile nothing changes: the dispatch of a custom op takes some 100 microseconds on the host with autograd, more than most of these
kernels run for, so eager calls never go through one. While a program is traced, `past_modes` (dispatch.py) hands the call to the function of the
same name in one of the files here. It turns layouts and caches into tensors and numbers and calls the custom op. The op runs the eager
operator, with all its checks, when the compiled program runs; while tracing, its fake implementation only computes shapes.

A backward is a custom op too. It calls the kernels' backward on the forward's inputs and results; where a reference or a library's kernel is
differentiated, it computes the forward again (`operands.gradients`). So under torch.compile full attention costs one forward more.

Not supported while tracing, and refused: layouts with spans of queries, a `select` of one's own, a sample, `group` and `accumulate_into`.
"""

from ..dispatch import GRAPH_OPERATORS
from . import attention, branches, decoding, keys, layers

GRAPH_OPERATORS.update(
    {
        "append_to_cache": decoding.append_to_cache,
        "compressed_attention": branches.compressed_attention,
        "decode_attention": decoding.decode_attention,
        "full_attention": attention.full_attention,
        "gate": layers.gate,
        "gate_and_align": layers.gate_and_align,
        "gated_sum": branches.gated_sum,
        "key_convolution": keys.key_convolution,
        "linear_cross_entropy": layers.linear_cross_entropy,
        "qkv_rope": keys.qkv_rope,
        "rope": keys.rope,
        "select_blocks": attention.select_blocks,
        "select_cached_blocks": decoding.select_cached_blocks,
        "sparse_attention": attention.sparse_attention,
        "ssa_attention": attention.ssa_attention,
        "swiglu": layers.swiglu,
        "update_block_means": decoding.update_block_means,
        "window_attention": branches.window_attention,
    }
)
