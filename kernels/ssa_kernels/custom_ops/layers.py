"""Custom ops of what surrounds attention: gates, alignment, the split projection with RoPE, SwiGLU, the output layer."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from ..dispatch import resolve_impl
from ..gate import gate as gate_operator
from ..gate_and_align import api as alignment
from ..linear_cross_entropy import api as output_layer
from ..linear_cross_entropy.reference import LinearCrossEntropyReference
from ..qkv_rope import api as projection
from ..swiglu import swiglu as swiglu_operator
from .operands import gradients, wide


@torch.library.custom_op("ssa_kernels::swiglu", mutates_args=())
def swiglu_op(x: torch.Tensor, impl: str | None) -> torch.Tensor:
    """Returns silu(a) * b."""
    return swiglu_operator(x, impl=impl)


@torch.library.custom_op("ssa_kernels::swiglu_backward", mutates_args=())
def swiglu_backward_op(grad_y: torch.Tensor, x: torch.Tensor, impl: str | None) -> torch.Tensor:
    """Returns the gradient of x."""
    if resolve_impl(impl, x, "swiglu") == "triton":
        from ..swiglu_triton import swiglu_backward  # imported here because Triton may be missing on a CPU machine

        return swiglu_backward(x.contiguous(), grad_y.contiguous())
    return gradients(lambda x: swiglu_operator(x, impl=impl), (x,), (grad_y,))[0]


swiglu_op.register_fake(lambda x, impl: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)))
swiglu_backward_op.register_fake(lambda grad_y, x, impl: x.new_empty(x.shape))


def _save_swiglu(ctx, inputs, output) -> None:
    x, ctx.impl = inputs
    ctx.save_for_backward(x)


swiglu_op.register_autograd(
    lambda ctx, grad_y: (swiglu_backward_op(grad_y, *ctx.saved_tensors, ctx.impl), None), setup_context=_save_swiglu
)


def swiglu(x: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """Returns `ssa_kernels.swiglu` by the custom op."""
    return swiglu_op(x, impl)


@torch.library.custom_op("ssa_kernels::gate", mutates_args=())
def gate_op(o: torch.Tensor, gate_logits: torch.Tensor, impl: str | None) -> torch.Tensor:
    """Returns the gated stream."""
    return gate_operator(o, gate_logits, impl=impl)


@torch.library.custom_op("ssa_kernels::gate_backward", mutates_args=())
def gate_backward_op(
    grad_out: torch.Tensor, o: torch.Tensor, gate_logits: torch.Tensor, impl: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of o and the logits."""
    if resolve_impl(impl, o, "gate") == "triton":
        from ..gate_triton import gate_stream_backward

        return gate_stream_backward(o.contiguous(), gate_logits.contiguous(), grad_out.contiguous())
    grad_o, grad_logits = gradients(lambda *x: gate_operator(*x, impl=impl), (o, gate_logits), (grad_out,))
    return grad_o, grad_logits


gate_op.register_fake(lambda o, gate_logits, impl: o.new_empty(o.shape))
gate_backward_op.register_fake(
    lambda grad_out, o, gate_logits, impl: (o.new_empty(o.shape), gate_logits.new_empty(gate_logits.shape))
)


def _save_gate(ctx, inputs, output) -> None:
    o, gate_logits, ctx.impl = inputs
    ctx.save_for_backward(o, gate_logits)


gate_op.register_autograd(
    lambda ctx, grad_out: (*gate_backward_op(grad_out, *ctx.saved_tensors, ctx.impl), None), setup_context=_save_gate
)


