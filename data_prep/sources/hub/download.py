"""Datasets on the Hugging Face hub: what is in them at which commit, and their files on this disk.

    cache/hub/OWNER--NAME/REVISION.json           the commit that a branch or tag stands for, its files, sizes and sha256
    cache/hub/OWNER--NAME/COMMIT/PATH             a file (download), with PATH.fetched.json beside it
    cache/hub/OWNER--NAME/COMMIT/PATH.stream/     Parquet files with the text column (stream), data_prep/sources/hub/streaming.py

The listing is asked for once, so a run that goes on next week reads the same commit, and one whose files are all here needs no
network. A record (`.fetched.json`) is written last and says commit, size and sha256; without it a file is not there. Transport,
redirects and tokens are huggingface_hub's; what is added is retrying a file that its own retries gave up, and comparing the
content with the sha256 that the hub states: it does not do that itself.
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
from data_prep.sources.hub.settings import HubSource
from ssa_pretrain.data.indexed_format import file_sha256

Log = Callable[[str], None]

LONGEST_PAUSE = 30.0


class TransferError(Exception):
    """A transfer came to an end with something else than the file; another try may do better."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a dataset; `sha256` is None for the small ones that the hub keeps in git."""

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
        """Returns the files that a pattern names, by path; InputError where there are none."""
        found = sorted((f for f in self.files if fnmatch.fnmatchcase(f.path, pattern)), key=lambda f: f.path)
        if not found:
            kinds = sorted({os.path.dirname(f.path) + "/*" + "".join(Path(f.path).suffixes[-1:]) for f in self.files})
            raise InputError(
                f"{self.repo} has no file {pattern}; it has {', '.join(kinds[:8])}: set source.subsets.…files, or "
                "source.revision=refs/convert/parquet for the hub's own conversion to Parquet"
            )
        return found


def list_dataset(source: HubSource, folder: Path) -> Listing:
    """Returns the dataset at the commit that `source.revision` stands for; asks the hub the first time only.

    Args:
        source: checked settings.
        folder: the dataset's folder in the cache.
    """
    memory = folder / f"{source.revision.replace('/', '--')}.json"
    if isinstance(known := read_json(memory), dict):
        files = tuple(RemoteFile(**file) for file in known["files"])
        return Listing(known["repo"], known["commit"], known["licence"], files)
    from huggingface_hub import HfApi  # half a second, for this source alone

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
    licence = (info.card_data or {}).get("license")
    listing = Listing(source.repo, info.sha, licence if isinstance(licence, str) else None, tuple(files))
    write_json(memory, {**asdict(listing), "files": [asdict(file) for file in files]})
    return listing


def download_all(source: HubSource, listing: Listing, files: list[RemoteFile], folder: Path, log: Log) -> list[Path]:
    """Returns the files on this disk, in order, after fetching what the cache lacks.

    Raises:
        InputError: naming the file, when all attempts at it failed or its content is not what the hub states.
    """
    place = folder / listing.commit
    missing = [file for file in files if not is_fetched(place / file.path)]
    if missing:
        log(
            f"hub: {source.repo}@{listing.commit[:12]}, {len(missing)} files, {sum(f.size for f in missing) / 1e9:.2f} GB"
        )
        run_all(lambda file: _download(source, listing, file, place), missing, source.connections)
    return [place / file.path for file in files]


def is_fetched(path: Path) -> bool:
    """Returns whether a file is there with its record and the size in it."""
    record = read_json(record_path(path))
    return isinstance(record, dict) and path.is_file() and path.stat().st_size == record["size"]


def record_path(path: Path) -> Path:
    """Returns where the record of a fetched file is."""
    return path.with_name(path.name + ".fetched.json")


def write_record(path: Path, **facts: Any) -> None:
    """Says that a file is whole: flushes it to the disk, then writes size, sha256 and `facts` beside it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    write_json(record_path(path), {"size": path.stat().st_size, **facts})


def run_all(work: Callable[[Any], Any], items: list[Any], connections: int) -> list[Any]:
    """Returns work(item) for all items, several at a time; the first failure ends it, what is under way finishes."""
    with ThreadPoolExecutor(min(connections, max(1, len(items)))) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


def retry(work: Callable[[], Any], attempts: int, what: str) -> Any:
    """Returns work(), tried again after a pause that doubles where the transport failed; the last failure is an InputError.

    What no repetition mends (no such file, no permission) is passed on at once.
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
                    f"{what} could not be fetched in {attempts} attempts ({reason}); run again to go on, finished files "
                    "are kept"
                ) from None
            time.sleep(min(LONGEST_PAUSE, 2**attempt * random.uniform(0.25, 0.5)))
    raise AssertionError("attempts is at least 1")


@contextmanager
def explain_errors(what: str) -> Iterator[None]:
    """Turns the hub's final answers into one sentence with a remedy."""
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
            f"{what} is not on the server any more; delete its listing in the cache, or pin another source.revision"
        ) from None
    except errors.HfHubHTTPError as error:
        raise InputError(f"{what}: the server answered {' '.join(str(error).split())[:300]}; try again later") from None


def _is_transient(error: Any) -> bool:
    """Returns whether an answer of the server may be another one next time."""
    status = error.response.status_code if error.response is not None else 0
    return status in (408, 425, 429) or status >= 500


def _download(source: HubSource, listing: Listing, file: RemoteFile, place: Path) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    path = place / file.path
    what = f"{source.repo}/{file.path}"

    def fetch() -> str:
        path.unlink(missing_ok=True)
        hf_hub_download(
            source.repo,
            file.path,
            repo_type="dataset",
            revision=listing.commit,
            local_dir=place,
            endpoint=source.endpoint,
        )
        size, sha256 = path.stat().st_size, file_sha256(path)
        if size != file.size:
            raise TransferError(f"it has {size} bytes where the hub's listing states {file.size}")
        if file.sha256 is not None and sha256 != file.sha256:
            raise TransferError(f"its sha256 is {sha256[:12]}… where the hub's listing states {file.sha256[:12]}…")
        return sha256

    with explain_errors(what):
        sha256 = retry(fetch, source.attempts, what)
    write_record(path, sha256=sha256, repo=listing.repo, commit=listing.commit)
