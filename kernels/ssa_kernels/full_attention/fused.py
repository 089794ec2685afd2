"""Full attention by the fused kernels that ship with torch: cuDNN for rows of equal length, FlashAttention for documents.

Which kernel runs is decided from shapes and explicit arguments alone, never from values on the device:

- `cudnn`: the caller says that the tokens are `num_rows` spans of equal length, one document each. The fastest by far on Hopper.
- `flash`: anything else. Torch's FlashAttention-2, or FlashAttention-3 and 4 where the process has activated one of them with
  `torch.nn.attention.activate_flash_attention_impl`, which replaces the kernel under the very operator called here.

Torch's cuDNN operator for packed documents is not used: in torch 2.11 it rebuilds its graph at every call (45 ms) and its gradients
are wrong with more than one document. Deterministic mode (`torch.use_deterministic_algorithms`) sends everything to `flash`, whose
backward then sums dQ in a fixed order; cuDNN's dQ differs in its last bits from run to run.

The log-sum-exp comes back as the library lays it out, viewed as [rows, tokens / rows, H] without a copy. Neither library takes
rowsum(dO * O) from outside, so the backward here computes its own.
"""

from dataclasses import dataclass

import torch

from ..documents import DocumentLayout

# Below this a row is not worth cuDNN's fixed costs, and its support for very short ones has varied.
MIN_CUDNN_ROW = 128


@dataclass(frozen=True, slots=True)
class FusedPlan:
    """What a forward did, as far as its backward must know; all of it lives on the host."""

    backend: str  # "cudnn" or "flash"
    num_rows: int  # 1 for flash
    max_length: int
    scale: float


def plan_fused(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor | DocumentLayout, num_rows: int | None, scale: float
) -> tuple[FusedPlan, torch.Tensor]:
    """Returns the plan and the documents' int32 boundaries, which reach the last token.

    Raises:
        ValueError: for a dtype or a head dimension that no fused kernel takes.
    """
    tokens, _, head_dim = q.shape
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={q.dtype} of full_attention on a GPU must be bfloat16 or float16; try impl='reference' for others")
    if head_dim % 8 or head_dim > 128:
        raise ValueError(f"head_dim={head_dim} must be a multiple of 8 and at most 128; try impl='reference' for others")
    row_length = tokens // num_rows if num_rows else 0
    if row_length >= MIN_CUDNN_ROW and not torch.are_deterministic_algorithms_enabled():
        return FusedPlan("cudnn", num_rows, row_length, scale), boundaries(cu_seqlens, k.shape[0])
    max_length = cu_seqlens.max_length if isinstance(cu_seqlens, DocumentLayout) else (row_length or k.shape[0])
    return FusedPlan("flash", 1, max_length, scale), boundaries(cu_seqlens, k.shape[0])


def boundaries(cu_seqlens: torch.Tensor | DocumentLayout, num_tokens: int) -> torch.Tensor:
    """Returns int32 boundaries ending with num_tokens: tokens past the last document form one more, as in `documents.py`."""
    if isinstance(cu_seqlens, DocumentLayout):
        return cu_seqlens.cu_seqlens
    end = cu_seqlens.new_full((1,), num_tokens, dtype=torch.int32)
    return torch.cat([cu_seqlens.to(torch.int32), end]).clamp(max=num_tokens)


def fused_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, plan: FusedPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (o, lse, state_0, state_1): o [tokens, H, D], lse float32 [rows, tokens / rows, H] of any strides.

    The two states go back to `fused_backward` as they came (dropout's generator state, unused here).
    """
    if plan.backend == "cudnn":
        o, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(_rows(x, plan.num_rows) for x in (q, k, v)), None, True, 0.0, True, False, scale=plan.scale
        )
        return o.transpose(1, 2).reshape(q.shape), lse.squeeze(-1).transpose(1, 2), seed, offset
    longest = plan.max_length
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
    """Returns (dq, dk, dv) in the shapes of q, k and v; the other arguments as the forward took and gave them."""
    longest = plan.max_length
    if plan.backend == "cudnn":
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(_rows(x, plan.num_rows) for x in (grad_o, q, k, v, o)),
            lse.transpose(1, 2).unsqueeze(-1),
            *states, None, None, None, longest, longest, 0.0, True, scale=plan.scale,
        )  # fmt: skip
        return tuple(grad.transpose(1, 2).reshape(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))
    return torch.ops.aten._flash_attention_backward(
        grad_o, q, k, v, o, lse[0].transpose(0, 1), cu_seqlens, cu_seqlens, longest, longest, 0.0, True, *states, scale=plan.scale
    )


def _rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """View [tokens, heads, D] as [rows, heads, tokens / rows, D]."""
    return x.view(num_rows, -1, *x.shape[1:]).transpose(1, 2)
