"""The keys or options that a user most likely meant by one that does not exist.

The distance is that of typing errors: swapped, missing, doubled or neighbouring letters cost less than arbitrary ones. A key is compared
whole, by its last parts (`lr`, `wandb.mode`), and by its last part under another section (`trainer.lr`); names that other trainers use
come from a table. Stdlib only, deterministic.
"""

from collections.abc import Iterable
from itertools import pairwise, takewhile
from math import inf

# What other trainers call our keys, by the last part of a key.
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
    "decay_ratio": "optim.decay_fraction",
    "lr_wsd_decay_style": "optim.decay_shape",
    "rampup_batch_size": "training.batch_steps",
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

_KEYBOARD = ("1234567890-", "qwertyuiop", "asdfghjkl", "zxcvbnm_")
_NEIGHBOURS = frozenset(
    pair for row in _KEYBOARD for left, right in pairwise(row) for pair in ((left, right), (right, left))
)
_SLIP = 0.8  # a swapped, doubled or neighbouring letter
_SHORTENED = 0.5  # a key without its section
_MOVED = 1.5  # a key under another section
_AS_NEAR = 0.3  # how much farther than the nearest a name may be to be named too


def closest(typed: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Returns the known names that a user most likely meant by `typed`, best first; empty if none is near.

    Args:
        typed: a dotted key, with or without its section, or an option.
        known: valid names.
        count: how many to return at most; only names about as near as the best are returned.
    """
    known, typed = list(known), typed.lower()
    best = max(1.0, 0.34 * len(typed))
    scored = []
    for key in known:
        distance = _key_distance(typed, key, best + _AS_NEAR)
        best = min(best, distance)
        scored.append((distance, -_shared_ends(typed, key), abs(len(typed) - len(key)), key))
    found = [key for distance, _, _, key in sorted(scored) if distance <= best + _AS_NEAR]
    synonym = SYNONYMS.get(typed.rsplit(".", 1)[-1])
    if synonym in known and (best > 1.0 or not found):
        return [synonym]
    return found[:count] or _with_its_words(typed, known)[:count]


def _key_distance(typed: str, key: str, limit: float) -> float:
    """Returns the smallest of three distances: to the whole key, to its last parts, and to its last part under another section."""
    section, _, leaf = typed.rpartition(".")
    parts = key.split(".")
    distances = [typing_distance(typed, key, limit)]
    if typed.count(".") + 1 < len(parts):
        last = ".".join(parts[-typed.count(".") - 1 :])
        distances.append(_SHORTENED + typing_distance(typed, last, limit - _SHORTENED))
    if section:
        distances.append(_MOVED + typing_distance(leaf, parts[-1], limit - _MOVED))
    return min(distances)


def _shared_ends(typed: str, key: str) -> int:
    """Returns the number of letters that two words share at their beginning and at their end."""
    pairs = (zip(typed, key, strict=False), zip(reversed(typed), reversed(key), strict=False))
    return sum(1 for letters in pairs for _ in takewhile(lambda pair: pair[0] == pair[1], letters))


def _with_its_words(typed: str, known: list[str]) -> list[str]:
    """Returns the known names whose last part has all the words of the typed one (num_heads: num_attention_heads)."""
    words = set(typed.rsplit(".", 1)[-1].split("_"))
    return [key for key in known if words <= set(key.rsplit(".", 1)[-1].split("_"))]


def typing_distance(typed: str, meant: str, limit: float = inf) -> float:
    """Returns the cost of the cheapest typing errors that turn `meant` into `typed`: 1 per arbitrary letter, 0.8 per likely one.

    The optimal string alignment distance (Damerau and Levenshtein's, no letter edited twice) with weights.

    Args:
        typed: the word as typed.
        meant: a word that may have been meant.
        limit: the search stops above it and returns infinity.
    """
    if abs(len(typed) - len(meant)) * _SLIP > limit:
        return inf
    two_above: list[float] = []
    above = [float(j) for j in range(len(meant) + 1)]
    for i, a in enumerate(typed, start=1):
        row = [float(i)]
        extra = _SLIP if i > 1 and a == typed[i - 2] else 1.0
        for j, b in enumerate(meant, start=1):
            missing = _SLIP if j > 1 and b == meant[j - 2] else 1.0
            cost = min(above[j] + extra, row[j - 1] + missing, above[j - 1] + _substitution(a, b))
            if i > 1 and j > 1 and a != b and a == meant[j - 2] and b == typed[i - 2]:
                cost = min(cost, two_above[j - 2] + _SLIP)
            row.append(cost)
        if min(row) > limit and min(above) > limit:  # a swap reaches over one row
            return inf
        two_above, above = above, row
    return above[-1] if above[-1] <= limit else inf


def _substitution(typed: str, meant: str) -> float:
    """Returns the cost of typing one letter for another."""
    if typed == meant:
        return 0.0
    if {typed, meant} == {"-", "_"}:
        return 0.2
    return _SLIP if (typed, meant) in _NEIGHBOURS else 1.0
