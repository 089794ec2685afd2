"""What a recipe consists of. All of it is plain data and small functions of results; nothing here starts a process or reads a file.

A setting is trained with every seed as one run. Two recipes with the same setting share its runs. A measure turns a run's results at a step into a
number. Tables, comparisons, panels and claims name settings and measures; verdicts.py makes means and errors of them, report.py and figure.py show them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssa_pretrain.experiments.results import RunResult

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is trained, once per seed.

    Attributes:
        name: in tables; the run's folder is NAME_SEED.
        overrides: of `python -m ssa_pretrain.train`, after those of the size.
    """

    name: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation of every finished run's last checkpoint by `ssa_pretrain.evaluate`.

    Attributes:
        name: of its result file, RUN/evaluations/NAME.json.
        overrides: of `python -m ssa_pretrain.evaluate`.
        settings: names of the settings that it is for; empty: all.
        length: tokens per row, if another than in training.
    """

    name: str
    overrides: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    length: int = 0


@dataclass(frozen=True, slots=True)
class Bench:
    """A benchmark by `python -m ssa_pretrain.bench`, which has its GPU to itself.

    Attributes:
        name: of its folder, bench_NAME.
        arguments: of the command, without `out`.
        minutes: estimate of its time on a GPU.
        memory_gib: estimate of the GPU's memory that it needs.
    """

    name: str
    arguments: tuple[str, ...]
    minutes: float = 2.0
    memory_gib: float = 8.0


@dataclass(frozen=True, slots=True)
class Measure:
    """A number of a run.

    Attributes:
        name: head of its column.
        value: of a run at a step; None where the run's files do not have it.
        form: as `format` takes it.
    """

    name: str
    value: Callable[[RunResult, int], float | None]
    form: str = ".4f"


@dataclass(frozen=True, slots=True)
class Table:
    """A row per setting, mean ± standard error over seeds."""

    title: str
    measures: Sequence[Measure]
    settings: tuple[str, ...] = ()  # empty: all
    note: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference `first` - `second` of two settings, paired by seed, at every step that both have evaluated."""

    first: str
    second: str
    measures: Sequence[Measure]


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart: a curve per setting, the mean over seeds with a band of one standard error.

    Attributes:
        title, x_name, y_name: of the chart.
        points: of a run, in ascending order of x.
        settings: drawn; empty: all.
        log_x, log_y: logarithmic axes.
    """

    title: str
    x_name: str
    y_name: str
    points: Callable[[RunResult], Points]
    settings: tuple[str, ...] = ()
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, slots=True)
class AtMost:
    """A number of each seed that a claim needs to be at most `margin`, such as a paired difference of two settings.

    Attributes:
        label: what the number is.
        value: of the runs of one seed, by setting; None if it cannot be computed.
        margin: in the number's unit.
    """

    label: str
    value: Callable[[dict[str, RunResult]], float | None]
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence of the paper, and the tests that all have to hold."""

    text: str
    tests: Sequence[AtMost]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """An experiment.

    Attributes:
        name: on the command line.
        title: of the report.
        about: what is compared, and the paper's claim.
        settings: what is trained.
        evaluations: of every finished run.
        benches: benchmarks, which need no run.
        tables, comparisons, panels, claims: what the report shows.
    """

    name: str
    title: str
    about: str
    settings: Sequence[Setting] = ()
    evaluations: Sequence[Evaluation] = ()
    benches: Sequence[Bench] = ()
    tables: Sequence[Table] = ()
    comparisons: Sequence[Comparison] = ()
    panels: Sequence[Panel] = ()
    claims: Sequence[Claim] = ()

    def evaluations_of(self, setting: str) -> list[Evaluation]:
        """Returns the evaluations of a setting's runs."""
        return [e for e in self.evaluations if not e.settings or setting in e.settings]


def paired(
    label: str, value: Callable[[RunResult], float | None], first: str, second: str, margin: float = 0.0
) -> AtMost:
    """Returns the test that a number of one setting's run is at most that of another's plus a margin."""

    def difference(runs: dict[str, RunResult]) -> float | None:
        high, low = (value(runs[name]) if name in runs else None for name in (first, second))
        return None if high is None or low is None else high - low

    return AtMost(f"{label}: {first} − {second}", difference, margin)


def below(measure: Measure, first: str, second: str, margin: float = 0.0) -> AtMost:
    """Returns the test that a measure of one setting is at most that of another plus a margin, at the last step of both."""
    return paired(measure.name, lambda run: measure.value(run, run.last_step), first, second, margin)


def within(measure: Measure, setting: str, margin: float) -> AtMost:
    """Returns the test that a measure of one setting is at most `margin`, at its last step."""

    def value(runs: dict[str, RunResult]) -> float | None:
        return measure.value(runs[setting], runs[setting].last_step) if setting in runs else None

    return AtMost(f"{measure.name}: {setting}", value, margin)
