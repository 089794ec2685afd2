"""How long a job takes and how much memory it needs: measured where the same experiment has measured it, else by the planner.

*Memory* is the planner's for the run (`Estimate.needed_bytes`), with the CUDA context. For an evaluation on longer rows it is that of a run on such rows,
which is more than a forward needs.

*Time.* A run takes its remaining steps times the seconds of a step, and START_SECONDS. The seconds are the median of its own newest steps, else of another run
of the same setting, else of the method, else the planner's: the time of one process by itself, or the device's work times the number of processes that share
the GPU if that is more. On a CPU, without a measurement, FLOPs over CPU_FLOPS. An evaluation takes the forwards of its tokens, and EVALUATION_SECONDS.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from ssa_pretrain.config import Config
from ssa_pretrain.experiments.devices import Device, hardware_of
from ssa_pretrain.experiments.jobs import BenchJob, EvaluationJob, Job, TrainJob
from ssa_pretrain.experiments.recipe import Evaluation
from ssa_pretrain.planning.calibration import Calibration, calibration
from ssa_pretrain.planning.estimate import GIB, as_plan_config, estimate
from ssa_pretrain.planning.plan import make_plan

START_SECONDS = 30.0  # imports, compiled kernels, the last checkpoint
EVALUATION_SECONDS = 6.0  # loading the checkpoint and its digests
NEEDLE_SECONDS = 10.0
CPU_START_SECONDS = 10.0
CPU_FLOPS = 1e10
USUAL_VOCABULARY = 8192  # before the data is prepared


@dataclass
class Estimates:
    """Estimates for the jobs of one command.

    Attributes:
        runs: all training runs, whose speeds are taken where they are measured.
        device: a device of the kind that jobs run on.
        shared: processes that share a device.
        vocab_size: of the data's tokenizer; None: unknown.
    """

    runs: Sequence[TrainJob]
    device: Device
    shared: int
    vocab_size: int | None
    _memory: dict[str, float] = field(default_factory=dict)

    def memory(self, job: Job) -> float:
        """Returns the bytes of a GPU that a job needs; 0 on a CPU."""
        if not self.device.is_gpu:
            return 0.0
        if job.name not in self._memory:
            self._memory[job.name] = self._job_memory(job)
        return self._memory[job.name]

    def _job_memory(self, job: Job) -> float:
        if isinstance(job, BenchJob):
            return job.bench.memory_gib * GIB
        if isinstance(job, EvaluationJob):
            longest = max((e.length for e in job.evaluations), default=0)
            return self._needed(job.run.config, longest)
        assert isinstance(job, TrainJob)
        return self._needed(job.config, 0)

    def seconds(self, job: Job) -> float:
        """Returns the seconds that a job still takes."""
        start = START_SECONDS if self.device.is_gpu else CPU_START_SECONDS
        if job.is_done:
            return 0.0
        if isinstance(job, BenchJob):
            return job.bench.minutes * 60.0 + start
        if isinstance(job, EvaluationJob):
            return start + sum(self._evaluation_seconds(job.run, evaluation) for evaluation in job.missing)
        assert isinstance(job, TrainJob)
        left = job.steps - job.result.step
        count = left // (job.config.evaluation.interval or job.steps) + 1
        rows = job.config.evaluation.rows * job.config.data.sequence_length
        return start + left * self.step_seconds(job) + count * self._forward_seconds(job, 2 * rows)

    def step_seconds(self, job: TrainJob) -> float:
        """Returns the seconds of a training step."""
        for same in (
            [job],
            [run for run in self.runs if run.setting == job.setting],
            [run for run in self.runs if run.config.attention.method is job.config.attention.method],
        ):
            times = [time for run in same if (time := run.result.seconds_per_step)]
            if times:
                return sum(times) / len(times)
        return self._planned_seconds(job.config)

    def _forward_seconds(self, job: TrainJob, tokens: int) -> float:
        return tokens / job.config.training.global_batch_tokens * self.step_seconds(job) / 2.0

    def _evaluation_seconds(self, run: TrainJob, evaluation: Evaluation) -> float:
        asked = [word.partition("=")[2] for word in evaluation.overrides if word.startswith("evaluation.rows=")]
        rows = int(asked[-1]) if asked else run.config.evaluation.rows
        tokens = 2 * rows * (evaluation.length or run.config.data.sequence_length)
        needles = NEEDLE_SECONDS * any("needle" in word for word in evaluation.overrides)
        fixed = EVALUATION_SECONDS + needles if self.device.is_gpu else 2.0
        return fixed + self._forward_seconds(run, tokens)

    def _planned_seconds(self, config: Config) -> float:
        plan = make_plan(config, 1, self._vocabulary(config))
        if not self.device.is_gpu:
            return plan.flops_per_token * plan.tokens_per_step / CPU_FLOPS
        found = estimate(as_plan_config(config, hardware_of(self.device)), plan, _fitted())
        return max(found.step.total, self.shared * sum(found.step.work.values()))

    def _needed(self, config: Config, longer: int) -> float:
        if longer > config.data.sequence_length:
            batch = replace(config.training, global_batch_tokens=longer, micro_batch_size=1)
            config = replace(config, data=replace(config.data, sequence_length=longer), training=batch)
        plan = make_plan(config, 1, self._vocabulary(config))
        return estimate(as_plan_config(config, hardware_of(self.device)), plan, _fitted()).needed_bytes

    def _vocabulary(self, config: Config) -> int | None:
        return None if config.model.vocab_size else self.vocab_size or USUAL_VOCABULARY


@cache
def _fitted() -> Calibration:
    """Returns the planner's cost model, fitted once."""
    return calibration()
