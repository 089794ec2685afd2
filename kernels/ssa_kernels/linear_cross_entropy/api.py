"""`linear_cross_entropy`: the output layer's product and the cross entropy of its logits, without logits in float32.

    z_tv = h_t . w_v;   lse_t = log sum_v exp z_tv;   loss_t = lse_t - z_t,label(t)
    P_tv = exp(z_tv - lse_t) - [v = label(t)];   with g_t the gradient of loss_t:   dh = g (P W),   dW = P^T (g h)

One buffer [tokens, vocabulary] in the hidden states' dtype is all that there is of size: the product writes z into it, and the forward kernel
turns it into P where it lies, reading each row twice, the second time from the cache. Since g multiplies rows, it is put on h and dh
(M columns) instead of P (V columns): the backward is two matrix products and nothing that passes over the vocabulary.

Under tensor parallelism each rank holds a span of the vocabulary: ranks exchange two numbers a token (their log-sum-exp, and the label's
logit or 0) in one gather, and dh is each rank's own part, which the caller sums.

The gradient of W may be added straight into a float32 buffer (`main_grad`, where megatron-core accumulates over microbatches): the matrix
product then accumulates in float32, and no gradient in the weight's dtype is ever written.
"""

import torch
import torch.distributed as dist

from ..dispatch import past_modes, resolve_impl
from .reference import LinearCrossEntropyReference


@past_modes
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    accumulate_into: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Returns the losses, float32 `[tokens]`, differentiable in hidden and weight.

    Args:
        hidden: `[tokens, M]`.
        weight: `[V, M]`, this rank's rows of the output layer, in rank order: rank r holds ids r V to (r + 1) V - 1.
        labels: int64 `[tokens]`, ids in the whole vocabulary.
        group: the ranks that share the vocabulary; None for one.
        accumulate_into: float32 `[V, M]`; the weight's gradient is added to it in the backward, and autograd sees none for the weight.
        impl: None, "triton" or "reference".
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, {hidden.dtype} and weight {tuple(weight.shape)}, {weight.dtype} must be [tokens, M] and [V, M] "
            "of one dtype"
        )
    if labels.shape != hidden.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels {tuple(labels.shape)}, {labels.dtype} must be one integer for each of {hidden.shape[0]} tokens"
        )
    if accumulate_into is not None and (
        accumulate_into.shape != weight.shape or accumulate_into.dtype != torch.float32
    ):
        raise ValueError(
            f"accumulate_into {tuple(accumulate_into.shape)}, {accumulate_into.dtype} must be float32 of the weight's shape {tuple(weight.shape)}"
        )
    group = None if group is None or dist.get_world_size(group) == 1 else group
    if resolve_impl(impl, hidden, "linear_cross_entropy") == "reference":
        return LinearCrossEntropyReference.apply(hidden, weight, labels, group, accumulate_into)
    from .autograd import LinearCrossEntropy  # here, because it imports Triton

    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LinearCrossEntropy.apply(hidden.contiguous(), weight, labels, group, accumulate_into, wanted)
