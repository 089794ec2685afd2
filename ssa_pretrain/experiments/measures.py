"""The measures that several recipes share: numbers of a run at a step, from its own metrics or from evaluations of its last checkpoint."""

import math
import statistics
from collections.abc import Callable, Sequence

from ssa_pretrain.experiments.recipe import Measure, Points
from ssa_pretrain.experiments.results import RunResult

SETTLED = 0.5  # of the training steps: the share at the end over which stability is measured


def held_out(key: str, mode: str, name: str = "", form: str = ".4f") -> Measure:
    """Returns a held-out metric of the run itself, in one mode."""
    return Measure(name or f"{key.replace('_', ' ')}, {mode}", lambda run, step: run.metric(key, mode, step), form)


FULL = held_out("cross_entropy", "full", "full mode")
SPARSE = held_out("cross_entropy", "sparse", "sparse mode")
MASS = held_out("captured_mass", "full", "captured mass, full mode")
MASS_SPARSE = held_out("captured_mass", "sparse", "captured mass, sparse mode")
ENTROPY = held_out("attention_entropy", "full", "entropy, full mode", ".3f")


def _gap(run: RunResult, step: int) -> float | None:
    full, sparse = (run.metric("cross_entropy", mode, step) for mode in ("full", "sparse"))
    return None if full is None or sparse is None else sparse - full


GAP = Measure("sparse − full", _gap)


def evaluated(name: str, mode: str, head: str, *keys: str, form: str = ".4f") -> Measure:
    """Returns a value of an evaluation of the last checkpoint (`RunResult.evaluated`)."""
    return Measure(head, lambda run, step: run.evaluated(name, mode, *keys), form)


def layer_mean(name: str, mode: str, head: str, *keys: str, form: str = ".4f") -> Measure:
    """Returns the mean over layers of an evaluation's list by layer."""

    def value(run: RunResult, step: int) -> float | None:
        values = run.evaluated(name, mode, *keys)
        return sum(values) / len(values) if values else None

    return Measure(head, value, form)


def by_layer(name: str, mode: str, *keys: str) -> Callable[[RunResult], Points]:
    """Returns (layer, value) of an evaluation's list by layer."""
    return lambda run: [(float(i), v) for i, v in enumerate(run.evaluated(name, mode, *keys) or (), start=1)]


def last_by_layer(key: str, mode: str) -> Callable[[RunResult], Points]:
    """Returns (layer, value) of a list by layer of the run's newest held-out metrics."""
    return lambda run: [(float(i), v) for i, v in enumerate(run.metric(key, mode, run.last_step) or (), start=1)]


def over_training(key: str, mode: str) -> Callable[[RunResult], Points]:
    """Returns (tokens, value) of a held-out metric."""
    return lambda run: run.curve(key, mode)


def by_evaluation(names: Sequence[tuple[float, str]], mode: str, *keys: str) -> Callable[[RunResult], Points]:
    """Returns (x, value) over evaluations, given as (x, name)."""

    def points(run: RunResult) -> Points:
        found = [(x, run.evaluated(name, mode, *keys)) for x, name in names]
        return [(x, value) for x, value in found if value is not None]

    return points


def settled(run: RunResult, key: str) -> list[float]:
    """Returns a training metric over the last half of the run's steps, without steps that lack it."""
    first = run.steps * (1.0 - SETTLED)
    return [r[key] for r in run.train if r["step"] > first and r.get(key) is not None]


def _spread(key: str, log: bool) -> Callable[[RunResult, int], float | None]:
    """Returns the variance of a metric over the last half of training; of its logarithm with `log`."""

    def value(run: RunResult, step: int) -> float | None:
        values = settled(run, key)
        if len(values) < 2:
            return None
        if not all(map(math.isfinite, values)) or (log and min(values) <= 0):
            return math.inf
        return statistics.variance([math.log(v) for v in values] if log else values)

    return value


def _detrended(run: RunResult, step: int) -> float | None:
    """Returns the variance of the training cross entropy around its running mean of 16 steps: the fall of the loss itself does not count."""
    values = settled(run, "cross_entropy")
    if len(values) < 4:
        return None
    if not all(map(math.isfinite, values)):
        return math.inf
    window = min(16, len(values) // 2)
    means = [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]
    return statistics.fmean((v - m) ** 2 for v, m in zip(values[window // 2 :], means, strict=False))


NORM_VARIANCE = Measure("variance of log gradient norm", _spread("grad_norm", True), ".4f")
LOSS_VARIANCE = Measure("variance of loss", _detrended, ".5f")
SPIKES = Measure("loss spikes", lambda run, step: float(sum(1 for r in run.train if r.get("spike"))), ".1f")
