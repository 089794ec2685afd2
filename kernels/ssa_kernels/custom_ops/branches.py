"""Custom ops of NSA's branches and of their gated sum. Their backwards differentiate the operator again, which computes its forward once more."""

from collections.abc import Sequence

import torch

from .. import gated_sum as summing
from ..branches import api
from ..documents import DocumentLayout
from .operands import gradients, layout_of, layout_operands, wide


@torch.library.custom_op("ssa_kernels::branch_attention", mutates_args=())
def branch_attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    arrays: Sequence[torch.Tensor],
    sizes: Sequence[int],
    block_size: int,
    window: int,
    scale: float | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse) of the window, or with window 0 of the compressed branch."""
    common = {"cu_seqlens": layout_of(arrays, sizes), "scale": scale, "impl": impl}
    if window:
        return api.window_attention(q, k, v, window=window, **common)
    return api.compressed_attention(q, k, v, block_size=block_size, **common)


@torch.library.custom_op("ssa_kernels::branch_attention_backward", mutates_args=())
def branch_attention_backward_op(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    arrays: Sequence[torch.Tensor],
    sizes: Sequence[int],
    block_size: int,
    window: int,
    scale: float | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv)."""

    def forward(*qkv: torch.Tensor) -> torch.Tensor:
        common = {"cu_seqlens": layout_of(arrays, sizes), "scale": scale, "impl": impl}
        if window:
            return api.window_attention(*qkv, window=window, **common)[0]
        return api.compressed_attention(*qkv, block_size=block_size, **common)[0]

    dq, dk, dv = gradients(forward, (q, k, v), (grad_o,))
    return dq, dk, dv


@branch_attention_op.register_fake
def _(q, k, v, arrays, sizes, block_size, window, scale, impl):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide(q.dtype))


@branch_attention_backward_op.register_fake
def _(grad_o, q, k, v, arrays, sizes, block_size, window, scale, impl):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save_branch(ctx, inputs, output) -> None:
    q, k, v, arrays, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *arrays)


def _branch_backward(ctx, grad_o, _):
    tensors, arrays = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    grads = branch_attention_backward_op(grad_o, *tensors, list(arrays), *ctx.numbers)
    return *grads, [None] * len(arrays), *(None,) * 5


branch_attention_op.register_autograd(_branch_backward, setup_context=_save_branch)


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    cu_seqlens: torch.Tensor | DocumentLayout,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse) by the custom op; arguments as in `ssa_kernels.window_attention`."""
    o, lse = branch_attention_op(q, k, v, *layout_operands(cu_seqlens), 0, window, scale, impl)
    return o, lse.detach()


def compressed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_size: int,
    cu_seqlens: torch.Tensor | DocumentLayout,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse) by the custom op; arguments as in `ssa_kernels.compressed_attention`."""
    o, lse = branch_attention_op(q, k, v, *layout_operands(cu_seqlens), block_size, 0, scale, impl)
    return o, lse.detach()


@torch.library.custom_op("ssa_kernels::gated_sum", mutates_args=())
def gated_sum_op(branches: Sequence[torch.Tensor], gate_logits: torch.Tensor, impl: str | None) -> torch.Tensor:
    """Returns the gated sum."""
    return summing.gated_sum(list(branches), gate_logits, impl=impl)


@torch.library.custom_op("ssa_kernels::gated_sum_backward", mutates_args=())
def gated_sum_backward_op(
    grad_out: torch.Tensor, branches: Sequence[torch.Tensor], gate_logits: torch.Tensor, impl: str | None
) -> list[torch.Tensor]:
    """Returns the gradients of the branches and of the gates."""

    def forward(*x: torch.Tensor) -> torch.Tensor:
        return summing.gated_sum(x[:-1], x[-1], impl=impl)

    return list(gradients(forward, (*branches, gate_logits), (grad_out,)))


@gated_sum_op.register_fake
def _(branches, gate_logits, impl):
    return branches[0].new_empty(branches[0].shape)


@gated_sum_backward_op.register_fake
def _(grad_out, branches, gate_logits, impl):
    return [x.new_empty(x.shape) for x in (*branches, gate_logits)]


def _save_sum(ctx, inputs, output) -> None:
    branches, gate_logits, ctx.impl = inputs
    ctx.save_for_backward(*branches, gate_logits)


def _sum_backward(ctx, grad_out):
    *branches, gate_logits = ctx.saved_tensors
    *grads, grad_logits = gated_sum_backward_op(grad_out, branches, gate_logits, ctx.impl)
    return list(grads), grad_logits, None


gated_sum_op.register_autograd(_sum_backward, setup_context=_save_sum)


def gated_sum(branches: Sequence[torch.Tensor], gate_logits: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """Returns `ssa_kernels.gated_sum` by the custom op."""
    return gated_sum_op(list(branches), gate_logits, impl)
