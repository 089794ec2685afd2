"""Rules across sections of a configuration, the machine and the files. `check` runs all of them.

A rule lives where the values it reads live: layout, schedule, machine, deepspeed, optimizer, indexer, evaluation, data, files. It returns problems
and never raises.
Rules run in order. A rule that reads a key with a problem of its own is skipped, so that one mistake is one line.
`warning` reports a suspicious setting that no rule rejects.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ssa_pretrain.config import Config
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.config.rules.data import DATA_RULES
from ssa_pretrain.config.rules.deepspeed import DEEPSPEED_RULES
from ssa_pretrain.config.rules.evaluation import EVALUATION_FILE_RULES, EVALUATION_RULES
from ssa_pretrain.config.rules.files import FILE_RULES
from ssa_pretrain.config.rules.indexer import INDEXER_RULES
from ssa_pretrain.config.rules.keys import KEY_RULES
from ssa_pretrain.config.rules.layout import LAYOUT_RULES
from ssa_pretrain.config.rules.machine import MACHINE_RULES
from ssa_pretrain.config.rules.nsa import NSA_RULES
from ssa_pretrain.config.rules.optimizer import OPTIMIZER_RULES
from ssa_pretrain.config.rules.schedule import SCHEDULE_RULES
from ssa_pretrain.settings.convert import SECRET_ADVICE, SECRET_RULE, config_to_dict
from ssa_pretrain.settings.problems import HIDDEN, Problem, hide_secrets, independent


def check(config: Config, machine: Machine, wrong: Collection[str] = (), *, secrets: bool = True) -> list[Problem]:
    """Returns every problem of a configuration.

    Args:
        config: the typed configuration.
        machine: the machine, as far as it is known.
        wrong: keys that already have problems; a section stands for all its keys.
        secrets: whether texts are searched for secrets, which takes longer than all other rules.
    """
    files = (*FILE_RULES, *EVALUATION_FILE_RULES) if machine.has_files else ()
    rules = (
        *((_secrets,) if secrets else ()),
        _sections,
        *KEY_RULES,
        *NSA_RULES,
        *LAYOUT_RULES,
        *SCHEDULE_RULES,
        *MACHINE_RULES,
        *DEEPSPEED_RULES,
        *OPTIMIZER_RULES,
        *INDEXER_RULES,
        *EVALUATION_RULES,
        *DATA_RULES,
        *files,
    )
    found: list[Problem] = []
    for rule in rules:
        bad = {*wrong, *(problem.key for problem in found)}
        found += independent(rule(config, machine), bad)
    return found


def accepts_layout(config: Config, machine: Machine) -> bool:
    """Returns whether a configuration has no problem that its layout, batch or engine can cause. Stops at the first: a search asks thousands of times."""
    of_layout = (*LAYOUT_RULES, *SCHEDULE_RULES, *MACHINE_RULES, *DEEPSPEED_RULES)
    rules = (_sections, *of_layout, *OPTIMIZER_RULES, *INDEXER_RULES)
    return not any(rule(config, machine) for rule in rules)


def warning(config: Config) -> str:
    """Returns a warning about a suspicious setting that no rule rejects; usually empty."""
    attention, length = config.attention, config.data.sequence_length
    if "sparse" not in attention.method.streams or attention.top_k * attention.block_size < length:
        return ""
    blocks = f"attention.top_k={attention.top_k} blocks of attention.block_size={attention.block_size}"
    return (
        f"{blocks} cover whole rows of data.sequence_length={length}, so sparse attention is full attention: alignment 0, captured mass 1; "
        "lower top_k or lengthen the rows"
    )


def _secrets(config: Config, machine: Machine) -> list[Problem]:
    """No setting holds a secret: the configuration is saved beside the checkpoints."""
    found = [key for key, text in _texts(config_to_dict(config)) if hide_secrets(text, machine.secrets) != text]
    return [Problem(key, HIDDEN, SECRET_RULE, SECRET_ADVICE) for key in found]


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields the texts of a tree with their keys; a mapping's own names count as texts."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield key, str(name)
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _texts(value, key)


def _sections(config: Config, _: Machine) -> list[Problem]:
    """Applies each section's own rules."""
    return config.problems()
