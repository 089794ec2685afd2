"""The files of an evaluation: RUN/evaluations/NAME.json and NAME.png. No evaluation overwrites another's.

NAME has the step, the row length, the blocks and a digest of all settings that decide the results, so different evaluations have different names.
The same evaluation again writes the same file. A name that the user gives (`evaluation.name`) belongs to the first evaluation that used it.

A checkpoint may be evaluated with other settings than it was trained with, as far as no weight depends on them. The file has the settings of the
evaluation, and under `trained_with` the checkpoint's own value of each that differs.

An evaluation of the weights with the checkpoint's own settings also writes RUN/evaluation.json and RUN/samples.json, which the run's report shows.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ssa_pretrain.checkpoint.find import Checkpoint
from ssa_pretrain.checkpoint.weights import EMA
from ssa_pretrain.monitor.environment import versions
from ssa_pretrain.run import Run
from ssa_pretrain.settings.convert import config_to_dict
from ssa_pretrain.settings.files import write_atomically
from ssa_pretrain.settings.problems import ConfigError, Problem

FOLDER = "evaluations"
SCHEMA = 1
# The facts of a checkpoint's contract that decide an evaluation's results and no weight's shape.
JUDGED = (
    "model.rope_theta",
    "model.rope_scaling",
    "model.norm_eps",
    "attention.method",
    "attention.block_size",
    "attention.top_k",
    "attention.score",
    "data.sequence_length",
    "data.isolate_documents",
    "data.fingerprint",
    "precision.name",
)


def settings_of(run: Run, found: Checkpoint) -> dict[str, Any]:
    """Returns the settings that decide an evaluation's results, as plain values."""
    contract, evaluation = run.contract(), config_to_dict(run.config)["evaluation"]
    asked = {f"evaluation.{key}": evaluation[key] for key in ("rows", "head_rows", "tasks", "lm_eval")}
    if evaluation["bound_rows"]:  # results of older versions have no such setting
        asked["evaluation.bound_rows"] = evaluation["bound_rows"]
    return {
        "checkpoint": found.folder.name,
        "step": found.step,
        "data.path": run.config.data.path,
        **{key: contract[key] for key in _judged(contract)},
        **asked,
        "seed": run.config.seed,
        **({"weights": EMA} if run.config.evaluation.ema else {}),
    }


def trained_with(run: Run, found: Checkpoint) -> dict[str, Any]:
    """Returns the checkpoint's own values of the settings that the evaluation changes."""
    contract = run.contract()
    return {key: found.facts[key] for key in _judged(contract) if found.facts.get(key, contract[key]) != contract[key]}


def _judged(contract: dict[str, Any]) -> tuple[str, ...]:
    """Returns the keys of JUDGED, with the window if the method has one."""
    return (*JUDGED, "attention.window") if contract["attention.method"] == "nsa" else JUDGED


def result_name(settings: dict[str, Any], given: str = "") -> str:
    """Returns the name of an evaluation's files: the given one, or one made of its settings."""
    if given:
        return given
    decisive = {key: value for key, value in settings.items() if key != "data.path"}  # the data's fingerprint decides
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
    rope = settings["model.rope_scaling"]
    stretched = f"_rope{rope['factor']:g}" if rope["enabled"] else ""
    blocks = f"B{settings['attention.block_size']}_S{settings['attention.top_k']}"
    mean = f"_{EMA}" if settings.get("weights") == EMA else ""
    return f"step_{settings['step']:08d}{mean}_length{settings['data.sequence_length']}_{blocks}{stretched}_{digest}"


def require_own(folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Checks that no other evaluation has written a name's files.

    Raises:
        ConfigError: another one has, or the file is not a result.
    """
    path = folder / FOLDER / f"{name}.json"
    if not path.exists():
        return
    try:
        other = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        other = {}
    changed = [key for key in settings if other.get(key) != settings[key] and key != "data.path"]
    if changed:
        rule = f"names another evaluation's results ({path} differs in {', '.join(changed)})"
        raise ConfigError([Problem("evaluation.name", name, rule, f"try {name}_2, or leave it out")])


def write_result(run: Run, name: str, result: dict[str, Any], samples: list[dict[str, str]]) -> Path:
    """Writes an evaluation's JSON file, and those that the report shows if its settings are the checkpoint's own. Returns the first one's path."""
    path = run.folder / FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"schema": SCHEMA, "name": name, **result, "samples": samples, "versions": versions()})
    if not result["trained_with"] and "weights" not in result["settings"]:
        shown = {key: result[key] for key in ("step", "tokens", "split", "rows", "modes")}
        write_json(run.folder / "evaluation.json", shown | {"details": f"{FOLDER}/{path.name}"})
        write_json(run.folder / "samples.json", samples)
    return path


def write_json(path: Path, value: object) -> None:
    """Writes a value as JSON."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
