"""The problems of a configuration, as values: each names its key, its value, the rule and the nearest valid choice.

Rules return lists of problems instead of raising, so that a user sees all of them at once. This module has the problem, the error that carries
several of them, and the words and numbers that rules share. Standard library only.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssa_pretrain.errors import CommandError, ExitCode

SECRET = re.compile(
    r"(api|access|auth|secret|private)[_-]?(key|token)|(^|[._-])(key|(?<!eos_)(?<!bos_)token)$|secret|passw|credential",
    re.IGNORECASE,
)

# Shapes of credentials: W&B, Hugging Face, GitHub, AWS, OpenAI-like keys, JSON web tokens, and passwords inside URLs. A W&B key of the old form is
# 40 hex digits, like a revision in a path, so only `redact` looks for it.
CREDENTIAL = re.compile(
    r"\bwandb_v1_\w{20,}|\bhf_\w{20,}|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\bsk-[\w-]{20,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
HIDDEN = "<hidden>"
SHORTEST_SECRET = 12  # a shorter value in the environment is a word that other texts contain


def secrets_of(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the values of the variables whose names are those of secrets (WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY), longest first."""
    found = {v for name, v in environment.items() if SECRET.search(name) and len(v) >= SHORTEST_SECRET}
    return tuple(sorted(found - {name for name in found if os.path.exists(name)}, key=len, reverse=True))


def hide_secrets(text: str, secrets: Iterable[str] = ()) -> str:
    """Returns a text with everything that has the shape of a credential, and the given secrets, replaced by HIDDEN."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return CREDENTIAL.sub(HIDDEN, text)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the configuration.

    Attributes:
        key: the dotted key as the user writes it ("optim.lr"), or the words that are wrong.
        value: its value; None leaves "=value" out.
        rule: the rule that the value breaks, worded to follow "key=value".
        advice: the nearest valid choice ("try 2 or 4"); may be empty.
        reads: other keys that the rule reads; a rule that reads a key with a problem of its own is not reported.
        exit_code: 3 for the configuration, 4 for the data.
    """

    key: str
    value: object
    rule: str
    advice: str = ""
    reads: tuple[str, ...] = ()
    exit_code: int = 3

    def __str__(self) -> str:
        shown = "" if self.value is None else f"={show(self.value)}"
        if shown and SECRET.search(self.key):
            shown = f"={HIDDEN}"
        return f"{self.key}{shown} {self.rule}" + (f"; {self.advice}" if self.advice else "")


class ConfigError(CommandError, ValueError):
    """A configuration with problems; str() lists them, one per line."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        only_data = all(problem.exit_code == ExitCode.DATA for problem in self.problems)
        self.exit_code = ExitCode.DATA if only_data else ExitCode.CONFIGURATION
        super().__init__("\n".join(f"  {problem}" for problem in self.problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[Problem, ...]]]:
        """Returns how another process rebuilds it: from the problems, not from their text."""
        return ConfigError, (self.problems,)


def independent(found: Iterable[Problem], wrong: Iterable[str]) -> list[Problem]:
    """Returns the problems that do not follow from another one: neither their key nor one that their rule reads is wrong already.

    Args:
        found: problems.
        wrong: keys with problems; a section stands for all its keys.
    """
    wrong = list(wrong)

    def follows(problem: Problem) -> bool:
        keys = (problem.key, *problem.reads)
        return any(key == bad or key.startswith(f"{bad}.") for key in keys for bad in wrong)

    return [problem for problem in found if not follows(problem)]


def show(value: object) -> str:
    """Returns a value as a user writes it on the command line, cut to 60 characters."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or value == "":
        return "null" if value is None else "''"
    if isinstance(value, list):
        value = f"[{', '.join(map(show, value))}]"
    # A mapping may hold a secret.
    text = "{...}" if isinstance(value, dict) and value else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def join(choices: Iterable[object], last: str = "or") -> str:
    """Returns choices as English: "2", "2 or 4", "2, 4 or 8"."""
    words = [show(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def nearest(value: int, choices: Iterable[int], count: int = 2) -> list[int]:
    """Returns the `count` choices nearest to a number, in increasing order."""
    return sorted(sorted(set(choices), key=lambda choice: (abs(choice - value), choice))[:count])


def nearest_multiples(value: int, unit: int) -> list[int]:
    """Returns the positive multiples of `unit` just below and just above a number."""
    return sorted({max(1, value // unit) * unit, max(1, -(-value // unit)) * unit})


def divisors(number: int) -> list[int]:
    """Returns the divisors of a positive number up to 4,096, in increasing order: degrees of parallelism to choose from."""
    return [d for d in range(1, min(number, 4096) + 1) if number % d == 0]


def at_least(section: str, values: Any, minimum: float, *names: str) -> list[Problem]:
    """Returns a problem for each of a section's fields that is below a minimum; the section of the top level is empty."""
    low = {name: getattr(values, name) for name in names if getattr(values, name) < minimum}
    rule, advice = f"must be at least {minimum:g}", f"try {minimum:g}"
    return [Problem(_dotted(section, name), value, rule, advice) for name, value in low.items()]


def above_zero(section: str, values: Any, *names: str) -> list[Problem]:
    """Returns a problem for each of a section's fields that is not positive; the advice is the default."""
    low = {name: getattr(values, name) for name in names if getattr(values, name) <= 0}
    defaults = type(values)()
    advice = {name: f"try {getattr(defaults, name)}" for name in low}
    return [Problem(_dotted(section, name), value, "must be above 0", advice[name]) for name, value in low.items()]


def between(section: str, values: Any, low: float, high: float, *names: str) -> list[Problem]:
    """Returns a problem for each of a section's fields outside a closed interval; the advice is its nearer end."""
    outside = {name: getattr(values, name) for name in names if not low <= getattr(values, name) <= high}
    rule = f"must lie in {low:g} to {high:g}"
    return [
        Problem(_dotted(section, name), value, rule, f"try {low if value < low else high:g}")
        for name, value in outside.items()
    ]


def _dotted(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
