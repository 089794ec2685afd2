"""The typed configuration of a run: one dataclass per section, one line per field with its meaning and unit.

Hydra composes YAML from `conf/`; the command line turns the result into a `Config` and reports every problem at once.
From then on the configuration is a plain value that nothing changes. Each section checks itself (`problems`). Rules
across sections are in rules/. Imports neither torch nor Hydra.
"""

from dataclasses import dataclass, field
from typing import Any

from ssa_pretrain.config.choices import (
    AdamImpl,
    EngineName,
    Fp8Recipe,
    KernelImpl,
    LayerSpec,
    Method,
    PrecisionName,
    Recompute,
    Schedule,
    Score,
    StreamDraw,
    Timestamps,
    WandbMode,
)
from ssa_pretrain.problems import Problem, above_zero, at_least, between, divisors, join, nearest


@dataclass(kw_only=True, slots=True)
class RopeScalingConfig:
    """Llama-3 RoPE scaling; low 1, high 4 and original context 8,192 are megatron-core's and Llama 3's constants."""

    enabled: bool = False  # stretch RoPE to a longer context, as Llama 3.1 did
    factor: float = 4.0  # how many times longer the context becomes

    def problems(self) -> list[Problem]:
        """Returns what is wrong with this section alone."""
        return between("model.rope_scaling", self, 1.0, 64.0, "factor") if self.enabled else []


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Shape of the Llama."""

    name: str = "tiny"  # what the banner and the plan call the shape
    num_layers: int = 4  # transformer layers
    hidden_size: int = 128  # M, width of the residual stream
    ffn_hidden_size: int = 384  # F, SwiGLU's inner width
    num_attention_heads: int = 4  # H, query heads
    num_kv_heads: int = 2  # H_kv, key and value heads; each serves num_attention_heads / num_kv_heads query heads
    head_dim: int = 32  # D, width of one head
    vocab_size: int = 0  # 0: the tokenizer's, from the data's manifest
    vocab_divisor: int = 128  # the embedding is padded to a multiple of this, the same on every layout
    tie_embeddings: bool = True  # the output layer shares the embedding's weights
    rope_theta: float = 500_000.0  # base of RoPE's wavelengths
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    init_std: float = 0.02  # standard deviation of the initial weights

    @property
    def query_width(self) -> int:
        """Width of all query heads, H * D; also that of the attention's output."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all keys, or of all values: G * D."""
        return self.num_kv_heads * self.head_dim

    def qkv_width(self, *, gate: bool) -> int:
        """Returns the width of the projection to queries, keys, values and, with `gate`, one gate per query head."""
        return self.query_width + 2 * self.kv_width + (self.num_attention_heads if gate else 0)

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Returns the number of rows of the embedding for a vocabulary."""
        return -(-vocab_size // self.vocab_divisor) * self.vocab_divisor

    def problems(self) -> list[Problem]:
        """Returns what is wrong with this section alone."""
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_kv_heads", "vocab_divisor")
        found = [
            *at_least("model", self, 1, *sizes),
            *at_least("model", self, 2, "head_dim"),
            *at_least("model", self, 0, "vocab_size"),
            *above_zero("model", self, "rope_theta", "norm_eps", "init_std"),
            *self.rope_scaling.problems(),
        ]
        if self.head_dim > 2 and self.head_dim % 2:
            advice = f"try {self.head_dim - 1} or {self.head_dim + 1}"
            found.append(Problem("model.head_dim", self.head_dim, "must be even: RoPE turns pairs", advice))
        heads = self.num_attention_heads
        if heads > 0 and self.num_kv_heads > 0 and heads % self.num_kv_heads:
            advice = f"try {join(nearest(self.num_kv_heads, divisors(heads)))}"
            rule = f"must divide model.num_attention_heads={heads}"
            reads = ("model.num_attention_heads",)
            found.append(Problem("model.num_kv_heads", self.num_kv_heads, rule, advice, reads))
        return found


@dataclass(kw_only=True, slots=True)
class AttentionConfig:
    """The attention method and its constants."""

    method: Method = Method.ssa
    block_size: int = 16  # B, keys per block
    top_k: int = 16  # S, blocks per query, its own included
    score: Score = Score.softmax_sum
    gate: bool = True  # one sigmoid gate per token and head on the attention's output
    alignment_weight: float = 10.0  # alpha, on the mean over layers of the alignment loss
    sparsity_weight: float = 1.0  # SmoothL1(full, sg(sparse)) inside the alignment
    commitment_weight: float = 1.0  # SmoothL1(sg(full), sparse) inside the alignment
    full_ratio: float = 0.5  # p, probability that the full stream is the main one
    stream_draw: StreamDraw = StreamDraw.microbatch
    counterpart_share: float = (
        1.0  # r, share of the queries whose other stream is computed too, for the alignment; 1: the paper
    )
    impl: KernelImpl = KernelImpl.auto

    def problems(self) -> list[Problem]:
        """Returns what is wrong with this section alone."""
        shares = ("full_ratio", "counterpart_share")
        found = at_least("attention", self, 1, "top_k") + between("attention", self, 0.0, 1.0, *shares)
        found += at_least("attention", self, 0.0, "alignment_weight", "sparsity_weight", "commitment_weight")
        sizes = (16, 32, 64, 128)
        if self.block_size not in sizes:
            advice = f"try {join(nearest(self.block_size, sizes))}"
            found.append(Problem("attention.block_size", self.block_size, f"must be {join(sizes)} keys", advice))
        elif self.score is Score.official_compat and not 2 <= self.top_k <= self.block_size:
            rule = f"must lie in 2 to attention.block_size={self.block_size} under attention.score=official_compat"
            advice = f"try {self.block_size}"
            found.append(Problem("attention.top_k", self.top_k, rule, advice, ("attention.block_size",)))
        return found


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Indexed binaries written by data_prep and how they become rows."""

    path: str = "???"  # folder of a dataset that data_prep wrote (with manifest.json)
    sequence_length: int = 512  # tokens per row
    weights: dict[str, float] = field(
        default_factory=dict
    )  # tokens by source; empty: the dataset's, or all rows equally often
    isolate_documents: bool = True  # no attention across documents; positions restart at each

    def problems(self) -> list[Problem]:
        """Returns what is wrong with this section alone."""
        found = at_least("data", self, 1, "sequence_length")
        negative = {f"data.weights.{name}": weight for name, weight in self.weights.items() if weight < 0}
        rule, advice = "must not be negative", "0 leaves the source out"
        found += [Problem(key, weight, rule, advice) for key, weight in negative.items()]
        if self.weights and sum(self.weights.values()) <= 0:
            advice = "try data.weights={} for all sources in proportion"
            found.append(Problem("data.weights", None, "must have a positive sum", advice))
        return found


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Degrees of parallelism; the data-parallel one is world_size / (tp * pp * cp)."""

    tp: int = 1  # tensor parallel: ranks that share each layer's matrices
    pp: int = 1  # pipeline parallel: stages that the layers are dealt out to
    vpp: int = 1  # virtual pipeline stages per rank; 1: no interleaving
    cp: int = 1  # context parallel: a row's tokens over ranks, keys and values gathered in each layer
    sequence_parallel: bool = False  # shard norms and residuals over tp along the sequence
    world_size: int = 0  # processes; 0: what the launcher says (set it to plan a larger machine)
    timeout_minutes: float = 10.0  # that a rank waits for the others in a collective before it ends the run

    def problems(self) -> list[Problem]:
        """Returns what is wrong with this section alone."""
        found = at_least("parallel", self, 1, "tp", "pp", "vpp", "cp") + at_least("parallel", self, 0, "world_size")
        found += between("parallel", self, 0.1, 1440.0, "timeout_minutes")
        if self.vpp > 1 and self.pp in (1, 2):
            rule = "interleaves pipeline stages, and parallel.pp=1 has none"
            if self.pp == 2:
                rule = "is refused at parallel.pp=2, where megatron-core's interleaved schedule trains wrongly"
            advice = "try parallel.vpp=1 or parallel.pp=4"
            found.append(Problem("parallel.vpp", self.vpp, rule, advice, ("parallel.pp",)))
        if self.sequence_parallel and self.tp == 1:
            rule = "shards the sequence over tensor-parallel ranks and needs more than one (parallel.tp=1)"
            advice = "try parallel.sequence_parallel=false or parallel.tp=2"
            found.append(Problem("parallel.sequence_parallel", self.sequence_parallel, rule, advice, ("parallel.tp",)))
        return found


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """The library that runs a step, and what it trades memory for."""

    name: EngineName = EngineName.megatron
    layer_spec: LayerSpec = LayerSpec.auto
    recompute: Recompute = Recompute.none
    distributed_optimizer: bool = True  # shard optimizer states over dp; engine=deepspeed: see deepspeed.zero_stage
    overlap_grad_reduce: bool = False  # reduce gradients while the backward runs
    overlap_param_gather: bool = False  # gather parameters while the forward runs; engine=deepspeed: always in stage 3
    fuse_gradient_accumulation: bool = True  # add weight gradients into their fp32 buffers in the matrix product itself
    overlap_tp: bool = (
        False  # tensor-parallel communication beside the matrix products (Transformer Engine's user buffers)
    )

    def problems(self) -> list[Problem]:
        """Returns what is wrong with this section alone."""
        found = []
        needed = [name for name in ("distributed_optimizer", "overlap_grad_reduce") if not getattr(self, name)]
        if self.overlap_param_gather and needed and self.name is EngineName.megatron:
            rule = f"needs {join((f'engine.{name}=true' for name in needed), 'and')}"
            reads = tuple(f"engine.{name}" for name in needed)
            advice = "try engine.overlap_param_gather=false"
            found.append(Problem("engine.overlap_param_gather", self.overlap_param_gather, rule, advice, reads))
        return found


@dataclass(kw_only=True, slots=True)
class DeepSpeedConfig:
    """DeepSpeed's own choices."""

    zero_stage: int = 1  # 0: nothing is sharded over dp, 1: optimizer states, 2: and gradients, 3: and weights
    offload_optimizer: bool = False  # optimizer states and step on the CPU, as the paper trained (stages 1, 2, 3)
    adam: AdamImpl = AdamImpl.torch
    contiguous_gradients: bool = True  # copy gradients into one buffer as they come
    reduce_bucket_size: int = 500_000_000  # numbers reduced at a time
    allgather_bucket_size: int = 500_000_000  # numbers gathered at a time
    flops_profiler_step: int = 0  # step whose forward DeepSpeed profiles into output_dir/flops_profile.txt; 0: none
    extra: dict[str, Any] = field(default_factory=dict)  # further keys of DeepSpeed's configuration, as it spells them

    def problems(self) -> list[Problem]:
        """Returns what is wrong with this section alone."""
        found = at_least("deepspeed", self, 0, "flops_profiler_step")
        found += above_zero("deepspeed", self, "reduce_bucket_size", "allgather_bucket_size")
        if self.zero_stage not in (0, 1, 2, 3):
            advice = f"try {min(3, max(0, self.zero_stage))}"
            found.append(Problem("deepspeed.zero_stage", self.zero_stage, "must be 0, 1, 2 or 3", advice))
        if self.offload_optimizer and self.zero_stage == 0:
            rule = "moves what a ZeRO stage shards, and deepspeed.zero_stage=0 shards nothing"
            reads = ("deepspeed.zero_stage",)
            found.append(Problem("deepspeed.offload_optimizer", True, rule, "try deepspeed.zero_stage=2", reads))
        return found


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3  # peak learning rate, reached after the warm-up
    min_lr: float = 0.0  # learning rate at the end of the schedule
    schedule: Schedule = Schedule.cosine
    warmup_fraction: float = 0.01  # share of all steps in which the learning rate rises from 0 to its peak
    beta1: float = 0.9  # decay of AdamW's mean of the gradients
    beta2: float = 0.95  # decay of AdamW's mean of their squares
    eps: float = 1e-8  # added to AdamW's denominator
    weight_decay: float = 0.1  # AdamW's decoupled decay, on matrices; norms are exempt
    clip_grad: float = 1.0  # largest global norm of the gradients; 0: no clipping

    def problems(self) -> list[Problem]:
        """Returns what is wrong with this section alone."""
        found = above_zero("optim", self, "lr", "eps") + between("optim", self, 0.0, 1.0, "warmup_fraction")
        found += at_least("optim", self, 0.0, "min_lr", "weight_decay", "clip_grad")
        if self.lr > 1.0:
            found.append(Problem("optim.lr", self.lr, "must be at most 1", "AdamW's usual peak is 1e-4 to 1e-2"))
        if 0 < self.lr < self.min_lr:
            rule = f"must not exceed optim.lr={self.lr}"
            found.append(Problem("optim.min_lr", self.min_lr, rule, f"try {self.lr / 10:g} or 0", ("optim.lr",)))
        for name, usual in (("beta1", 0.9), ("beta2", 0.95)):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                found.append(Problem(f"optim.{name}", value, "must be at least 0 and below 1", f"try {usual}"))
        return found


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """Number formats."""

    name: PrecisionName = PrecisionName.bf16
    grad_reduce_in_fp32: bool = True  # accumulate and reduce gradients in fp32
    fp8_recipe: Fp8Recipe = Fp8Recipe.tensorwise  # read under precision fp8


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """Length and batch of the run."""

    total_tokens: int = 0  # tokens to train on; with steps = 0 it decides the steps (rounded up)
    steps: int = 0  # optimizer steps; 0: from total_tokens
    global_batch_tokens: int = 0  # tokens per optimizer step, over all ranks
    micro_batch_size: int = 1  # rows per rank and microbatch
    stop_at_step: int = 0  # leave after this step with a checkpoint, the schedule unchanged; 0: run to the end

    def problems(self) -> list[Problem]:
        """Returns what is wrong with this section alone."""
        found = at_least("training", self, 0, "total_tokens", "steps", "stop_at_step")
        found += at_least("training", self, 1, "micro_batch_size")
        if self.global_batch_tokens < 1:
            rule = "must be the tokens of an optimizer step over all ranks"
            advice = "try 8192"
            found.append(Problem("training.global_batch_tokens", self.global_batch_tokens, rule, advice))
        both = ("training.total_tokens", "training.steps")
        if self.steps == 0 and self.total_tokens == 0:
            advice = "try training.steps=300, or start from an experiment: experiment=quickstart"
            rule = "and training.total_tokens=0 leave the length open"
            found.append(Problem("training.steps", 0, rule, advice, both))
        if self.steps > 0 and self.total_tokens > 0:
            rule = f"and training.total_tokens={self.total_tokens} are two lengths"
            found.append(
                Problem("training.steps", self.steps, rule, "try training.steps=0 or training.total_tokens=0", both)
            )
        return found


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out evaluation, in both modes."""

    interval: int = 0  # steps between evaluations; 0: only at the end
    rows: int = 64  # held-out rows, spread over the split; 0: all of it, the last row of each source padded
    at_start: bool = True  # evaluate before the first step too

    def problems(self) -> list[Problem]:
        """Returns what is wrong with this section alone."""
        return at_least("evaluation", self, 0, "interval", "rows")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints and where a run starts from."""

    interval: int = 0  # steps between checkpoints; 0: only at the end
    keep: int = 2  # newest intact checkpoints that are kept
    weights: bool = True  # put the weights into each checkpoint in the common format too, which both engines read
    init_from: str = ""  # whose weights start a new run (step 0, fresh optimizer): a run's folder, a checkpoint's or one of common weights

    def problems(self) -> list[Problem]:
        """Returns what is wrong with this section alone."""
        return at_least("checkpoint", self, 0, "interval") + at_least("checkpoint", self, 1, "keep")


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases. The key comes from WANDB_API_KEY or `wandb login`, never from here."""

    mode: WandbMode = WandbMode.off
    project: str = "ssa_pretrain"  # W&B project
    entity: str = ""  # W&B user or team; empty: the account's default
    group: str = ""  # W&B group that the run appears in; empty: none
    tags: list[str] = field(default_factory=list)  # W&B tags


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What a run prints and where."""

    interval: int = 10  # steps between console lines; metrics.jsonl has every step
    timestamps: Timestamps = Timestamps.off  # before every console line
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def problems(self) -> list[Problem]:
        """Returns what is wrong with this section alone."""
        found = at_least("logging", self, 1, "interval")
        if self.wandb.mode is not WandbMode.off and not self.wandb.project:
            found.append(Problem("logging.wandb.project", "", "must name a project", "try ssa_pretrain"))
        return found


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    """Traces of single steps, into the run's folder `profile`."""

    at: list[int] = field(default_factory=list)  # steps that are profiled, counted as in metrics.jsonl, from 1
    memory: bool = True  # with a snapshot of the GPU's memory

    def problems(self) -> list[Problem]:
        """Returns what is wrong with this section alone."""
        low = [step for step in self.at if step < 1]
        return [Problem("profile.at", self.at, "must count steps from 1", "try 'profile.at=[10]'")] if low else []


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run."""

    name: str = "run"  # the run's name, in the banner and in W&B
    output_dir: str = (
        "outputs/run"  # folder of the run: configuration, metrics, checkpoints; the same folder again resumes
    )
    seed: int = 1234  # of initial weights, order of the rows and drawn streams
    dry_run: bool = False  # print the plan and leave
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
        """Returns what is wrong within each section; rules across sections are in rules.py."""
        empty = {name: getattr(self, name) for name in ("name", "output_dir") if not getattr(self, name).strip()}
        found = [Problem(name, value, "must not be empty", "try run") for name, value in empty.items()]
        if not 0 <= self.seed < 2**32:
            found.append(Problem("seed", self.seed, "must lie in 0 to 4294967295", "try 1234"))
        shape = (self.model, self.attention, self.data, self.parallel, self.engine, self.deepspeed, self.optim)
        for section in (*shape, self.training, self.evaluation, self.checkpoint, self.logging, self.profile):
            found += section.problems()
        return found
