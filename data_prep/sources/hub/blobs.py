"""The text of blobs that a dataset lists by id: from Software Heritage's public bucket into Parquet files.

python-edu of the SmolLM corpus is such a list. The text of blob X is the object content/X of the S3 bucket
`softwareheritage`: gzip of bytes that are decoded as UTF-8 with errors ignored, as the authors of the corpus do.
Requests are not signed, so no AWS account is needed. There are eight million small objects, so many requests run
concurrently.

    FOLDER/blobs_00000.parquet                the listed rows that have text, with `text` beside the columns of the list
    FOLDER/blobs_00000.parquet.fetched.json   written last: size, sha256, counts, and which blobs were dropped and why

A killed run loses at most the current file of `part_rows` blobs. A blob is dropped and recorded if the bucket does not
have it (`missing`), refuses it (`denied`) or sends it damaged in every attempt (`damaged`). A request without any
answer ends the run, since it does not show whether the blob exists.
"""

import gzip
import random
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from data_prep.errors import InputError
from data_prep.files import digest, read_json
from data_prep.plain import to_plain
from data_prep.progress import Log
from data_prep.sources.hub.download import is_fetched, record_path, write_record
from data_prep.sources.hub.settings import BlobSettings
from ssa_pretrain.settings.files import file_sha256, temporary_path

MAX_PAUSE_SECONDS = 30.0
MIN_ROWS_FOR_SHARE = 1_000  # the share of fewer blobs is not checked until the end
MISSING = {"NoSuchKey", "404", "NotFound"}
DENIED = {"AccessDenied", "403", "Forbidden"}


@dataclass(frozen=True, slots=True)
class Blob:
    """The result for one blob: its text, or why there is none (missing, denied or damaged)."""

    text: str | None
    reason: str = ""


def fetch_blobs(lists: list[Path], settings: BlobSettings, folder: Path, log: Log) -> tuple[list[Path], dict[str, Any]]:
    """Returns Parquet files with the text of all listed blobs, and counts of blobs with and without text.

    Args:
        lists: Parquet files with a column of ids.
        settings: where the blobs are.
        folder: where the Parquet files go; its name must depend on the content of the lists.
        log: takes lines for the user.

    Raises:
        InputError: a request failed in all attempts, or too few blobs have text.
    """
    facts = {"bucket": settings.bucket, "prefix": settings.prefix, "part_rows": settings.part_rows}
    place = folder / digest(facts)[:12]
    place.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    counts: Counter = Counter()
    client = None
    with ThreadPoolExecutor(settings.connections) as pool:
        for number, rows in enumerate(_chunks(lists, settings)):
            path = place / f"blobs_{number:05d}.parquet"
            record = read_json(record_path(path)) if is_fetched(path) else None
            if record is None or record["ids"] != _ids_digest(rows, settings):
                client = client or Bucket(settings)
                record = _write_file(path, rows, client, pool, settings)
                log(_progress(number, record))
            counts.update(record["counts"])
            _check_share(counts, settings, MIN_ROWS_FOR_SHARE)
            if record["counts"].get("text"):
                paths.append(path)
    _check_share(counts, settings, 1)
    report = {
        "blobs": sum(counts.values()),
        **{reason: counts[reason] for reason in ("text", *sorted(set(counts) - {"text"}))},
    }
    log(f"blobs: {report['text']:,} of {report['blobs']:,} have text ({_share(counts):.2%})")
    return paths, report


