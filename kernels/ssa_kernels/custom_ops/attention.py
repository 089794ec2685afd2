"""Custom ops of selection and of both streams; `ssa_attention` is traced as the operators that it consists of."""

from collections.abc import Sequence

import torch

from ..captured_mass import captured_mass
from ..checks import aligned, check_scale
from ..dispatch import resolve_impl
from ..documents import DocumentLayout, as_layout
from ..full_attention import api as full
from ..select import api as selection
from ..sparse_attention import api as sparse
from ..ssa_attention.api import SSAOutput
from . import layers
from .operands import gradients, layout_of, layout_operands, wide


@torch.library.custom_op("ssa_kernels::select_blocks", mutates_args=())
def select_blocks_op(
    q: torch.Tensor,
    k: torch.Tensor,
    arrays: Sequence[torch.Tensor],
    sizes: Sequence[int],
    block_size: int,
    top_k: int,
    scale: float | None,
    score: str,
    impl: str | None,
) -> torch.Tensor:
    """Returns indices."""
    layout = layout_of(arrays, sizes)
    return selection.select_blocks(
        q, k, block_size=block_size, top_k=top_k, cu_seqlens=layout, scale=scale, score=score, impl=impl
    )


@select_blocks_op.register_fake
def _(q, k, arrays, sizes, block_size, top_k, scale, score, impl):
    lists = q.shape[1] if score == "per_head" else k.shape[1]
    return q.new_empty((q.shape[0], lists, top_k), dtype=torch.int32)


def select_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_size: int,
    top_k: int,
    cu_seqlens: torch.Tensor | DocumentLayout,
    scale: float | None = None,
    score: str = "softmax_sum",
    lse: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Returns indices by the custom op; arguments as in `ssa_kernels.select_blocks`. `lse` only saves time, and the op computes it again."""
    arrays, sizes = layout_operands(cu_seqlens)
    return select_blocks_op(q.detach(), k.detach(), arrays, sizes, block_size, top_k, scale, score, impl)


@torch.library.custom_op("ssa_kernels::sparse_attention", mutates_args=())
def sparse_attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    arrays: Sequence[torch.Tensor],
    sizes: Sequence[int],
    block_size: int,
    scale: float | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse)."""
    layout = layout_of(arrays, sizes)
    return sparse.sparse_attention(q, k, v, indices, block_size=block_size, cu_seqlens=layout, scale=scale, impl=impl)


@torch.library.custom_op("ssa_kernels::sparse_attention_backward", mutates_args=())
def sparse_attention_backward_op(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    arrays: Sequence[torch.Tensor],
    sizes: Sequence[int],
    block_size: int,
    scale: float | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv)."""
    layout = as_layout(layout_of(arrays, sizes), q, k, block_size=block_size)
    if resolve_impl(impl, q, "sparse_attention") == "triton":
        from ..sparse_attention.autograd import sparse_attention_backward  # Triton may be missing on a CPU machine

        tensors = [aligned(x) for x in (q, k, v, indices, o, lse, grad_o)]
        return sparse_attention_backward(*tensors, layout, check_scale(scale, q.shape[-1]))

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparse.sparse_attention(
            q, k, v, indices, block_size=block_size, cu_seqlens=layout, scale=scale, impl=impl
        )[0]

    dq, dk, dv = gradients(forward, (q, k, v), (grad_o,))
    return dq, dk, dv


@sparse_attention_op.register_fake
def _(q, k, v, indices, arrays, sizes, block_size, scale, impl):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide(q.dtype))


@sparse_attention_backward_op.register_fake
def _(grad_o, q, k, v, indices, o, lse, arrays, sizes, block_size, scale, impl):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save_sparse(ctx, inputs, output) -> None:
    q, k, v, indices, arrays, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, indices, *output, *arrays)


def _sparse_backward(ctx, grad_o, _):
    tensors, arrays = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    grads = sparse_attention_backward_op(grad_o, *tensors, list(arrays), *ctx.numbers)
    return *grads, None, [None] * len(arrays), *(None,) * 4


sparse_attention_op.register_autograd(_sparse_backward, setup_context=_save_sparse)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    *,
    block_size: int,
    cu_seqlens: torch.Tensor | DocumentLayout,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse) by the custom op; arguments as in `ssa_kernels.sparse_attention`."""
    arrays, sizes = layout_operands(cu_seqlens)
    o, lse = sparse_attention_op(q, k, v, indices, arrays, sizes, block_size, scale, impl)
    return o, lse.detach()


