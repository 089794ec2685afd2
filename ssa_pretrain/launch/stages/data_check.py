"""The first stage: compares every byte of the datasets with their manifests before any GPU is used.

    python -m ssa_pretrain.launch.stages.data_check FOLDER DATASET [DATASET ...]

The manifest, sizes, headers and indices are checked as every rank does at its start (data/manifest.py); then the sha256 of every .bin file, which
no rank computes. The verdict on each file is kept in FOLDER/HOST.json with its size, inode and time of change, so after a kill only the remaining files
are read. Hosts read each other's verdicts: a file on shared storage is the same file for all of them, a copy on a local disk is not. `data_prep stage=validate` checks more (ids, ends of documents) but begins again each time. Exit codes: 0 intact, 4 not. torch is not imported.
"""

import json
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ssa_pretrain.data.manifest import Manifest, load_manifest
from ssa_pretrain.data.repair import repair_advice
from ssa_pretrain.errors import DataError
from ssa_pretrain.process import command, exit_with_starter
from ssa_pretrain.settings.files import file_sha256, write_atomically

THREADS = 4
REPORT_SECONDS = 10.0
SAVE_SECONDS = 1.0
Verdicts = set[tuple[str, int, int, int, str]]  # of files: name, bytes, inode, time of the last change in ns, sha256


def check(datasets: list[Path], folder: Path) -> None:
    """Reads the files that have no verdict yet, and keeps the verdicts.

    Args:
        datasets: their folders.
        folder: of the verdicts; created if it is missing.

    Raises:
        DataError: a dataset is missing, incomplete or changed.
    """
    path = folder / f"{socket.gethostname()}.json"
    own = _read(path)
    for dataset in datasets:
        manifest = manifest_of(dataset)
        missing = _without_verdict(manifest, own | known(folder))
        total, done, saved, reported = sum(size for _, size, _ in missing), 0, time.monotonic(), time.monotonic()
        with ThreadPoolExecutor(THREADS) as pool:
            for (file, size, sha256), found in zip(missing, pool.map(lambda one: _hash(one[0]), missing), strict=True):
                stamp, actual = found
                if actual != sha256:
                    pool.shutdown(wait=False, cancel_futures=True)
                    _write(path, own)
                    raise DataError(
                        f"{file} has sha256 {actual[:12]}…, its manifest has {sha256[:12]}…; {repair_advice(manifest.root)}"
                    )
                own.add((str(file), *stamp, sha256))
                done += size
                if time.monotonic() - saved > SAVE_SECONDS:
                    _write(path, own)
                    saved = time.monotonic()
                if time.monotonic() - reported > REPORT_SECONDS:
                    print(f"{dataset}: {done / 1e9:.2f} of {total / 1e9:.2f} GB read", file=sys.stderr, flush=True)
                    reported = time.monotonic()
        _write(path, own)
        count = sum(map(len, manifest.splits.values()))
        print(f"{dataset}: {count} shards intact, {len(missing)} of them read now", file=sys.stderr, flush=True)


def require_checked(dataset: Path, folder: Path) -> None:
    """Checks that every file of a dataset has a verdict and has not changed since. Reads none of them.

    Raises:
        DataError: one has not been read, or has changed.
    """
    if missing := _without_verdict(manifest_of(dataset), known(folder)):
        raise DataError(
            f"{missing[0][0]} has changed since it was checked; run the same command again, which checks it"
        )


def manifest_of(dataset: Path) -> Manifest:
    """Returns the checked manifest of a dataset. Raises DataError."""
    try:
        return load_manifest(dataset)
    except ValueError as error:
        raise DataError(str(error)) from None


def _without_verdict(manifest: Manifest, verdicts: Verdicts) -> list[tuple[Path, int, str]]:
    """Returns (file, bytes, sha256) of the .bin files that have no verdict for their present size, time and expected sha256."""
    found = []
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        file = manifest.root / f"{shard.prefix}.bin"
        if (str(file), *_stamp(file), shard.bin_sha256) not in verdicts:
            found.append((file, shard.bin_bytes, shard.bin_sha256))
    return found


def known(folder: Path) -> Verdicts:
    """Returns the verdicts of all hosts."""
    return set().union(*(_read(path) for path in folder.glob("*.json")))


def _stamp(file: Path) -> tuple[int, int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_ino, stat.st_mtime_ns


def _hash(file: Path) -> tuple[tuple[int, int, int], str]:
    """Returns a file's stamp before it was read, and its sha256. Raises DataError if it cannot be read."""
    try:
        return _stamp(file), file_sha256(file)
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}); check its storage and run the same command again"
        ) from None


def _read(path: Path) -> Verdicts:
    """Returns the verdicts in a file; none if it is missing or cannot be read, since a verdict can be found again."""
    try:
        return {
            (str(name), int(size), int(inode), int(at), str(sha))
            for name, size, inode, at, sha in json.loads(path.read_text())
        }
    except (OSError, ValueError, TypeError):
        return set()


def _write(path: Path, verdicts: Verdicts) -> None:
    write_atomically(path, json.dumps(sorted(verdicts), indent=0))


if __name__ == "__main__":
    with command("stages, data"):
        exit_with_starter(os.environ)
        check([Path(word) for word in sys.argv[2:]], Path(sys.argv[1]))
