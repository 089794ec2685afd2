"""The Llama: megatron-core's GPTModel with a fused output layer, and the modules that its layer spec (spec.py) names beside the attention.

*Output layer.* The output projection and its cross entropy are one operator (ssa_kernels.linear_cross_entropy). Core keeps the logits twice in
fp32 beside the bf16 ones: 16.8 GB for 16,384 tokens and 128,256 ids. Here they are one bf16 buffer. Without labels the model is core's. The operator runs
inside the layer's call, because data parallelism gathers a weight beside the forward and waits for it in the hooks of that call (`overlap_param_gather`).

*RoPE.* Core computes the frequencies on the device. A GPU's power function is off by up to four units in the last place, and an angle has the
frequency's relative error times the position: 2.5e-5 of the logits after 1,500 tokens. Here they are computed on the CPU, as transformers does, and
are the same bits on every device.

*FeedForward.* SwiGLU's output is F wide, the widest tensor of a layer after the layer's own input, and costs one pass over memory. Selective
recomputation drops it after linear_fc2 and recomputes it in the backward: nothing else in the layer saves as much memory for as little time.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    CheckpointWithoutOutput,
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ssa_kernels import linear_cross_entropy, swiglu


class Llama(GPTModel):
    """One pipeline stage of the Llama.

    Args:
        impl: implementation of the cross entropy's kernels, None to choose by device.
        fuse_gradient_accumulation: whether the tied weight's gradient is added directly to its fp32 buffer.
        z_loss: factor of the squared log-sum-exp that is added to each loss in training.
        logits_multiplier: factor of the logits (mup.py).
    """

    def __init__(
        self,
        *args: object,
        impl: str | None,
        fuse_gradient_accumulation: bool,
        z_loss: float = 0.0,
        logits_multiplier: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rotary_pos_emb = RotaryEmbedding(
            kv_channels=self.config.kv_channels,
            rotary_percent=1.0,
            rotary_base=kwargs["rotary_base"],
            rope_scaling=kwargs["rope_scaling"],
            rope_scaling_factor=kwargs["rope_scaling_factor"],
            use_cpu_initialization=True,
            cp_group=self.pg_collection.cp,
        )
        self.impl = impl
        self.z_loss, self.logits_multiplier = z_loss, logits_multiplier
        self.fuse_gradient_accumulation = fuse_gradient_accumulation
        if self.post_process:
            self.output_layer.__class__ = OutputLayer

    def _postprocess(
        self, hidden_states: Tensor, input_ids: Tensor, position_ids: Tensor, labels: Tensor | None, **rest
    ) -> Tensor:
        """Returns losses [1, tokens] if labels are given on the last stage, otherwise what core returns.

        In training with a z-loss: [2, tokens], the losses with it and the z-losses by themselves.
        """
        if self.post_process and self.logits_multiplier != 1.0:
            hidden_states = hidden_states * self.logits_multiplier
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, input_ids, position_ids, labels, **rest)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        elif group.size() > 1:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)

        def losses_of(hidden_states: Tensor, weight: Tensor) -> Tensor:
            losses = linear_cross_entropy(
                hidden_states.squeeze(1),
                weight,
                labels.squeeze(0),
                group=group,
                accumulate_into=self._gradient_buffer(weight),
                z_loss=self.z_loss if self.training else 0.0,
                impl=self.impl,
            )
            return torch.stack(losses) if isinstance(losses, tuple) else losses.unsqueeze(0)

        return self.output_layer(hidden_states, weight, use=losses_of)

    def _gradient_buffer(self, weight: Tensor) -> Tensor | None:
        """Returns the buffer that the output layer's gradient is added to, None to return the gradient to autograd.

        Only a weight that this stage's embedding shares may bypass autograd: the embedding's gradient still goes through autograd, which tells
        data parallelism that the weight is done.
        """
        buffer = getattr(weight, "main_grad", None)
        shared_here = self.share_embeddings_and_output_weights and self.pre_process
        fits = buffer is not None and buffer.dtype is torch.float32
        return buffer if self.fuse_gradient_accumulation and shared_here and fits and self.training else None


class OutputLayer(ColumnParallelLinear):
    """Core's output layer, whose call may do something else with its weight than project: `use(input_, weight)`, whose result it returns."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        *args: object,
        use: Callable[[Tensor, Tensor], Tensor] | None = None,
        **options: object,
    ) -> Any:
        """See the class; without `use` as core's."""
        if use is None:
            return super().forward(input_, weight, *args, **options)
        return use(input_, self.weight if weight is None else weight)


class FeedForward(MLP):
    """fc2(silu(a) * b) with [a, b] = fc1(x), without biases. `impl` names the kernels' implementation, None to choose by device."""

    def __init__(
        self,
        *args: object,
        impl: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        **kwargs: object,
    ) -> None:
        assert not is_mtp_layer
        groups = {} if pg_collection is None else {"tp_group": pg_collection.tp}  # core passes them from 0.18 on
        super().__init__(*args, **groups, **kwargs)
        self.impl = impl

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: object
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (output, None) for hidden states [tokens, 1, M]."""
        assert per_token_scale is None  # only mixtures of experts have one
        projected, _ = self.linear_fc1(hidden_states)
        if self.config.recompute_granularity == "selective" and self.training:
            recomputed = CheckpointWithoutOutput(fp8=None)  # the kernel is the same under FP8
            output, bias = self.linear_fc2(recomputed.checkpoint(self._activate, projected))
            recomputed.discard_output_and_register_recompute(output)
            return output, bias
        return self.linear_fc2(self._activate(projected))

    def _activate(self, projected: Tensor) -> Tensor:
        return swiglu(projected, impl=self.impl)


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, with the constructor that core's local layers expect.

    Core's own wrapper around `torch.nn.RMSNorm` refuses sequence parallelism. There each tensor rank sees a slice of the tokens, so the weight's
    gradient must be summed over tensor ranks; core does that for parameters with `sequence_parallel = True`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


class HeadNorm(RMSNorm):
    """The RMSNorm of query heads or keys, which a kernel computes as it rotates them. A call returns the weight.

    The weight is taken by a call because core's hooks wait, before a module's call, until its weights are gathered (engine.overlap_param_gather).
    """

    def forward(self) -> Tensor:
        """Returns the weight [D]."""
        return self.weight