@torch.library.custom_op("ssa_kernels::full_attention", mutates_args=())
def full_attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    arrays: Sequence[torch.Tensor],
    sizes: Sequence[int],
    scale: float | None,
    return_lse: bool,
    num_rows: int | None,
    backend: str | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (o, lse); lse has no rows unless it is asked for."""
    o, lse = full.full_attention(
        q, k, v, cu_seqlens=layout_of(arrays, sizes), scale=scale, return_lse=return_lse, num_rows=num_rows,
        backend=backend, impl=impl,
    )  # fmt: skip
    return o, q.new_empty((0, q.shape[1]), dtype=wide(q.dtype)) if lse is None else lse


@torch.library.custom_op("ssa_kernels::full_attention_backward", mutates_args=())
def full_attention_backward_op(
    grad_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    arrays: Sequence[torch.Tensor],
    sizes: Sequence[int],
    scale: float | None,
    return_lse: bool,
    num_rows: int | None,
    backend: str | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dq, dk, dv). The state that a library's backward needs differs between libraries, so the forward is computed again."""
    layout = layout_of(arrays, sizes)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        named = {"cu_seqlens": layout, "scale": scale, "num_rows": num_rows, "backend": backend, "impl": impl}
        return full.full_attention(q, k, v, **named)[0]

    dq, dk, dv = gradients(forward, (q, k, v), (grad_o,))
    return dq, dk, dv


@full_attention_op.register_fake
def _(q, k, v, arrays, sizes, scale, return_lse, num_rows, backend, impl):
    rows = q.shape[0] if return_lse else 0
    return q.new_empty(q.shape), q.new_empty((rows, q.shape[1]), dtype=wide(q.dtype))


@full_attention_backward_op.register_fake
def _(grad_o, q, k, v, arrays, sizes, scale, return_lse, num_rows, backend, impl):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save_full(ctx, inputs, output) -> None:
    q, k, v, arrays, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *arrays)


def _full_backward(ctx, grad_o, _):
    tensors, arrays = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    grads = full_attention_backward_op(grad_o, *tensors, list(arrays), *ctx.numbers)
    return *grads, [None] * len(arrays), *(None,) * 6


full_attention_op.register_autograd(_full_backward, setup_context=_save_full)


def full_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | DocumentLayout,
    scale: float | None = None,
    return_lse: bool = False,
    num_rows: int | None = None,
    backend: str | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns (o, lse) by the custom op; arguments as in `ssa_kernels.full_attention`."""
    arrays, sizes = layout_operands(cu_seqlens)
    o, lse = full_attention_op(q, k, v, arrays, sizes, scale, return_lse, num_rows, backend, impl)
    return o, lse.detach() if return_lse else None


def ssa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_logits: torch.Tensor | None,
    *,
    block_size: int,
    top_k: int,
    cu_seqlens: torch.Tensor | DocumentLayout,
    main: str | torch.Tensor,
    weights: tuple[float, float] = (1.0, 1.0),
    scale: float | None = None,
    score: str = "softmax_sum",
    select: object = None,
    num_rows: int | None = None,
    sample: object = None,
    impl: str | None = None,
) -> SSAOutput:
    """Returns the result of `ssa_kernels.ssa_attention` by the custom ops of its parts; arguments as there."""
    if select is not None or sample is not None:
        raise ValueError(
            "select and sample of ssa_attention are not supported by torch.compile; try the operator outside it, or its parts"
        )
    logits = q.new_full(q.shape[:2], torch.inf) if gate_logits is None else gate_logits
    common = {"cu_seqlens": cu_seqlens, "scale": scale, "impl": impl}
    o_full, lse_full = full_attention(q, k, v, return_lse=True, num_rows=num_rows, **common)
    indices = select_blocks(q, k, block_size=block_size, top_k=top_k, score=score, **common)
    o_sparse, lse_sparse = sparse_attention(q, k, v, indices, block_size=block_size, **common)
    out, loss = layers.gate_and_align(o_full, o_sparse, logits, main=main, weights=weights, impl=impl)
    return SSAOutput(out, loss, captured_mass(lse_full, lse_sparse).mean())