class Bucket:
    """An S3 bucket that is read with unsigned requests."""

    def __init__(self, settings: BlobSettings) -> None:
        try:
            import boto3
            import botocore
            from botocore.config import Config
        except ImportError:
            raise InputError(
                "the text of blobs is read with boto3, which is not installed; install the extra: pip install -e '.[hub]'"
            ) from None
        # botocore waits after S3's "slow down" answers. It does not retry a truncated body; `text` does.
        config = Config(
            signature_version=botocore.UNSIGNED,
            max_pool_connections=settings.connections,
            connect_timeout=settings.timeout_s,
            read_timeout=settings.timeout_s,
            retries={"mode": "standard", "total_max_attempts": settings.attempts},
            s3={"addressing_style": "path"} if settings.endpoint else {},
        )
        self._settings = settings
        self._client = boto3.client("s3", region_name="us-east-1", endpoint_url=settings.endpoint, config=config)

    def text(self, blob_id: str) -> Blob:
        """Returns a blob's text, or why it has none; InputError if no attempt got an answer."""
        from botocore.exceptions import BotoCoreError, ClientError

        key = self._settings.prefix + blob_id
        attempts = self._settings.attempts
        for attempt in range(attempts):
            last = attempt + 1 == attempts
            try:
                body = self._client.get_object(Bucket=self._settings.bucket, Key=key)["Body"].read()
                return Blob(gzip.decompress(body).decode("utf-8", errors="ignore"))
            except (EOFError, gzip.BadGzipFile, zlib.error):
                if last:
                    return Blob(None, "damaged")
            except ClientError as error:
                code = str(error.response.get("Error", {}).get("Code"))
                if code in MISSING:
                    return Blob(None, "missing")
                if code in DENIED:
                    return Blob(None, "denied")
                if last or code == "NoSuchBucket":
                    raise self._failure(key, error) from None
            except (BotoCoreError, OSError) as error:
                if last:
                    raise self._failure(key, error) from None
            time.sleep(min(MAX_PAUSE_SECONDS, 2**attempt * random.uniform(0.1, 0.3)))
        raise AssertionError("attempts is at least 1")

    def _failure(self, key: str, error: Exception) -> InputError:
        where = self._settings.endpoint or "AWS"
        return InputError(
            f"s3://{self._settings.bucket}/{key} at {where} could not be read in {self._settings.attempts} attempts "
            f"({' '.join(str(error).split())[:300]}); run again to continue, finished files are kept"
        )


def _chunks(lists: list[Path], settings: BlobSettings) -> Iterator[pyarrow.Table]:
    """Yields the listed rows, at most `part_rows` at a time and never from two files at once."""
    left = settings.limit_rows or None
    for path in lists:
        try:
            with parquet.ParquetFile(path) as file:
                if settings.id_column not in file.schema_arrow.names:
                    raise InputError(
                        f"{path} has no column {settings.id_column!r}, it has {', '.join(file.schema_arrow.names[:12])}; set "
                        "source.blobs.id_column"
                    )
                for batch in file.iter_batches(batch_size=settings.part_rows):
                    rows = pyarrow.Table.from_batches([batch])
                    if left is not None:
                        rows, left = rows.slice(0, left), max(0, left - len(rows))
                    if len(rows):
                        yield rows
        except pyarrow.ArrowException as error:
            raise InputError(f"{path} is damaged ({error}); delete it and run again") from None


def _write_file(
    path: Path, rows: pyarrow.Table, bucket: Bucket, pool: ThreadPoolExecutor, settings: BlobSettings
) -> dict[str, Any]:
    started = time.monotonic()
    ids = rows.column(settings.id_column).to_pylist()
    blobs = list(pool.map(bucket.text, ids))
    counts = Counter(blob.reason or "text" for blob in blobs)
    dropped: dict[str, list[str]] = {}
    for blob_id, blob in zip(ids, blobs, strict=True):
        if blob.text is None:
            dropped.setdefault(blob.reason, []).append(blob_id)
    texts = pyarrow.array([blob.text for blob in blobs], type=pyarrow.large_string())
    kept = rows.append_column("text", texts).filter(texts.is_valid())
    temporary = temporary_path(path)
    parquet.write_table(kept, temporary, compression="zstd")
    temporary.replace(path)
    record = {
        "sha256": file_sha256(path),
        "ids": _ids_digest(rows, settings),
        "counts": dict(counts),
        "dropped": dropped,
        "seconds": round(time.monotonic() - started, 1),
    }
    where = {name: to_plain(getattr(settings, name)) for name in ("endpoint", "bucket", "prefix")}
    write_record(path, settings=where, **record)
    return record


def _ids_digest(rows: pyarrow.Table, settings: BlobSettings) -> str:
    return digest(rows.column(settings.id_column).to_pylist())


def _share(counts: Counter) -> float:
    return counts["text"] / max(1, sum(counts.values()))


def _check_share(counts: Counter, settings: BlobSettings, min_rows: int) -> None:
    total = sum(counts.values())
    if total >= min_rows and _share(counts) < settings.min_success:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if reason != "text")
        raise InputError(
            f"only {_share(counts):.2%} of {total} blobs have text ({reasons or 'no blob was listed'}), less than "
            f"source.blobs.min_success={settings.min_success}; check source.blobs.bucket and prefix, or lower it"
        )


def _progress(number: int, record: dict[str, Any]) -> str:
    counts = record["counts"]
    total = sum(counts.values())
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if reason != "text")
    rate = total / max(0.1, record["seconds"])
    return f"blobs: file {number}, {total:,} blobs, {rate:,.0f}/s{f', {dropped}' if dropped else ''}"
