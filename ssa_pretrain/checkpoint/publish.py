"""Publishes checkpoints. The engine writes their content; find.py finds them again.

A checkpoint is a folder `checkpoints/step_00000100` that appears atomically. The engine writes into a hidden folder beside it. Rank 0 adds
`checkpoint.json`: the step, the facts that a resume must agree on, and size and sha256 of every file. All ranks take part in the hashing.
Everything is flushed to disk, and one rename publishes the folder.

A checkpoint is removed once `keep` newer ones are published and intact. That is checked, not assumed: files are hashed again only if they have
changed since this process wrote or hashed them (`Verdicts`). A damaged checkpoint does not count towards `keep` and is removed with the old ones.
One of another schema cannot be checked and stays.

A save that fails leaves all ranks in step, and earlier checkpoints as they are (`SaveError`): each part of it is work of the rank itself, after which all
ranks exchange whether it failed. Only the engine's part has collectives of its own. If a rank fails there by itself, others may wait for it in one of
them, so the run ends (`CheckpointError`).
"""

import hashlib
import heapq
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ssa_pretrain.checkpoint.find import folder_of, published, step_of
from ssa_pretrain.checkpoint.integrity import FACTS, HASHED_AT_ONCE, SCHEMA, Verdicts, is_of_another_schema, record_text
from ssa_pretrain.checkpoint.storage import patiently, rename_patiently
from ssa_pretrain.errors import CheckpointError, ExitCode, SaveError
from ssa_pretrain.parallel.agreement import AGREED, exits_with_peers, on_all_ranks
from ssa_pretrain.settings.files import file_sha256, sync

VISIBLE_SECONDS = 30.0  # until a file of another node must be visible: network storage may be slow to show it
UNFINISHED = ".tmp"  # end of the name of a checkpoint that is being written
REMOVED = ".old.tmp"  # end of the name of an old checkpoint that is being removed
Entry = dict[str, int | str]  # of a file: "bytes", "sha256"


