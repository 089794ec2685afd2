"""`linear_cross_entropy`: the output layer's product and the cross entropy of its logits, without logits in float32.

    z_tv = h_t . w_v;   lse_t = log sum_v exp z_tv;   loss_t = lse_t - z_t,label(t)
    P_tv = exp(z_tv - lse_t) - [v = label(t)];   with g_t the gradient of loss_t:   dh = g (P W),   dW = P^T (g h)

The only large tensor is one buffer [tokens, V] in the hidden states' dtype. The product writes z into it, and the forward kernel turns z
into P in place. It reads each row twice, the second time from the cache. g multiplies rows, so it is applied to h and dh (M columns)
instead of P (V columns). The backward is then two matrix products, without another pass over the vocabulary.

Under tensor parallelism each rank holds a slice of the vocabulary. The ranks exchange two numbers per token (the log-sum-exp of the slice,
and the label's logit or 0) in one gather. dh is each rank's own contribution, which the caller sums.

A token with label -100 is ignored, as in torch's cross entropy: its loss is 0 and it contributes no gradient. Any other label outside the
vocabulary is refused on a CPU. On a GPU, where checking would mean waiting, such a token is ignored too.

A z-loss c lse_t^2 may be added to each loss (PaLM, arXiv 2204.02311): it keeps the log-sum-exp near 0. Its gradient is in P as well,

    P_tv = exp(z_tv - lse_t) (1 + 2 c lse_t) - [v = label(t)]

The gradient of W can be added directly to a float32 buffer (`main_grad`, where megatron-core accumulates over microbatches). The matrix
product then accumulates in float32, and no gradient in the weight's dtype is ever written.
"""

import math

import torch
import torch.distributed as dist

from ..checks import INTEGERS, check_floats, check_tensors, elements_apart, looks_at_values
from ..dispatch import past_modes, resolve_impl
from .reference import IGNORED, LinearCrossEntropyReference, counted


@past_modes
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    accumulate_into: torch.Tensor | None = None,
    z_loss: float = 0.0,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Returns the losses, float32 `[tokens]`, differentiable in hidden and weight; with a z-loss, (losses with it, the z-losses by themselves, detached).

    Args:
        hidden: `[tokens, M]`.
        weight: `[V, M]`, this rank's rows of the output layer, in rank order: rank r holds ids r V to (r + 1) V - 1.
        labels: int64 or int32 `[tokens]`, ids in the whole vocabulary, or -100 to ignore a token. On a GPU every label outside the
            vocabulary ignores its token.
        group: the ranks that share the vocabulary; None for one.
        accumulate_into: float32 `[V, M]` without overlapping elements. The backward adds the weight's gradient to it, and autograd gets
            none for the weight.
        z_loss: c, factor of the squared log-sum-exp that is added to each loss, at least 0; 0: none.
        impl: None, "triton" or "reference".

    Raises:
        ValueError: for arguments that do not fit each other, and for inputs that the implementation does not support (float64: reference only).
    """
    group = None if group is None or dist.get_world_size(group) == 1 else group
    if not isinstance(z_loss, int | float) or isinstance(z_loss, bool) or not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss={z_loss!r} must be a finite number, at least 0; try 1e-4")
    check_inputs(hidden, weight, labels, accumulate_into, 1 if group is None else dist.get_world_size(group))
    hidden, weight, labels = hidden.contiguous(), weight.contiguous(), labels.contiguous()
    if resolve_impl(impl, hidden, "linear_cross_entropy") == "reference":
        return LinearCrossEntropyReference.apply(hidden, weight, labels, group, accumulate_into, z_loss)
    from .triton import LinearCrossEntropy  # imported here because Triton may be missing on a CPU machine

    training = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LinearCrossEntropy.apply(hidden, weight, labels, group, accumulate_into, training, z_loss)


def check_inputs(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, accumulate_into: torch.Tensor | None, ranks: int
) -> None:
    """Raises ValueError unless dtypes, devices and shapes fit each other, and labels the vocabulary of all ranks."""
    check_tensors(hidden=hidden, weight=weight, labels=labels)
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or 0 in weight.shape
        or hidden.dtype != weight.dtype
    ):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, {hidden.dtype} and weight {tuple(weight.shape)}, {weight.dtype} must be [tokens, M] and [V, M] "
            "of one dtype, V and M at least 1"
        )
    check_floats(hidden=hidden)
    if labels.shape != hidden.shape[:1] or labels.dtype not in INTEGERS:
        raise ValueError(
            f"labels {tuple(labels.shape)}, {labels.dtype} must be one integer for each of {hidden.shape[0]} tokens of hidden, int64 or int32"
        )
    if looks_at_values(labels) and bool(
        (outside := ~counted(labels, weight.shape[0] * ranks) & (labels != IGNORED)).any()
    ):
        raise ValueError(
            f"label {int(labels[outside][0])} must lie in [0, {weight.shape[0] * ranks}), the vocabulary, or be {IGNORED} to be ignored"
        )
    if accumulate_into is not None:
        check_tensors(hidden=hidden, accumulate_into=accumulate_into)
        if accumulate_into.shape != weight.shape or accumulate_into.dtype != torch.float32:
            raise ValueError(
                f"accumulate_into {tuple(accumulate_into.shape)}, {accumulate_into.dtype} must be float32 of the weight's shape {tuple(weight.shape)}"
            )
        if not elements_apart(accumulate_into):
            raise ValueError(
                f"accumulate_into with strides {accumulate_into.stride()} must not overlap in memory; try accumulate_into.clone()"
            )
