"""The cost model's factors, fitted to the measured runs: how many times longer than at the peak each kind of work takes.

The time of a run is linear in the factors: the sum over the terms of work.py and of communication (sent at NVLink's nominal bandwidth), each times its
factor. The factors minimise the squared relative errors of all measured times plus their squared distance from what the kernels take by themselves, in units of
SPREAD and PRIOR_SPREAD: the maximum of a posterior with normal deviations. Without the second part, terms that always occur together (products and
memory traffic of one model) could trade places. A factor that cannot be (below 0, or a link faster than its nominal bandwidth) is set to its prior.

Errors are stated twice: of the fit itself, and of each run by a fit without it ("left out"), which is what a run that was not measured would see.

The fit is made when a plan needs it (some milliseconds), so it always belongs to the file that it is judged by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ssa_pretrain.config.stages import layers_per_stage
from ssa_pretrain.planning.communication import DATA, GIGA, LINKS, OTHER, TENSOR, USER_BUFFERS, communication
from ssa_pretrain.planning.documents import typical_row
from ssa_pretrain.planning.measured import MeasuredRun, measured_runs
from ssa_pretrain.planning.memory import activations, count_parameters, optimizer_shards, state_bytes
from ssa_pretrain.planning.work import Rank, mean_work, step_work

SPREAD, PRIOR_SPREAD = 0.015, 0.3  # relative standard deviations of a measured time and of a prior
LIBRARIES = (
    200 * 2**20
)  # bytes of cuBLAS's and Transformer Engine's workspaces and of RoPE's tables, by the measured peaks
# What the kernels take by themselves. Full and sparse stream and selection: the table of kernels/README.md. The others: usual shares of the peak and of the
# bandwidth, 80% for large products and 75% for the memory; NCCL counts on 360 of NVLink's 450 GB/s.
PRIOR = {
    "products": 1.25,
    "fp8 products": 1.6,
    "full stream": 1.9,
    "sampled full stream": 2.7,
    "sparse stream": 7.5,
    "selection": 10.0,
    "trained scorer": 20.0,
    "memory traffic": 1.3,
    "optimizer": 1.3,
    "zero 1": 0.5,
    "zero 2": 1.0,
    "zero 3": 5.0,
    "offload": 2.0,
    TENSOR: 1.25,
    USER_BUFFERS: 1.25,
    DATA: 1.25,
    OTHER: 1.25,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The fitted cost model.

    Attributes:
        factors: by term.
        time_errors: relative error of each measured time, by the fit to all runs.
        left_out_errors: the same, by a fit without the run.
        memory_errors: relative error of each measured peak.
        runs: the measured runs; errors are in their order, None where nothing was measured.
    """

    factors: Mapping[str, float]
    time_errors: Sequence[float | None]
    left_out_errors: Sequence[float | None]
    memory_errors: Sequence[float | None]
    runs: Sequence[MeasuredRun]

    @property
    def time_error(self) -> float:
        """The largest relative error of a time whose run was left out of the fit."""
        return max(abs(error) for error in self.left_out_errors if error is not None)

    @property
    def memory_error(self) -> float:
        """The largest relative error of a peak."""
        return max(abs(error) for error in self.memory_errors if error is not None)


@lru_cache(maxsize=1)
def calibration() -> Calibration:
    """Returns the cost model fitted to the measured runs."""
    return fit(measured_runs())


def fit(runs: Sequence[MeasuredRun]) -> Calibration:
    """Returns the cost model fitted to runs."""
    timed = [index for index, run in enumerate(runs) if run.seconds is not None]
    names = list(PRIOR)
    features = [terms(runs[index]) for index in timed]
    x = np.array([[found[name] for name in names] for found in features])
    y = np.array([runs[index].seconds for index in timed])
    factors, leverage = _solve(x, y, names)
    times: list[float | None] = [None] * len(runs)
    left_out = list(times)
    for place, index in enumerate(timed):
        error = float(x[place] @ factors / y[place] - 1.0)
        times[index] = error
        # Of a least-squares fit, the error without a point follows from the point's leverage.
        left_out[index] = error / (1.0 - float(leverage[place]))
    return Calibration(
        factors=dict(zip(names, map(float, factors), strict=True)),
        time_errors=times,
        left_out_errors=left_out,
        memory_errors=[peak_bytes(run) / run.peak_bytes - 1.0 if run.peak_bytes else None for run in runs],
        runs=runs,
    )


