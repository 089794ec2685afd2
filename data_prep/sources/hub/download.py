"""Datasets on the Hugging Face hub: listing their files at one commit, and downloading them.

    cache/hub/OWNER--NAME/REVISION.json           the commit of a branch or tag, its files, sizes and sha256
    cache/hub/OWNER--NAME/COMMIT/PATH             a file (download), with PATH.fetched.json beside it
    cache/hub/OWNER--NAME/COMMIT/PATH.stream-COLUMN/   Parquet files with the text column, data_prep/sources/hub/streaming.py

The listing is fetched once. So a run that continues next week reads the same commit, and a run whose files are all on
this machine needs no network. A record (`.fetched.json`) with commit, size and sha256 is written last. A file without a
record counts as missing. huggingface_hub does transport, redirects and tokens. This module adds two things that it does
not do: retrying a file after its own retries have failed, and comparing the content with the sha256 in the hub's
listing.
"""

import fnmatch
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.files import read_json, write_json
from data_prep.progress import Log
from data_prep.sources.hub.settings import HubSource
from ssa_pretrain.settings.files import file_sha256, leads_outside, sync

MAX_PAUSE_SECONDS = 30.0


class TransferError(Exception):
    """A transfer ended with wrong content. Another attempt may succeed."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a dataset; `sha256` is None for small files, which the hub keeps in git."""

    path: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """A dataset at one commit."""

    repo: str
    commit: str
    licence: str | None
    files: tuple[RemoteFile, ...]

    def matching(self, pattern: str) -> list[RemoteFile]:
        """Returns the files that match a pattern, sorted by path; InputError if there are none."""
        found = sorted((f for f in self.files if fnmatch.fnmatchcase(f.path, pattern)), key=lambda f: f.path)
        if not found:
            kinds = sorted({os.path.dirname(f.path) + "/*" + "".join(Path(f.path).suffixes[-1:]) for f in self.files})
            raise InputError(
                f"{self.repo} has no file {pattern}; it has {', '.join(kinds[:8])}; set source.subsets.…files, or "
                "source.revision=refs/convert/parquet for the hub's own conversion to Parquet"
            )
        return found


def list_dataset(source: HubSource, folder: Path) -> Listing:
    """Returns the dataset at the commit of `source.revision`. Only the first call sends a request to the hub.

    Args:
        source: checked settings.
        folder: the dataset's folder in the cache.
    """
    listing_file = folder / f"{source.revision.replace('/', '--')}.json"
    if isinstance(known := read_json(listing_file), dict):
        files = tuple(RemoteFile(**file) for file in known["files"])
        return Listing(known["repo"], known["commit"], known["licence"], files)
    from huggingface_hub import HfApi  # takes half a second, and only this source needs it

    with explain_errors(f"dataset {source.repo}"):
        api = HfApi(endpoint=source.endpoint)
        info = retry(
            lambda: api.dataset_info(source.repo, revision=source.revision, files_metadata=True),
            source.attempts,
            f"dataset {source.repo}",
        )
    if info.sha is None:
        raise InputError(f"{source.repo}: the server states no commit for {source.revision}; name a commit")
    files = [
        RemoteFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None)
        for s in info.siblings or []
        if not s.rfilename.startswith(".")
    ]
    if outside := next((file.path for file in files if leads_outside(folder, file.path)), None):
        raise InputError(f"{source.repo} lists {outside!r}, which is outside its folder; use another dataset")
    licence = (info.card_data or {}).get("license")
    listing = Listing(source.repo, info.sha, licence if isinstance(licence, str) else None, tuple(files))
    write_json(listing_file, {**asdict(listing), "files": [asdict(file) for file in files]})
    return listing


