"""The Llama: megatron-core's GPTModel (gpt.py) with SSA attention and our feed-forward in its layer spec.

Two specs. *local*: megatron-core's own linear layers and our RMSNorm, on CPU and on GPUs without Transformer Engine. *transformer_engine*:
norm fused into the QKV and the first MLP projection, FP8 where the precision asks for it. The two have the same weights; the checkpoint keys
of the local spec's norms are mapped onto Transformer Engine's.

Initial weights are a function of (seed, parameter name) alone, so every layout starts from the same model on one kind of device.
"""

import hashlib

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

from ssa_pretrain.config import Config, EngineConfig, EngineName, KernelImpl, LayerSpec, PrecisionName, Recompute
from ssa_pretrain.model.attention import SSAAttention, SSAAttentionSubmodules
from ssa_pretrain.model.gpt import Llama
from ssa_pretrain.model.mlp import FeedForward
from ssa_pretrain.model.norm import RMSNorm


def transformer_config(config: Config) -> TransformerConfig:
    """Return megatron-core's configuration of the layers for a run's `Config`."""
    model, parallel, engine = config.model, config.parallel, config.engine
    low = config.precision.name is not PrecisionName.fp32
    on_gpu = torch.cuda.is_available()
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
        batch_p2p_comm=on_gpu,
        gradient_accumulation_fusion=False,
        **_recompute(engine),
    )


def build_model(config: Config, vocab_size: int, groups: ProcessGroupCollection, vp_stage: int | None = None) -> Llama:
    """Return this rank's part of the Llama, initialised: one pipeline stage (or virtual stage) of one tensor rank.

    Args:
        config: the run.
        vocab_size: tokens of the tokenizer, before padding.
        groups: process groups of megatron-core.
        vp_stage: the virtual pipeline stage, None without interleaving.
    """
    core = transformer_config(config)
    stages, rank = config.parallel.pp, groups.pp.rank()
    virtual = config.parallel.vpp
    scaling = config.model.rope_scaling
    # The buffers that gradients are added into are megatron-core's.
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
    )
    if fused:
        _fuse_gradient_accumulation(model)
    offset = get_transformer_layer_offset(core, vp_stage, rank)
    initialise(model, config, tp_rank=groups.tp.rank(), layer_offset=offset)
    return model


def kernel_impl(config: Config) -> str | None:
    """Return the kernels' implementation as the operators name it, None by device."""
    return None if config.attention.impl is KernelImpl.auto else config.attention.impl.value


def _fuse_gradient_accumulation(model: torch.nn.Module) -> None:
    """Let Transformer Engine's layers add weight gradients into the fp32 buffers in the matrix product itself.

    Core's own switch is one for the whole model and refuses to build core's embedding and output layer without Apex.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def uses_transformer_engine(config: Config) -> bool:
    """Return whether the layers come from Transformer Engine: as told, or where it is installed beside a GPU and precision is not fp32.

    Transformer Engine multiplies fp32 matrices in TF32, which keeps 10 bits of the 23.
    """
    if config.engine.layer_spec is not LayerSpec.auto:
        return config.engine.layer_spec is LayerSpec.transformer_engine
    if not torch.cuda.is_available() or config.precision.name is PrecisionName.fp32:
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE


def _recompute(engine: EngineConfig) -> dict:
    if engine.recompute is Recompute.full:
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if engine.recompute is Recompute.selective:
        return {"recompute_granularity": "selective", "recompute_modules": []}  # SwiGLU's output (mlp.py)
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


def _feed_forward(config: Config, up: type, down: type) -> ModuleSpec:
    return ModuleSpec(
        module=FeedForward,
        params={"impl": kernel_impl(config), "ffn_hidden_size": config.model.ffn_hidden_size},
        submodules=MLPSubmodules(linear_fc1=up, linear_fc2=down),
    )


def _local_layer(config: Config) -> ModuleSpec:
    attention = ModuleSpec(
        module=SSAAttention,
        params={"attention": config.attention},
        submodules=SSAAttentionSubmodules(linear_qkv=ColumnParallelLinear, linear_proj=RowParallelLinear),
    )
    mlp = _feed_forward(config, ColumnParallelLinear, RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _transformer_engine_layer(config: Config) -> tuple[ModuleSpec, type]:
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TENorm, TERowParallelLinear

    attention = ModuleSpec(
        module=SSAAttention,
        params={"attention": config.attention},
        submodules=SSAAttentionSubmodules(linear_qkv=TELayerNormColumnParallelLinear, linear_proj=TERowParallelLinear),
    )
    mlp = _feed_forward(config, TELayerNormColumnParallelLinear, TERowParallelLinear)
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return layer, TENorm


@torch.no_grad()
def initialise(model: torch.nn.Module, config: Config, *, tp_rank: int, layer_offset: int) -> None:
    """Set norms to 1 and every matrix to N(0, init_std), drawn whole by (seed, name) and cut to this tensor rank's part."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(1.0)
            continue
        full = _draw(global_name(name, layer_offset, tied=config.model.tie_embeddings), parameter, config)
        parameter.copy_(tensor_rank_part(full, name, parameter, config.parallel.tp, tp_rank))


def global_name(name: str, layer_offset: int, *, tied: bool) -> str:
    """Return a parameter's name in the whole model: layers counted over all stages, a tied output layer called by its embedding."""
    if tied and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + layer_offset)
    return ".".join(parts)


def _draw(name: str, parameter: torch.Tensor, config: Config) -> torch.Tensor:
    shape = list(parameter.shape)
    if (dim := getattr(parameter, "partition_dim", -1)) >= 0:
        shape[dim] *= config.parallel.tp
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}:{name}".encode()).digest()[:8], "little") >> 1
    generator = torch.Generator(device=parameter.device).manual_seed(seed)
    return torch.empty(shape, device=parameter.device).normal_(std=config.model.init_std, generator=generator)


def tensor_rank_part(full: torch.Tensor, name: str, parameter: torch.Tensor, tp: int, tp_rank: int) -> torch.Tensor:
    """Return a tensor rank's part of a whole parameter."""
    dim = getattr(parameter, "partition_dim", -1)
    if dim < 0 or tp == 1:
        return full
    if "linear_fc1" in name:  # [gate; up], each sharded on its own
        return torch.cat([half.chunk(tp, dim=0)[tp_rank] for half in full.chunk(2, dim=0)])
    return full.chunk(tp, dim=dim)[tp_rank]
