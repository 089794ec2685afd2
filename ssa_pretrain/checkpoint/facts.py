"""The contract between a run and the checkpoint that it resumes from, as plain values. Imports neither torch nor an engine."""

from typing import Any

from ssa_pretrain.config import Batches, Config, RowPacking, batches
from ssa_pretrain.data.packed_index import VERSION
from ssa_pretrain.settings.convert import config_to_dict

AVERAGED = "averaged"  # fact of a model soup: the checkpoints whose weights it averages
HISTORY = "history"  # fact of a branch: the runs that it continues; it decides nothing
LATER = "vocabulary."  # prefix of facts that older checkpoints lack
OPTIM = ("name", "beta1", "beta2", "eps", "weight_decay", "clip_grad", "muon")
BATCH_STEPS = "training.batch_steps"
MICRO_BATCH = "training.micro_batch_size"
STAGES = "data.stages"
SHAPELESS = ("model.rope_theta", "model.rope_scaling", "model.norm_eps", "model.init_std", "model.vocab_divisor")


def run_facts(
    config: Config, *, fingerprint: str, padded_vocab_size: int, tokenizer_sha256: str, step: int = 0
) -> dict[str, Any]:
    """Returns the facts on which a resumed run and its checkpoint must agree: everything that decides the losses, except layout and schedule.

    Args:
        config: the run's configuration.
        fingerprint: of the data.
        padded_vocab_size: the embedding's first dim.
        tokenizer_sha256: of the data's tokenizer.
        step: the checkpoint's. Stages of the mixture that began before it are a fact; later ones may change.
    """
    tree = config_to_dict(config)
    kept = {f"model.{k}": v for k, v in tree["model"].items() if k != "name"}
    kept |= {f"attention.{k}": v for k, v in tree["attention"].items() if k != "impl"}
    kept |= {f"data.{k}": tree["data"][k] for k in ("sequence_length", "weights", "packing", "isolate_documents")}
    kept |= {f"training.{k}": tree["training"][k] for k in ("global_batch_tokens", "micro_batch_size", "z_loss")}
    kept |= {f"optim.{k}": tree["optim"][k] for k in OPTIM}
    kept |= {f"precision.{k}": tree["precision"][k] for k in ("name", "grad_reduce_in_fp32", "fp8_recipe")}
    kept |= {f"engine.{k}": tree["engine"][k] for k in ("name", "distributed_optimizer")}
    if config.data.packing is RowPacking.best_fit:
        kept["data.packing"] += f", version {VERSION}"
    sizes = batches(config.training)
    begins = [(stage.steps_before(sizes) + 1, dict(stage.weights)) for stage in config.data.stages]
    return kept | {
        "seed": tree["seed"],
        STAGES: [{"from_step": first, "weights": weights} for first, weights in begins if first <= step],
        "data.fingerprint": fingerprint,
        "vocabulary.padded_size": padded_vocab_size,
        "vocabulary.tokenizer_sha256": tokenizer_sha256,
    }


def batch_changes(config: Config, step: int) -> list[list[int]]:
    """Returns [steps before it, tokens per step] of each change of the batch that a checkpoint of a step has behind it."""
    return [[first, tokens] for first, tokens in batches(config.training).phases[1:] if first < step]


def tokens_trained_on(facts: dict[str, Any], step: int) -> int:
    """Returns the tokens of a checkpoint's first `step` steps, by its facts."""
    changes = ((first, tokens) for first, tokens in facts.get(BATCH_STEPS, []))
    return Batches(((0, facts["training.global_batch_tokens"]), *changes)).tokens_before(step)


def refused_changes(saved: dict[str, Any], wanted: dict[str, Any], equal_microbatches: str | None) -> list[str]:
    """Returns one line for each fact that a resumed run must not change, with both values.

    Args:
        saved: the checkpoint's facts.
        wanted: the run's.
        equal_microbatches: why the micro-batch size must stay; None if it may change.
    """
    lines = {line.partition(":")[0]: line for line in differences(saved, wanted)}
    if MICRO_BATCH in lines and equal_microbatches is None:
        del lines[MICRO_BATCH]
    elif MICRO_BATCH in lines:
        lines[MICRO_BATCH] += f" ({equal_microbatches})"
    if STAGES in lines:
        lines[STAGES] += " (stages that began before the checkpoint must stay, and later ones begin after it)"
    return list(lines.values())


def model_changes(saved: dict[str, Any], wanted: dict[str, Any], *, shapes_only: bool = False) -> list[str]:
    """Returns one line for each fact by which a checkpoint holds another model than the run's, with both values.

    Args:
        saved: the facts of the checkpoint whose weights will be read.
        wanted: the run's.
        shapes_only: compare only the keys that decide the weights' shapes, so that a new run or an evaluation may change others (a longer RoPE).
            The padded vocabulary is compared; model.vocab_size only if neither is 0, which stands for the tokenizer's.
    """
    changed = {line.partition(":")[0]: line for line in differences(saved, wanted)}
    changed.pop("model.init_std", None)  # weights that are read are not drawn
    if shapes_only:
        unnamed = 0 in (saved.get("model.vocab_size"), wanted.get("model.vocab_size"))
        for key in (*SHAPELESS, *["model.vocab_size"] * unnamed):
            changed.pop(key, None)
    decisive = ["attention.gate", "attention.key_convolution", "vocabulary.padded_size"]
    if "nsa" in (saved.get("attention.method"), wanted.get("attention.method")):
        decisive.append("attention.method")  # it has more gates than the others, which share their weights
    scores = saved.get("attention.score"), wanted.get("attention.score")
    if scores[0] == "indexer" and scores[1] != "indexer":
        # A run may begin a scorer, but has no place for one that it does not compute.
        decisive.append("attention.score")
    lines = [line for key, line in changed.items() if key.startswith("model.") or key in decisive]
    heads = [facts.get("attention.indexer", {}).get("heads") for facts in (saved, wanted)]
    if scores == ("indexer", "indexer") and heads[0] != heads[1]:
        lines.append(f"attention.indexer.heads: checkpoint {heads[0]}, run {heads[1]}")
    return lines


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Returns one line for each fact in which a checkpoint and a run differ.

    A key that was added to the configuration after the checkpoint was written has its default, because that is what the older run did. A missing
    fact with the prefix LATER is not compared.
    """
    return [f"{key}: checkpoint {old!r}, run {new!r}" for key, (old, new) in differing(saved, wanted).items()]


def differing(saved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the facts of `differences` by key, with the checkpoint's value and the run's."""
    saved = _with_defaults(saved, wanted, config_to_dict(Config()))
    keys = sorted((saved.keys() | wanted.keys()) - {HISTORY})
    return {key: (saved.get(key), wanted.get(key)) for key in keys if saved.get(key) != wanted.get(key)}


def _with_defaults(saved: dict[str, Any], wanted: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Returns the saved facts, with the configuration's defaults for keys that only `wanted` has; "model.x" is `defaults["model"]["x"]`."""
    filled = dict(saved)
    for key, value in wanted.items():
        default: Any = defaults
        for name in key.split("."):
            default = default.get(name) if isinstance(default, dict) else None
        if isinstance(value, dict) and isinstance(saved.get(key), dict):
            filled[key] = _with_defaults(saved[key], value, default or {})
        elif key not in saved and (default is not None or key.startswith(LATER)):
            filled[key] = value if default is None else default
    return filled