def publish(
    run_folder: Path,
    step: int,
    facts: dict[str, Any],
    write: Callable[[Path], None],
    *,
    keep: int,
    is_rank_0: bool,
    report: Callable[[str], None] = print,
    verdicts: Verdicts | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes and publishes a checkpoint, then removes old ones; every rank calls it.

    Old ones are removed here and nowhere else, after the new one is published. So none is removed while another save is in flight, and with `keep`
    of 2 or more there are always two complete checkpoints, once there have been two.

    Args:
        run_folder: the run's output folder.
        step: optimizer steps done.
        facts: the facts that a resume must agree on; plain values.
        write: the engine's save, called on every rank with an empty folder.
        keep: number of newest intact checkpoints that stay.
        is_rank_0: whether this rank publishes.
        report: receives a line for the user.
        verdicts: verdicts on earlier checkpoints, so that they are not hashed again; None: no verdicts yet.
        group: of all ranks, for this thread only; None: the default group.

    Returns:
        The published folder.

    Raises:
        SaveError: on every rank, if any rank could not write its part; earlier checkpoints are unchanged, and the ranks are in step.
        CheckpointError: likewise, if a rank failed in `write` by itself, so that others may have waited for it.
    """
    save = _Save(run_folder, step, facts, is_rank_0=is_rank_0, report=report, group=group)
    with exits_with_peers(save.failure_key, exit_code=ExitCode.CHECKPOINT):
        save.on_every_rank(save.create_folder)
        save.write(write)
        save.on_every_rank(save.hash_share)
        save.gather_entries()
        save.on_every_rank(save.require_visible)
        save.on_every_rank(save.commit)
    if is_rank_0:
        verdicts = verdicts or Verdicts()
        verdicts.note_intact(save.target)
        try:
            for old in [*_half_removed(run_folder), *_outdated(run_folder, step, keep, verdicts, report)]:
                _remove(old, report)
        except OSError as error:  # the storage has failed since; the checkpoint is published
            report(f"old checkpoints could not be looked up ({error.strerror}); the next checkpoint tries again")
    return save.target


@dataclass(slots=True)
class _Save:
    """One checkpoint between its empty folder and its commit.

    Attributes:
        own: entries of the files that this rank hashed.
        seen: names of all files that this rank sees.
        entries: every rank's entries.
        hidden: files that another rank sees and rank 0 does not.
    """

    run_folder: Path
    step: int
    facts: dict[str, Any]
    is_rank_0: bool = field(kw_only=True)
    report: Callable[[str], None] = field(kw_only=True)
    group: dist.ProcessGroup | None = field(kw_only=True)
    own: dict[str, Entry] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    entries: dict[str, Entry] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)

    @property
    def target(self) -> Path:
        """The published folder."""
        return folder_of(self.run_folder, self.step)

    @property
    def scratch(self) -> Path:
        """The hidden folder that is renamed to `target`."""
        return self.target.with_name(f".{self.target.name}{UNFINISHED}")

    @property
    def failure_key(self) -> str:
        """The key under which a failing rank reports to the others."""
        return f"ssa_pretrain/failed_save/{self.step}"

    def on_every_rank(self, act: Callable[[], None]) -> None:
        """Runs this rank's part of a step of the save, which has no collectives.

        Raises:
            SaveError: on every rank, if any rank failed.
        """
        if reason := on_all_ranks(act, None, self._describe, self.group):
            self._remove_scratch()
            raise SaveError(reason)

    def write(self, act: Callable[[Path], None]) -> None:
        """Lets the engine write, which has collectives of its own.

        Raises:
            SaveError: on every rank, if any rank failed and all ranks have agreed on that.
            CheckpointError: on every rank that is not stuck, if a rank failed by itself.
        """
        is_agreed = False

        def run() -> None:
            nonlocal is_agreed
            try:
                act(self.scratch)
            except AGREED:
                is_agreed = True  # on every rank, or on none
                raise

        def describe(reason: str) -> str:
            error = SaveError(self._describe(reason))
            return error.reason if is_agreed else str(error)  # a rank that is stuck ends with it

        if text := on_all_ranks(run, self.failure_key, describe, self.group):
            self._remove_scratch()
            raise SaveError(text) if is_agreed else CheckpointError(text)

    def create_folder(self) -> None:
        """Creates the empty hidden folder, on rank 0, which first removes what failed saves have left."""
        if self.is_rank_0:
            for left in self.target.parent.glob(f".step_*{UNFINISHED}"):
                if not left.name.endswith(REMOVED):
                    shutil.rmtree(left, ignore_errors=True)
            patiently(lambda: self.scratch.mkdir(parents=True), f"creating {self.scratch}", self.report)

    def hash_share(self) -> None:
        """Hashes this rank's share of the files and flushes them to disk."""
        sizes = patiently(lambda: _sizes(self.scratch), f"listing {self.scratch}", self.report)
        self.seen.update(sizes)
        share = _share(sizes, dist.get_rank(), dist.get_world_size())
        self.own.update(_entries(self.scratch, share, self.report))

    def gather_entries(self) -> None:
        """Gathers all ranks' entries, and the files that rank 0 does not see."""
        parts: list[dict[str, Entry]] = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, self.own, group=self.group)
        self.entries = {name: entry for part in parts for name, entry in part.items()}
        self.hidden = _hidden_from_rank_0(self.seen, self.group)

    def require_visible(self) -> None:
        """Raises OSError on rank 0 if another rank's files stay invisible to it: its list would lack them."""
        deadline = time.monotonic() + VISIBLE_SECONDS
        while self.is_rank_0 and (left := sorted(n for n in self.hidden if not (self.scratch / n).is_file())):
            if time.monotonic() > deadline:
                raise OSError(
                    f"{left[0]}, which another rank wrote, is not visible here: is output_dir on shared storage?"
                )
            time.sleep(0.1)

    def commit(self) -> None:
        """Writes `checkpoint.json`, flushes, and renames the folder, on rank 0."""
        if self.is_rank_0:
            patiently(self._write_facts, f"writing {self.scratch / FACTS}", self.report)
            shutil.rmtree(self.target, ignore_errors=True)
            rename_patiently(self.scratch, self.target, self.report)
            sync(self.target.parent)

    def _write_facts(self) -> None:
        """Writes the facts and the list of files; a file whose entry is missing or has another size is hashed here."""
        sizes = _sizes(self.scratch)
        known = {name: entry for name, entry in self.entries.items() if entry["bytes"] == sizes.get(name)}
        listed = dict(
            sorted((known | _entries(self.scratch, sizes.keys() - known.keys() - {FACTS}, self.report)).items())
        )
        record = self.scratch / FACTS
        content = {"schema": SCHEMA, "step": self.step, "facts": self.facts, "files": listed}
        record.write_text(record_text(content))
        sync(record)
        for folder in (*(p for p in self.scratch.rglob("*") if p.is_dir()), self.scratch):  # the names of the files
            sync(folder)

    def _remove_scratch(self) -> None:
        if self.is_rank_0:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _describe(self, reason: str) -> str:
        try:
            free = f"{shutil.disk_usage(self.run_folder).free / 2**30:.1f} GiB free"
        except OSError as error:  # the storage does not answer at all
            free = f"an unknown amount of free space: {error.strerror}"
        return (
            f"step {self.step} could not be saved in {self.target.parent}, which has {free} ({reason}); "
            "earlier checkpoints are unchanged"
        )


