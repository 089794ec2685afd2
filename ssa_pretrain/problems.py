"""What is wrong with a configuration, as values: a problem names its key, its value, the rule and the nearest valid choice.

Checks return lists of problems instead of raising, so that a user sees all of them at once. The nearest known key is found by the edit
distance of people's typing errors (a swapped, missing, doubled or neighbouring letter costs less than an arbitrary one) over the whole
dotted key and over its last part alone, after a short table of names that other trainers use. Stdlib only.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

SECRET = re.compile(r"(api|access|auth|secret|private)[_-]?(key|token)|token$|secret|passw|credential", re.IGNORECASE)

# What other trainers call our keys (the last part of a key).
SYNONYMS = {
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "warmup": "optim.warmup_fraction",
    "warmup_ratio": "optim.warmup_fraction",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "max_grad_norm": "optim.clip_grad",
    "grad_clip": "optim.clip_grad",
    "lr_scheduler_type": "optim.schedule",
    "max_steps": "training.steps",
    "train_iters": "training.steps",
    "iterations": "training.steps",
    "batch_size": "training.global_batch_tokens",
    "global_batch_size": "training.global_batch_tokens",
    "mbs": "training.micro_batch_size",
    "seq_len": "data.sequence_length",
    "seq_length": "data.sequence_length",
    "max_seq_len": "data.sequence_length",
    "context_length": "data.sequence_length",
    "tensor_model_parallel_size": "parallel.tp",
    "tensor_parallel": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "pipeline_parallel": "parallel.pp",
    "context_parallel_size": "parallel.cp",
    "num_hidden_layers": "model.num_layers",
    "n_layers": "model.num_layers",
    "num_heads": "model.num_attention_heads",
    "n_heads": "model.num_attention_heads",
    "num_key_value_heads": "model.num_kv_heads",
    "num_query_groups": "model.num_kv_heads",
    "n_kv_heads": "model.num_kv_heads",
    "intermediate_size": "model.ffn_hidden_size",
    "kv_channels": "model.head_dim",
    "rotary_base": "model.rope_theta",
    "alpha": "attention.alignment_weight",
    "block_counts": "attention.top_k",
    "dtype": "precision.name",
    "save_interval": "checkpoint.interval",
    "save_steps": "checkpoint.interval",
    "eval_interval": "evaluation.interval",
    "log_interval": "logging.interval",
    "wandb_project": "logging.wandb.project",
    "data_path": "data.path",
}

_ROWS = ("1234567890-", "qwertyuiop", "asdfghjkl", "zxcvbnm_")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the configuration.

    Attributes:
        key: the dotted key, as the user writes it ("optim.lr"), or the words at fault.
        value: its value; None leaves "=value" out.
        rule: what the value breaks, read after "key=value".
        advice: the nearest valid choice ("try 2 or 4"); may be empty.
        reads: other keys that the rule reads. A rule over a key that is wrong already is not reported.
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
        if SECRET.search(self.key) and self.value is not None:
            shown = "=<hidden>"
        return f"{self.key}{shown} {self.rule}" + (f"; {self.advice}" if self.advice else "")


class ConfigError(ValueError):
    """A configuration with problems; str() is the whole message."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"  {problem}" for problem in self.problems))

    @property
    def exit_code(self) -> int:
        """3 when the configuration is wrong, 4 when only the data is."""
        return 4 if all(problem.exit_code == 4 for problem in self.problems) else 3


def show(value: object) -> str:
    """A value as a user writes it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value == "":
        return "''"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def join(choices: Iterable[object], last: str = "or") -> str:
    """Choices as English: "2", "2 or 4", "2, 4 or 8"."""
    words = [show(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def nearest(value: int, choices: Iterable[int], count: int = 2) -> list[int]:
    """The `count` choices nearest to a number, in increasing order."""
    return sorted(sorted(set(choices), key=lambda choice: (abs(choice - value), choice))[:count])


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, in increasing order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def nearest_multiples(value: int, unit: int) -> list[int]:
    """The multiples of `unit` just below and just above a number, none below one unit."""
    below = max(1, value // unit) * unit
    return [below] if below == value else sorted({below, max(1, -(-value // unit)) * unit})


@lru_cache(maxsize=65536)
def typing_distance(typed: str, meant: str) -> float:
    """The cheapest way to type `typed` for `meant`: 1 an arbitrary letter, less for the slips that hands make."""
    rows = [[0.0] * (len(meant) + 1) for _ in range(len(typed) + 1)]
    for i in range(len(typed) + 1):
        rows[i][0] = float(i)
    for j in range(len(meant) + 1):
        rows[0][j] = float(j)
    for i in range(1, len(typed) + 1):
        for j in range(1, len(meant) + 1):
            a, b = typed[i - 1], meant[j - 1]
            doubled = i > 1 and a == typed[i - 2]
            best = min(
                rows[i - 1][j] + (0.8 if doubled else 1.0),
                rows[i][j - 1] + (0.8 if j > 1 and b == meant[j - 2] else 1.0),
                rows[i - 1][j - 1]
                + (0.0 if a == b else 0.2 if {a, b} == {"-", "_"} else 0.8 if _adjacent(a, b) else 1.0),
            )
            if i > 1 and j > 1 and a == meant[j - 2] and typed[i - 2] == b and a != b:
                best = min(best, rows[i - 2][j - 2] + 0.8)
            rows[i][j] = best
    return rows[-1][-1]


def _adjacent(a: str, b: str) -> bool:
    """Whether two letters are neighbours on a row of the keyboard."""
    return any(abs(row.index(a) - row.index(b)) == 1 for row in _ROWS if a in row and b in row)


def closest(typed: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known keys that a user most likely meant, best first; empty when none is near.

    Args:
        typed: a dotted key, with or without its section.
        known: valid dotted keys.
        count: how many to return at most.
    """
    known = list(known)
    synonym = SYNONYMS.get(typed.rsplit(".", 1)[-1])
    scored = sorted((_key_distance(typed, key), key) for key in known)
    found = [key for distance, key in scored if distance <= max(1.0, 0.34 * len(typed))]
    if synonym in known and not (scored and scored[0][0] <= 1.0):
        found = [synonym, *(key for key in found if key != synonym)]
    if not found:
        found = _sharing_words(typed, known)
    best = _key_distance(typed, found[0]) if found else 0.0
    return [key for key in found if key == found[0] or _key_distance(typed, key) <= best + 0.5][:count]


def _key_distance(typed: str, key: str) -> float:
    """The distance over the whole key, or over its last part when the section is missing or another one."""
    typed = typed.lower()
    section, _, leaf = typed.rpartition(".")
    known_section, _, known_leaf = key.rpartition(".")
    whole = typing_distance(typed, key)
    elsewhere = typing_distance(leaf, known_leaf) + (1.5 if section and section != known_section else 0.5)
    return min(whole, elsewhere)


def _sharing_words(typed: str, known: Iterable[str]) -> list[str]:
    """Known keys whose last part has all the words of the typed one (num_heads: num_attention_heads)."""
    words = set(typed.rsplit(".", 1)[-1].lower().split("_"))
    return [key for key in known if words <= set(key.rsplit(".", 1)[-1].split("_"))]
