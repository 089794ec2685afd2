"""The typed configuration of a run: one dataclass per section, one line per field with its meaning and unit.

Hydra composes YAML from `conf/`; the command line turns the result into a `Config` and reports every problem at once.
From then on the configuration is a plain value that nothing changes. Each section checks itself (`problems`). Rules
across sections are in rules/. Imports neither torch nor Hydra.
"""

from dataclasses import dataclass, field
from typing import Any

from ssa_pretrain.config.checkpoint import CheckpointConfig
from ssa_pretrain.config.choices import (
    AdamImpl,
    EngineName,
    Fp8Recipe,
    KernelImpl,
    LayerSpec,
    Method,
    OptimizerName,
    PrecisionName,
    Recompute,
    Schedule,
    Score,
    Shape,
    StreamDraw,
)
from ssa_pretrain.config.data import DataConfig
from ssa_pretrain.config.evaluation import EvaluationConfig
from ssa_pretrain.config.indexer import IndexerConfig
from ssa_pretrain.config.optimizers import MuonConfig, MupConfig
from ssa_pretrain.config.schedule import BatchStepConfig, PieceConfig, batch_problems, batches, schedule_problems
from ssa_pretrain.config.trackers import LoggingConfig
from ssa_pretrain.settings.problems import Problem, above_zero, at_least, between, divisors, join, nearest
from ssa_pretrain.step_ranges import are_valid