def gate(o: torch.Tensor, gate_logits: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """Returns `ssa_kernels.gate` by the custom op."""
    return gate_op(o, gate_logits, impl)


@torch.library.custom_op("ssa_kernels::gate_and_align", mutates_args=())
def gate_and_align_op(
    o_full: torch.Tensor,
    o_sparse: torch.Tensor,
    gate_logits: torch.Tensor,
    main: torch.Tensor | None,
    main_name: str,
    weights: Sequence[float],
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out, loss); `main` is a number on the device, or None if the stream has a name."""
    stream = main_name if main is None else main
    out, loss = alignment.gate_and_align(
        o_full, o_sparse, gate_logits, main=stream, weights=(weights[0], weights[1]), impl=impl
    )
    return out, loss


@torch.library.custom_op("ssa_kernels::gate_and_align_backward", mutates_args=())
def gate_and_align_backward_op(
    grad_out: torch.Tensor,
    grad_loss: torch.Tensor,
    o_full: torch.Tensor,
    o_sparse: torch.Tensor,
    gate_logits: torch.Tensor,
    main: torch.Tensor | None,
    main_name: str,
    weights: Sequence[float],
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of both streams and the logits."""
    stream, tensors = main_name if main is None else main, (o_full, o_sparse, gate_logits)
    if resolve_impl(impl, o_full, "gate_and_align") == "triton":
        from ..gate_and_align.triton import gate_backward

        tensors = (x.contiguous() for x in (*tensors, grad_out))
        do_full, do_sparse, _, _, grad_logits = gate_backward(
            *tensors, grad_loss.contiguous(), alignment.main_operand(stream), (weights[0], weights[1])
        )
        return do_full, do_sparse, grad_logits

    def forward(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return alignment.gate_and_align(*x, main=stream, weights=(weights[0], weights[1]), impl=impl)

    do_full, do_sparse, grad_logits = gradients(forward, tensors, (grad_out, grad_loss))
    return do_full, do_sparse, grad_logits


@gate_and_align_op.register_fake
def _(o_full, o_sparse, gate_logits, main, main_name, weights, impl):
    return o_full.new_empty(o_full.shape), o_full.new_empty((), dtype=torch.float32)


@gate_and_align_backward_op.register_fake
def _(grad_out, grad_loss, o_full, o_sparse, gate_logits, main, main_name, weights, impl):
    return tuple(x.new_empty(x.shape) for x in (o_full, o_sparse, gate_logits))


def _save_alignment(ctx, inputs, output) -> None:
    *tensors, main, ctx.main_name, ctx.weights, ctx.impl = inputs
    ctx.has_main = main is not None
    ctx.save_for_backward(*tensors, *([] if main is None else [main]))


def _alignment_backward(ctx, grad_out, grad_loss):
    tensors = ctx.saved_tensors
    main = tensors[3] if ctx.has_main else None
    grads = gate_and_align_backward_op(grad_out, grad_loss, *tensors[:3], main, ctx.main_name, ctx.weights, ctx.impl)
    return *grads, *(None,) * 4


gate_and_align_op.register_autograd(_alignment_backward, setup_context=_save_alignment)


def gate_and_align(
    o_full: torch.Tensor,
    o_sparse: torch.Tensor,
    gate_logits: torch.Tensor,
    *,
    main: str | torch.Tensor,
    weights: tuple[float, float] = (1.0, 1.0),
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out, loss) by the custom op; arguments as in `ssa_kernels.gate_and_align`."""
    on_device = isinstance(main, torch.Tensor)
    numbers = [float(x) for x in weights]
    return gate_and_align_op(
        o_full, o_sparse, gate_logits, main if on_device else None, "" if on_device else main, numbers, impl
    )


@torch.library.custom_op("ssa_kernels::qkv_rope", mutates_args=())
def qkv_rope_op(
    mixed: torch.Tensor, angles: torch.Tensor, positions: torch.Tensor, sizes: Sequence[int], impl: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (q, k, v, gate logits), the last without columns if there are no gates."""
    q, k, v, logits = projection.qkv_rope(mixed, angles.detach(), positions, **_named(sizes), impl=impl)
    return q, k, v, mixed.new_empty((mixed.shape[0], 0)) if logits is None else logits


@torch.library.custom_op("ssa_kernels::qkv_rope_backward", mutates_args=())
def qkv_rope_backward_op(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    grad_gate: torch.Tensor,
    angles: torch.Tensor,
    positions: torch.Tensor,
    sizes: Sequence[int],
    impl: str | None,
) -> torch.Tensor:
    """Returns the gradient of `mixed`."""
    grads = [x.contiguous() for x in (grad_q, grad_k, grad_v, grad_gate)]
    if resolve_impl(impl, grad_q, "qkv_rope") == "triton":
        from ..qkv_rope.triton import Sizes, qkv_rope_backward

        angles = angles if angles.stride(1) == 1 else angles.contiguous()
        return qkv_rope_backward(tuple(grads), angles, positions.contiguous(), Sizes(*sizes))

    def forward(mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = projection.qkv_rope(mixed, angles, positions, **_named(sizes), impl=impl)
        return tuple(x for x in found if x is not None)

    # The operator is linear, so the gradient does not depend on where it is taken.
    zeros = grad_q.new_zeros((grad_q.shape[0], _width(sizes)))
    return gradients(forward, (zeros,), grads[: 4 if sizes[3] else 3])[0]


def _named(sizes: Sequence[int]) -> dict[str, int]:
    return dict(zip(("num_kv_heads", "group_size", "head_dim", "num_gates"), sizes, strict=True))


def _width(sizes: Sequence[int]) -> int:
    kv_heads, group_size, head_dim, gates = sizes
    return kv_heads * ((group_size + 2) * head_dim + gates)


@qkv_rope_op.register_fake
def _(mixed, angles, positions, sizes, impl):
    kv_heads, group_size, head_dim, gates = sizes
    tokens = mixed.shape[0]
    heads = (mixed.new_empty((tokens, n, head_dim)) for n in (kv_heads * group_size, kv_heads, kv_heads))
    return *heads, mixed.new_empty((tokens, kv_heads * gates))


@qkv_rope_backward_op.register_fake
def _(grad_q, grad_k, grad_v, grad_gate, angles, positions, sizes, impl):
    return grad_q.new_empty((grad_q.shape[0], _width(sizes)))


def _save_projection(ctx, inputs, output) -> None:
    _, angles, positions, ctx.sizes, ctx.impl = inputs
    ctx.save_for_backward(angles, positions)


qkv_rope_op.register_autograd(
    lambda ctx, *grads: (qkv_rope_backward_op(*grads, *ctx.saved_tensors, ctx.sizes, ctx.impl), *(None,) * 4),
    setup_context=_save_projection,
)


def qkv_rope(
    mixed: torch.Tensor,
    angles: torch.Tensor,
    positions: torch.Tensor,
    *,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    num_gates: int,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns (q, k, v, gate logits) by the custom op; arguments as in `ssa_kernels.qkv_rope`."""
    q, k, v, logits = qkv_rope_op(mixed, angles, positions, [num_kv_heads, group_size, head_dim, num_gates], impl)
    return q, k, v, logits if num_gates else None


@torch.library.custom_op("ssa_kernels::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, training: bool, impl: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (losses, softmax minus one-hot, which tokens count); the last two are empty unless training."""
    output_layer.check_inputs(hidden, weight, labels, None, 1)
    hidden, weight, labels = hidden.contiguous(), weight.contiguous(), labels.contiguous()
    kept: list[torch.Tensor] = []
    ctx = SimpleNamespace(save_for_backward=lambda *tensors: kept.extend(tensors))
    if resolve_impl(impl, hidden, "linear_cross_entropy") == "reference":
        losses = LinearCrossEntropyReference.forward(ctx, hidden, weight, labels, None, None)
    else:
        from ..linear_cross_entropy.triton import LinearCrossEntropy

        losses = LinearCrossEntropy.forward(ctx, hidden, weight, labels, None, None, training)
    if training:
        return losses, kept[2], kept[3]
    return losses, hidden.new_empty((0, weight.shape[0])), labels.new_empty((0,), dtype=torch.bool)


@torch.library.custom_op("ssa_kernels::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward_op(
    grad_losses: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    probabilities: torch.Tensor,
    counts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of hidden and weight: two products, the same for both implementations."""
    ctx = SimpleNamespace(
        saved_tensors=(hidden, weight, probabilities, counts), needs_input_grad=(True, True), accumulate_into=None
    )
    with torch.no_grad():
        grad_hidden, grad_weight, *_ = LinearCrossEntropyReference.backward(ctx, grad_losses)
    return grad_hidden.contiguous(), grad_weight.contiguous()


@linear_cross_entropy_op.register_fake
def _(hidden, weight, labels, training, impl):
    tokens, kept = hidden.shape[0], hidden.shape[0] if training else 0
    losses = hidden.new_empty((tokens,), dtype=wide(hidden.dtype))
    return losses, hidden.new_empty((kept, weight.shape[0])), labels.new_empty((kept,), dtype=torch.bool)


@linear_cross_entropy_backward_op.register_fake
def _(grad_losses, hidden, weight, probabilities, counts):
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _save_losses(ctx, inputs, output) -> None:
    _, probabilities, counts = output
    ctx.save_for_backward(*inputs[:2], probabilities, counts)


linear_cross_entropy_op.register_autograd(
    lambda ctx, grad_losses, *_: (
        *linear_cross_entropy_backward_op(grad_losses, *ctx.saved_tensors),
        *(None,) * 3,
    ),
    setup_context=_save_losses,
)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    group: object = None,
    accumulate_into: torch.Tensor | None = None,
    z_loss: float = 0.0,
    impl: str | None = None,
) -> torch.Tensor:
    """Returns the losses by the custom op; arguments as in `ssa_kernels.linear_cross_entropy`, for one rank and without a z-loss."""
    if group is not None or accumulate_into is not None or z_loss:
        raise ValueError(
            "group, accumulate_into and z_loss of linear_cross_entropy are not supported by torch.compile; try the operator outside it"
        )
    training = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return linear_cross_entropy_op(hidden, weight, labels, training, impl)[0]
