"""Rules of evaluation: tasks against the length of the rows, and the files that tasks read."""

from importlib.util import find_spec
from pathlib import Path

from ssa_pretrain.config import ChoiceTask, Config, NeedleTask, PerplexityTask
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.data.manifest import load_manifest
from ssa_pretrain.settings.problems import Problem


def _needles(config: Config, _: Machine) -> list[Problem]:
    """A haystack fits into a row."""
    found, length = [], config.data.sequence_length
    for name, task in config.evaluation.tasks.items():
        if isinstance(task, NeedleTask) and (long := [n for n in task.lengths if n > length]):
            rule = f"must be at most data.sequence_length={length} tokens each"
            advice = f"try [{length}], or data.sequence_length={max(long)} in an evaluation"
            key, reads = f"evaluation.tasks.{name}.lengths", ("data.sequence_length",)
            found.append(Problem(key, long, rule, advice, reads))
    return found


def _lm_eval(config: Config, machine: Machine) -> list[Problem]:
    """Tasks of lm_eval need lm_eval."""
    tasks = config.evaluation.lm_eval.tasks
    if not tasks or not machine.has_files or machine.entry != "evaluate" or find_spec("lm_eval") is not None:
        return []
    rule, advice = "needs lm_eval, which is not installed", 'try pip install -e ".[evaluation]"'
    return [Problem("evaluation.lm_eval.tasks", tasks, rule, advice)]


def _files(config: Config, _: Machine) -> list[Problem]:
    """Questions exist; a further dataset has held-out text in the tokens of the run's own."""
    found: list[Problem] = []
    for name, task in config.evaluation.tasks.items():
        key = f"evaluation.tasks.{name}.path"
        if isinstance(task, ChoiceTask) and not Path(task.path).is_file():
            advice = "give a file with one question per line"
            found.append(Problem(key, task.path, "does not exist", advice, exit_code=4))
        elif isinstance(task, PerplexityTask):
            found += _dataset(key, task.path, config.data.path)
    if (folder := config.evaluation.lm_eval.include_path) and not Path(folder).is_dir():
        found.append(
            Problem("evaluation.lm_eval.include_path", folder, "does not exist", "give a folder of task files")
        )
    return found


def _dataset(key: str, path: str, own: str) -> list[Problem]:
    """Returns the problems of a task's dataset."""
    try:
        manifest = load_manifest(path)
    except ValueError as error:
        return [Problem(key, path, f"is not usable: {error}", exit_code=4)]
    if not manifest.splits["heldout"]:
        advice = "choose another, or prepare it with split.heldout_fraction above 0"
        return [Problem(key, path, "has no heldout documents", advice, exit_code=4)]
    try:
        trained = load_manifest(own, hashes=False).tokenizer
    except ValueError:
        return []  # reported under data.path
    if manifest.tokenizer.sha256 == trained.sha256:
        return []
    rule = f"was made with another tokenizer ({manifest.tokenizer.name}) than data.path={own} ({trained.name})"
    return [Problem(key, path, rule, "prepare its text again with the run's tokenizer", ("data.path",), exit_code=4)]


EVALUATION_RULES = (_needles, _lm_eval)
EVALUATION_FILE_RULES = (_files,)
