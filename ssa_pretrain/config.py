"""The typed configuration of a run: one dataclass a section, one line a field with its meaning and unit.

Hydra composes YAML from `conf/`; `ssa_pretrain.cli` turns the result into a `Config` and reports every problem at once. Past that border
the configuration is a plain value that nobody changes. This module imports neither torch nor Hydra.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class Method(StrEnum):
    """What a layer's attention computes in training."""

    ssa = "ssa"  # both streams, gated, aligned; the main stream is drawn
    full = "full"  # the full stream alone
    moba = "moba"  # the sparse stream alone, every query head choosing for itself


class Score(StrEnum):
    """How a token scores the blocks before its own."""

    softmax_sum = "softmax_sum"
    per_head = "per_head"
    official_compat = "official_compat"


class KernelImpl(StrEnum):
    """Which implementation of the attention kernels runs."""

    auto = "auto"  # Triton on a GPU, the reference elsewhere
    triton = "triton"
    reference = "reference"


class StreamDraw(StrEnum):
    """How often the main stream is drawn."""

    microbatch = "microbatch"
    step = "step"


class EngineName(StrEnum):
    """Which library runs forward, backward and the optimizer step."""

    megatron = "megatron"
    deepspeed = "deepspeed"


class Recompute(StrEnum):
    """Which activations are computed again in the backward."""

    none = "none"
    selective = "selective"  # core attention
    full = "full"  # whole layers


class LayerSpec(StrEnum):
    """Which layers megatron-core builds the model from."""

    auto = "auto"  # Transformer Engine where it is installed and a GPU is used, local elsewhere
    local = "local"
    transformer_engine = "transformer_engine"


class PrecisionName(StrEnum):
    """Number format of the matrix products."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"


class Schedule(StrEnum):
    """Shape of the learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class WandbMode(StrEnum):
    """Where Weights & Biases writes."""

    online = "online"
    offline = "offline"
    off = "off"


@dataclass(kw_only=True, slots=True)
class RopeScalingConfig:
    """Llama-3 RoPE scaling; low 1, high 4 and original context 8,192 are megatron-core's and Llama 3's constants."""

    enabled: bool = False
    factor: float = 4.0  # how many times longer the context becomes


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Shape of the Llama."""

    name: str = "tiny"
    num_layers: int = 4
    hidden_size: int = 128  # M
    ffn_hidden_size: int = 384  # F, SwiGLU's inner width
    num_attention_heads: int = 4  # H
    num_kv_heads: int = 2  # H_kv
    head_dim: int = 32  # D
    vocab_size: int = 0  # 0: the tokenizer's, from the data's manifest
    vocab_divisor: int = 128  # the embedding is padded to a multiple of this times tp
    tie_embeddings: bool = True
    rope_theta: float = 500_000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    norm_eps: float = 1e-5
    init_std: float = 0.02


@dataclass(kw_only=True, slots=True)
class AttentionConfig:
    """The attention method and its constants."""

    method: Method = Method.ssa
    block_size: int = 16  # B, keys a block
    top_k: int = 16  # S, blocks a query, its own included
    score: Score = Score.softmax_sum
    gate: bool = True  # one sigmoid gate a token and head on the attention's output
    alignment_weight: float = 10.0  # alpha, on the mean over layers of the alignment loss
    sparsity_weight: float = 1.0  # SmoothL1(full, sg(sparse)) inside the alignment
    commitment_weight: float = 1.0  # SmoothL1(sg(full), sparse) inside the alignment
    full_ratio: float = 0.5  # p, probability that the full stream is the main one
    stream_draw: StreamDraw = StreamDraw.microbatch
    impl: KernelImpl = KernelImpl.auto


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Indexed binaries written by data_prep and how they become rows."""

    path: str = "???"  # folder with manifest.json
    sequence_length: int = 512  # tokens a row
    weights: dict[str, float] = field(default_factory=dict)  # share of tokens by source; empty: in proportion to their size
    isolate_documents: bool = True  # no attention across documents; positions restart at each


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Degrees of parallelism; the data-parallel one is world_size / (tp * pp * cp)."""

    tp: int = 1  # tensor
    pp: int = 1  # pipeline
    vpp: int = 1  # virtual pipeline stages a rank; 1: no interleaving
    cp: int = 1  # context
    sequence_parallel: bool = False  # shard norms and residuals over tp along the sequence
    world_size: int = 0  # processes; 0: what the launcher says (set it to plan a larger machine)


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """The library that runs a step, and what it trades memory for."""

    name: EngineName = EngineName.megatron
    layer_spec: LayerSpec = LayerSpec.auto
    recompute: Recompute = Recompute.none
    distributed_optimizer: bool = True  # shard optimizer states over dp
    overlap_grad_reduce: bool = False  # reduce gradients while the backward runs
    overlap_param_gather: bool = False  # gather parameters while the forward runs


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3  # peak
    min_lr: float = 0.0  # at the end
    schedule: Schedule = Schedule.cosine
    warmup_fraction: float = 0.01  # of all steps
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; norms are exempt
    clip_grad: float = 1.0  # global norm


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """Number formats."""

    name: PrecisionName = PrecisionName.bf16
    grad_reduce_in_fp32: bool = True  # accumulate and reduce gradients in fp32


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """Length and batch of the run."""

    total_tokens: int = 0  # tokens to train on; with steps = 0 it decides the steps (rounded up)
    steps: int = 0  # optimizer steps; 0: from total_tokens
    global_batch_tokens: int = 0  # tokens an optimizer step, over all ranks
    micro_batch_size: int = 1  # rows a rank and microbatch
    stop_at_step: int = 0  # leave after this step with a checkpoint, the schedule unchanged; 0: run to the end


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out evaluation, in every mode that the method has."""

    interval: int = 0  # steps between evaluations; 0: only at the end
    rows: int = 64  # held-out rows; 0: all of them
    at_start: bool = True  # evaluate before the first step too


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints and where a run starts from."""

    interval: int = 0  # steps between checkpoints; 0: only at the end
    keep: int = 2  # newest complete checkpoints that are kept
    init_from: str = ""  # checkpoint folder whose weights start a new run (step 0, fresh optimizer)


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases. The key comes from WANDB_API_KEY or `wandb login`, never from here."""

    mode: WandbMode = WandbMode.off
    project: str = "ssa_pretrain"
    entity: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What a run says and where."""

    interval: int = 10  # steps between console lines; metrics.jsonl has every step
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run."""

    name: str = "run"
    output_dir: str = "outputs/run"
    seed: int = 1234
    dry_run: bool = False  # print the plan and leave
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
