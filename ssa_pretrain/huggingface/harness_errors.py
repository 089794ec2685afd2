"""lm_eval's errors that a user can mend, in one sentence: a task that it does not know, and data that it cannot fetch. Does not import lm_eval."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssa_pretrain.errors import DataError
from ssa_pretrain.settings.problems import ConfigError, Problem, join
from ssa_pretrain.settings.suggestions import closest


def require_tasks(manager: Any, names: Sequence[str], key: str) -> None:
    """Checks that lm_eval knows all tasks, groups and tags.

    Args:
        manager: lm_eval's TaskManager.
        names: of the tasks; a path of a YAML file is one too.
        key: the setting with the names, for the message.

    Raises:
        ConfigError: with every unknown name.
    """
    known = list(manager.task_index)
    problems = []
    for name in names:
        if name not in known and not Path(name).is_file():
            near = closest(name, known, 1)
            advice = f"did you mean {near[0]}?" if near else "lm_eval ls tasks lists those it has"
            problems.append(Problem(key, name, "is not a task, a group or a tag of lm_eval", advice))
    if problems:
        raise ConfigError(problems)


@contextmanager
def data_is_reachable(names: Sequence[str]) -> Iterator[None]:
    """Turns the error of a block in which lm_eval fetches the data of tasks, and has no network for it, into one sentence.

    Raises:
        DataError: the data cannot be fetched.
    """
    try:
        yield
    except ConnectionError as error:
        raise DataError(
            f"lm_eval could not fetch the data of {join(names, 'and')} ({' '.join(str(error).split())}); "
            "run it once where the hub can be reached, with the same HF_HOME, which keeps the data"
        ) from None
