"""Checkpoints in an S3-like object store: uploading, finding and downloading them.

An object store has no rename, so a checkpoint is complete there once its `checkpoint.json` exists. It is uploaded last, and removed first. The store
checks the SHA-256 of every part that it receives, and an object's size and its file's sha256 (kept as metadata) are compared afterwards. A download is
hashed like any other checkpoint before it is published in the run's folder.

boto3 reads the credentials, the region and the endpoint of a store that is not Amazon's (AWS_ENDPOINT_URL) from the environment. It tries a request
again itself when the store is busy or does not answer.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from ssa_pretrain.checkpoint.integrity import FACTS

ATTEMPTS = 8  # of a request


class StoreError(Exception):
    """The store did not do what it was asked for; str() says why."""


class BrokenError(StoreError):
    """A checkpoint in the store lacks an object, or its list cannot be read."""


class ObjectStore:
    """The checkpoints of one run in a bucket.

    Args:
        address: such as s3://BUCKET/PREFIX.
    """

    def __init__(self, address: str) -> None:
        import boto3
        from botocore.config import Config

        parts = urlsplit(address)
        self.address, self._bucket, self._prefix = address.rstrip("/"), parts.netloc, parts.path.strip("/")
        settings = Config(retries={"mode": "standard", "total_max_attempts": ATTEMPTS})
        self._client: Any = boto3.client("s3", config=settings)

    def complete(self) -> list[str]:
        """Returns the names of the complete checkpoints, in no order; those of another run whose prefix begins with this one's are not among them."""
        found = (PurePosixPath(key).relative_to(self._prefix).parts for key in self._keys(""))
        return [parts[0] for parts in found if parts[1:] == (FACTS,)]

    def upload(self, folder: Path) -> None:
        """Uploads a published checkpoint; objects that are there already, from an upload that was cut short, are not sent again.

        Raises:
            StoreError: it is not complete in the store.
        """
        record = (folder / FACTS).read_text()
        with _told():
            self._client.delete_object(Bucket=self._bucket, Key=self._key(folder.name, FACTS))
            for name, entry in json.loads(record)["files"].items():
                if not self._has(folder.name, name, entry):
                    self._send(folder, name, entry)
            self._client.put_object(Bucket=self._bucket, Key=self._key(folder.name, FACTS), Body=record.encode())

    def facts(self, name: str) -> str:
        """Returns the text of a checkpoint's `checkpoint.json`."""
        with _told():
            return self._client.get_object(Bucket=self._bucket, Key=self._key(name, FACTS))["Body"].read().decode()

    def download(self, name: str, target: Path) -> None:
        """Downloads a checkpoint into an empty folder, without checking its files.

        Raises:
            BrokenError: a file is missing, or the list cannot be read.
            StoreError: the store does not answer, or a name points outside the folder.
        """
        try:
            record = self.facts(name)
            files = list(json.loads(record)["files"])
        except (ValueError, KeyError, TypeError):
            raise BrokenError(f"{FACTS} cannot be read") from None
        for file in files:
            path = target / file
            if not path.resolve().is_relative_to(target.resolve()):
                raise StoreError(f"{name} lists {file}, which lies outside it")
            path.parent.mkdir(parents=True, exist_ok=True)
            with _told():
                self._client.download_file(self._bucket, self._key(name, file), str(path))
        (target / FACTS).write_text(record)

    def remove(self, name: str) -> None:
        """Removes a checkpoint; from the first moment it is no longer complete."""
        with _told():
            self._client.delete_object(Bucket=self._bucket, Key=self._key(name, FACTS))
            for key in self._keys(f"{name}/"):
                self._client.delete_object(Bucket=self._bucket, Key=key)

    def _key(self, *parts: str) -> str:
        return "/".join(part for part in (self._prefix, *parts) if part)

    def _keys(self, below: str) -> Iterator[str]:
        """Yields the keys of the objects whose names begin with the run's prefix and `below`."""
        prefix = f"{self._prefix}/{below}" if self._prefix else below
        with _told():
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
                yield from (item["Key"] for item in page.get("Contents", ()))

    def _has(self, name: str, file: str, entry: dict[str, Any]) -> bool:
        """Returns whether the store has a file with its listed size and sha256."""
        from botocore.exceptions import ClientError

        try:
            found = self._client.head_object(Bucket=self._bucket, Key=self._key(name, file))
        except ClientError as error:
            if _is_missing(error):
                return False
            raise
        return (found["ContentLength"], found["Metadata"].get("sha256")) == (entry["bytes"], entry["sha256"])

    def _send(self, folder: Path, file: str, entry: dict[str, Any]) -> None:
        """Uploads a file; raises StoreError unless the store has it afterwards."""
        more = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": str(entry["sha256"])}}
        self._client.upload_file(str(folder / file), self._bucket, self._key(folder.name, file), ExtraArgs=more)
        if not self._has(folder.name, file, entry):
            raise StoreError(f"{file} has another size or sha256 in the store")


@contextmanager
def _told() -> Iterator[None]:
    """Raises the errors of boto3 and of the network as StoreError, in one line; BrokenError for an object that is missing."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (Boto3Error, BotoCoreError, ClientError, OSError) as error:
        kind = BrokenError if isinstance(error, ClientError) and _is_missing(error) else StoreError
        raise kind(" ".join(str(error).split())[:300]) from None


def _is_missing(error: Any) -> bool:
    """Returns whether a ClientError means that an object does not exist; a missing bucket is another matter."""
    response = error.response
    is_404 = response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404
    return is_404 and response.get("Error", {}).get("Code") != "NoSuchBucket"
