"""What `python -m ssa_pretrain.lm_eval` runs: its settings, and the evaluations in YAML files, each one or several tasks of lm_eval.

An evaluation is a file of conf/lm_eval, or one of the user's own. Nothing here imports lm_eval or torch.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ssa_pretrain.config import CONF
from ssa_pretrain.huggingface.settings import Mode
from ssa_pretrain.settings.convert import config_from_dict
from ssa_pretrain.settings.problems import ConfigError, Problem, at_least, join
from ssa_pretrain.settings.suggestions import closest

FILES = CONF / "lm_eval"
PAPER = "paper"
NEEDED = ("lm_eval", "transformers", "accelerate")
DEFAULT_SEED = 1234  # lm_eval's own, of few-shot examples


@dataclass(kw_only=True, slots=True)
class Evaluation:
    """Tasks of lm_eval with the settings that decide their results."""

    tasks: list[str] = field(default_factory=list)  # names of lm_eval's tasks or groups
    num_fewshot: int | None = None  # examples before each question; null: as the task says
    seeds: list[int] = field(default_factory=lambda: [DEFAULT_SEED])  # one run each; the seed draws the examples
    batch_size: int = 8  # requests at once
    max_length: int = 0  # tokens of the longest input; 0: the model's max_position_embeddings
    metadata: dict[str, Any] = field(default_factory=dict)  # for tasks that generate their data, such as RULER's
    metrics: list[str] = field(default_factory=list)  # metrics in the printed table; empty: all

    def problems(self) -> list[Problem]:
        """Returns the problems of these settings."""
        found = at_least("", self, 1, "batch_size") + at_least("", self, 0, "max_length")
        for key in ("tasks", "seeds"):
            if not getattr(self, key):
                found.append(
                    Problem(key, None, "must not be empty", f"try {key}: [{'1' if key == 'seeds' else 'piqa'}]")
                )
        return found


@dataclass(kw_only=True, slots=True)
class LmEvalOptions:
    """Settings of `python -m ssa_pretrain.lm_eval`."""

    tasks: list[str] = field(default_factory=lambda: [PAPER])  # files of conf/lm_eval, paper for all, paths of others
    modes: list[Mode] = field(default_factory=lambda: [Mode.full, Mode.sparse])
    out: str = ""  # file of the results; must not exist; empty: FOLDER/lm_eval/TASKS.json
    seeds: list[int] = field(default_factory=list)  # instead of the evaluations'; empty: theirs
    batch_size: int = 0  # instead of the evaluations'; 0: theirs
    limit: int = 0  # questions per task, to try something; 0: all
    include_path: str = ""  # folder of your own tasks, as lm_eval takes them
    device: str = ""  # such as cuda:1; empty: the first GPU, or the CPU
    model_args: dict[str, Any] = field(default_factory=dict)  # more arguments of lm_eval's hf model

    def problems(self) -> list[Problem]:
        """Returns the problems of these settings."""
        found = at_least("", self, 0, "batch_size", "limit")
        if not self.modes:
            found.append(Problem("modes", None, "must not be empty", "try modes=[full,sparse]"))
        if self.include_path and not Path(self.include_path).is_dir():
            found.append(Problem("include_path", self.include_path, "is not a folder", "give a folder of task files"))
        if self.out and Path(self.out).exists():
            found.append(Problem("out", self.out, "exists, and nothing is overwritten", "remove it, or choose another"))
        missing = [name for name in NEEDED if find_spec(name) is None]
        if missing:
            rule = f"needs {join(missing, 'and')}, not installed here"
            found.append(Problem("lm_eval", None, rule, 'try pip install -e ".[evaluation]"'))
        return found


def read_evaluations(names: list[str]) -> dict[str, Evaluation]:
    """Returns the evaluations by name; raises ConfigError with every problem.

    Args:
        names: files of conf/lm_eval without their ending, `paper` for all of them, or paths of other YAML files.
    """
    known = sorted(path.stem for path in FILES.glob("*.yaml"))
    found: dict[str, Evaluation] = {}
    problems: list[Problem] = []
    for name in dict.fromkeys(each for given in names for each in (known if given == PAPER else [given])):
        path = FILES / f"{name}.yaml" if name in known else Path(name)
        if not path.is_file():
            near = closest(name, [*known, PAPER], 1)
            advice = f"did you mean {near[0]}?" if near else f"try {join([PAPER, *known])}, or the path of a YAML file"
            problems.append(Problem("tasks", name, "is neither in conf/lm_eval nor a file", advice))
            continue
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        evaluation, wrong = config_from_dict(Evaluation, tree if isinstance(tree, dict) else {})
        wrong += [problem for problem in evaluation.problems() if problem.key not in {w.key for w in wrong}]
        problems += [Problem(f"{path}: {p.key}", p.value, p.rule, p.advice) for p in wrong]
        found[path.stem] = evaluation
    if problems:
        raise ConfigError(problems)
    return found
