"""Publishing checkpoints and finding them again; what is inside them is the engine's matter.

A checkpoint is a folder `checkpoints/step_00000100` that appears atomically: the engine writes into a hidden folder beside it, rank 0 adds
`checkpoint.json` (step, the facts that a resume must agree on, size and sha256 of every file, which the ranks share among them), everything
is flushed, and one rename publishes it. There is no pointer to the newest one that could be stale: the newest *intact* folder is found by looking. A folder whose
files do not match its list is named and passed over.

A checkpoint is removed once `keep` newer ones are published and intact. Whether they are is looked up, not assumed: files are hashed again only if they
have changed since this process wrote or hashed them (`Verdicts`). A damaged one takes nobody's place and goes with the old ones. One of another
schema cannot be judged, and stays.
"""

import hashlib
import heapq
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ssa_pretrain.checkpoint_facts import differences
from ssa_pretrain.checkpoint_integrity import FACTS, SCHEMA, Verdicts, is_of_another_schema
from ssa_pretrain.checkpoint_integrity import find_damage as find_damage
from ssa_pretrain.errors import CheckpointError, ExitCode
from ssa_pretrain.parallel.agreement import exits_with_peers, on_all_ranks
from ssa_pretrain.settings.files import file_sha256

VISIBLE_SECONDS = 30.0  # until a file of another node must be seen: network storage may be slow in showing it
NAME = re.compile(r"step_\d{8,}")  # anything else beside the checkpoints (step_00000100_good, a copy) is the user's
Entry = dict[str, int | str]  # of a file: "bytes", "sha256"
SHAPELESS = ("model.rope_theta", "model.rope_scaling", "model.norm_eps", "model.init_std", "model.vocab_divisor")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published checkpoint: its folder, the steps done, the facts of the run that wrote it."""

    folder: Path
    step: int
    facts: dict[str, Any]


def publish(
    run: Path,
    step: int,
    facts: dict[str, Any],
    write: Callable[[Path], None],
    *,
    keep: int,
    is_first: bool,
    say: Callable[[str], None] = print,
    verdicts: Verdicts | None = None,
) -> Path:
    """Write and publish a checkpoint, then remove old ones; every rank calls it.

    Args:
        run: the run's output folder.
        step: optimizer steps done.
        facts: what a resume must agree on; plain values.
        write: the engine's save, called on every rank with an empty folder.
        keep: newest intact checkpoints that stay.
        is_first: on the one rank that publishes.
        say: takes a line for the user.
        verdicts: what is known of earlier checkpoints; None: nothing.

    Returns:
        The published folder.

    Raises:
        CheckpointError: on every rank, if any could not write its part; what was published before is as it was.
    """
    target = _folder_of(run, step)
    scratch = target.with_name(f".{target.name}.tmp")

    def prepare() -> None:
        if is_first:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)

    def digest() -> None:
        sizes = _sizes(scratch)
        seen.update(sizes)
        mine.update(_entries(scratch, _share(sizes, dist.get_rank(), dist.get_world_size())))

    def seal() -> None:
        if is_first:
            _seal(scratch, step, facts, {name: entry for part in parts for name, entry in part.items()})
            shutil.rmtree(target, ignore_errors=True)
            os.rename(scratch, target)
            _flush(target.parent)

    def describe(reason: str) -> str:
        free = shutil.disk_usage(run).free / 2**30
        return (
            f"step {step} could not be saved in {target.parent}, which has {free:.1f} GiB free ({reason}); "
            "earlier checkpoints are as they were: free space and give the same command again"
        )

    def everywhere(act: Callable[[], None]) -> None:
        if message := on_all_ranks(act, key, describe):
            if is_first:
                shutil.rmtree(scratch, ignore_errors=True)
            raise CheckpointError(message)

    key = f"ssa_pretrain/failed_save/{step}"
    mine: dict[str, Entry] = {}
    seen: set[str] = set()
    parts: list[dict[str, Entry]] = [{}] * dist.get_world_size()
    with exits_with_peers(key, exit_code=ExitCode.CHECKPOINT):
        everywhere(prepare)
        everywhere(lambda: write(scratch))
        everywhere(digest)
        dist.all_gather_object(parts, mine)
        everywhere(lambda: _require_all(scratch, _missed(seen), is_first=is_first))
        everywhere(seal)
    if is_first:
        verdicts = verdicts or Verdicts()
        verdicts.note_intact(target)
        for old in _outdated(run, step, keep, verdicts, say):
            _remove(old, say)
    return target


def newest(
    run: Path,
    *,
    is_first: bool,
    device: torch.device,
    say: Callable[[str], None],
    verdicts: Verdicts | None = None,
) -> Checkpoint | None:
    """Return the newest intact checkpoint of a run (or the one that `run` itself is), the same on every rank, or None where there is none.

    Args:
        run: the run's output folder, or a checkpoint.
        is_first: on the one rank that reads the files.
        device: of this process.
        say: takes a line for the user.
        verdicts: takes what is found, for `publish`.

    Raises:
        CheckpointError: there are checkpoints, but none is intact.
    """
    named = (run / FACTS).is_file()
    folders = [run] if named else _published(run)
    verdict = torch.full((), -1, dtype=torch.int64, device=device)  # -1: no checkpoint, -2: none intact, else which one
    if is_first:
        verdicts = verdicts or Verdicts()
        verdict.fill_(-2 if folders else -1)
        for folder in folders:
            damage = verdicts.damage(folder)
            if damage is None:
                verdict.fill_(0 if named else _step_of(folder))
                break
            say(f"checkpoint {folder} is damaged ({damage}); looking for an older one")
    dist.broadcast(verdict, src=0)
    step = int(verdict)
    if step == -2:
        raise CheckpointError(
            f"no checkpoint in {run / 'checkpoints'} is intact; restore one, or start again in another output_dir"
        )
    if step == -1:
        return None
    return read(run if named else _folder_of(run, step))


def read(folder: Path) -> Checkpoint:
    """Return a checkpoint's facts.

    Raises:
        CheckpointError: the folder is no published checkpoint, or one of another schema.
    """
    try:
        record = json.loads((folder / FACTS).read_text())
        schema, found = record["schema"], Checkpoint(folder, int(record["step"]), dict(record["facts"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is no checkpoint ({FACTS}: {error}); name a folder such as RUN/checkpoints/step_00000100"
        ) from None
    if schema != SCHEMA:
        raise CheckpointError(
            f"{folder} is of schema {schema}, and this version of ssa_pretrain reads {SCHEMA}; go on with the version that wrote it"
        )
    return found


def require_same_model(found: Checkpoint, wanted: dict[str, Any], *, shapes_alone: bool = False) -> None:
    """Refuse a checkpoint of another model than a run's.

    Args:
        found: whose weights are to be read.
        wanted: the run's facts.
        shapes_alone: compare only what decides the weights' shapes, so that a new run may change the rest (a longer RoPE). The vocabulary is
            compared as padded; model.vocab_size only where both name it, since 0 is the tokenizer's.

    Raises:
        CheckpointError: they differ; it names each key with both values.
    """
    changed = {line.partition(":")[0]: line for line in differences(found.facts, wanted)}
    changed.pop("model.init_std", None)  # weights that were read were not drawn
    if shapes_alone:
        unnamed = 0 in (found.facts.get("model.vocab_size"), wanted.get("model.vocab_size"))
        for key in (*SHAPELESS, *["model.vocab_size"] * unnamed):
            changed.pop(key, None)
    decisive = ("attention.gate", "vocabulary.padded_size")
    lines = [line for key, line in changed.items() if key.startswith("model.") or key in decisive]
    if lines:
        raise CheckpointError(
            f"{found.folder} holds another model ({'; '.join(lines)}); give the settings it was trained with, or name another checkpoint"
        )


def _missed(seen: set[str]) -> set[str]:
    """Return files that some rank sees and the first one did not, on every rank; names travel only where what the ranks see differs."""
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256("\n".join(sorted(seen)).encode()).hexdigest())
    if len(set(digests)) == 1:
        return set()
    views: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(views, seen)
    return set().union(*views) - views[0]


def _require_all(folder: Path, missed: set[str], *, is_first: bool) -> None:
    """Raise OSError on the first rank where files that other ranks have written do not come to its sight: its list would lack them."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while is_first and (hidden := sorted(name for name in missed if not (folder / name).is_file())):
        if time.monotonic() > deadline:
            raise OSError(
                f"{hidden[0]}, which another rank wrote, is not to be seen here: is output_dir on shared storage?"
            )
        time.sleep(0.1)


