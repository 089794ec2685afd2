"""The processes of a recipe: training runs, evaluations of finished runs, benchmarks. Whether one is done is read from its files.

    OUT/SETTING_SEED/            a run's folder; done when its last step is evaluated and its checkpoint published
    OUT/SETTING_SEED/evaluations the result file of each evaluation, with the step that it evaluated
    OUT/bench_NAME/              a benchmark's results; its folder gets this name when the benchmark has ended
    OUT/JOB.log, OUT/JOB.failed  what a job printed, and how it last failed; the second file is removed when the job succeeds

No other state exists, so a command continues from whatever a killed one has left, and recipes that share OUT share their runs.
"""

import json
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssa_pretrain.config import Config
from ssa_pretrain.experiments.recipe import Bench, Evaluation
from ssa_pretrain.experiments.results import EVALUATIONS, RunResult
from ssa_pretrain.saved_run import FACTS
from ssa_pretrain.settings.files import write_atomically

LAST_LINES = 12  # of a failed job's log, for the report


@dataclass
class Job(ABC):
    """A process to run.

    Attributes:
        name: of its log.
        out: folder of all jobs.
    """

    name: str
    out: Path

    @property
    @abstractmethod
    def command(self) -> list[str]:
        """The command line."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether its results are there."""

    @property
    def is_ready(self) -> bool:
        """Whether what it needs is there."""
        return True

    @property
    def can_resume(self) -> bool:
        """Whether it saves when it is stopped."""
        return False

    @property
    def is_exclusive(self) -> bool:
        """Whether nothing else may run on its GPU."""
        return False

    @property
    def log(self) -> Path:
        """What it prints, over all its starts."""
        return self.out / f"{self.name}.log"

    @property
    def failure(self) -> dict | None:
        """How it last failed: `code`, and `text` from the end of its log; None if it never did or has succeeded since."""
        path = self.out / f"{self.name}.failed"
        if not path.is_file() or self.is_done:
            return None
        return json.loads(path.read_text(encoding="utf-8"))

    def ended(self, code: int) -> None:
        """Writes or removes the file of its failure. A job with exit code 0 whose results are missing has failed too."""
        path = self.out / f"{self.name}.failed"
        if code == 0 and self.is_done:
            path.unlink(missing_ok=True)
            return
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        write_atomically(path, json.dumps({"code": code, "text": "\n".join(lines[-LAST_LINES:])}, indent=1) + "\n")


@dataclass(kw_only=True)
class TrainJob(Job):
    """A training run.

    Attributes:
        setting, seed: what is trained.
        overrides: all of them, in order.
        config: resolved.
    """

    setting: str
    seed: int
    overrides: Sequence[str] = ()
    config: Config
    _done: bool = False  # a finished run stays so, and its metrics are not read again

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.out / self.name

    @property
    def command(self) -> list[str]:
        """The command line."""
        return [sys.executable, "-m", "ssa_pretrain.train", *self.overrides]

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.training.num_steps()

    @property
    def result(self) -> RunResult:
        """Its results so far."""
        return RunResult(self.setting, self.seed, self.folder, self.steps)

    @property
    def is_done(self) -> bool:
        """Whether the last step is evaluated and its checkpoint published."""
        self._done = self._done or (self.has_checkpoint and self.result.is_finished)
        return self._done

    @property
    def has_checkpoint(self) -> bool:
        """Whether the checkpoint of the last step is published."""
        return (self.folder / "checkpoints" / f"step_{self.steps:08d}" / FACTS).is_file()

    @property
    def can_resume(self) -> bool:
        """It saves when it is stopped."""
        return True


@dataclass(kw_only=True)
class EvaluationJob(Job):
    """The evaluations of one run's last checkpoint that have no results yet, in one process.

    Attributes:
        run: whose checkpoint is evaluated.
        evaluations: all of the run's.
    """

    run: TrainJob
    evaluations: Sequence[Evaluation]

    @property
    def command(self) -> list[str]:
        """The command line."""
        words = [sys.executable, "-m", "ssa_pretrain.experiments.evaluating", str(self.run.folder)]
        for evaluation in self.missing:
            words += ["--", evaluation.name, *evaluation.overrides]
        return words

    @property
    def missing(self) -> list[Evaluation]:
        """The evaluations without a result of the last step."""
        return [evaluation for evaluation in self.evaluations if not self._has(evaluation.name)]

    def _has(self, name: str) -> bool:
        path = self.run.folder / EVALUATIONS / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))["step"] == self.run.steps
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @property
    def is_done(self) -> bool:
        """Whether every evaluation has its result."""
        return not self.missing

    @property
    def is_ready(self) -> bool:
        """Whether the run is finished."""
        return self.run.is_done


@dataclass(kw_only=True)
class BenchJob(Job):
    """A benchmark. It writes into a folder of another name until it has ended, so half a benchmark does not count.

    Attributes:
        bench: what is measured.
    """

    bench: Bench

    @property
    def folder(self) -> Path:
        """The folder of its results."""
        return self.out / self.name

    @property
    def _unfinished(self) -> Path:
        return self.out / f"{self.name}.unfinished"

    @property
    def command(self) -> list[str]:
        """The command line."""
        return [sys.executable, "-m", "ssa_pretrain.bench", *self.bench.arguments, f"out={self._unfinished}"]

    @property
    def is_done(self) -> bool:
        """Whether it has ended well."""
        return (self.folder / "results.csv").is_file()

    @property
    def is_exclusive(self) -> bool:
        """Another process on the GPU would change its times."""
        return True

    def ended(self, code: int) -> None:
        """Gives the folder its name after a good end."""
        if code == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._unfinished.rename(self.folder)
        else:
            shutil.rmtree(self._unfinished, ignore_errors=True)
        super().ended(code)
