"""Builds the Llama of a run: megatron-core's layer configuration and the spec that names each layer's modules.

There are two specs. *local* uses megatron-core's own linear layers and our RMSNorm; it serves CPUs and GPUs without Transformer Engine.
*transformer_engine* fuses each norm into the projection after it (QKV, linear_fc1) and supports FP8. Both have the same weights: the local
spec's norms are saved under Transformer Engine's names.
"""

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from ssa_pretrain.config import (
    AttentionConfig,
    Config,
    EngineConfig,
    EngineName,
    KernelImpl,
    LayerSpec,
    Method,
    ParallelConfig,
    PrecisionName,
    Recompute,
    Score,
)
from ssa_pretrain.model.attention import SSAAttention, SSAAttentionSubmodules
from ssa_pretrain.model.indexer import IndexerAttention, IndexerAttentionSubmodules
from ssa_pretrain.model.init import init_weights
from ssa_pretrain.model.llama import FeedForward, Llama, RMSNorm
from ssa_pretrain.model.mup import logits_multiplier, query_multiplier

ATTENTION: dict[Method, type[SSAAttention]] = dict.fromkeys(Method, SSAAttention)  # a layer's attention, by method
ATTENTION[Method.indexer] = IndexerAttention


def attention_class(attention: AttentionConfig) -> type[SSAAttention]:
    """Returns the class of a layer's attention: the method's, unless a trained scorer chooses its blocks."""
    return IndexerAttention if attention.score is Score.indexer else ATTENTION[attention.method]


def transformer_config(config: Config) -> TransformerConfig:
    """Returns megatron-core's configuration of the layers for a run's `Config`."""
    model, parallel, engine = config.model, config.parallel, config.engine
    low = config.precision.name is not PrecisionName.fp32
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        softmax_scale=query_multiplier(model) / model.head_dim**0.5 if model.mup.base_head_dim else None,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        cuda_graph_scope=[],
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        num_layers_in_last_pipeline_stage=parallel.layers_on_last_stage or None,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=torch.bfloat16 if low else torch.float32,
        params_dtype=torch.bfloat16 if low else torch.float32,
        bf16=low,
        fp8="hybrid" if config.precision.name is PrecisionName.fp8 else None,
        fp8_recipe=config.precision.fp8_recipe.value,
        tp_comm_overlap=engine.overlap_tp,
        variable_seq_lengths=False,
        deallocate_pipeline_outputs=True,
        **_stage_exchange(parallel),
        gradient_accumulation_fusion=False,
        **_recompute(engine),
    )


def build_model(config: Config, vocab_size: int, groups: ProcessGroupCollection, vp_stage: int | None = None) -> Llama:
    """Returns this rank's part of the Llama with its initial weights: one pipeline stage (or virtual stage) of one tensor rank.

    Args:
        config: the run.
        vocab_size: tokens of the tokenizer, before padding.
        groups: process groups of megatron-core.
        vp_stage: the virtual pipeline stage; None without interleaving.
    """
    core = transformer_config(config)
    stages, rank = config.parallel.pp, groups.pp.rank()
    virtual = config.parallel.vpp
    scaling = config.model.rope_scaling
    # The gradient buffers belong to megatron-core.
    fused = config.engine.fuse_gradient_accumulation and config.engine.name is EngineName.megatron
    model = Llama(
        config=core,
        transformer_layer_spec=_block_spec(config, core, rank, vp_stage),
        vocab_size=config.model.padded_vocab_size(vocab_size),
        max_sequence_length=config.data.sequence_length,
        pre_process=rank == 0 and vp_stage in (None, 0),
        post_process=rank == stages - 1 and vp_stage in (None, virtual - 1),
        parallel_output=True,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rope_theta,
        rope_scaling=scaling.enabled,
        rope_scaling_factor=scaling.factor,
        pg_collection=groups,
        vp_stage=vp_stage,
        impl=kernel_impl(config),
        fuse_gradient_accumulation=fused,
        z_loss=config.training.z_loss,
        logits_multiplier=logits_multiplier(config.model),
    )
    if fused:
        _fuse_gradient_accumulation(model)
    offset = get_transformer_layer_offset(core, vp_stage, rank)
    init_weights(model, config, tp_rank=groups.tp.rank(), layer_offset=offset)
    return model


