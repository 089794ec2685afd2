"""Custom ops of QK-norm and the convolution of keys: the split projection with norms or plain keys, heads by themselves, the convolution.

Each backward differentiates the operator (`operands.gradients`), which computes its forward again.
"""

from collections.abc import Sequence

import torch

from ..key_convolution import api as convolution
from ..qkv_rope import api as projection
from ..qkv_rope.reference import QKNorm
from . import layers
from .operands import gradients

NAMES = ("num_kv_heads", "group_size", "head_dim", "num_gates")


@torch.library.custom_op("ssa_kernels::qkv_norm_rope", mutates_args=())
def qkv_norm_rope_op(
    mixed: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    angles: torch.Tensor,
    positions: torch.Tensor,
    sizes: Sequence[int],
    eps: float,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (q, k, v, gate logits), the last without columns if there are no gates; `sizes` end with whether keys are rotated."""
    found = _split((mixed, q_weight, k_weight), angles, positions, sizes, eps, impl)
    return found if sizes[3] else (*found, mixed.new_empty((mixed.shape[0], 0)))


@torch.library.custom_op("ssa_kernels::qkv_norm_rope_backward", mutates_args=())
def qkv_norm_rope_backward_op(
    grads: Sequence[torch.Tensor],
    mixed: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    angles: torch.Tensor,
    positions: torch.Tensor,
    sizes: Sequence[int],
    eps: float,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of `mixed` and of the weights, empty for those that have none."""
    given = [x for x in (mixed, q_weight, k_weight) if x is not None]
    used = given[: 3 if sizes[4] else 2]  # keys as they are meet no norm

    def forward(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        both = (*leaves[1:], k_weight) if len(leaves) == 2 else leaves[1:]
        return _split((leaves[0], *(both or (None, None))), angles, positions, sizes, eps, impl)

    found = list(gradients(forward, used, list(grads)[: 4 if sizes[3] else 3]))
    found += [torch.zeros_like(x) for x in given[len(used) :]]
    return tuple(found + [mixed.new_empty(0) for _ in range(3 - len(found))])  # pyright: ignore[reportReturnType]


def _split(tensors, angles, positions, sizes: Sequence[int], eps: float, impl: str | None) -> tuple[torch.Tensor, ...]:
    """Returns what `qkv_rope` does for (mixed, weights or None twice), without the gates if there are none."""
    mixed, q_weight, k_weight = tensors
    norm = None if q_weight is None else QKNorm(q_weight, k_weight, eps)
    common = dict(zip(NAMES, sizes, strict=False)) | {"norm": norm, "rotate_keys": bool(sizes[4]), "impl": impl}
    return tuple(x for x in projection.qkv_rope(mixed, angles.detach(), positions, **common) if x is not None)


@qkv_norm_rope_op.register_fake
def _(mixed, q_weight, k_weight, angles, positions, sizes, eps, impl):
    kv_heads, group_size, head_dim, gates, _ = sizes
    tokens = mixed.shape[0]
    heads = (mixed.new_empty((tokens, n, head_dim)) for n in (kv_heads * group_size, kv_heads, kv_heads))
    return *heads, mixed.new_empty((tokens, kv_heads * gates))


@qkv_norm_rope_backward_op.register_fake
def _(grads, mixed, q_weight, k_weight, angles, positions, sizes, eps, impl):
    return tuple(mixed.new_empty(0) if x is None else x.new_empty(x.shape) for x in (mixed, q_weight, k_weight))


def _save_projection(ctx, inputs, output) -> None:
    mixed, q_weight, k_weight, angles, positions, *ctx.rest = inputs
    ctx.normed = q_weight is not None
    ctx.save_for_backward(mixed, *((q_weight, k_weight) if ctx.normed else ()), angles, positions)


def _projection_backward(ctx, *grads):
    mixed, *weights, angles, positions = ctx.saved_tensors
    both = weights or (None, None)
    found = qkv_norm_rope_backward_op(list(grads), mixed, *both, angles, positions, *ctx.rest)
    return *(found if ctx.normed else (found[0], None, None)), *(None,) * 5


qkv_norm_rope_op.register_autograd(_projection_backward, setup_context=_save_projection)


def qkv_rope(
    mixed: torch.Tensor,
    angles: torch.Tensor,
    positions: torch.Tensor,
    *,
    norm: QKNorm | None = None,
    rotate_keys: bool = True,
    impl: str | None = None,
    **sizes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns (q, k, v, gate logits) by a custom op; arguments as in `ssa_kernels.qkv_rope`."""
    if norm is None and rotate_keys:
        return layers.qkv_rope(mixed, angles, positions, **sizes, impl=impl)
    q_weight, k_weight, eps = norm or (None, None, 0.0)
    numbers = [*(sizes[name] for name in NAMES), int(rotate_keys)]
    q, k, v, logits = qkv_norm_rope_op(mixed, q_weight, k_weight, angles, positions, numbers, eps, impl)
    return q, k, v, logits if sizes["num_gates"] else None


@torch.library.custom_op("ssa_kernels::rope", mutates_args=())
def rope_op(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    angles: torch.Tensor,
    positions: torch.Tensor,
    eps: float,
    impl: str | None,
) -> torch.Tensor:
    """Returns the rotated heads."""
    return projection.rope(x, angles.detach(), positions, weight=weight, eps=eps, impl=impl)


@torch.library.custom_op("ssa_kernels::rope_backward", mutates_args=())
def rope_backward_op(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    angles: torch.Tensor,
    positions: torch.Tensor,
    eps: float,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of x and of the weight, empty without one."""

    def forward(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        return projection.rope(x, angles.detach(), positions, weight=weight, eps=eps, impl=impl)

    found = gradients(forward, [t for t in (x, weight) if t is not None], (grad,))
    return found[0], found[1] if weight is not None else x.new_empty(0)


rope_op.register_fake(lambda x, weight, angles, positions, eps, impl: x.new_empty(x.shape))


@rope_backward_op.register_fake
def _(grad, x, weight, angles, positions, eps, impl):
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _save_rope(ctx, inputs, output) -> None:
    x, weight, angles, positions, *ctx.rest = inputs
    ctx.normed = weight is not None
    ctx.save_for_backward(x, *((weight,) if ctx.normed else ()), angles, positions)


def _rope_backward(ctx, grad):
    x, *weight, angles, positions = ctx.saved_tensors
    grad_x, grad_weight = rope_backward_op(grad, x, weight[0] if weight else None, angles, positions, *ctx.rest)
    return grad_x, grad_weight if ctx.normed else None, *(None,) * 4


rope_op.register_autograd(_rope_backward, setup_context=_save_rope)


def rope(
    x: torch.Tensor,
    angles: torch.Tensor,
    positions: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    impl: str | None = None,
) -> torch.Tensor:
    """Returns the rotated heads by the custom op; arguments as in `ssa_kernels.rope`."""
    return rope_op(x, weight, angles, positions, eps, impl)


@torch.library.custom_op("ssa_kernels::key_convolution", mutates_args=())
def key_convolution_op(
    k: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, impl: str | None
) -> torch.Tensor:
    """Returns the convolved keys."""
    return convolution.key_convolution(k, weight, positions, impl=impl)


@torch.library.custom_op("ssa_kernels::key_convolution_backward", mutates_args=())
def key_convolution_backward_op(
    grad: torch.Tensor, k: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, impl: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of k and the weight."""
    grad_k, grad_weight = gradients(
        lambda *x: convolution.key_convolution(*x, positions, impl=impl), (k, weight), (grad,)
    )
    return grad_k, grad_weight


key_convolution_op.register_fake(lambda k, weight, positions, impl: k.new_empty(k.shape))
key_convolution_backward_op.register_fake(
    lambda grad, k, weight, positions, impl: (k.new_empty(k.shape), weight.new_empty(weight.shape))
)


def _save_convolution(ctx, inputs, output) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


key_convolution_op.register_autograd(
    lambda ctx, grad: (*key_convolution_backward_op(grad, *ctx.saved_tensors, ctx.impl), None, None),
    setup_context=_save_convolution,
)


def key_convolution(
    k: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, *, impl: str | None = None
) -> torch.Tensor:
    """Returns the convolved keys by the custom op; arguments as in `ssa_kernels.key_convolution`."""
    return key_convolution_op(k, weight, positions, impl)
