"""What a command would find here: is its data prepared, and what does its output_dir mean for it. Lines of the plan.

Nothing is created, locked for long or changed, and torch is not imported. Checkpoints are taken as they are listed: only a run verifies their files.
"""

import fcntl
import json
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

from ssa_pretrain.checkpoint.facts import refused_changes, run_facts
from ssa_pretrain.config import Config
from ssa_pretrain.data.indexed_format import Manifest
from ssa_pretrain.planning.plan import Plan
from ssa_pretrain.run_folder import LOCK, unwritable
from ssa_pretrain.schedule import needs_equal_microbatches

OF_DATA = ("data.fingerprint", "vocabulary.tokenizer_sha256")  # unknown without the data
MOST_SHOWN = 4


def outlook(entry: str, config: Config, plan: Plan, manifest: Manifest | None) -> list[tuple[str, str]]:
    """Returns the plan's last rows, name and text: the folder of the run, and the data where they are missing.

    Args:
        entry: the entry point.
        config: a configuration without problems.
        plan: its plan.
        manifest: of its data; None where it is not prepared yet.
    """
    rows = [("output", _folder(entry, config, plan, manifest))]
    return rows if manifest else [("data", _data(config.data.path)), *rows]


def _data(path: str) -> str:
    """That there are no data yet, and the command that prepares them."""
    source, tokenizer = ("quickstart", "bpe8k") if "quickstart" in path else ("…", "…")
    command = f"python -m data_prep source={source} tokenizer={tokenizer} out={quote(path)}"
    return f"{path} is not prepared yet: {command}"


def _folder(entry: str, config: Config, plan: Plan, manifest: Manifest | None) -> str:
    """What output_dir means for a command."""
    folder = Path(config.output_dir)
    if reason := unwritable(folder):
        return f"{folder} {reason}"
    if entry != "evaluate" and (holder := _holder(folder)):
        return f"{folder} is in use by {holder}: the run would be refused"
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


def _holder(folder: Path) -> str:
    """The process that holds a run's folder, empty where none is known to."""
    with suppress(OSError), (folder / LOCK).open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            with suppress(ValueError, KeyError, TypeError):
                held = json.loads(file.read())
                return f"process {held['pid']} on {held['host']}, started {held['started']}"
            return "another process"
    return ""