@dataclass(kw_only=True, slots=True)
class RopeScalingConfig:
    """Llama-3 RoPE scaling, with the constants of Llama 3 and megatron-core: low 1, high 4, original context 8,192."""

    enabled: bool = False  # stretch RoPE to a longer context, as Llama 3.1 does
    factor: float = 4.0  # how many times longer the context becomes

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        return between("model.rope_scaling", self, 1.0, 64.0, "factor") if self.enabled else []


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Shape of the Llama."""

    name: str = "tiny"  # name of the shape in the banner and the plan
    num_layers: int = 4  # transformer layers
    hidden_size: int = 128  # M, width of the residual stream
    ffn_hidden_size: int = 384  # F, inner width of SwiGLU
    num_attention_heads: int = 4  # H, query heads
    num_kv_heads: int = 2  # G, key and value heads; each serves num_attention_heads / num_kv_heads query heads
    head_dim: int = 32  # D, width of a head
    vocab_size: int = 0  # V, size of the vocabulary; 0: the tokenizer's, from the manifest of the data
    vocab_divisor: int = 128  # the embedding is padded to a multiple of this number of rows, the same on every layout
    tie_embeddings: bool = True  # the output layer shares the weights of the embedding
    rope_theta: float = 500_000.0  # base of the RoPE wavelengths
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    qk_norm: bool = False  # RMSNorm with a learnt weight over each query head and key, before RoPE, as in Qwen3
    init_std: float = 0.02  # standard deviation of the initial weights
    mup: MupConfig = field(default_factory=MupConfig)

    @property
    def query_width(self) -> int:
        """Width of all query heads, H * D; also that of the attention's output."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all keys, or of all values: G * D."""
        return self.num_kv_heads * self.head_dim

    def index_width(self, attention: "AttentionConfig") -> int:
        """Returns the width of the projection to index queries and keys: 0 without a trained scorer."""
        return (attention.indexer.heads + 1) * self.kv_width if attention.score is Score.indexer else 0

    def qkv_width(self, *, gate: bool) -> int:
        """Returns the width of the projection to queries, keys, values and, with `gate`, one gate per query head."""
        return self.query_width + 2 * self.kv_width + (self.num_attention_heads if gate else 0)

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Returns the number of rows of the embedding for a vocabulary."""
        return -(-vocab_size // self.vocab_divisor) * self.vocab_divisor

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_kv_heads", "vocab_divisor")
        found = [
            *at_least("model", self, 1, *sizes),
            *at_least("model", self, 2, "head_dim"),
            *at_least("model", self, 0, "vocab_size"),
            *above_zero("model", self, "rope_theta", "norm_eps", "init_std"),
            *self.rope_scaling.problems(),
            *self.mup.problems(),
        ]
        if self.head_dim > 2 and self.head_dim % 2:
            advice = f"try {self.head_dim - 1} or {self.head_dim + 1}"
            found.append(Problem("model.head_dim", self.head_dim, "must be even: RoPE rotates pairs", advice))
        heads = self.num_attention_heads
        if heads > 0 and self.num_kv_heads > 0 and heads % self.num_kv_heads:
            advice = f"try {join(nearest(self.num_kv_heads, divisors(heads)))}"
            rule, reads = f"must divide model.num_attention_heads={heads}", ("model.num_attention_heads",)
            found.append(Problem("model.num_kv_heads", self.num_kv_heads, rule, advice, reads))
        return found


@dataclass(kw_only=True, slots=True)
class AttentionConfig:
    """The attention method and its constants."""

    method: Method = Method.ssa
    block_size: int = 16  # K, keys per block
    top_k: int = 16  # N, blocks per query, including its own
    score: Score = Score.softmax_sum
    key_convolution: int = 0  # W, tokens of the causal convolution over keys: 3 or 5 (FlashMoBA), 0 for none
    gate: bool = True  # multiply the attention output by a sigmoid gate per token and query head
    alignment_weight: float = 10.0  # alpha, weight of the alignment loss, which is a mean over layers
    sparsity_weight: float = 1.0  # weight of SmoothL1(full, sg(sparse)) in the alignment loss
    commitment_weight: float = 1.0  # weight of SmoothL1(sg(full), sparse) in the alignment loss
    full_ratio: float = 0.5  # p, probability that the full stream is the main stream
    stream_draw: StreamDraw = StreamDraw.microbatch
    counterpart_share: float = 1.0  # r, share of queries whose other stream is computed for the alignment; 1: the paper
    impl: KernelImpl = KernelImpl.auto
    indexer: IndexerConfig = field(default_factory=IndexerConfig)

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        shares = ("full_ratio", "counterpart_share")
        found = at_least("attention", self, 1, "top_k") + between("attention", self, 0.0, 1.0, *shares)
        found += at_least("attention", self, 0.0, "alignment_weight", "sparsity_weight", "commitment_weight")
        found += self.indexer.problems()
        sizes = (16, 32, 64, 128)
        if self.block_size not in sizes:
            advice = f"try {join(nearest(self.block_size, sizes))}"
            found.append(Problem("attention.block_size", self.block_size, f"must be {join(sizes)} keys", advice))
        elif self.score is Score.official_compat and not 2 <= self.top_k <= self.block_size:
            rule = f"must lie in 2 to attention.block_size={self.block_size} under attention.score=official_compat"
            reads = ("attention.block_size",)
            found.append(Problem("attention.top_k", self.top_k, rule, f"try {self.block_size}", reads))
        return found


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Degrees of parallelism; the data-parallel degree is world_size / (tp * pp * cp)."""

    tp: int = 1  # tensor parallel: ranks that share the matrices of each layer
    pp: int = 1  # pipeline parallel: stages that the layers are split into
    vpp: int = 1  # virtual pipeline stages per rank; 1: no interleaving
    layers_on_last_stage: int = (
        0  # layers of the last pipeline stage, which has the output layer; 0: as many as the others
    )
    cp: int = 1  # context parallel: ranks that share the tokens of each row; keys and values are gathered in each layer
    sequence_parallel: bool = False  # shard norms and residuals along the sequence over the tensor-parallel ranks
    world_size: int = 0  # number of processes; 0: as launched (set it to plan for a larger machine)
    timeout_minutes: float = 10.0  # minutes that a rank waits for the others in a collective before it ends the run
    hang_minutes: float = (
        0.0  # minutes that a training step may take before the rank that hangs is named and the run ends; 0: measured
    )

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        found = at_least("parallel", self, 1, "tp", "pp", "vpp", "cp") + at_least(
            "parallel", self, 0, "world_size", "layers_on_last_stage"
        )
        found += between("parallel", self, 0.1, 1440.0, "timeout_minutes") + at_least(
            "parallel", self, 0.0, "hang_minutes"
        )
        if self.hang_minutes > 0.0 and self.hang_minutes >= self.timeout_minutes:
            rule = f"must be less than parallel.timeout_minutes={self.timeout_minutes}, or the collective times out first and names no rank"
            advice = f"try {self.timeout_minutes / 2:g}, or 0 for 20 times a usual step"
            reads = ("parallel.timeout_minutes",)
            found.append(Problem("parallel.hang_minutes", self.hang_minutes, rule, advice, reads))
        if self.vpp > 1 and self.pp == 1:
            rule = "interleaves pipeline stages, but parallel.pp=1 has only one"
            advice = "try parallel.vpp=1 or parallel.pp=2"
            found.append(Problem("parallel.vpp", self.vpp, rule, advice, ("parallel.pp",)))
        if self.sequence_parallel and self.tp == 1:
            rule = "shards the sequence over tensor-parallel ranks, but parallel.tp=1 has only one"
            advice = "try parallel.sequence_parallel=false or parallel.tp=2"
            found.append(Problem("parallel.sequence_parallel", self.sequence_parallel, rule, advice, ("parallel.tp",)))
        return found


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """The library that runs a step, with its options for memory and overlap."""

    name: EngineName = EngineName.megatron
    layer_spec: LayerSpec = LayerSpec.auto
    recompute: Recompute = Recompute.none
    distributed_optimizer: bool = True  # shard optimizer states over dp; engine=deepspeed: see deepspeed.zero_stage
    overlap_grad_reduce: bool = False  # reduce gradients during the backward pass
    overlap_param_gather: bool = False  # gather parameters during the forward; engine=deepspeed: always in stage 3
    fuse_gradient_accumulation: bool = True  # add weight gradients to their fp32 buffers within the matrix product
    overlap_tp: bool = False  # overlap tensor-parallel communication with matrix products (TE's user buffers)

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        needed = [name for name in ("distributed_optimizer", "overlap_grad_reduce") if not getattr(self, name)]
        if not (self.overlap_param_gather and needed and self.name is EngineName.megatron):
            return []
        rule = f"needs {join((f'engine.{name}=true' for name in needed), 'and')}"
        reads = tuple(f"engine.{name}" for name in needed)
        return [Problem("engine.overlap_param_gather", True, rule, "try engine.overlap_param_gather=false", reads)]


