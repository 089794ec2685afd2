"""Weights & Biases as a view of a run: one W&B run per training run across restarts, and never a reason to stop or to wait.

The id lives in the run's folder (`wandb.json`), beside the last step of every series that W&B surely has. A restart takes the id up again and
is shown metrics.jsonl from its beginning: it sends what is missing and nothing twice. W&B's client keeps the last 15 seconds in memory, so a
step counts as received only `SETTLE_SECONDS` after it was sent; a kill may thus repeat the rows of those seconds, with the same step and,
training being reproducible, the same numbers, but it never leaves a gap. The x axis is tokens (`define_metric`), W&B's own step is ours.

The run's configuration carries the resolved settings, the code's git commit and the data manifest's hash; what looks like a secret is
replaced before it leaves the process, and neither code, console output nor git remotes are sent.

A server that is away, slow or broken costs at most `START_SECONDS` once, at the start: the run then writes offline and says so in a line,
with the command that uploads it later. A failure afterwards ends the tracking, not the training. metrics.jsonl has every number anyway.
"""

import hashlib
import json
import logging
import os
import re
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import wandb

from ssa_pretrain.config import WandbConfig, WandbMode
from ssa_pretrain.problems import SECRET

STATE_FILE = "wandb.json"
START_SECONDS = 8.0
FINISH_SECONDS = 10.0
SETTLE_SECONDS = 20.0
HIDDEN = "<hidden>"