def download_all(source: HubSource, listing: Listing, files: list[RemoteFile], folder: Path, log: Log) -> list[Path]:
    """Returns the local files, in order, after downloading those that the cache lacks.

    Raises:
        InputError: all attempts at a file failed, or its content does not match the listing; names the file.
    """
    commit_folder = folder / listing.commit
    missing = [file for file in files if not is_fetched(commit_folder / file.path)]
    if missing:
        log(
            f"hub: {source.repo}@{listing.commit[:12]}, {len(missing)} files, {sum(f.size for f in missing) / 1e9:.2f} GB"
        )
        run_all(lambda file: _download(source, listing, file, commit_folder), missing, source.connections)
    return [commit_folder / file.path for file in files]


def is_fetched(path: Path) -> bool:
    """Returns whether a file exists with a record of its size."""
    record = read_json(record_path(path))
    return isinstance(record, dict) and path.is_file() and path.stat().st_size == record["size"]


def record_path(path: Path) -> Path:
    """Returns the path of the record of a fetched file."""
    return path.with_name(path.name + ".fetched.json")


def write_record(path: Path, **facts: Any) -> None:
    """Marks a file as complete: flushes it to the disk, then writes its size and `facts` beside it."""
    sync(path)
    write_json(record_path(path), {"size": path.stat().st_size, **facts})


def run_all(work: Callable[[Any], Any], items: list[Any], connections: int) -> list[Any]:
    """Returns work(item) for all items, several at a time. After the first failure no new item starts."""
    with ThreadPoolExecutor(min(connections, max(1, len(items)))) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


def retry(work: Callable[[], Any], attempts: int, what: str) -> Any:
    """Returns work(), retried after a doubling pause if the transfer fails; the last failure is an InputError.

    Permanent errors (no such file, no permission) are raised at once.
    """
    import httpx2  # huggingface_hub's transport
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(attempts):
        try:
            return work()
        except (HfHubHTTPError, httpx2.TransportError, OSError, TransferError) as error:
            if isinstance(error, HfHubHTTPError) and not _is_transient(error):
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if attempt + 1 == attempts:
                raise InputError(
                    f"{what} could not be fetched in {attempts} attempts ({reason}); run again to continue, finished files "
                    "are kept"
                ) from None
            time.sleep(min(MAX_PAUSE_SECONDS, 2**attempt * random.uniform(0.25, 0.5)))
    raise AssertionError("attempts is at least 1")


@contextmanager
def explain_errors(what: str) -> Iterator[None]:
    """Turns the hub's permanent errors into an InputError of one sentence with a remedy."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise InputError(
            f"{what} is gated; accept its terms on its page, then set HF_TOKEN or run `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"{what} has no such revision; correct source.revision (a branch, a tag or a commit)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{what} does not exist there, or is private; correct source.repo, or set HF_TOKEN or run `hf auth login`"
        ) from None
    except errors.EntryNotFoundError:
        raise InputError(
            f"{what} is no longer on the server; delete its listing in the cache, or pin another source.revision"
        ) from None
    except errors.HfHubHTTPError as error:
        raise InputError(f"{what}: the server answered {' '.join(str(error).split())[:300]}; try again later") from None


def _is_transient(error: Any) -> bool:
    """Returns whether a server error may be gone on the next attempt."""
    status = error.response.status_code if error.response is not None else 0
    return status in (408, 425, 429) or status >= 500


def _download(source: HubSource, listing: Listing, file: RemoteFile, folder: Path) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    path = folder / file.path
    what = f"{source.repo}/{file.path}"

    def fetch() -> str:
        path.unlink(missing_ok=True)
        hf_hub_download(
            source.repo,
            file.path,
            repo_type="dataset",
            revision=listing.commit,
            local_dir=folder,
            endpoint=source.endpoint,
        )
        size, sha256 = path.stat().st_size, file_sha256(path)
        if size != file.size:
            raise TransferError(f"it has {size} bytes, but the hub's listing has {file.size}")
        if file.sha256 is not None and sha256 != file.sha256:
            raise TransferError(f"its sha256 is {sha256[:12]}…, but the hub's listing has {file.sha256[:12]}…")
        return sha256

    with explain_errors(what):
        sha256 = retry(fetch, source.attempts, what)
    write_record(path, sha256=sha256, repo=listing.repo, commit=listing.commit)
