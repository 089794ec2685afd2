"""The plan as text: its table, and what the command would find here. Is its data prepared, and what does its output_dir mean for it?

Nothing is created or changed, no lock is kept, and torch is not imported. Checkpoints count as listed: only a run verifies their files.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

from ssa_pretrain.checkpoint.facts import refused_changes, run_facts
from ssa_pretrain.config import Config, EngineName
from ssa_pretrain.config.deepspeed import ds_config
from ssa_pretrain.config.rules import warning
from ssa_pretrain.data.indexed_format import Manifest, load_manifest
from ssa_pretrain.planning.plan import Plan, make_plan
from ssa_pretrain.planning.table import describe
from ssa_pretrain.run_folder import LOCK, unwritable
from ssa_pretrain.schedule import needs_equal_microbatches
from ssa_pretrain.settings.files import LockedError, require_unlocked
from ssa_pretrain.settings.problems import ConfigError, Problem

OF_DATA = ("data.fingerprint", "vocabulary.tokenizer_sha256")  # unknown without the data
MOST_SHOWN = 4


def plan_table(entry: str, config: Config, arguments: Sequence[str], world_size: int) -> str:
    """Returns the plan of a command as a table; prepared data gives the vocabulary and the epochs.

    Args:
        entry: the entry point.
        config: a configuration without problems.
        arguments: of the command.
        world_size: processes of this command, if parallel.world_size does not give a number.

    Raises:
        ConfigError: the data is damaged.
    """
    manifest = _prepared(Path(config.data.path))
    vocab_size = manifest.tokenizer.vocab_size if manifest else None
    plan = make_plan(config, config.parallel.world_size or world_size, vocab_size)
    overrides = [argument for argument in arguments if not argument.startswith("--")]
    table = describe(config, plan, overrides, manifest, entry="evaluate" if entry == "evaluate" else "train") + "\n"
    rows = outlook(entry, config, plan, manifest)
    if suspicious := warning(config):
        rows.append(("warning", suspicious))
    table += "".join(f"{name:<11}{text}\n" for name, text in rows)
    if config.engine.name is EngineName.deepspeed:
        table += f"DeepSpeed's configuration:\n{json.dumps(ds_config(config, plan.dp), indent=2)}\n"
    return table


def _prepared(path: Path) -> Manifest | None:
    """The manifest of prepared data, None if there is none yet; raises ConfigError if it is damaged."""
    if not (path.is_file() or os.path.lexists(path / "manifest.json")):
        return None
    try:
        return load_manifest(path)
    except ValueError as error:
        raise ConfigError([Problem("data.path", str(path), f"is not usable: {error}", exit_code=4)]) from None


def outlook(entry: str, config: Config, plan: Plan, manifest: Manifest | None) -> list[tuple[str, str]]:
    """Returns the plan's last rows, name and text: the run's folder, and the data if they are missing.

    Args:
        entry: the entry point.
        config: a configuration without problems.
        plan: its plan.
        manifest: of its data; None if it is not prepared yet.
    """
    rows = [("output", _folder(entry, config, plan, manifest))]
    return rows if manifest else [("data", _data(config.data.path)), *rows]


def _data(path: str) -> str:
    """A line that the data are missing, with the command that prepares them."""
    source, tokenizer = ("quickstart", "bpe8k") if "quickstart" in path else ("…", "…")
    command = f"python -m data_prep source={source} tokenizer={tokenizer} out={quote(path)}"
    return f"{path} is not prepared yet: {command}"


def _folder(entry: str, config: Config, plan: Plan, manifest: Manifest | None) -> str:
    """What output_dir means for a command."""
    folder = Path(config.output_dir)
    if reason := unwritable(folder):
        return f"{folder} {reason}"
    if entry != "evaluate" and (owner := _owner(folder)):
        return f"{folder} is in use by {owner}: the run would be refused"
    found = _newest(folder)
    if found is None:
        return f"{folder} holds no checkpoint" + ("" if entry == "evaluate" else ": the run starts at step 0")
    step = found["step"]
    if entry == "evaluate":
        return f"{folder}: the checkpoint of step {step} is evaluated"
    wanted = run_facts(
        config,
        fingerprint=manifest.fingerprint if manifest else "",
        padded_vocab_size=plan.padded_vocab_size,
        tokenizer_sha256=manifest.tokenizer.sha256 if manifest else "",
    )
    saved = {k: v for k, v in found["facts"].items() if k != "data.order"}  # the run takes the checkpoint's
    if manifest is None:
        saved, wanted = ({k: v for k, v in facts.items() if k not in OF_DATA} for facts in (saved, wanted))
    if changed := refused_changes(saved, wanted, needs_equal_microbatches(config)):
        more = f"; and {len(changed) - MOST_SHOWN} more" * (len(changed) > MOST_SHOWN)
        listed = "; ".join(changed[:MOST_SHOWN])
        return f"{folder}: the run would be refused at the checkpoint of step {step}, which differs ({listed}{more})"
    last = min(plan.steps, config.training.stop_at_step or plan.steps)
    if step >= last:
        return f"{folder} is finished: it has {step} steps, and {last} are asked for"
    return f"{folder}: the run resumes after step {step} of {plan.steps}"


def _newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint's record that can be read."""
    steps = {path.parent.name.removeprefix("step_"): path for path in folder.glob("checkpoints/step_*/checkpoint.json")}
    for _, path in sorted(((int(step), path) for step, path in steps.items() if step.isdecimal()), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(path.read_text())
            return {"step": int(record["step"]), "facts": dict(record["facts"])}
    return None


def _owner(folder: Path) -> str:
    """The process that has locked a run's folder; empty if none is known to."""
    try:
        require_unlocked(folder / LOCK, patience=0.0)
    except LockedError as owner:
        return str(owner)
    return ""