def _hidden_from_rank_0(seen: set[str], group: dist.ProcessGroup | None) -> set[str]:
    """Returns the files that some rank sees and rank 0 does not, on every rank; names are exchanged only if the ranks see different files."""
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256("\n".join(sorted(seen)).encode()).hexdigest(), group=group)
    if len(set(digests)) == 1:
        return set()
    views: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(views, seen, group=group)
    return set().union(*views) - views[0]


def _outdated(run_folder: Path, step: int, keep: int, verdicts: Verdicts, report: Callable[[str], None]) -> list[Path]:
    """Returns the checkpoints older than the `keep` newest intact ones up to a step; later ones were damaged when the run resumed."""
    num_intact, old = 0, []
    for folder in published(run_folder):
        if step_of(folder) > step or is_of_another_schema(folder):
            continue
        if num_intact == keep:
            old += [folder] * (folder not in verdicts.in_use)
            continue
        is_news = not verdicts.knows(folder)
        damage = verdicts.damage(folder)
        if damage and is_news:
            report(f"checkpoint {folder} is damaged ({damage}); it does not count towards checkpoint.keep={keep}")
        num_intact += damage is None
    return old


def _half_removed(run_folder: Path) -> list[Path]:
    """Returns the old checkpoints whose removal has begun and failed."""
    return sorted((run_folder / "checkpoints").glob(f".step_*{REMOVED}"))


def _remove(folder: Path, report: Callable[[str], None]) -> None:
    """Removes an old checkpoint, or reports why it stays: the newer one is published, and the next save tries again.

    Its name goes first. So a kill in between leaves a hidden folder, which the next start removes, and no damaged checkpoint.
    """
    hidden = folder if folder.name.endswith(REMOVED) else folder.with_name(f".{folder.name}{REMOVED}")
    try:
        if hidden != folder:
            os.rename(folder, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        report(f"{folder} could not be removed ({error.strerror}); the next checkpoint tries again")


def _entries(folder: Path, names: Iterable[str], report: Callable[[str], None]) -> dict[str, Entry]:
    """Returns size and sha256 of files in a folder, after flushing them to disk; several files at once, because hashing is slower than most disks."""

    def entry(path: Path) -> Entry:
        return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}

    def flushed(name: str) -> tuple[str, Entry]:
        found = patiently(partial(entry, folder / name), f"reading {folder / name}", report)
        sync(folder / name)
        return name, found

    with ThreadPoolExecutor(HASHED_AT_ONCE) as threads:
        return dict(threads.map(flushed, names))


def _sizes(folder: Path) -> dict[str, int]:
    """Returns the bytes of each file below a folder by relative name; another node's newest files may not be visible yet."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def _share(sizes: dict[str, int], rank: int, world_size: int) -> list[str]:
    """Returns the files that a rank reads: largest first, each to the rank with the fewest bytes so far."""
    loads = [(0, r) for r in range(world_size)]
    own = []
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        load, reader = heapq.heappop(loads)
        heapq.heappush(loads, (load + size, reader))
        if reader == rank:
            own.append(name)
    return own
