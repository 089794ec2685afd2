"""Tries out the settings that a problem advises before the advice is printed.

A rule knows its own keys, and the value that it advises may break another rule: `training.steps=0` where `training.total_tokens` is 0 as well. So
each advised setting is put into the configuration and all rules run again. A setting that one of them refuses is not advised. If none is left,
the nearest value that all rules accept is searched for. Sentences that advise no setting stay as they are.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import yaml

from ssa_pretrain.config import CONF, Config
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.config.rules import check
from ssa_pretrain.settings.convert import MismatchError, convert, known_keys
from ssa_pretrain.settings.kinds import first_of
from ssa_pretrain.settings.problems import HIDDEN, Problem, join

GROUP_KEYS = {"precision": "precision.name", "engine": "engine.name", "attention": "attention.method"}
ONE_STAGE = "parallel.tp=1 parallel.pp=1 parallel.vpp=1 parallel.cp=1 parallel.sequence_parallel=false"  # parallel=dp
SETTING = re.compile(r"(?:([a-z_][\w.]*)=)?([^\s=]+)")
INTEGERS = sorted(
    {*range(129), *range(0, 4097, 16), *(factor << power for factor in (1, 3, 5, 7) for power in range(45))}
)
USUAL = 300  # where a whole number was meant and none was typed
MOST_ADVISED = 2


def with_tried_advice(problems: Sequence[Problem], config: Config, machine: Machine) -> list[Problem]:
    """Returns problems whose advised settings all rules accept.

    Args:
        problems: all that is wrong with a configuration.
        config: the configuration; a field whose value could not be converted has its default.
        machine: the machine, as far as it is known.
    """
    trial = _Trial(config, replace(machine, has_files=False), {problem.key for problem in problems})
    return [_tried(problem, trial) for problem in problems]


def settings_advised(problem: Problem) -> list[str]:
    """Returns the settings, as key=value, that a problem's advice names after "try" or "add"."""
    verb, _, text = problem.advice.partition(" ")
    found = []
    for part in re.split(r",? or |, ", text) if verb in ("try", "add") else []:
        match = SETTING.fullmatch(part)
        found += [f"{match[1] or problem.key}={match[2]}"] if match else []
    return found


def in_keys_only(advice: str) -> str:
    """Returns advice for a configuration without groups: `engine=megatron` is `engine.name=megatron` there."""
    advice = re.sub(r"\b(precision|engine|attention)=(\w+)", lambda found: f"{GROUP_KEYS[found[1]]}={found[2]}", advice)
    return advice.replace("parallel=dp", ONE_STAGE)


class _Trial:
    """All rules over one configuration with other values."""

    def __init__(self, config: Config, machine: Machine, wrong: Collection[str]) -> None:
        self.config = config
        self.machine = machine
        self.wrong = set(wrong)
        # Those of rules are in the configuration, and another value may end them; the others it does not hold.
        found = check(config, machine)
        self.unread = self.wrong - {problem.key for problem in found}
        self.secret = {problem.key for problem in found if problem.value == HIDDEN}

    def accepts(self, problem: Problem, values: Mapping[str, Any], *, alone: bool = False) -> bool:
        """Returns whether values by key solve a problem and cause no other one; `alone`: no other one of the same keys."""
        ended, config, unread = {problem.key, *values}, self.config, self.unread
        for key, value in values.items():
            config = with_value(config, key, value)
        may_be_secret = any(isinstance(value, str) for value in values.values())
        if not may_be_secret:  # the secrets are those of before
            unread = unread | self.secret
        found = {other.key for other in check(config, self.machine, unread - ended, secrets=may_be_secret)}
        return not found & ended if alone else found <= self.wrong - ended


def with_value(config: Any, key: str, value: Any) -> Any:
    """Returns a configuration with another value of a dotted key."""
    name, _, rest = key.partition(".")
    return replace(config, **{name: with_value(getattr(config, name), rest, value) if rest else value})


