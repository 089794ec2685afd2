"""The settings of evaluation: held-out rows, tasks, what `ssa_pretrain.evaluate` measures besides, and tasks of lm_eval.

A task is an entry of `evaluation.tasks`: a name of the user's, and the settings of its kind. A run evaluates its tasks in both modes while it
trains; `python -m ssa_pretrain.evaluate` does so on a checkpoint.

    evaluation:
      tasks:
        wiki:     {kind: perplexity, path: data/wiki}
        arc_easy: {kind: multiple_choice, path: tasks/arc_easy.jsonl}
        needle:   {kind: needle, haystack: noise, lengths: [4096, 8192]}
"""

import re
from dataclasses import dataclass, field, replace

from ssa_pretrain.config.choices import Haystack
from ssa_pretrain.settings.problems import Problem, at_least

TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # becomes a part of metrics' names
NEEDLE_LENGTHS = (4096, 8192, 16384, 32768)
SHORTEST_NEEDLE = 128  # tokens: the question around an empty haystack has fewer


@dataclass(kw_only=True, slots=True)
class PerplexityTask:
    """Perplexity per token, word and byte on the held-out split of a further dataset."""

    kind: str = "perplexity"  # the kind of task
    path: str = "???"  # folder of a dataset written by data_prep with the run's tokenizer
    rows: int = 64  # held-out rows, spread over the split; 0: all rows

    def problems(self) -> list[Problem]:
        """Returns the problems within this task."""
        return at_least("", self, 0, "rows")


@dataclass(kw_only=True, slots=True)
class ChoiceTask:
    """Multiple choice: the answer with the largest log-likelihood after the question, as lm_eval scores it."""

    kind: str = "multiple_choice"  # the kind of task
    path: str = "???"  # file of questions, one JSON object per line with question, choices and answer
    limit: int = 0  # only the first questions of the file; 0: all

    def problems(self) -> list[Problem]:
        """Returns the problems within this task."""
        return at_least("", self, 0, "limit")


@dataclass(kw_only=True, slots=True)
class NeedleTask:
    """Needle in a haystack: a number hidden in a long text, which the model must repeat."""

    kind: str = "needle"  # the kind of task
    haystack: Haystack = Haystack.noise
    lengths: list[int] = field(default_factory=list)  # tokens of prompt and answer; empty: 4096 to 32768 as rows allow
    depths: list[float] = field(default_factory=lambda: [0, 25, 50, 75, 100])  # % of the haystack before the needle
    samples: int = 4  # haystacks per length and depth

    def problems(self) -> list[Problem]:
        """Returns the problems within this task."""
        found = at_least("", self, 1, "samples")
        if short := [length for length in self.lengths if length < SHORTEST_NEEDLE]:
            rule = f"must be at least {SHORTEST_NEEDLE} tokens each"
            found.append(Problem("lengths", short, rule, f"try [{SHORTEST_NEEDLE}]"))
        if not self.depths or any(not 0 <= depth <= 100 for depth in self.depths):
            rule = "must be percentages from 0 to 100"
            found.append(Problem("depths", self.depths, rule, "try [0,25,50,75,100]"))
        return found

    def lengths_within(self, sequence_length: int) -> list[int]:
        """Returns the lengths of haystacks for rows of a length: those that are set, or the usual ones that fit."""
        usual = [length for length in NEEDLE_LENGTHS if length <= sequence_length]
        return self.lengths or usual or [sequence_length]


TaskConfig = PerplexityTask | ChoiceTask | NeedleTask


@dataclass(kw_only=True, slots=True)
class LmEvalConfig:
    """Tasks of EleutherAI's lm_eval, run by `ssa_pretrain.evaluate` on the training checkpoint (extra `evaluation`)."""

    tasks: list[str] = field(default_factory=list)  # names of tasks or groups of lm_eval; empty: none
    include_path: str = ""  # folder with further task files (YAML); empty: none
    num_fewshot: int = -1  # examples before each question; -1: as the task says
    limit: int = 0  # documents per task; 0: all

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        found = at_least("evaluation.lm_eval", self, -1, "num_fewshot")
        return found + at_least("evaluation.lm_eval", self, 0, "limit")


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Evaluation on held-out rows and on tasks, with full and with sparse attention."""

    interval: int = 0  # steps between evaluations; 0: only at the end
    rows: int = 64  # held-out rows to evaluate, spread over the split; 0: all rows, the last of each part padded
    at_start: bool = True  # also evaluate before the first step
    ema: bool = (
        False  # a run also evaluates the running mean of its weights (optim.ema_decay); `evaluate RUN` only that
    )
    tasks: dict[str, TaskConfig] = field(default_factory=dict)  # by name: kind, and the settings of that kind
    task_interval: int = 0  # steps between evaluations of the tasks; 0: with every evaluation
    name: str = ""  # of the results that `evaluate` writes; empty: made of the step and the settings
    head_rows: int = 2  # held-out rows whose attention `evaluate` measures by layer and head; 0: none
    entropy_rows: int = 0  # held-out rows whose attention entropy a run measures by layer with each evaluation; 0: none
    bound_rows: int = 0  # held-out rows on which `evaluate` compares both streams with Theorem 1's bound; 0: none
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)

    def problems(self) -> list[Problem]:
        """Returns the problems within this section."""
        found = at_least(
            "evaluation", self, 0, "interval", "rows", "task_interval", "head_rows", "entropy_rows", "bound_rows"
        )
        if self.name and not TASK_NAME.fullmatch(self.name):
            rule = "must be a file's name of letters, digits, dots, hyphens and underscores"
            found.append(Problem("evaluation.name", self.name, rule, "try rope_4x"))
        if self.task_interval > 0 and self.interval > 0 and self.task_interval % self.interval:
            rule = f"must be a multiple of evaluation.interval={self.interval}, with which the tasks are evaluated"
            advice = f"try {-(-self.task_interval // self.interval) * self.interval}"
            found.append(
                Problem("evaluation.task_interval", self.task_interval, rule, advice, ("evaluation.interval",))
            )
        elif self.task_interval > 0 and self.interval == 0:
            rule, advice = "needs evaluations on the way", f"try evaluation.interval={self.task_interval}"
            found.append(Problem("evaluation.task_interval", self.task_interval, rule, advice))
        for name, task in self.tasks.items():
            key = f"evaluation.tasks.{name}"
            if not TASK_NAME.fullmatch(name):
                rule = "must have a name of letters, digits, dots, hyphens and underscores"
                found.append(Problem(key, None, rule, "try evaluation.tasks.arc_easy.kind=multiple_choice"))
            found += [replace(problem, key=f"{key}.{problem.key}") for problem in task.problems()]
        return found + self.lm_eval.problems()
