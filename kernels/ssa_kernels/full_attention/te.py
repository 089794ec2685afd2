"""Transformer Engine's fused attention: cuDNN's kernels, with graphs kept from batch to batch, on packed documents, spans or equal rows.

On Hopper it computes packed documents in two thirds of FlashAttention-2's time. Neither the number of documents nor the bound on their
length changes that: Transformer Engine rounds both up to sizes for which it builds a graph once. The calls are those of its own attention
module. The log-sum-exp is a natural logarithm: [tokens, H, 1] for documents (cuDNN 9.6 and later on sm_90 and sm_100),
[rows, H, tokens / rows, 1] for rows.

Spans of queries (`query_spans`) are one batch of segments: a segment's queries are the last of the keys that it sees, and the causal mask is
aligned at the bottom right. Segments of different spans see the same keys, which the forward reads where they are. The backward gets copies
of them, one span after another, and their gradients are added in float32 (span_sums.py).

Not used in deterministic mode: for a deterministic backward on packed documents, version 2.20 with cuDNN 9.19 requests terabytes.
"""

import re
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from ..documents import SpanSegments

# The oldest version that this file's calls were tested with.
OLDEST = (2, 20)
PACKED = {"qkv_layout": "thd_thd_thd", "o_format": "thd", "attn_mask_type": "padding_causal"}
SEGMENTS = {**PACKED, "attn_mask_type": "padding_causal_bottom_right"}
ROWS = {"qkv_layout": "bshd_bshd_bshd", "o_format": "bshd", "attn_mask_type": "causal"}


@cache
def is_usable() -> bool:
    """Returns whether a recent enough Transformer Engine is installed and loads with its torch extension. The first call takes seconds.

    Warns of an installed version that is too old or does not load. The first call must come before the process first uses torch's cuDNN:
    on a system with a cuDNN of its own, Transformer Engine loads the system's libraries, which cannot be loaded after torch's. So
    plan_fused calls this before anything else, whichever kernel it then chooses.
    """
    try:
        installed = version("transformer_engine")
    except PackageNotFoundError:
        return False
    if tuple(int(number) for number in re.findall(r"\d+", installed)[:2]) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        warnings.warn(
            f"Transformer Engine {installed} is older than {needed}; packed documents take FlashAttention instead. Install {needed} or later."
        )
        return False
    try:
        import transformer_engine.pytorch.cpp_extensions.fused_attn  # noqa: F401
    except (ImportError, OSError) as error:
        warnings.warn(
            f"Transformer Engine is installed but does not load ({error}); packed documents take FlashAttention instead. If the process "
            "used torch's cuDNN before, import transformer_engine.pytorch first; else reinstall it for this torch."
        )
        return False
    return True


def te_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    num_rows: int,
    max_length: int,
    scale: float,
    segments: SpanSegments | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (o [queries, H, D], lse in this module's layout, random state).

    num_rows is 0 for packed documents. With `segments`, q has their queries and k and v all keys.
    """
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    lengths, ends, layout = _layout(cu_seqlens, num_rows, max_length, segments)
    if segments is not None:
        layout["cu_seqlens_kv_padded"] = segments.first_key
    o, (lse, state) = fused_attn.fused_attn_fwd(
        True, *lengths, *ends, *(_shaped(x, num_rows) for x in (q, k, v)), q.dtype,
        fused_attn.FusedAttnBackend["F16_arbitrary_seqlen"], attn_scale=scale, **layout,
    )  # fmt: skip
    if lse.dim() != (4 if num_rows else 3):
        raise ValueError(
            f"lse of Transformer Engine has shape {tuple(lse.shape)}, not [tokens, H, 1]: cuDNN is too old; try backend='flash'"
        )
    return o.view(q.shape), lse, state


def te_backward(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    num_rows: int,
    max_length: int,
    scale: float,
    segments: SpanSegments | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv); lse and state are the forward's results. With `segments`, dk and dv are float32, summed over the spans."""
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    lengths, ends, layout = _layout(cu_seqlens, num_rows, max_length, segments)
    keys = (k, v)
    if segments is not None:
        layout["cu_seqlens_kv_padded"] = segments.first_copy
        keys = (torch.cat([x[first:end] for first, end in segments.key_ranges]) for x in (k, v))
    dq, dk, dv, *_ = fused_attn.fused_attn_bwd(
        *lengths, *ends, *(_shaped(x, num_rows) for x in (q, *keys, o, grad_o)), q.dtype, [lse, state],
        fused_attn.FusedAttnBackend["F16_arbitrary_seqlen"], attn_scale=scale, do_format=layout["o_format"],
        dqkv_layout=layout["qkv_layout"], **layout,
    )  # fmt: skip
    if segments is None:
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)
    from .span_sums import sum_over_spans  # imported here because Triton may be missing on a CPU machine

    return dq, *sum_over_spans(dk, dv, k, segments)


def _layout(
    cu_seqlens: torch.Tensor, num_rows: int, max_length: int, segments: SpanSegments | None
) -> tuple[tuple[int, int], tuple[torch.Tensor, torch.Tensor], dict]:
    """Returns the maximum lengths and boundaries of queries and keys, and the keywords that name the layout.

    Of equal rows only the number of boundaries is read. Where the keys of segments lie is left to the caller.
    """
    if segments is not None:
        # A power of two: the lengths of spans differ from batch to batch, and every other one would build another graph.
        longest = (1 << (segments.longest_q - 1).bit_length(), 1 << (segments.longest_k - 1).bit_length())
        ends = (segments.cu_seqlens_q, segments.cu_seqlens_k)
        return longest, ends, {**SEGMENTS, "cu_seqlens_q_padded": segments.cu_seqlens_q}
    if num_rows:
        ends = cu_seqlens[: num_rows + 1]
        return (max_length, max_length), (ends, ends), ROWS
    places = {"cu_seqlens_q_padded": cu_seqlens, "cu_seqlens_kv_padded": cu_seqlens}
    return (max_length, max_length), (cu_seqlens, cu_seqlens), {**PACKED, **places}


def _shaped(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    return x.view(num_rows, -1, *x.shape[1:]) if num_rows else x
