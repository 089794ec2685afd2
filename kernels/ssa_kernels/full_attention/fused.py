"""Full attention by the installed libraries' fused kernels, behind one forward and one backward.

The kernel is chosen from shapes, explicit arguments and the installed libraries, never from values on the device:

- `cudnn`: torch's cuDNN attention, if the caller states that the tokens are `num_rows` rows of equal length, one document each; also for spans
  of queries of such rows (pieces.py).
- `te`: Transformer Engine's cuDNN attention on packed documents and on spans of queries (`query_spans`), if it is installed (te.py). On
  request it also takes equal rows.
- `flash`: torch's FlashAttention-2 on packed documents and on spans of queries (spans.py), or FlashAttention-3 or 4 if the process has
  activated one with `torch.nn.attention.activate_flash_attention_impl`, which replaces the kernel of the operator called here.

Heads wider than 128 take `flash`, and cuDNN is refused by either name: it computes them on Hopper by its documentation, but its dQ of packed
documents at D 256 was wrong on an H200 (Transformer Engine 2.20.2: errors of 35 to 60%, columns of 0), and equal rows were not tested. AMD's GPUs
take `flash` too.

Torch's own cuDNN operator for packed documents is not used: in torch 2.11 it rebuilds its graph at every call (45 ms), and its gradients
are wrong with more than one document. Deterministic mode (`torch.use_deterministic_algorithms`) sends everything to `flash`, whose
backward then sums dQ in a fixed order. cuDNN's dQ differs in its last bits from run to run.

The log-sum-exp is returned in the library's layout, viewed as [rows, tokens / rows, H] without a copy. No library accepts rowsum(dO * O)
from outside, so each backward here computes its own.
"""

from dataclasses import dataclass

import torch

from ..devices import gpu_of
from ..documents import DocumentLayout, QuerySpan, SpanSegments, document_ends
from . import te
from .pieces import Piece, pieces_backward, pieces_forward, pieces_of
from .spans import spans_backward, spans_forward

# Shorter rows run as packed documents: they are not worth cuDNN's fixed costs, and its support for very short rows has varied.
MIN_CUDNN_ROW = 128
WIDEST_CUDNN_HEAD = 128


@dataclass(frozen=True, slots=True)
class FusedPlan:
    """The choices of a forward that its backward needs. Everything is on the host."""

    backend: str
    num_rows: int  # 0 for packed documents
    max_length: int  # of a row or a document
    scale: float
    spans: tuple[QuerySpan, ...] = ()  # of a layout by `query_spans`
    segments: SpanSegments | None = None  # the spans as one batch
    pieces: tuple[Piece, ...] = ()  # the spans row by row


