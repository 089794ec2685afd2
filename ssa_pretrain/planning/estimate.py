"""What a run costs on a cluster: memory by part, the time of a step by part, tokens per second, days and money. Pure arithmetic on fitted factors.

*Step.* A microbatch takes its work (work.py) times the fitted factors (calibration.py), or as long as the host needs to launch it if that is more, plus the
communication that nothing hides. A pipeline of pp stages with vpp chunks each adds (pp - 1) / vpp microbatches of waiting, all at the speed of its
slowest stage, the one with the output layer. Drawn streams make data ranks wait for the slowest (balance.py). Then come gradients, the optimizer and the
weights. Of communication beside computation, what does not fit beside it counts, or HIDDEN_COST of it if that is more.

*Run.* Steps, evaluations, and what failures, saves and restarts cost (goodput.py).

Measured, and so fitted: one and two GPUs. Assumed: networks, and what more GPUs do, by the formulas above. `is_measured` tells them apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ssa_pretrain.config import Config, PrecisionName, RowPacking
from ssa_pretrain.config.hardware import HardwareConfig, PlanConfig
from ssa_pretrain.config.stages import layers_per_stage
from ssa_pretrain.planning.balance import Batch, balance
from ssa_pretrain.planning.calibration import LIBRARIES, Calibration, calibration
from ssa_pretrain.planning.communication import DATA, Traffic, communication
from ssa_pretrain.planning.documents import document_rule, typical_row
from ssa_pretrain.planning.flops import TERA, RowFlops
from ssa_pretrain.planning.goodput import Goodput, goodput
from ssa_pretrain.planning.memory import Activations, activations
from ssa_pretrain.planning.plan import Plan
from ssa_pretrain.planning.work import TERMS, Rank, host_seconds, mean_work, microbatch_work, step_work
from ssa_pretrain.schedule import WINDOW

GIB = 2**30
CONTEXT = 1.5 * GIB  # bytes outside torch's allocator: the CUDA context and NCCL's channels; an assumption
SIMULATED_MICROBATCHES = 4096  # whose streams are drawn to find the slowest data rank
SPLIT = 0.04  # of the tensors' peak that the allocator holds but cannot use; an assumption


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step, by part; they add up to `total`.

    Attributes:
        work: of the device, by term.
        waiting_for_host: by which launching takes longer than the device's work.
        bubble: waiting of pipeline stages.
        imbalance: waiting for the data rank whose drawn streams cost most.
        groups: communication that computation does not hide, by group.
    """

    work: Mapping[str, float]
    waiting_for_host: float
    bubble: float
    imbalance: float
    groups: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds of the step."""
        waiting = self.waiting_for_host + self.bubble + self.imbalance
        return sum(self.work.values()) + waiting + sum(self.groups.values())

    @property
    def dominant(self) -> str:
        """The part that takes longest: compute, the host, the pipeline's bubble, imbalance, or a group's communication."""
        parts = {"computation": sum(self.work.values()), "the host": self.waiting_for_host, "the bubble": self.bubble}
        parts |= {"imbalance": self.imbalance, **{f"{name} communication": t for name, t in self.groups.items()}}
        return max(parts, key=lambda name: parts[name])

    @property
    def communication(self) -> float:
        """Seconds of communication that computation does not hide."""
        return sum(self.groups.values())


@dataclass(frozen=True)
class Estimate:
    """The costs of a plan on a cluster.

    Attributes:
        config: the run and the cluster.
        plan: its steps, layout and sizes.
        fitted: the cost model.
    """

    config: PlanConfig
    plan: Plan
    fitted: Calibration

    @property
    def hardware(self) -> HardwareConfig:
        """The cluster's GPUs."""
        return self.config.hardware

    @cached_property
    def row(self) -> RowFlops:
        """The operations of a typical row."""
        config = self.config
        rule = document_rule(config.document_tokens)
        covered = config.attention.top_k * config.attention.block_size
        padding = covered if config.data.packing is RowPacking.best_fit else 0
        shape = (config.model, config.attention, config.data.sequence_length, self.plan.vocab_size)
        return typical_row(*shape, rule, padding)

    @cached_property
    def rank(self) -> Rank:
        """A rank of the stage that works longest: the last, unless parallel.layers_on_last_stage makes it short."""
        config, plan = self.config, self.plan
        others, last = layers_per_stage(config)
        end = Rank(
            layers=last,
            has_output=True,
            parameters=plan.parameters_per_rank,
            padded_vocab_size=plan.padded_vocab_size,
            num_microbatches=plan.num_microbatches,
            sharded=plan.optimizer_shards,
        )

        if plan.pp == 1:
            return end
        return max(end, replace(end, layers=others, has_output=False), key=self._stage_seconds)

    @cached_property
    def activations(self) -> Activations:
        """Activations by part, on the stage that holds most."""
        plan = self.plan
        return activations(
            self.config, plan.padded_vocab_size, plan.num_microbatches, plan.parameters_per_rank, plan.dp
        )

    @property
    def memory_parts(self) -> dict[str, float]:
        """Bytes at the peak on the fullest rank, by part."""
        plan, held = self.plan, self.activations
        return {
            "weights": plan.weight_bytes,
            "gradients": plan.gradient_bytes,
            "optimizer": plan.optimizer_bytes,
            "activations of the layers": held.layers,
            "output layer" if held.output_layer >= held.layer else "backward of one layer": max(
                held.output_layer, held.layer
            ),
            "communication buffers": held.buffers,
            "libraries' workspaces": LIBRARIES,
        }

    @property
    def peak_bytes(self) -> float:
        """Bytes that tensors hold at the peak, as torch.cuda.max_memory_allocated() counts them."""
        return sum(self.memory_parts.values())

    @property
    def needed_bytes(self) -> float:
        """Bytes of the GPU that the run needs, with the allocator's splits, the CUDA context and NCCL."""
        return self.peak_bytes * (1.0 + SPLIT) + CONTEXT

    @property
    def fits(self) -> bool:
        """Whether the run fits into the memory of the GPU."""
        return self.needed_bytes <= self.hardware.memory_gib * GIB

    @cached_property
    def traffic(self) -> list[Traffic]:
        """What each group sends in a step."""
        return communication(self.config, self.hardware, self.rank, self.plan.world_size)

    def communication_seconds(self, traffic: Traffic) -> float:
        """Returns the time that a group's communication takes by itself."""
        return traffic.seconds(self.hardware, self.fitted.factors[traffic.term])

    @cached_property
    def step(self) -> StepTime:
        """The time of a step, by part."""
        found = self._evenly_drawn
        slot = self._slot_seconds()
        return replace(found, imbalance=self.plan.num_microbatches * slot * (self._slowest() - 1.0))

    @property
    def time_without_waiting(self) -> float:
        """Seconds of a step if no data rank waits for another one's drawn streams."""
        return self._evenly_drawn.total

    @cached_property
    def _evenly_drawn(self) -> StepTime:
        """The time of a step without imbalance."""
        plan, count = self.plan, self.plan.num_microbatches
        mean = self._scaled(mean_work(self.config, self.hardware, self.row, self.rank))
        device, slot = sum(mean.values()), self._slot_seconds()
        once = self._scaled(step_work(self.config, self.hardware, self.rank))
        groups: dict[str, float] = dict.fromkeys(("tp", "cp", "pp", "dp"), 0.0)
        for traffic in self.traffic:
            groups[traffic.group.name] += self._exposed(traffic, slot)
        per_microbatch = slot + (groups["tp"] + groups["cp"] + groups["pp"]) / count
        work = {term: count * mean[term] + once[term] for term in TERMS}
        return StepTime(
            work=work,
            waiting_for_host=count * (slot - device),
            bubble=per_microbatch * (plan.pp - 1) / plan.vpp,
            imbalance=0.0,
            groups={name: seconds for name, seconds in groups.items() if seconds},
        )

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs while it trains."""
        return self.plan.tokens_per_step / self.step.total

    @property
    def mfu(self) -> float:
        """Fraction of the GPUs' peak that the model's operations take."""
        peak = self.hardware.bf16_tflops
        if self.config.precision.name is PrecisionName.fp8 and self.hardware.fp8_tflops:
            peak = self.hardware.fp8_tflops
        flops = self.row.model * self.plan.rows_per_step
        return flops / self.step.total / (peak * TERA * self.plan.world_size)

    @cached_property
    def goodput(self) -> Goodput:
        """What failures and saves cost."""
        return goodput(self.config, self.plan.checkpoint_bytes, self.plan.world_size, self.step.total)

    @property
    def evaluation_seconds(self) -> float:
        """Time of all evaluations on held-out rows: the forward of each row in both modes."""
        evaluation, plan = self.config.evaluation, self.plan
        times = (plan.steps // evaluation.interval if evaluation.interval else 1) + evaluation.at_start
        per_row = self.step.total / plan.rows_per_step / 3.0
        return times * 2 * evaluation.rows * per_row

    @property
    def run_seconds(self) -> float:
        """Time of the whole run: steps, evaluations, saves, failures."""
        steps = self.plan.total_tokens / self.plan.tokens_per_step  # of the largest batch
        return (steps * self.step.total + self.evaluation_seconds) / self.goodput.share

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the whole run."""
        return self.run_seconds / 3600 * self.plan.world_size

    @property
    def cost(self) -> float:
        """Price of the whole run in USD."""
        return self.gpu_hours * self.hardware.price_per_gpu_hour

    def _stage_seconds(self, rank: Rank) -> float:
        """Returns the time of all microbatches on a stage, without the pipeline's own exchange."""
        device = sum(self._scaled(mean_work(self.config, self.hardware, self.row, rank)).values())
        computing = rank.num_microbatches * max(device, host_seconds(self.config, self.hardware, rank.layers))
        sent = communication(self.config, self.hardware, rank, self.plan.world_size)
        return computing + sum(self.communication_seconds(one) for one in sent if one.group.name in ("tp", "cp"))

    @property
    def is_measured(self) -> bool:
        """Whether runs of this kind have been measured: such a model and method, on this GPU, on as many of them, with as much of each parallelism."""
        method = self.config.attention.method
        runs = [run for run in self.fitted.runs if run.hardware.name == self.hardware.name and run.seconds]
        runs = [run for run in runs if run.config.attention.method is method]
        widths = [run.config.model.hidden_size for run in runs]
        if not runs or not min(widths) <= self.config.model.hidden_size <= max(widths):
            return False
        degrees = [run.config.parallel for run in runs]
        asked = [(self.plan.world_size, [run.world_size for run in runs])]
        asked += [(getattr(self.plan, axis), [getattr(d, axis) for d in degrees]) for axis in ("tp", "pp", "vpp", "cp")]
        return all(degree <= max(known, default=0) for degree, known in asked)

    def _scaled(self, work: Mapping[str, float]) -> dict[str, float]:
        """Returns work at the peak as seconds."""
        return {term: seconds * self.fitted.factors[term] for term, seconds in work.items()}

    def device_seconds(self, main: str, share: float) -> float:
        """Returns the device's time for a microbatch.

        Args:
            main: the main stream, "full" or "sparse".
            share: share of the queries that compute the other one.
        """
        work = microbatch_work(self.config, self.hardware, self.row, self.rank, main, share)
        return sum(self._scaled(work).values())

    def _slot_seconds(self) -> float:
        """Returns the mean time of a microbatch over both main streams, launching included, communication excluded."""
        host, row = host_seconds(self.config, self.hardware, self.rank.layers), self.row
        kinds = ((row.full_ratio, "full", row.share_if_full), (1.0 - row.full_ratio, "sparse", row.share_if_sparse))
        return sum(p * max(host, self.device_seconds(main, share)) for p, main, share in kinds if p)

    def _exposed(self, traffic: Traffic, slot: float) -> float:
        """Returns the time that a group's communication adds to a step."""
        seconds = self.communication_seconds(traffic)
        if traffic.term != DATA or not traffic.hidden:
            return seconds
        # Gradients are reduced during the last microbatch's backward, and weights gathered during the first one's forward.
        window = slot * self.rank.num_microbatches if self.config.engine.name.value == "deepspeed" else slot / 2
        return max(seconds - window, traffic.cost * seconds)

    def _slowest(self) -> float:
        """Returns the time of the slowest data rank over the mean, from the streams that the first steps draw."""
        attention, plan, training = self.config.attention, self.plan, self.config.training
        if len(attention.method.streams) == 1 or plan.dp == 1:
            return 1.0
        batch = Batch(
            dp=plan.dp,
            num_microbatches=plan.num_microbatches,
            rows=training.micro_batch_size,
            row_length=self.config.data.sequence_length,
        )
        steps = max(1, min(WINDOW, SIMULATED_MICROBATCHES // (plan.dp * plan.num_microbatches)))
        return balance(attention, batch, _RowTime(self), seed=self.config.seed, steps=steps).slowest


@dataclass(frozen=True, slots=True)
class _RowTime:
    """The time of a row, where balance.py takes its operations."""

    estimate: Estimate

    def computed(self, main: str, share: float) -> float:
        """Returns the seconds of a row with a main stream and a share of its queries drawn for the other one."""
        sampled = self.estimate.config.attention.counterpart_share < 1.0  # by other kernels than all queries
        share = min(share, 0.999) if sampled else share
        return self.estimate.device_seconds(main, share) / self.estimate.config.training.micro_batch_size


def estimate(config: PlanConfig, plan: Plan, fitted: Calibration | None = None) -> Estimate:
    """Returns the costs of a plan.

    Args:
        config: the run and the cluster.
        plan: of the run.
        fitted: the cost model; None: fitted to the measured runs.
    """
    return Estimate(config, plan, fitted or calibration())


def as_plan_config(config: Config, hardware: HardwareConfig) -> PlanConfig:
    """Returns a run's configuration on a cluster."""
    return PlanConfig(**{name: getattr(config, name) for name in Config.__dataclass_fields__}, hardware=hardware)
