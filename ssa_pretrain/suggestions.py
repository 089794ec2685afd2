"""What a user most likely meant by a key or an option that does not exist.

The distance is that of typing errors: swapped, missing, doubled or neighbouring letters cost less than arbitrary ones. A key is compared
whole, by its last parts (`lr`, `wandb.mode`), and by its last part under another section (`trainer.lr`); names that other trainers use
come from a table. Stdlib only, deterministic.
"""

from collections.abc import Iterable
from functools import lru_cache

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
_SLIP = 0.8  # a swapped, doubled or neighbouring letter
_SHORTENED = 0.5  # a key without its section
_MOVED = 1.5  # a key under another section


def closest(typed: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Returns the known names that a user most likely meant by `typed`, best first; none when nothing is near.

    Args:
        typed: a dotted key, with or without its section, or an option.
        known: valid names.
        count: how many to return at most; only names about as near as the best are returned.
    """
    known, typed = list(known), typed.lower()
    scored = sorted((_key_distance(typed, key), key) for key in known)
    best = scored[0][0] if scored else float("inf")
    synonym = SYNONYMS.get(typed.rsplit(".", 1)[-1])
    if best > 1.0 and synonym in known:
        return [synonym]
    if best <= max(1.0, 0.34 * len(typed)):
        return [key for distance, key in scored if distance <= best + 0.3][:count]
    words = set(typed.rsplit(".", 1)[-1].split("_"))
    return [key for key in known if words <= set(key.rsplit(".", 1)[-1].split("_"))][:count]


def _key_distance(typed: str, key: str) -> float:
    """The distance over the whole key, its last parts, or its last part under another section, whichever is least."""
    section, _, leaf = typed.rpartition(".")
    parts = key.split(".")
    distances = [typing_distance(typed, key)]
    if typed.count(".") + 1 < len(parts):
        distances.append(_SHORTENED + typing_distance(typed, ".".join(parts[-typed.count(".") - 1 :])))
    if section:
        distances.append(_MOVED + typing_distance(leaf, parts[-1]))
    return min(distances)


@lru_cache(maxsize=65536)
def typing_distance(typed: str, meant: str) -> float:
    """Returns the cost of the cheapest slips of the hand that make `typed` of `meant`: 1 an arbitrary letter, 0.8 a likely one.

    The optimal string alignment distance (Damerau and Levenshtein's, no letter edited twice) with weights.
    """
    two_above: list[float] = []
    above = [float(j) for j in range(len(meant) + 1)]
    for i, a in enumerate(typed, start=1):
        row = [float(i)]
        repeats = i > 1 and a == typed[i - 2]
        for j, b in enumerate(meant, start=1):
            extra = above[j] + (_SLIP if repeats else 1.0)
            missing = row[j - 1] + (_SLIP if j > 1 and b == meant[j - 2] else 1.0)
            cost = min(extra, missing, above[j - 1] + _substitution(a, b))
            if i > 1 and j > 1 and a != b and a == meant[j - 2] and b == typed[i - 2]:
                cost = min(cost, two_above[j - 2] + _SLIP)
            row.append(cost)
        two_above, above = above, row
    return above[-1]


def _substitution(typed: str, meant: str) -> float:
    """The cost of one letter for another."""
    if typed == meant:
        return 0.0
    if {typed, meant} == {"-", "_"}:
        return 0.2
    near = any(typed in row and meant in row and abs(row.index(typed) - row.index(meant)) == 1 for row in _KEYBOARD)
    return _SLIP if near else 1.0