def plan_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens: torch.Tensor | DocumentLayout,
    *,
    num_rows: int | None,
    backend: str | None,
    scale: float,
) -> tuple[FusedPlan, torch.Tensor]:
    """Returns the plan and the documents' int32 boundaries, which reach the last token.

    Raises:
        ValueError: for what no fused kernel supports, and for a backend that cannot run here.
    """
    te.is_usable()  # must load before torch's cuDNN; its docstring explains why
    tokens, _, head_dim = q.shape
    check_backend(backend, num_rows, head_dim)
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype={q.dtype} of full_attention on a GPU must be bfloat16 or float16; try impl='reference' for others"
        )
    if head_dim % 8 or head_dim > 256:
        raise ValueError(
            f"head_dim={head_dim} must be a multiple of 8 and at most 256; try impl='reference' for others"
        )
    if isinstance(cu_seqlens, DocumentLayout) and cu_seqlens.spans:
        return _plan_spans(q, cu_seqlens, num_rows, backend, scale), cu_seqlens.cu_seqlens
    if tokens != k.shape[0]:
        raise ValueError(
            f"q has {tokens} tokens and k {k.shape[0]}: the fused kernels need them equal, or a layout by query_spans; "
            "try impl='reference' for other selections of queries"
        )
    row_length = tokens // num_rows if num_rows else 0
    chosen = backend or _pick(q, row_length)
    _check_te(chosen)
    ends = cu_seqlens.cu_seqlens if isinstance(cu_seqlens, DocumentLayout) else document_ends(cu_seqlens, tokens)
    if chosen == "cudnn" or (chosen == "te" and row_length >= MIN_CUDNN_ROW):
        return FusedPlan(chosen, tokens // row_length, row_length, scale), ends
    max_length = cu_seqlens.max_length if isinstance(cu_seqlens, DocumentLayout) else (row_length or tokens)
    return FusedPlan(chosen, 0, max_length, scale), ends


def _plan_spans(
    q: torch.Tensor, layout: DocumentLayout, num_rows: int | None, backend: str | None, scale: float
) -> FusedPlan:
    if len(q) != (expected := sum(span.length for span in layout.spans)):
        raise ValueError(
            f"q has {len(q)} tokens and the layout's spans {expected}; pass the queries of the spans, in order"
        )
    pieces = pieces_of(layout.spans, layout.num_tokens, num_rows) if num_rows else ()
    chosen = backend or ("cudnn" if pieces and not _only_flash(q) else _pick(q, 0))
    if chosen == "cudnn":
        if not pieces:
            raise ValueError(
                "backend='cudnn' of full_attention takes spans of at least 128 queries and keys of each row; try backend=None"
            )
        return FusedPlan(chosen, 0, layout.max_length, scale, pieces=pieces)
    _check_te(chosen)
    return FusedPlan(chosen, 0, layout.max_length, scale, layout.spans, layout.segments)


def _only_flash(q: torch.Tensor) -> bool:
    """Returns whether no other kernel is chosen: in deterministic mode, for wide heads, on AMD's GPUs."""
    wide = q.shape[2] > WIDEST_CUDNN_HEAD
    return torch.are_deterministic_algorithms_enabled() or wide or gpu_of(q.device).backend == "hip"


def _pick(q: torch.Tensor, row_length: int) -> str:
    if _only_flash(q):
        return "flash"
    if row_length >= MIN_CUDNN_ROW:
        return "cudnn"
    hopper_or_later = gpu_of(q.device).capability // 10 in (9, 10)
    return "te" if hopper_or_later and te.is_usable() else "flash"


def _check_te(backend: str) -> None:
    """Raises ValueError if the backend is "te" and Transformer Engine is not usable."""
    if backend == "te" and not te.is_usable():
        raise ValueError(
            f"backend='te' needs transformer_engine {te.OLDEST[0]}.{te.OLDEST[1]} or later with its torch extension; try backend='flash'"
        )


def check_backend(backend: object, num_rows: object, head_dim: int) -> None:
    """Raises ValueError for an unknown backend, for one that needs num_rows without it, and for cuDNN's with heads that are too wide."""
    if backend not in (None, "cudnn", "te", "flash"):
        raise ValueError(f"backend={backend!r} of full_attention must be None, 'cudnn', 'te' or 'flash'; try None")
    if backend in ("cudnn", "te") and torch.version.hip:
        raise ValueError(
            f"backend={backend!r} of full_attention needs an NVIDIA GPU, and torch is built for AMD's; try 'flash'"
        )
    if backend == "cudnn" and num_rows is None:
        raise ValueError(
            "backend='cudnn' needs num_rows, since it takes only rows of equal length; try backend='te' or 'flash'"
        )
    if backend in ("cudnn", "te") and head_dim > WIDEST_CUDNN_HEAD:
        raise ValueError(
            f"head_dim={head_dim} of full_attention must be at most {WIDEST_CUDNN_HEAD} with backend={backend!r}, since cuDNN's gradients of "
            "wider heads were wrong on packed documents; try backend=None or 'flash'"
        )


def fused_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, plan: FusedPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (o, lse, state_0, state_1): o [tokens, H, D], lse float32 [rows, tokens / rows, H] of any strides.

    Pass the two states to `fused_backward` unchanged (dropout's generator state, unused here).
    """
    longest = plan.max_length
    if plan.spans and plan.backend == "flash":
        return spans_forward(q, k, v, plan.spans, max_length=longest, scale=plan.scale)
    if plan.pieces:
        return pieces_forward(q, k, v, plan.pieces, scale=plan.scale)
    if plan.backend == "cudnn":
        o, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(_rows(x, plan.num_rows) for x in (q, k, v)), None, True, 0.0, True, False, scale=plan.scale
        )
        return o.transpose(1, 2).reshape(q.shape), lse.squeeze(-1).transpose(1, 2), seed, offset
    if plan.backend == "te":
        sizes = {"num_rows": plan.num_rows, "max_length": longest, "scale": plan.scale, "segments": plan.segments}
        o, lse, state = te.te_forward(q, k, v, cu_seqlens, **sizes)
        return o, lse.squeeze(-1).transpose(1, 2) if plan.num_rows else lse.squeeze(-1)[None], state, state
    o, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False, scale=plan.scale
    )
    return o, lse.transpose(0, 1)[None], state, unused


def fused_backward(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    cu_seqlens: torch.Tensor,
    plan: FusedPlan,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv) in the shapes of q, k and v; the other arguments are the forward's arguments and results.

    dk and dv are float32 sums if the queries are spans, otherwise all are in q's dtype.
    """
    longest = plan.max_length
    if plan.spans and plan.backend == "flash":
        return spans_backward(grad_o, q, k, v, o, lse, states, plan.spans, max_length=longest, scale=plan.scale)
    if plan.pieces:
        return pieces_backward(grad_o, q, k, v, o, lse, states, plan.pieces, scale=plan.scale)
    if plan.backend == "cudnn":
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(_rows(x, plan.num_rows) for x in (grad_o, q, k, v, o)), lse.transpose(1, 2).unsqueeze(-1),
            *states, None, None, None, longest, longest, 0.0, True, scale=plan.scale,
        )  # fmt: skip
        return tuple(grad.transpose(1, 2).reshape(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))
    if plan.backend == "te":
        sizes = {"num_rows": plan.num_rows, "max_length": longest, "scale": plan.scale, "segments": plan.segments}
        lse = (lse.transpose(1, 2) if plan.num_rows else lse[0]).unsqueeze(-1)
        return te.te_backward(grad_o, q, k, v, o, lse, states[0], cu_seqlens, **sizes)
    return torch.ops.aten._flash_attention_backward(
        grad_o,
        q,
        k,
        v,
        o,
        lse[0].transpose(0, 1),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        0.0,
        True,
        *states,
        scale=plan.scale,
    )


def _rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Returns a view of x [tokens, heads, D] as [rows, heads, tokens / rows, D]."""
    return x.view(num_rows, -1, *x.shape[1:]).transpose(1, 2)
