"""The baseline: megatron-core's own GPTModel with full attention, from core's own layer spec, without any of our modules.

It uses Transformer Engine's layers if available and core's local layers otherwise. It runs under the same data-parallel
wrapper and gradient buffers as our engine, on rows of one document each. Fused RoPE, fused SwiGLU and core's fused cross
entropy are on where core has them.
"""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ssa_pretrain.config import Config, PrecisionName
from ssa_pretrain.model.spec import uses_transformer_engine
from ssa_pretrain.parallel.state import Placement


class PlainModel:
    """Core's GPTModel with the shape of our model, on one rank.

    Args:
        config: shape, sequence length and precision. The section attention is not read.
        placement: this process.
        vocab_size: size of the vocabulary, before padding.
    """

    def __init__(self, config: Config, placement: Placement, vocab_size: int) -> None:
        fused = uses_transformer_engine(config)
        low = config.precision.name is not PrecisionName.fp32
        self.length, self.device = config.data.sequence_length, placement.device
        core = _core_config(config, fused=fused, low=low)
        if fused:
            layer = get_gpt_layer_with_transformer_engine_spec()
        else:
            layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        model: torch.nn.Module = GPTModel(
            config=core,
            transformer_layer_spec=layer,
            vocab_size=config.model.padded_vocab_size(vocab_size),
            max_sequence_length=self.length,
            parallel_output=True,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=config.model.rope_theta,  # pyright: ignore[reportArgumentType]: core takes any number
            pg_collection=placement.groups,
        ).to(placement.device)
        if low:
            model = Float16Module(core, model)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=config.precision.grad_reduce_in_fp32,
            use_distributed_optimizer=config.engine.distributed_optimizer,
        )
        self.model = DistributedDataParallel(config=core, ddp_config=ddp, module=model)
        # Transformer Engine's causal attention takes no mask; core's local attention needs one.
        causal = torch.ones(self.length, self.length, dtype=torch.bool, device=placement.device).triu(1)
        self.mask = None if fused else causal[None, None]

    def forward_backward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Accumulates the gradients of the mean loss and returns the loss. Tokens and labels are [rows, sequence_length]."""
        self.model.zero_grad_buffer()
        positions = torch.arange(self.length, device=self.device).expand_as(tokens)
        loss = self.model(tokens, positions, self.mask, labels=labels).float().mean()
        loss.backward()
        finalize_model_grads([self.model])
        return loss.detach()


def _core_config(config: Config, *, fused: bool, low: bool) -> TransformerConfig:
    """Core's configuration of the baseline."""
    model = config.model
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        masked_softmax_fusion=False,
        cross_entropy_loss_fusion=fused,
        params_dtype=torch.bfloat16 if low else torch.float32,
        pipeline_dtype=torch.bfloat16 if low else torch.float32,
        bf16=low,
        fp8="hybrid" if config.precision.name is PrecisionName.fp8 else None,
        fp8_recipe=config.precision.fp8_recipe.value,
        gradient_accumulation_fusion=False,
    )
