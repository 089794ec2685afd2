"""The plan of a command as text: its table, and the state of its data and its output_dir on this machine.

Nothing is created or changed, no lock is kept, and torch is not imported. Checkpoints are not verified: only a run reads their files.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from ssa_pretrain.checkpoint.facts import (
    BATCH_STEPS,
    HISTORY,
    batch_changes,
    model_changes,
    refused_changes,
    run_facts,
)
from ssa_pretrain.config import Auto, Config, EngineName
from ssa_pretrain.config.deepspeed import ds_config
from ssa_pretrain.config.hardware import PlanConfig
from ssa_pretrain.config.rules import warning
from ssa_pretrain.data.manifest import Manifest, load_manifest
from ssa_pretrain.planning.calibration import calibration
from ssa_pretrain.planning.documents import mean_document
from ssa_pretrain.planning.estimate import estimate
from ssa_pretrain.planning.estimate_table import curve_table, estimate_rows, measured_table, search_table
from ssa_pretrain.planning.plan import Plan, make_plan
from ssa_pretrain.planning.scaling import strong_curve, weak_curve
from ssa_pretrain.planning.search import all_choices, search
from ssa_pretrain.planning.table import describe
from ssa_pretrain.run_folder import LOCK, named_folder, unwritable
from ssa_pretrain.schedule import needs_equal_microbatches
from ssa_pretrain.settings.files import LockedError, require_unlocked
from ssa_pretrain.settings.problems import ConfigError, Problem

OF_DATA = ("data.fingerprint", "vocabulary.tokenizer_sha256")  # unknown without the data
MAX_LISTED = 4


def plan_text(entry: str, config: Config, arguments: Sequence[str], world_size: int, views: Sequence[str] = ()) -> str:
    """Returns the plan of a command as a table; prepared data gives the vocabulary and the epochs.

    Args:
        entry: the entry point.
        config: a configuration without problems; that of `plan` adds a cluster, and estimates for it.
        arguments: of the command.
        world_size: processes of this command or GPUs of the cluster, if parallel.world_size does not give a number.
        views: flags that ask for other tables instead: --search, --scale, --measured.

    Raises:
        ConfigError: the data is damaged.
    """
    manifest = _load_prepared(Path(config.data.path))
    vocab_size = manifest.tokenizer.vocab_size if manifest else None
    if manifest and isinstance(config, PlanConfig) and isinstance(config.document_tokens, Auto):
        config = replace(config, document_tokens=mean_document(manifest))
    plan = make_plan(config, config.parallel.world_size or world_size, vocab_size)
    if views and isinstance(config, PlanConfig):
        return _views(config, plan, views, vocab_size)
    overrides = [argument for argument in arguments if not argument.startswith("--")]
    rows = estimate_rows(estimate(config, plan), vocab_size) if isinstance(config, PlanConfig) else []
    command = "evaluate" if entry == "evaluate" else "train"
    table = describe(config, plan, overrides, manifest, entry=command, estimates=rows) + "\n"
    rows = outlook(entry, config, plan, manifest)
    if suspicious := warning(config):
        rows.append(("warning", suspicious))
    table += "".join(f"{name:<11}{text}\n" for name, text in rows)
    if config.engine.name is EngineName.deepspeed:
        table += f"DeepSpeed's configuration:\n{json.dumps(ds_config(config, plan.dp), indent=2)}\n"
    return table


def _views(config: PlanConfig, plan: Plan, views: Sequence[str], vocab_size: int | None) -> str:
    """Returns the tables of --search, --scale and --measured."""
    fitted, found = calibration(), []
    if "--search" in views:
        layouts = search(config, plan.world_size, fitted, all_choices(config), vocab_size)
        found.append(search_table(layouts, config, plan.world_size))
    if "--scale" in views:
        strong, weak = (curve(config, fitted, vocab_size) for curve in (strong_curve, weak_curve))
        found.append(curve_table("The batch as it is, the fastest layout for each number of GPUs", strong))
        found.append(curve_table("The batch grows with the machine, the layout as it is", weak))
    if "--measured" in views:
        found.append(measured_table(fitted))
    return "\n".join(found)


def _load_prepared(path: Path) -> Manifest | None:
    """Returns the manifest of prepared data, None if there is none yet. Raises ConfigError if it is damaged."""
    if not (path.is_file() or os.path.lexists(path / "manifest.json")):
        return None
    try:
        return load_manifest(path)
    except ValueError as error:
        raise ConfigError([Problem("data.path", str(path), f"is not usable: {error}", exit_code=4)]) from None


def outlook(entry: str, config: Config, plan: Plan, manifest: Manifest | None) -> list[tuple[str, str]]:
    """Returns the plan's last rows, name and text: the run's folder, and the data if it is not prepared yet.

    Args:
        entry: the entry point.
        config: a configuration without problems.
        plan: its plan.
        manifest: of its data; None if it is not prepared yet.
    """
    rows = [("output", _describe_folder(entry, config, plan, manifest))]
    return rows if manifest else [("data", _describe_missing_data(config.data.path)), *rows]


def _describe_missing_data(path: str) -> str:
    """Returns a line that the data is not prepared yet, with the command that prepares it."""
    source, tokenizer = ("quickstart", "bpe8k") if "quickstart" in path else ("…", "…")
    command = f"python -m data_prep source={source} tokenizer={tokenizer} out={quote(path)}"
    return f"{path} is not prepared yet: {command}"


def _describe_folder(entry: str, config: Config, plan: Plan, manifest: Manifest | None) -> str:
    """Returns a line on what the command would do with output_dir."""
    folder = Path(config.output_dir)
    if reason := unwritable(folder):
        return f"{folder} {reason}"
    if entry != "evaluate" and (owner := _owner(folder)):
        return f"{folder} is in use by {owner}: the run would be refused"
    found = _newest_record(folder)
    step = found["step"] if found else 0
    wanted = run_facts(
        config,
        fingerprint=manifest.fingerprint if manifest else "",
        padded_vocab_size=plan.padded_vocab_size,
        tokenizer_sha256=manifest.tokenizer.sha256 if manifest else "",
        step=step,
    )
    if found is None:
        return f"{folder} holds no checkpoint" + ("" if entry == "evaluate" else f": {_describe_start(config, wanted)}")
    if entry == "evaluate":
        return f"{folder}: the checkpoint of step {step} is evaluated"
    if changes := batch_changes(config, step):
        wanted[BATCH_STEPS] = changes
    saved = {
        k: v for k, v in found["facts"].items() if k not in ("data.order", HISTORY)
    }  # the run takes over the checkpoint's
    if manifest is None:
        saved, wanted = ({k: v for k, v in facts.items() if k not in OF_DATA} for facts in (saved, wanted))
    if changed := refused_changes(saved, wanted, needs_equal_microbatches(config)):
        differs = f"which differs ({_listed(changed)})"
        return f"{folder}: the run would be refused at the checkpoint of step {step}, {differs}"
    last = min(plan.steps, config.training.stop_at_step or plan.steps)
    if step >= last:
        return f"{folder} is finished: it has {step} steps, and {last} are asked for"
    return f"{folder}: the run resumes after step {step} of {plan.steps}"


def _describe_start(config: Config, wanted: dict[str, Any]) -> str:
    """Returns where a run without a checkpoint starts; `wanted` are its facts."""
    if origin := config.checkpoint.branch_from:
        return f"the run branches from {origin}"
    if not (origin := config.checkpoint.init_from):
        return "the run starts at step 0"
    source = _newest_record(named_folder(origin))
    if source and (changed := model_changes(source["facts"], wanted, shapes_only=True)):
        return (
            f"the run would be refused at checkpoint.init_from={origin}, which holds another model ({_listed(changed)})"
        )
    missing = "" if named_folder(origin).is_dir() else ", which does not exist yet"
    return f"the run starts at step 0 from the weights of {origin}{missing}"


def _listed(changed: list[str]) -> str:
    """Returns the first of some changes, and how many more there are."""
    return "; ".join(changed[:MAX_LISTED]) + f"; and {len(changed) - MAX_LISTED} more" * (len(changed) > MAX_LISTED)


def _newest_record(folder: Path) -> dict[str, Any] | None:
    """Returns step and facts of the newest checkpoint of a run, or of the checkpoint itself, whose record can be read; None without one."""
    steps = {path.parent.name.removeprefix("step_"): path for path in folder.glob("checkpoints/step_*/checkpoint.json")}
    found = sorted(((int(step), path) for step, path in steps.items() if step.isdecimal()), reverse=True)
    for _, path in [(0, folder / "checkpoint.json"), *found]:
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(path.read_text())
            return {"step": int(record["step"]), "facts": dict(record["facts"])}
    return None


def _owner(folder: Path) -> str:
    """Returns the process that has locked a run's folder; empty if no process is known to hold the lock."""
    try:
        require_unlocked(folder / LOCK, patience=0.0)
    except LockedError as owner:
        return str(owner)
    return ""