@dataclass(kw_only=True, slots=True)
class DeepSpeedConfig:
    """Settings of engine=deepspeed only. Batch, clipping, precision, schedule and overlap come from their own sections."""

    zero_stage: int = 1  # ZeRO stage; sharded over dp: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights
    offload_optimizer: bool = False  # optimizer states and step on the CPU, as in the paper (ZeRO stages 1 to 3)
    adam: AdamImpl = AdamImpl.torch
    contiguous_gradients: bool = True  # copy gradients into one buffer as they are computed
    reduce_bucket_size: int = 500_000_000  # numbers per reduction
    allgather_bucket_size: int = 500_000_000  # numbers per gather
    flops_profiler_step: int = 0  # step whose forward is profiled into output_dir/flops_profile.txt; 0: none
    extra: dict[str, Any] = field(default_factory=dict)  # more keys of DeepSpeed's own configuration, under its names

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        found = at_least("deepspeed", self, 0, "flops_profiler_step")
        found += above_zero("deepspeed", self, "reduce_bucket_size", "allgather_bucket_size")
        if self.zero_stage not in (0, 1, 2, 3):
            advice = f"try {min(3, max(0, self.zero_stage))}"
            found.append(Problem("deepspeed.zero_stage", self.zero_stage, "must be 0, 1, 2 or 3", advice))
        if self.offload_optimizer and self.zero_stage == 0:
            rule = "needs sharded optimizer states, but deepspeed.zero_stage=0 shards nothing"
            reads = ("deepspeed.zero_stage",)
            found.append(Problem("deepspeed.offload_optimizer", True, rule, "try deepspeed.zero_stage=2", reads))
        return found


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The optimizer and the learning-rate schedule."""

    name: OptimizerName = OptimizerName.adamw
    lr: float = 1e-3  # peak learning rate, reached after the warm-up
    min_lr: float = 0.0  # learning rate at the end of the schedule
    schedule: Schedule = Schedule.cosine
    warmup_fraction: float = 0.01  # fraction of all steps during which the learning rate rises from 0 to its peak
    decay_fraction: float = 0.2  # schedule=wsd: fraction of all steps, the last ones, in which it goes down to min_lr
    decay_shape: Shape = Shape.linear  # schedule=wsd: how it goes down
    pieces: list[PieceConfig] = field(default_factory=list)  # the whole schedule, piece by piece, in place of the above
    ema_decay: float = 0.0  # also keep a running mean of the weights, with at most this decay per step; 0: none
    beta1: float = 0.9  # decay rate of the running mean of the gradients
    beta2: float = 0.95  # decay rate of the running mean of squared gradients
    eps: float = 1e-8  # added to the denominator of the update
    weight_decay: float = 0.1  # decoupled weight decay of matrices; norms are exempt
    clip_grad: float = 1.0  # maximum global norm of the gradients; 0: no clipping
    muon: MuonConfig = field(default_factory=MuonConfig)

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        found = above_zero("optim", self, "lr", "eps") + between("optim", self, 0.0, 1.0, "warmup_fraction")
        found += at_least("optim", self, 0.0, "min_lr", "weight_decay", "clip_grad")
        found += self.muon.problems() + schedule_problems(self)
        if self.lr > 1.0:
            found.append(Problem("optim.lr", self.lr, "must be at most 1", "AdamW's usual peak is 1e-4 to 1e-2"))
        if 0 < self.lr < self.min_lr:
            rule = f"must not exceed optim.lr={self.lr}"
            found.append(Problem("optim.min_lr", self.min_lr, rule, f"try {self.lr / 10:g} or 0", ("optim.lr",)))
        for name, usual in (("beta1", 0.9), ("beta2", 0.95), ("ema_decay", 0.999)):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                found.append(Problem(f"optim.{name}", value, "must be at least 0 and below 1", f"try {usual}"))
        return found


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """Number formats."""

    name: PrecisionName = PrecisionName.bf16
    grad_reduce_in_fp32: bool = True  # accumulate and reduce gradients in fp32
    fp8_recipe: Fp8Recipe = Fp8Recipe.tensorwise  # scaling of FP8 tensors; used only with precision=fp8


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """Length of the run and size of its batches."""

    total_tokens: int = 0  # tokens to train on, rounded up to whole steps; used if steps is 0
    steps: int = 0  # optimizer steps; 0: set by total_tokens
    global_batch_tokens: int = 0  # tokens per optimizer step over all ranks
    batch_steps: list[BatchStepConfig] = field(default_factory=list)  # where the global batch changes, and to what
    micro_batch_size: int = 1  # rows per rank and microbatch
    z_loss: float = 0.0  # c of the z-loss, c * log(sum of exp(logits))^2 per label, that is added to the loss; 0: none
    replica_check_interval: int = 10  # steps between comparisons of the data ranks' copies of the weights; 0: none
    stop_at_step: int = 0  # checkpoint and exit after this step; the schedule stays the same; 0: run to the end
    max_skipped_steps: int = (
        0  # steps in a row that are not finite and skipped until the run ends; 0: the first ends it
    )
    skip_steps: list[list[int]] = field(default_factory=list)  # ranges [first, last] of steps whose data is left out
    spike_threshold: float = 8.0  # deviations above recent losses of its main stream that make a step a spike; 0: never
    rollback_on_spike: bool = False  # after a spike, go back to the newest checkpoint and leave out the data before it
    rollback_window: int = 16  # steps, up to the spike's, that a rollback leaves out

    def num_steps(self) -> int:
        """Returns the optimizer steps of the whole schedule."""
        return self.steps or batches(self).steps_for(self.total_tokens)

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        found = at_least("training", self, 0, "total_tokens", "steps", "replica_check_interval", "stop_at_step")
        found += at_least("training", self, 0, "max_skipped_steps", "spike_threshold", "z_loss")
        found += at_least("training", self, 1, "micro_batch_size", "rollback_window")
        found += batch_problems(self)
        if not are_valid(self.skip_steps):
            rule = "must be ranges [first, last] of steps, counted from 1"
            found.append(Problem("training.skip_steps", self.skip_steps, rule, "try 'training.skip_steps=[[120,130]]'"))
        if self.rollback_on_spike and not self.spike_threshold:
            rule = "needs spikes, but training.spike_threshold=0 finds none"
            advice, reads = "try training.spike_threshold=8", ("training.spike_threshold",)
            found.append(Problem("training.rollback_on_spike", True, rule, advice, reads))
        if self.global_batch_tokens < 1:
            rule, advice = "must be set to the tokens per optimizer step over all ranks", "try 8192"
            found.append(Problem("training.global_batch_tokens", self.global_batch_tokens, rule, advice))
        both = ("training.total_tokens", "training.steps")
        if self.steps == 0 and self.total_tokens == 0:
            advice = "try training.steps=300, or start from an experiment: experiment=quickstart"
            rule = "and training.total_tokens=0 leave the length of the run undefined"
            found.append(Problem("training.steps", 0, rule, advice, both))
        if self.steps > 0 and self.total_tokens > 0:
            rule = f"and training.total_tokens={self.total_tokens} both set the length of the run"
            advice = "try training.steps=0 or training.total_tokens=0"
            found.append(Problem("training.steps", self.steps, rule, advice, both))
        return found


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    """Traces of single steps, written to output_dir/profile."""

    at: list[int] = field(default_factory=list)  # steps to profile, counted from 1 as in metrics.jsonl
    memory: bool = True  # also save a snapshot of GPU memory

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        low = [step for step in self.at if step < 1]
        return [Problem("profile.at", self.at, "must be steps, counted from 1", "try 'profile.at=[10]'")] if low else []


@dataclass(kw_only=True, slots=True)
class Config:
    """A training run."""

    name: str = "run"  # name of the run, in the banner and in W&B
    output_dir: str = "outputs/run"  # folder for config, metrics and checkpoints; the same folder again resumes the run
    seed: int = 1234  # seed of the initial weights, the order of rows and the drawn streams
    dry_run: bool = False  # print the plan and exit
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def problems(self) -> list[Problem]:
        """Returns the problems within each section. Rules across sections are in rules/."""
        empty = {name: getattr(self, name) for name in ("name", "output_dir") if not getattr(self, name).strip()}
        found = [Problem(name, value, "must not be empty", "try run") for name, value in empty.items()]
        if not 0 <= self.seed < 2**32:
            found.append(Problem("seed", self.seed, "must lie in 0 to 4294967295", "try 1234"))
        shape = (self.model, self.attention, self.data, self.parallel, self.engine, self.deepspeed, self.optim)
        for section in (*shape, self.training, self.evaluation, self.checkpoint, self.logging, self.profile):
            found += section.problems()
        return found