def terms(run: MeasuredRun) -> dict[str, float]:
    """Returns the time of a measured run at the peaks, by term."""
    config, hardware = run.config, run.hardware
    rank = rank_of(run)
    row = typical_row(
        config.model, config.attention, config.data.sequence_length, config.model.vocab_size, run.documents
    )
    # Stages of a pipeline wait for each other as in estimate.py.
    slots = rank.num_microbatches + (config.parallel.pp - 1) / config.parallel.vpp
    found = {term: slots * seconds for term, seconds in mean_work(config, hardware, row, rank).items()}
    if run.has_optimizer:
        for term, seconds in step_work(config, hardware, rank).items():
            found[term] += seconds
    found |= dict.fromkeys(LINKS, 0.0)
    for traffic in communication(config, hardware, rank, run.world_size):
        times = 1.0 if traffic.term == DATA else slots / rank.num_microbatches
        found[traffic.term] += times * traffic.cost * traffic.bytes / (hardware.nvlink_gb_per_s * GIGA)
    return found


def rank_of(run: MeasuredRun) -> Rank:
    """Returns what a rank of a measured run holds."""
    config = run.config
    padded = config.model.padded_vocab_size(config.model.vocab_size)
    _, largest = count_parameters(config, padded)
    training = config.training
    rows = run.dp * training.micro_batch_size * config.data.sequence_length
    replicas = run.dp * config.parallel.cp
    return Rank(
        layers=layers_per_stage(config)[1],
        has_output=True,
        parameters=largest,
        padded_vocab_size=padded,
        num_microbatches=training.global_batch_tokens // rows,
        sharded=optimizer_shards(config, replicas),
    )


def peak_bytes(run: MeasuredRun) -> float:
    """Returns the estimated peak of a measured run."""
    return sum(part_bytes(run).values())


def part_bytes(run: MeasuredRun) -> dict[str, float]:
    """Returns the estimated parts of a measured run's peak. Before the first optimizer step AdamW has no moments yet."""
    config, rank = run.config, rank_of(run)
    total, largest = count_parameters(config, rank.padded_vocab_size)
    states = state_bytes(config, total, largest, run.dp * config.parallel.cp)
    optimizer = states["optimizer_bytes"] * (1.0 if run.has_optimizer else 1 / 3)
    held = activations(config, rank.padded_vocab_size, rank.num_microbatches, largest, run.dp)
    return {
        "weights": states["weight_bytes"],
        "gradients": states["gradient_bytes"],
        "optimizer": optimizer,
        "activations": held.peak + LIBRARIES,
    }


def _solve(x: np.ndarray, y: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factors [terms] for times at the peak x [runs, terms] and measured times y [runs], and each run's leverage on its own time."""
    prior = np.array([PRIOR[name] for name in names])
    rows = np.concatenate([x / y[:, None] / SPREAD, np.diag(1.0 / (prior * PRIOR_SPREAD))])
    goal = np.concatenate([np.full(len(y), 1.0 / SPREAD), np.full(len(names), 1.0 / PRIOR_SPREAD)])
    lowest = np.array([1.0 if name in LINKS else 0.0 for name in names])
    free = np.ones(len(names), dtype=bool)
    while True:
        factors = prior.copy()
        rest = goal - rows[:, ~free] @ prior[~free]
        factors[free] = np.linalg.lstsq(rows[:, free], rest, rcond=None)[0]
        possible = factors > lowest
        if possible.all():
            hat = rows[:, free] @ np.linalg.pinv(rows[:, free])
            return factors, np.diag(hat)[: len(y)]
        free &= possible
