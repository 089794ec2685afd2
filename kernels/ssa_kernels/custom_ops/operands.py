"""What the custom ops share: layouts as operands, dtypes of results, and gradients by autograd inside an op."""

from collections.abc import Callable, Sequence

import torch

from ..documents import ARRAYS, DocumentLayout


def layout_operands(cu_seqlens: torch.Tensor | DocumentLayout) -> tuple[list[torch.Tensor], list[int]]:
    """Returns boundaries or a layout as tensors and numbers, for `layout_of`. Raises ValueError for a layout with spans of queries."""
    if isinstance(cu_seqlens, torch.Tensor):
        return [cu_seqlens], [0]  # autograd takes an empty list for one of tensors
    if cu_seqlens.spans:
        raise ValueError(
            "a layout with spans of queries is not supported by torch.compile; try the operator outside it"
        )
    sizes = [cu_seqlens.block_size, cu_seqlens.num_tokens, cu_seqlens.max_length, int(cu_seqlens.scattered)]
    return [getattr(cu_seqlens, name) for name in ARRAYS], sizes


def layout_of(arrays: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor | DocumentLayout:
    """Returns the boundaries or the layout of these operands."""
    if len(sizes) == 1:
        return arrays[0]
    block_size, num_tokens, max_length, scattered = sizes
    named = dict(zip(ARRAYS, arrays, strict=True))
    return DocumentLayout(
        **named, block_size=block_size, num_tokens=num_tokens, max_length=max_length, scattered=bool(scattered)
    )


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns float32, or float64 for float64: the dtype of losses and log-sum-exps."""
    return torch.promote_types(dtype, torch.float32)


def gradients(
    operator: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    inputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of an operator's inputs by autograd, which computes the operator again.

    Inside a custom op the dispatcher skips autograd; the guard switches it on for these calls.
    """
    functionality = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(functionality, False), torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        outs = operator(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        return tuple(x.contiguous() for x in torch.autograd.grad(outs, leaves, list(grads)))
