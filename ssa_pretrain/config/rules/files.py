"""Rules of the files: output folder, initial weights and data. They run only if `Machine.has_files`."""

from importlib.util import find_spec
from pathlib import Path

from ssa_pretrain.config import Config, RowPacking
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.data.manifest import load_manifest
from ssa_pretrain.data.mixture import is_padded, least_tokens
from ssa_pretrain.run_folder import ELSEWHERE, named_folder, require_free, unwritable
from ssa_pretrain.settings.problems import ConfigError, Problem, join

MAX_LISTED = 4  # steps of another run


def _output_dir(config: Config, machine: Machine) -> list[Problem]:
    """The output folder is writable and not in use by another run."""
    if not config.output_dir.strip():
        return []
    if reason := unwritable(Path(config.output_dir)):
        return [Problem("output_dir", config.output_dir, reason, ELSEWHERE)]
    try:
        if machine.locks_folder:
            require_free(Path(config.output_dir))
    except ConfigError as error:
        return list(error.problems)
    return []


def _initial_weights(config: Config, _: Machine) -> list[Problem]:
    """The folder of the initial weights exists and is not the run's own."""
    named, output_dir = config.checkpoint.init_from, Path(config.output_dir).resolve()
    if not named:
        return []
    folder = named_folder(named)
    if not folder.is_dir():
        advice = "give an earlier run's folder, a checkpoint's or one of common weights"
        return [Problem("checkpoint.init_from", named, "does not exist", advice)]
    if output_dir in (folder.resolve(), *folder.resolve().parents):
        rule = f"lies in this run's own output_dir={config.output_dir}"
        advice = "leave it out: the same command again resumes"
        return [Problem("checkpoint.init_from", named, rule, advice, ("output_dir",))]
    return []


def _branch(config: Config, _: Machine) -> list[Problem]:
    """The checkpoint that a branch continues exists and is not the run's own."""
    named, output_dir = config.checkpoint.branch_from, Path(config.output_dir).resolve()
    if not named:
        return []
    folder, key = named_folder(named), "checkpoint.branch_from"
    if output_dir in (folder.resolve(), *folder.resolve().parents):
        rule = f"lies in this run's own output_dir={config.output_dir}"
        return [Problem(key, named, rule, "give the branch an output_dir of its own", ("output_dir",))]
    if folder.is_dir():
        return []
    steps = sorted(int(p.name.removeprefix("step_")) for p in folder.parent.glob("step_" + "[0-9]" * 8))
    advice = (
        f"it has step {join(steps[-MAX_LISTED:])}"
        if steps
        else "give an earlier run's folder, RUN@STEP or a checkpoint"
    )
    return [Problem(key, named, "does not exist", advice)]


def _mirror(config: Config, _: Machine) -> list[Problem]:
    """A mirror needs boto3."""
    if not config.checkpoint.mirror or find_spec("boto3"):
        return []
    rule, advice = "needs boto3, which is not installed", "install the extra: pip install -e '.[hub]'"
    return [Problem("checkpoint.mirror", config.checkpoint.mirror, rule, advice)]


def _data(config: Config, machine: Machine) -> list[Problem]:
    """The data is usable: readable manifest, vocabulary that fits, known sources, enough tokens in the splits that are read."""
    path, length = config.data.path, config.data.sequence_length
    try:
        manifest = load_manifest(path)
    except ValueError as error:
        return [Problem("data.path", path, f"is not usable: {error}", exit_code=4)]
    found, vocab = [], manifest.tokenizer.vocab_size
    if 0 < config.model.vocab_size < vocab:
        rule, advice = f"is smaller than the {vocab} ids of {path}'s tokenizer", f"try 0 (the tokenizer's) or {vocab}"
        found.append(Problem("model.vocab_size", config.model.vocab_size, rule, advice))
    for split in machine.splits:
        if not manifest.splits[split]:
            advice = f"choose another, or prepare it with split.heldout_fraction {'below 1' if split == 'train' else 'above 0'}"
            return [*found, Problem("data.path", path, f"has no {split} documents", advice, exit_code=4)]
    if "train" not in machine.splits:
        return found
    tokens: dict[str, int] = {}
    for shard in manifest.splits["train"]:
        tokens[shard.part] = tokens.get(shard.part, 0) + shard.tokens
    mixtures = {"data.weights": config.data.weights}
    mixtures |= {f"data.stages[{n}].weights": stage.weights for n, stage in enumerate(config.data.stages)}
    for key, weights in mixtures.items():
        for name in sorted(set(weights) - set(tokens)):
            advice = f"its parts are {join(tokens, 'and')}"
            found.append(Problem(f"{key}.{name}", weights[name], f"names no part of {path}", advice))
    if config.data.packing is RowPacking.best_fit and is_padded(manifest):
        rule = f"packs documents, but {path} was packed as official_row, a sequence per row"
        advice = "try flow, or prepare the text again with packing=megatron"
        found.append(Problem("data.packing", config.data.packing, rule, advice))
    name, fewest = min(tokens.items(), key=lambda item: item[1])
    if fewest < least_tokens(length):
        rule = f"needs {least_tokens(length)} tokens of each part, and {name} (train) in {path} has {fewest}"
        block = max(1, config.attention.block_size)
        longest = (fewest - 1) // 2 // block * block
        advice = f"prepare more text, or try {longest}" if longest else "prepare more text"
        found.append(Problem("data.sequence_length", length, rule, advice))
    return found


FILE_RULES = (_output_dir, _initial_weights, _branch, _mirror, _data)