def _outdated(run: Path, step: int, keep: int, verdicts: Verdicts, say: Callable[[str], None]) -> list[Path]:
    """Return the checkpoints that are older than the `keep` newest intact ones up to a step; later ones were damaged when the run resumed."""
    intact, old = 0, []
    for folder in _published(run):
        if _step_of(folder) > step or is_of_another_schema(folder):
            continue
        if intact == keep:
            old.append(folder)
            continue
        known = verdicts.knows(folder)
        damage = verdicts.damage(folder)
        if damage and not known:
            say(f"checkpoint {folder} is damaged ({damage}); it does not count among checkpoint.keep={keep}")
        intact += damage is None
    return old


def _remove(folder: Path, say: Callable[[str], None]) -> None:
    """Remove an old checkpoint, or say why it stays: the newer one is published, and the next save tries again."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        say(f"{folder} could not be removed ({error.strerror}); the next checkpoint tries again")


def _seal(folder: Path, step: int, facts: dict[str, Any], entries: dict[str, Entry]) -> None:
    """Write the facts and the list of files; a file whose entry is missing or of another size is read here."""
    sizes = _sizes(folder)
    known = {name: entry for name, entry in entries.items() if entry["bytes"] == sizes.get(name)}
    files = known | _entries(folder, sizes.keys() - known.keys())
    record = folder / FACTS
    listed = dict(sorted(files.items()))
    record.write_text(json.dumps({"schema": SCHEMA, "step": step, "facts": facts, "files": listed}, indent=1))
    _flush(record)
    _flush(folder)


def _entries(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """Return size and sha256 of files of a folder, which are on disk then."""
    found: dict[str, Entry] = {}
    for name in names:
        found[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        _flush(folder / name)
    return found


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file below a folder, by its name in it; another node's newest may not be visible yet."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def _share(sizes: dict[str, int], rank: int, world_size: int) -> list[str]:
    """Return the files that a rank reads: the largest first, each to the rank with the fewest bytes so far."""
    loads = [(0, r) for r in range(world_size)]
    mine = []
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        load, reader = heapq.heappop(loads)
        heapq.heappush(loads, (load + size, reader))
        if reader == rank:
            mine.append(name)
    return mine


def _published(run: Path) -> list[Path]:
    """Return a run's published checkpoints' folders, newest first; folders with other names are left alone."""
    found = (p for p in (run / "checkpoints").glob("step_*") if NAME.fullmatch(p.name) and p.is_dir())
    return sorted(found, key=_step_of, reverse=True)


def _folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _flush(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
