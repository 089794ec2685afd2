"""What the ranks of a layout send in a step, by group, and how long it takes.

A collective over k ranks moves (k - 1) / k of its tensor through each rank (twice for an all-reduce), as a ring does. Its bandwidth is NVLink's if NVLink
joins all of its ranks. Otherwise a ring over nodes enters and leaves each node once, through the network adapters of the group's ranks there: with
eight ranks per node it has eight adapters. Latencies are those that NCCL plans with: its ring over NVLink and over a network.

| group | what | when |
|---|---|---|
| tp | hidden states, gathered before and summed after each pair of products | in each layer, both directions |
| cp | keys and values, gathered; their gradients in fp32, summed | in each layer |
| pp | hidden states and their gradients, to the next and the previous stage; a tied embedding's gradients | each microbatch; once |
| dp | gradients, summed; weights, gathered (ZeRO 2: gradients, 3: also weights, each microbatch); Muon's updates under ZeRO, gathered | once per step |

The data ranks' group includes the context ranks, which have the same weights. What `overlap_grad_reduce` and `overlap_param_gather` hide is limited by
the time of the computation beside it. Hidden communication still slows that computation, since it takes processors and bandwidth of the memory:
HIDDEN_COST of its own time, an assumption that the measured runs on two GPUs agree with. No network has been measured: NETWORK_SHARE of its nominal
bandwidth is an assumption too.

Sources: megatron-core 0.16 (order of ranks, size of buckets); NCCL's tuning model (latencies per hop). Standard library only.
"""

from dataclasses import dataclass

from ssa_pretrain.config import Config, EngineName, OptimizerName, PrecisionName, Recompute
from ssa_pretrain.config.hardware import HardwareConfig
from ssa_pretrain.model.matrices import whole_shapes
from ssa_pretrain.planning.work import Rank

GIGA = 1e9
# Terms of the cost model. Tensor parallelism's includes that the products of a rank are smaller.
TENSOR, USER_BUFFERS, DATA, OTHER = (
    "tensor parallelism",
    "the same with user buffers",
    "data parallelism",
    "communication",
)
LINKS = (TENSOR, USER_BUFFERS, DATA, OTHER)
NETWORK_SHARE = 0.8  # of the adapters' nominal bandwidth
HIDDEN_COST = 0.5  # of the time of hidden communication
BASE_LATENCY, NVLINK_HOP, NETWORK_HOP = 8.4e-6, 3.4e-6, 14e-6  # seconds
SMALLEST_BUCKET, BUCKET_PER_RANK = (
    40_000_000,
    1_000_000,
)  # parameters per reduction of gradients that overlaps with the backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Ranks that communicate: `size` ranks, `stride` apart.

    Attributes:
        name: tp, cp, pp or dp.
        size: number of ranks.
        stride: distance between neighbours.
        nvlink_gpus: ranks that NVLink joins.
    """

    name: str
    size: int
    stride: int
    nvlink_gpus: int

    @property
    def per_node(self) -> int:
        """Ranks of the group that NVLink joins."""
        return min(self.size, max(1, self.nvlink_gpus // self.stride))

    @property
    def num_nodes(self) -> int:
        """Nodes, or NVLink domains, that the group spans."""
        return -(-self.size // self.per_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one group sends in a step.

    Attributes:
        group: the ranks.
        bytes: through each rank.
        calls: collectives.
        hidden: whether computation runs beside it.
    """

    group: Group
    bytes: float
    calls: float
    hidden: bool = False

    @property
    def term(self) -> str:
        """The term of the cost model."""
        if self.group.name == "tp":
            return USER_BUFFERS if self.hidden else TENSOR
        return DATA if self.group.name == "dp" else OTHER

    @property
    def cost(self) -> float:
        """The part of its time that it costs while computation hides it, 1 if none does. User buffers have a factor of their own."""
        return HIDDEN_COST if self.hidden and self.term == DATA else 1.0

    def bandwidth(self, hardware: HardwareConfig, factor: float) -> float:
        """Returns the bandwidth of the group's slowest link in bytes per second.

        Args:
            hardware: nominal bandwidths.
            factor: of the term: how many times longer than at NVLink's nominal bandwidth collectives take.
        """
        nvlink = hardware.nvlink_gb_per_s * GIGA / factor
        if self.group.num_nodes == 1:
            return nvlink
        adapters = 1 if self.group.name == "pp" else self.group.per_node
        return min(nvlink, hardware.network_gb_per_s * GIGA * NETWORK_SHARE * adapters)

    def seconds(self, hardware: HardwareConfig, factor: float) -> float:
        """Returns the time of all calls, one after another."""
        nodes, size = self.group.num_nodes, self.group.size
        hops = (0, 1) if self.group.name == "pp" else (size - nodes, nodes - 1)
        latency = BASE_LATENCY + hops[0] * NVLINK_HOP + hops[1] * NETWORK_HOP * (nodes > 1)
        return self.bytes / self.bandwidth(hardware, factor) + self.calls * latency


def communication(config: Config, hardware: HardwareConfig, rank: Rank, world_size: int) -> list[Traffic]:
    """Returns what the groups of a rank send in a step; groups of one rank send nothing and are left out."""
    found = [*_tensor(config, hardware, rank), *_context(config, hardware, rank)]
    found += [*_pipeline(config, hardware, rank, world_size), *_data(config, hardware, rank, world_size)]
    return [traffic for traffic in found if traffic.group.size > 1]


