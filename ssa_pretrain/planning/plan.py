"""The plan of a run: the steps, layout and sizes of a configuration on a number of processes. Pure arithmetic, without torch or a GPU.

The trainer takes steps, layout and batch from a `Plan`; table.py prints it for people.
"""

from dataclasses import dataclass

from ssa_pretrain.config import Batches, Config, batches
from ssa_pretrain.planning.flops import RowFlops, row_flops
from ssa_pretrain.planning.memory import activations, count_parameters, optimizer_shards, state_bytes
from ssa_pretrain.settings.problems import ConfigError, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The numbers of a run.

    Attributes:
        world_size, tp, pp, vpp, cp, dp: processes and degrees of parallelism; dp = world_size / (tp * pp * cp).
        num_microbatches: forward and backward passes per rank and step; of the largest batch, if the batch changes.
        rows_per_step, tokens_per_step: over all ranks; likewise.
        steps, warmup_steps: optimizer steps of the schedule and of its warm-up.
        total_tokens: of all steps.
        batches: the tokens of each step.
        vocab_size, padded_vocab_size: size of the vocabulary, and rows of the embedding.
        parameters: of the whole model, with padding; tied embeddings count once.
        parameters_per_rank: of the rank that holds most.
        weight_bytes, gradient_bytes, optimizer_bytes, activation_bytes: estimates for that rank.
        checkpoint_bytes: estimate of one checkpoint, the files of all ranks.
        row: floating-point operations of a row that holds one document.
        optimizer_shards: ranks over which the optimizer's states are sharded.
    """

    world_size: int
    tp: int
    pp: int
    vpp: int
    cp: int
    dp: int
    num_microbatches: int
    rows_per_step: int
    tokens_per_step: int
    steps: int
    warmup_steps: int
    total_tokens: int
    vocab_size: int
    padded_vocab_size: int
    parameters: int
    parameters_per_rank: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    checkpoint_bytes: int
    row: RowFlops
    batches: Batches
    optimizer_shards: int = 1

    @property
    def memory_bytes(self) -> int:
        """Estimate of the memory in use on the rank that holds most."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations per token, forward and backward, as MFU counts them."""
        return self.row.model * self.rows_per_step / self.tokens_per_step

    def tokens_before(self, step: int) -> int:
        """Returns the tokens of the first `step` steps."""
        return self.batches.tokens_before(step)

    def rows_before(self, step: int) -> int:
        """Returns the rows of the first `step` steps: the place of the data."""
        return self.tokens_before(step) * self.rows_per_step // self.tokens_per_step

    def microbatches_at(self, step: int) -> int:
        """Returns the forward and backward passes per rank of the step after `step` steps."""
        return self.batches.tokens_at(step) * self.num_microbatches // self.tokens_per_step

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """Returns a rank's index along tp, cp, dp and pp, in megatron-core's order: tp varies fastest, pp slowest."""
        rank, tp = divmod(rank, self.tp)
        rank, cp = divmod(rank, self.cp)
        pp, dp = divmod(rank, self.dp)
        return tp, cp, dp, pp


def make_plan(config: Config, world_size: int, vocab_size: int | None = None) -> Plan:
    """Returns the plan of a checked configuration.

    Args:
        config: a configuration without problems.
        world_size: processes.
        vocab_size: the tokenizer's vocabulary, used if model.vocab_size=0.

    Raises:
        ConfigError: the processes or the batch do not fit the layout, or the vocabulary is unknown.
    """
    parallel, training, length = config.parallel, config.training, config.data.sequence_length
    unit = parallel.tp * parallel.pp * parallel.cp
    if world_size < 1 or world_size % unit:
        rule = f"must be a multiple of tp * pp * cp = {unit}"
        raise ConfigError([Problem("world_size", world_size, rule, f"try {unit}")])
    sizes, dp = batches(training), world_size // unit
    per_microbatch = dp * training.micro_batch_size * length
    if tokens := next((size for _, size in sizes.phases if size < 1 or size % per_microbatch), 0):
        factors = f"{length} * {training.micro_batch_size} * {dp}"
        rule = f"must be a multiple of sequence_length * micro_batch_size * dp = {factors}"
        raise ConfigError([Problem("training.global_batch_tokens", tokens, rule)])
    vocab = config.model.vocab_size or vocab_size
    if not vocab:
        advice = "prepare the data first, or try model.vocab_size=4096"
        raise ConfigError([Problem("model.vocab_size", 0, "is the tokenizer's, but no data was found", advice)])
    steps = training.num_steps()
    padded = config.model.padded_vocab_size(vocab)
    total, largest = count_parameters(config, padded)
    tokens = max(size for _, size in sizes.phases)
    num_microbatches = tokens // per_microbatch
    return Plan(
        world_size=world_size,
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        dp=dp,
        num_microbatches=num_microbatches,
        rows_per_step=tokens // length,
        tokens_per_step=tokens,
        steps=steps,
        warmup_steps=round(config.optim.warmup_fraction * steps),
        total_tokens=sizes.tokens_before(steps),
        vocab_size=vocab,
        padded_vocab_size=padded,
        parameters=total,
        parameters_per_rank=largest,
        **state_bytes(config, total, largest, dp * parallel.cp),
        activation_bytes=activations(config, padded, num_microbatches, largest, dp).peak,
        batches=sizes,
        optimizer_shards=optimizer_shards(config, dp * parallel.cp),
        row=row_flops(config.model, config.attention, [length], vocab),
    )
