"""Weights & Biases as a view of a run: one W&B run per training run across restarts. W&B never stops or delays training.

W&B's client runs in a separate process (tracking_process.py). Training only writes records to a pipe (tracking_client.py). An exception, an
exit, a crash or a hang of the client or its service ends that process and leaves training untouched: one line reports it, the run continues
untracked, and the next start sends the missing records. Every wait has a limit.

A restart reuses the W&B id in the run's folder (`wandb.json`) and passes metrics.jsonl from its beginning. Records that W&B already has are
not sent again. If training is killed, the pipe closes, and the process uploads the received records before it exits.

W&B's configuration contains the resolved settings, the code's git commit and the hash of the data's manifest. Whatever looks like a secret is
replaced before it leaves this process. Code, console output and git remotes are not sent. An absent, slow or broken server costs seconds,
once, at the start: the run then writes offline and prints the command that uploads it later. Stdlib only.
"""

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ssa_pretrain.config import WandbConfig, WandbMode
from ssa_pretrain.monitor.client_tracker import ClientTracker
from ssa_pretrain.monitor.redaction import redact
from ssa_pretrain.monitor.tracking_client import ClientProcess
from ssa_pretrain.monitor.tracking_rows import STATE_FILE

CLIENT_SECONDS = 8.0  # limit for each of W&B's service, login and server, at the start
START_SECONDS = 60.0  # limit for W&B's process to be ready; on a busy machine, importing its client takes most of it
LOG = "wandb/process.log"


class WandbTracker(ClientTracker):
    """A W&B run that receives the records of metrics.jsonl, again from the first one after every restart.

    Args:
        process: W&B's process, ready.
        print_line: prints one line for the user.
    """

    def __init__(self, process: ClientProcess, print_line: Callable[[str], None]) -> None:
        super().__init__(process, print_line, "W&B")
        assert process.ready is not None
        self.id: str = process.ready["id"]
        self._sync = f"wandb sync {shlex.quote(process.ready['folder'])}"
        self._offline: bool = process.ready["offline"]

    def remedy(self) -> str:
        """Returns how to get the records that W&B did not take in time."""
        return f"the next start sends the missing records, or upload with: {self._sync}"

    def after_finish(self) -> None:
        """Prints how to upload an offline run."""
        if self._offline:
            self._print_line(f"W&B wrote offline; upload with: {self._sync}")


def start_tracking(
    settings: WandbConfig,
    *,
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    print_line: Callable[[str], None],
    step: int = 0,
    decisive: Mapping[str, Any] | None = None,
) -> WandbTracker | None:
    """Starts or resumes the W&B run of an output folder. Returns None if W&B is off or cannot start.

    Args:
        settings: the configuration's `logging.wandb`.
        name: the run's name.
        folder: the run's output folder.
        config: the resolved configuration and provenance as plain values; secrets are removed here.
        print_line: prints one line for the user.
        step: the step that the run continues after.
        decisive: the settings that determine the run's metrics. If they changed and steps that W&B has will be trained again, the metrics
            of those steps will differ: a new W&B run begins.
    """
    if settings.mode is WandbMode.off:
        return None
    opening = {
        "project": settings.project,
        "entity": settings.entity,
        "group": settings.group,
        "tags": settings.tags,
        "name": name,
        "folder": str(folder),
        "config": redact(dict(config)),
        "step": step,
        "settings": digest(decisive or {}),
        "patience": CLIENT_SECONDS,
    }
    for mode in ("online", "offline") if settings.mode is WandbMode.online else ("offline",):
        consequence = "writing offline" if mode == "online" else "continuing without W&B"
        try:
            process = ClientProcess(folder / LOG, print_line)
        except OSError as error:
            print_line(f"W&B {mode} cannot start ({error.strerror or error}); {consequence}")
            continue
        process.send(opening | {"mode": mode})
        if process.wait_ready(START_SECONDS):
            return WandbTracker(process, print_line)
        reason = process.failure() or f"not ready after {START_SECONDS:g} s"
        process.end(0.0)
        print_line(f"W&B {mode} cannot start ({reason}); {consequence}")
    return None


def digest(decisive: Mapping[str, Any]) -> str:
    """Returns a digest of the settings that determine a run's metrics."""
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()


def lacks_records(settings: WandbConfig, folder: Path, newest: Mapping[str, int]) -> bool:
    """Returns whether the W&B run of an output folder ended without some of the run's records. False without a W&B run, or if W&B is off.

    Args:
        settings: the configuration's `logging.wandb`.
        folder: the run's output folder.
        newest: the last step of each series in the run's metrics.
    """
    if settings.mode is WandbMode.off:
        return False
    try:
        received = json.loads((folder / STATE_FILE).read_text())["received"]
        return any(int(received.get(name, -1)) < step for name, step in newest.items())
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return False