def _tensor(config: Config, hardware: HardwareConfig, rank: Rank) -> list[Traffic]:
    """Returns the traffic of tensor parallelism: four gathers or scatters per layer and direction, two more for the gradients of gathered inputs."""
    parallel = config.parallel
    group = Group(name="tp", size=parallel.tp, stride=1, nvlink_gpus=hardware.nvlink_gpus)
    forward, backward = (4, 6) if parallel.sequence_parallel else (4, 4)  # an all-reduce counts twice
    forward += 4 * (config.engine.recompute is Recompute.full)
    number = rank.layers * (forward + backward) + 4 * rank.has_output
    calls = number if parallel.sequence_parallel else number / 2
    each = _hidden(config) * (group.size - 1) / group.size
    times = rank.num_microbatches
    return [Traffic(group=group, bytes=times * number * each, calls=times * calls, hidden=config.engine.overlap_tp)]


def _context(config: Config, hardware: HardwareConfig, rank: Rank) -> list[Traffic]:
    """Returns the traffic of context parallelism: keys and values in the forward, their gradients in the backward."""
    parallel, model = config.parallel, config.model
    group = Group(name="cp", size=parallel.cp, stride=parallel.tp, nvlink_gpus=hardware.nvlink_gpus)
    tokens = config.training.micro_batch_size * config.data.sequence_length
    keys = 2 * tokens * model.kv_width / parallel.tp
    forwards = 2 if config.engine.recompute is Recompute.full else 1
    each = keys * (forwards * _size(config) + 4) * (group.size - 1) / group.size
    times = rank.num_microbatches * rank.layers
    return [Traffic(group=group, bytes=times * each, calls=times * (1 + forwards))]


def _pipeline(config: Config, hardware: HardwareConfig, rank: Rank, world_size: int) -> list[Traffic]:
    """Returns the traffic of pipeline parallelism between two neighbours, and of a tied embedding between the first and the last stage."""
    parallel, model = config.parallel, config.model
    stride = world_size // parallel.pp
    group = Group(name="pp", size=parallel.pp, stride=stride, nvlink_gpus=hardware.nvlink_gpus)
    shards = parallel.tp if parallel.sequence_parallel else 1
    number = 2 * rank.num_microbatches * parallel.vpp
    tied = 2 * 4 * rank.padded_vocab_size * model.hidden_size / parallel.tp if model.tie_embeddings else 0
    return [Traffic(group=group, bytes=number * _hidden(config) / shards + tied, calls=number + bool(tied))]


def _data(config: Config, hardware: HardwareConfig, rank: Rank, world_size: int) -> list[Traffic]:
    """Returns the traffic of data parallelism: the sum of gradients and the gather of weights."""
    parallel, engine = config.parallel, config.engine
    size = world_size // (parallel.tp * parallel.pp)
    group = Group(name="dp", size=size, stride=parallel.tp, nvlink_gpus=hardware.nvlink_gpus)
    share = rank.parameters * (size - 1) / size
    gradient = 4 if config.precision.grad_reduce_in_fp32 or config.precision.name is PrecisionName.fp32 else 2
    weight = _size(config)
    if engine.name is EngineName.deepspeed:
        stage, times = config.deepspeed.zero_stage, rank.num_microbatches
        reduces, gathers = (times if stage >= 2 else 1), (2 * times if stage == 3 else 1)
        number = rank.layers * 7 if stage == 3 else 1
        bytes_ = share * (reduces * gradient + gathers * weight)
        reduce = Traffic(
            group=group, bytes=bytes_, calls=number * (reduces + gathers), hidden=engine.overlap_grad_reduce
        )
        gathers_updates = stage > 0 and config.optim.name is OptimizerName.muon
        return [reduce, _matrices(config, rank, group)] if gathers_updates else [reduce]
    calls = -(-rank.parameters // max(SMALLEST_BUCKET, BUCKET_PER_RANK * size)) if engine.overlap_grad_reduce else 1
    sums = 1 if engine.distributed_optimizer and config.optim.name is OptimizerName.adamw else 2  # Muon: to all ranks
    reduce = Traffic(group=group, bytes=sums * share * gradient, calls=calls, hidden=engine.overlap_grad_reduce)
    if not engine.distributed_optimizer:
        return [reduce]
    return [reduce, Traffic(group=group, bytes=share * weight, calls=calls, hidden=engine.overlap_param_gather)]


def _matrices(config: Config, rank: Rank, group: Group) -> Traffic:
    """Returns the traffic of Muon under ZeRO: each matrix's update, gathered before it is orthogonalised."""
    shapes = whole_shapes(config).values()
    elements = rank.layers * sum(rows * columns for rows, columns in shapes) / config.parallel.tp
    moved = elements * _size(config) * (group.size - 1) / group.size
    return Traffic(group=group, bytes=moved, calls=rank.layers * len(shapes))


def _size(config: Config) -> int:
    """Returns the bytes of an activation or a weight."""
    return 4 if config.precision.name is PrecisionName.fp32 else 2


def _hidden(config: Config) -> float:
    """Returns the bytes of a microbatch's hidden states on a context rank."""
    tokens = config.training.micro_batch_size * config.data.sequence_length / config.parallel.cp
    return tokens * config.model.hidden_size * _size(config)