def kernel_impl(config: Config) -> str | None:
    """Returns the name of the kernels' implementation as operators take it, None to choose by device."""
    return None if config.attention.impl is KernelImpl.auto else config.attention.impl.value


def _fuse_gradient_accumulation(model: torch.nn.Module) -> None:
    """Makes Transformer Engine's layers add weight gradients to the fp32 buffers inside the matrix product.

    Core's own switch applies to the whole model, and without Apex it refuses to build core's embedding and output layer.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def uses_transformer_engine(config: Config) -> bool:
    """Returns whether the layers are Transformer Engine's.

    `auto` means yes if it is installed, there is a GPU and the precision is not fp32: it multiplies fp32 matrices in TF32, which keeps
    10 of the 23 mantissa bits.
    """
    if config.engine.layer_spec is not LayerSpec.auto:
        return config.engine.layer_spec is LayerSpec.transformer_engine
    if not torch.cuda.is_available() or config.precision.name is PrecisionName.fp32:
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE


def _stage_exchange(parallel: ParallelConfig) -> dict[str, bool]:
    """Returns how pipeline stages exchange activations.

    Interleaved stages do not batch their messages. At pp 2 the next stage and the previous one are the same rank, and a batch does not say which of
    its messages is which (Megatron-LM #750). On GPUs the messages overlap with computation. gloo matches overlapping messages wrongly.
    """
    on_gpu, interleaved = torch.cuda.is_available(), parallel.vpp > 1
    return {"batch_p2p_comm": on_gpu and not interleaved, "overlap_p2p_comm": on_gpu and interleaved}


def _recompute(engine: EngineConfig) -> dict:
    if engine.recompute is Recompute.full:
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if engine.recompute is Recompute.selective:
        return {
            "recompute_granularity": "selective",
            "recompute_modules": [],
        }  # FeedForward recomputes SwiGLU's output itself
    return {}


def _block_spec(
    config: Config, core: TransformerConfig, pp_rank: int, vp_stage: int | None
) -> TransformerBlockSubmodules:
    if uses_transformer_engine(config):
        layer, norm = _transformer_engine_layer(config)
    else:
        layer, norm = _local_layer(config), RMSNorm
    num_layers = get_num_layers_to_build(core, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _local_layer(config: Config) -> ModuleSpec:
    return _layer(
        config,
        ColumnParallelLinear,
        RowParallelLinear,
        norm=RMSNorm,
        unfused=(RMSNorm, ColumnParallelLinear),
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )


def _transformer_engine_layer(config: Config) -> tuple[ModuleSpec, type]:
    """Returns the spec of a layer and the module of the norm after the last layer."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    indexed = config.attention.score is Score.indexer
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    rest = {"sharded_state_dict_keys_map": names} if indexed else {}
    unfused = (TENorm, TEColumnParallelLinear)
    common = {"norm": IdentityOp, "unfused": unfused}
    return _layer(config, TELayerNormColumnParallelLinear, TERowParallelLinear, **common, **rest), TENorm


def _layer(
    config: Config, column_parallel: type, row_parallel: type, *, norm: type, unfused: tuple[type, type], **rest: dict
) -> ModuleSpec:
    """Returns the spec of a layer.

    Args:
        config: the run.
        column_parallel: module of the projections into heads and feed-forward.
        row_parallel: module of the projections back to M.
        norm: module in front of attention and feed-forward.
        unfused: norm and projection in front of attention where a trained scorer reads the norm's output too.
        rest: further submodules' settings.
    """
    impl = kernel_impl(config)
    projections, input_norm = SSAAttentionSubmodules(linear_qkv=column_parallel, linear_proj=row_parallel), norm
    if config.attention.score is Score.indexer:
        input_norm, linear = unfused
        projections = IndexerAttentionSubmodules(linear_qkv=linear, linear_proj=row_parallel, linear_index=linear)
    attention = ModuleSpec(
        module=attention_class(config.attention),
        params={"attention": config.attention, "impl": impl},
        submodules=projections,
    )
    feed_forward = ModuleSpec(
        module=FeedForward,
        params={"impl": impl, "ffn_hidden_size": config.model.ffn_hidden_size},
        submodules=MLPSubmodules(linear_fc1=column_parallel, linear_fc2=row_parallel),
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=input_norm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=feed_forward,
        mlp_bda=get_bias_dropout_add,
        **rest,
    )
    return ModuleSpec(module=TransformerLayer, submodules=submodules)
