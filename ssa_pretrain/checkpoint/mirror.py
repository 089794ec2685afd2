"""A mirror of a run's checkpoints in an object store, for when the run's storage is lost.

Rank 0 uploads each published checkpoint from a thread, while training goes on. One upload is under way at a time, and of those that wait only the
newest is kept. Until it is uploaded, a checkpoint is not removed from the run's folder. A failed upload is reported and does not end the run: the
checkpoint itself is published. The mirror keeps as many complete checkpoints as the run, at least two, and removes one only when a newer one is complete.

`restore` brings the newest one back into a folder that has none.
"""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from ssa_pretrain.checkpoint.find import NAME, published, step_of
from ssa_pretrain.checkpoint.integrity import find_damage
from ssa_pretrain.checkpoint.object_store import BrokenError, ObjectStore, StoreError
from ssa_pretrain.checkpoint.storage import rename_patiently
from ssa_pretrain.errors import CheckpointError
from ssa_pretrain.settings.files import sync

RESTORED, UPLOADED = "ssa_pretrain/mirror_restored", "ssa_pretrain/mirror_uploaded"
POLL_SECONDS = 0.2


class Mirror:
    """Uploads the checkpoints of a run; on rank 0.

    Args:
        address: such as s3://BUCKET/PREFIX.
        keep: complete checkpoints that stay in the store, at least two.
        in_use: receives the folder that must not be removed.
        report: receives a line for the user.
    """

    def __init__(self, address: str, *, keep: int, in_use: set[Path], report: Callable[[str], None]) -> None:
        self._store, self._keep = ObjectStore(address), max(2, keep)
        self._in_use, self._report = in_use, report
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._busy = False
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def offer(self, folder: Path) -> None:
        """Uploads a published checkpoint in the background, in place of one that has not begun."""
        with self._changed:
            if self._waiting is not None:
                self._in_use.discard(self._waiting)
            self._waiting = folder
            self._in_use.add(folder)
            self._changed.notify_all()

    def finish(self) -> None:
        """Waits until nothing is left to upload."""
        with self._changed:
            if self._busy or self._waiting:
                self._report(f"waiting for the upload of the newest checkpoint to {self._store.address}")
            self._changed.wait_for(lambda: not self._busy and self._waiting is None)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                folder, self._waiting, self._busy = self._waiting, None, True
            assert folder is not None
            try:
                self._upload(folder)
            finally:
                with self._changed:
                    self._busy = False
                    self._in_use.discard(folder)
                    self._changed.notify_all()

    def _upload(self, folder: Path) -> None:
        """Uploads a checkpoint and removes old ones from the store, or reports why not."""
        begin = time.monotonic()
        try:
            self._store.upload(folder)
            seconds = time.monotonic() - begin
            self._report(f"mirrored step {step_of(folder)} in {seconds:.1f} s  {self._store.address}/{folder.name}")
            for old in _newest_first(self._store)[self._keep :]:
                self._store.remove(old)
        except Exception as error:  # noqa: BLE001 - `finish` waits for this thread
            self._report(
                f"{folder} was not mirrored to {self._store.address} ({error}); training continues, and the next checkpoint is mirrored again"
            )


def restore(address: str, run_folder: Path, *, is_rank_0: bool, report: Callable[[str], None]) -> None:
    """Downloads the newest intact checkpoint of the mirror if the run's folder has none; every rank calls it.

    The others wait for rank 0 without a collective, which would time out during a long download.

    Raises:
        CheckpointError: on every rank, if the store cannot be read or has only damaged checkpoints: a new run must not begin in silence.
    """
    store, failure = dist.distributed_c10d._get_default_store(), ""
    if is_rank_0:
        try:
            if not published(run_folder):
                _restore(ObjectStore(address), run_folder, report)
        except (StoreError, OSError) as error:
            failure = f"checkpoint.mirror={address} cannot be restored from ({error}); try again, or leave it out to begin a new run"
        store.set(RESTORED, failure)
    else:
        _wait_for(store, RESTORED)
        failure = store.get(RESTORED).decode()
    if failure:
        raise CheckpointError(failure)


def leave_together(*, is_rank_0: bool) -> None:
    """Waits on every rank until rank 0 calls it, when its uploads are done: a launcher ends all ranks soon after one has exited."""
    store = dist.distributed_c10d._get_default_store()
    if is_rank_0:
        store.set(UPLOADED, "")
    else:
        _wait_for(store, UPLOADED)


def _wait_for(store: Store, key: str) -> None:
    while not store.check([key]):
        time.sleep(POLL_SECONDS)


def _newest_first(store: ObjectStore) -> list[str]:
    """Returns the names of the complete checkpoints in a store, newest first."""
    found = [name for name in store.complete() if NAME.fullmatch(name)]
    return sorted(found, key=lambda name: step_of(Path(name)), reverse=True)


def _restore(store: ObjectStore, run_folder: Path, report: Callable[[str], None]) -> None:
    """Downloads the newest checkpoint that arrives intact and publishes it; nothing if the store has none."""
    names = _newest_first(store)
    for name in names:
        begin, target = time.monotonic(), run_folder / "checkpoints" / name
        hidden = target.with_name(f".{name}.tmp")
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        try:
            store.download(name, hidden)
            damage = find_damage(hidden)
        except BrokenError as error:
            damage = str(error)
        if damage:
            report(f"checkpoint {store.address}/{name} is damaged ({damage}); looking for an older one")
            shutil.rmtree(hidden, ignore_errors=True)
            continue
        for path in (*(p for p in hidden.rglob("*") if p.is_file()), hidden):
            sync(path)
        rename_patiently(hidden, target, report)
        sync(target.parent)
        report(f"restored {target} from {store.address} in {time.monotonic() - begin:.1f} s")
        return
    if names:
        raise StoreError("no checkpoint in it is intact")