# Shapes of credentials: W&B, Hugging Face, GitHub, AWS, OpenAI-like keys, JSON web tokens, and passwords inside URLs.
_CREDENTIAL = re.compile(
    r"\b[0-9a-f]{40}\b|\bwandb_v1_\w{20,}|\bhf_\w{20,}|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\bsk-[\w-]{20,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def redact(value: Any) -> Any:
    """The value with everything that looks like a secret replaced: entries by their key's name, strings by their shape.

    Args:
        value: mappings, lists and plain values, nested in any way.
    """
    if isinstance(value, Mapping):
        return {key: HIDDEN if SECRET.search(str(key)) and item else redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if isinstance(value, str):
        return _CREDENTIAL.sub(HIDDEN, value)
    return value


def provenance(source: Path, data: Path | None) -> dict[str, Any]:
    """Where a run's code and data come from: git commit, whether files differ from it, sha256 of the data's manifest.

    Args:
        source: a folder of the code; outside of a git checkout the commit is None.
        data: the dataset's folder.
    """
    commit = _git(source, "rev-parse", "--short=12", "HEAD")  # all 40 digits would look like a W&B key
    manifest = data / "manifest.json" if data is not None else None
    return {
        "git_commit": commit,
        "git_dirty": bool(_git(source, "status", "--porcelain", "--untracked-files=no")) if commit else None,
        "data_manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()
        if manifest is not None and manifest.is_file()
        else None,
    }


class Tracker:
    """A W&B run that takes the records of metrics.jsonl, from the first one on after every restart.

    Args:
        run: what wandb.init returned.
        folder: the run's output folder, where the state file lives.
        say: writes one line to the user.
        settings: names what decides the run's figures.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        run: "wandb.Run",
        folder: Path,
        say: Callable[[str], None],
        settings: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._run: wandb.Run | None = run
        self._state = folder / STATE_FILE
        self._say = say
        self._clock = clock
        self._received: dict[str, int] = dict(_read_state(folder).get("received", {}))
        self._skipped_until = dict(self._received)
        self._sent: deque[tuple[float, str, int]] = deque()
        self.id: str = run.id
        self._failing = False
        self._save()

    def log(self, record: Mapping[str, Any]) -> None:
        """Sends a record unless W&B has it from before a restart.

        Args:
            record: a record of metrics.jsonl.
        """
        name, step = series(record), record["step"]
        if self._run is None or step <= self._skipped_until.get(name, -1):
            return
        try:
            self._run.log(redact(flatten(record)), step=step)
        except (wandb.Error, OSError) as error:
            self._say(f"W&B stopped taking records ({_first_line(error)}); metrics.jsonl goes on")
            self._run = None
            return
        self._sent.append((self._clock(), name, step))
        self._settle(SETTLE_SECONDS)

    def finish(self) -> None:
        """Ends the run; what could not be uploaded in time stays on disk for `wandb sync`."""
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.finish()
        except (wandb.Error, OSError, TimeoutError) as error:
            self._say(f"W&B did not finish ({_first_line(error)}); upload later with: wandb sync {_run_folder(run)}")
            return
        self._settle(0.0)
        if run.offline:
            self._say(f"W&B wrote offline; upload with: wandb sync {_run_folder(run)}")

    def _settle(self, age: float) -> None:
        """Counts as received what was sent at least `age` seconds ago."""
        now, before = self._clock(), len(self._sent)
        while self._sent and now - self._sent[0][0] >= age:
            _, name, step = self._sent.popleft()
            self._received[name] = step
        if len(self._sent) < before or self._failing:
            self._save()

    def _save(self) -> None:
        """Writes id and received steps, whole or not at all; where that fails, a restart sends again what W&B has."""
        fresh = self._state.with_suffix(f".{os.getpid()}.tmp")
        state = {"id": self.id, "received": self._received, "settings": self._settings}
        try:
            fresh.write_text(json.dumps(state) + "\n")
            os.replace(fresh, self._state)
        except OSError as error:
            if not self._failing:
                self._say(f"{self._state} cannot be written ({error.strerror}); training and W&B go on")
            self._failing = True
        else:
            self._failing = False


def start_tracking(
    settings: WandbConfig,
    *,
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    say: Callable[[str], None],
    step: int = 0,
    decisive: Mapping[str, Any] | None = None,
) -> Tracker | None:
    """Starts or resumes the W&B run of an output folder; None when it is switched off or not to be had.

    Args:
        settings: the configuration's `logging.wandb`.
        name: the run's name.
        folder: the run's output folder.
        config: the resolved configuration and provenance, plain values; secrets are taken out here.
        say: writes one line to the user.
        step: the step that the run goes on after.
        decisive: the part of the configuration that decides the run's figures. Where it is another than before and W&B has steps that are to be
            made again, they will come out otherwise: that is another run of W&B.
    """
    if settings.mode is WandbMode.off:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps(decisive or {}, sort_keys=True, default=str).encode()).hexdigest()
    before = _read_state(folder)
    if before.get("settings", digest) != digest and max(dict(before.get("received", {})).values(), default=0) > step:
        say(f"W&B: a new run, since it has steps after {step} of other settings")
        (folder / STATE_FILE).unlink()
    # wandb-core's own exporters report failed uploads of its telemetry through logging, into the console of the run.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    for mode in ("online", "offline") if settings.mode is WandbMode.online else ("offline",):
        try:
            run = _init(settings, mode, name, folder, config)
        except (wandb.Error, OSError, TimeoutError) as error:
            after = "writing offline" if mode == "online" else "going on without it"
            say(f"W&B {mode} cannot start ({_first_line(error)}); {after}")
            continue
        try:
            run.define_metric("tokens")
            run.define_metric("*", step_metric="tokens")
            return Tracker(run, folder, say, digest)
        except (wandb.Error, OSError) as error:
            say(f"W&B cannot start ({_first_line(error)}); going on without it")
            return None
    return None


def series(record: Mapping[str, Any]) -> str:
    """The name of the series that a record continues: train, or split and mode of an evaluation."""
    return "train" if record["kind"] == "train" else f"{record['split']}/{record['mode']}"


def flatten(record: Mapping[str, Any]) -> dict[str, float | int | str]:
    """A record as W&B's flat names; lists by layer become one name a layer, missing values none.

    Args:
        record: a record of metrics.jsonl.
    """
    prefix = series(record)
    flat: dict[str, float | int | str] = {"tokens": record["tokens"], "step": record["step"]}
    for key, value in record.items():
        if key in ("kind", "split", "mode", "tokens", "step") or value is None:
            continue
        if isinstance(value, list | tuple):
            name = key.removesuffix("_by_layer")
            flat |= {f"{prefix}/{name}/layer_{i:02d}": item for i, item in enumerate(value) if item is not None}
        else:
            flat[f"{prefix}/{key}"] = value
    return flat


def _init(settings: WandbConfig, mode: str, name: str, folder: Path, config: Mapping[str, Any]) -> "wandb.Run":
    """wandb.init with a short patience and nothing sent that was not asked for."""
    return wandb.init(
        project=settings.project,
        entity=settings.entity or None,
        group=settings.group or None,
        tags=settings.tags or None,
        name=name,
        id=_read_state(folder).get("id"),
        resume="allow",
        job_type="pretrain",
        dir=str(folder),
        config=redact(dict(config)),
        mode=mode,  # pyright: ignore[reportArgumentType]
        settings=wandb.Settings(
            init_timeout=START_SECONDS,
            login_timeout=START_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            console="off",
            disable_code=True,
            disable_git=True,
            silent=True,
        ),
    )


def _read_state(folder: Path) -> dict[str, Any]:
    """The state file's content; empty where it is missing or unreadable, which starts a new W&B run."""
    try:
        state = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _run_folder(run: "wandb.Run") -> Path:
    """The folder that `wandb sync` takes: files/ lies inside it."""
    return Path(run.dir).parent


def _first_line(error: BaseException) -> str:
    """An error's first line, without secrets."""
    lines = redact(str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


def _git(folder: Path, *arguments: str) -> str | None:
    """A git command's output; None where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
