"""megatron-core's GPTModel with the output layer and its cross entropy as one operator (ssa_kernels.linear_cross_entropy).

Core's own way holds the logits twice in fp32 beside the bf16 ones, 16.8 GB for 16,384 tokens and 128,256 ids. Here they are one bf16 buffer.
Without labels (logits for a reader) the model is core's.
"""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from ssa_kernels import linear_cross_entropy


class Llama(GPTModel):
    """A pipeline stage of the Llama.

    Args:
        impl: implementation of the cross entropy's kernels, None by device.
        fuse_gradient_accumulation: add the tied weight's gradient straight into its fp32 buffer.
    """

    def __init__(self, *args: object, impl: str | None, fuse_gradient_accumulation: bool, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.impl = impl
        self.fuse_gradient_accumulation = fuse_gradient_accumulation

    def _postprocess(
        self, hidden_states: Tensor, input_ids: Tensor, position_ids: Tensor, labels: Tensor | None, **rest
    ):
        """Return losses [1, tokens] where labels are given on the last stage, else what core returns."""
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, input_ids, position_ids, labels, **rest)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        elif group.size() > 1:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        losses = linear_cross_entropy(
            hidden_states.squeeze(1),
            weight,
            labels.squeeze(0),
            group=group,
            accumulate_into=self._gradient_buffer(weight),
            impl=self.impl,
        )
        return losses.unsqueeze(0)

    def _gradient_buffer(self, weight: Tensor) -> Tensor | None:
        """Return where the output layer's gradient is added, None to hand it to autograd.

        Only a weight that the embedding of this very stage uses too may be added to behind autograd's back: its other gradient then tells
        data parallelism that the weight is done.
        """
        buffer = getattr(weight, "main_grad", None)
        shared_here = self.share_embeddings_and_output_weights and self.pre_process
        fits = buffer is not None and buffer.dtype is torch.float32
        return buffer if self.fuse_gradient_accumulation and shared_here and fits and self.training else None