def _tried(problem: Problem, trial: _Trial) -> Problem:
    """Returns the problem with advice that all rules accept."""
    kind, named = first_of(known_keys(Config).get(problem.key)), settings_advised(problem)
    if not named or not (kind in (bool, int, float) or (isinstance(kind, type) and issubclass(kind, Enum))):
        return problem
    for alone in (
        False,
        True,
    ):  # if no single setting solves the problem, one that is valid for its own key is a first step
        good = [setting for setting in named if _holds(problem, setting, trial, alone=alone)]
        if len(good) == len(named):
            return problem
        words = [setting.removeprefix(f"{problem.key}=") for setting in good]
        if found := words or _nearest(problem, kind, trial, alone=alone):
            return replace(problem, advice=f"try {join(found)}")
    return replace(problem, advice=f"see --explain {problem.key}")


def _holds(problem: Problem, setting: str, trial: _Trial, *, alone: bool) -> bool:
    """Returns whether all rules accept an advised setting. A setting that the configuration does not have is not tried: True."""
    key, _, text = setting.partition("=")
    values, kinds = _option(key, text, trial.config) if key in GROUP_KEYS else {key: text}, known_keys(Config)
    if not values.keys() <= kinds.keys():
        return True
    try:
        return trial.accepts(problem, {k: convert(kinds[k], value) for k, value in values.items()}, alone=alone)
    except MismatchError:
        return False


def _option(group: str, name: str, config: Config) -> dict[str, Any]:
    """Returns the values that a group's option sets, by dotted key. Keys that only the present option's file sets get their defaults."""
    present = value_of(config, GROUP_KEYS[group]).value
    values = {key: value_of(Config(), key) for key in _option_file(group, present)}
    return values | {GROUP_KEYS[group]: name} | _option_file(group, name)


def _option_file(group: str, name: str) -> dict[str, Any]:
    """Returns the values in an option's file by dotted key; empty if there is no such file."""
    path = CONF / group / f"{name}.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return {f"{group}.{key}": value for key, value in (settings or {}).items()}


def _nearest(problem: Problem, kind: Any, trial: _Trial, *, alone: bool = False) -> list[Any]:
    """Returns the accepted values nearest to the given one: one value, or two if the second is near as well."""
    found, target = [], _number(problem.value) if kind in (int, float) else None
    for value in dict.fromkeys(_candidates(problem, kind, trial)):
        if trial.accepts(problem, {problem.key: value}, alone=alone):
            found.append(value)
        if len(found) == MOST_ADVISED or (found and (target is None or found == [target])):
            break
    if target and len(found) > 1 and not target / 2 <= found[1] <= target * 2:
        found.pop()
    return sorted(found) if kind in (int, float) else found


def _candidates(problem: Problem, kind: Any, trial: _Trial) -> Iterator[Any]:
    """Yields values that might do, the likeliest first."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        yield from kind
    elif kind is bool:
        yield from (False, True)
    elif kind in (int, float):
        default = value_of(Config(), problem.key)
        target = _number(problem.value)
        if target is None:
            target = default or (USUAL if kind is int else 0.1)
            yield target
        unit = _batch_unit(trial) if problem.key == "training.global_batch_tokens" else 1
        numbers = INTEGERS if kind is int else (0.0, 0.01, 0.1, 0.5, 1.0)
        yield from sorted(
            (default, *(number * unit for number in numbers)), key=lambda number: (abs(number - target), number)
        )


def _batch_unit(trial: _Trial) -> int:
    """Returns the tokens of one microbatch on all data-parallel ranks together."""
    config, parallel = trial.config, trial.config.parallel
    world = parallel.world_size or trial.machine.world_size or 1
    dp = max(1, world // max(1, parallel.tp * parallel.pp * parallel.cp))
    return max(1, config.data.sequence_length * config.training.micro_batch_size * dp)


def _number(value: Any) -> float | None:
    """Returns the magnitude of the number that a user meant, None for other text. A sign is more likely wrong than the digits."""
    try:
        return None if isinstance(value, bool) else min(abs(float(str(value))), 2.0**45)
    except ValueError:
        return None


def value_of(config: Any, key: str) -> Any:
    """Returns the value of a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config
