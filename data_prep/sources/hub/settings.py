"""The settings of source=hub and its presets: which dataset, which of its files, how they are fetched."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from data_prep.run_config import OnError
from ssa_pretrain.settings.problems import Problem, above_zero, at_least, between


class HubMode(Enum):
    """How the files of a dataset reach this machine."""

    download = "download"  # entire files, checked against the sha256 in the hub's listing
    stream = "stream"  # only the text column, by HTTP range requests, into local Parquet files


@dataclass(kw_only=True, slots=True)
class HubPart:
    """A part of the corpus: some files of the dataset."""

    files: str = "*.parquet"  # pattern for paths in the dataset; * also matches /
    text_column: str = "text"  # column, or key of JSON lines, that holds the text
    limit_gb: float = 0.0  # stop after this many GB of files (download) or of uncompressed text (stream); 0 takes all
    blobs: bool = False  # the files list blob ids, whose text is in Software Heritage's bucket

    def problems(self, name: str) -> list[Problem]:
        """Returns what is wrong with the values of the subset `name`."""
        section, found = f"source.subsets.{name}", []
        if not name or not all(c.isalnum() or c in "-_" for c in name):
            rule = f"has the name {name!r}, which must be made of letters, digits, - and _"
            found.append(Problem("source.subsets", None, rule, "try text"))
        if not self.files:
            found.append(Problem(f"{section}.files", "", "must not be empty", "try '*.parquet'"))
        if not self.text_column:
            found.append(Problem(f"{section}.text_column", "", "must not be empty", "try text"))
        return found + at_least(section, self, 0, "limit_gb")


@dataclass(kw_only=True, slots=True)
class BlobSettings:
    """Where the text of listed blobs is, and how it is requested."""

    endpoint: str | None = None  # address of an S3 service; null takes AWS
    bucket: str = "softwareheritage"  # S3 bucket of the blobs
    prefix: str = "content/"  # a blob's key is the prefix and its id
    id_column: str = "blob_id"  # column that names each blob
    connections: int = 64  # concurrent requests
    attempts: int = 6  # attempts per request before the run ends
    timeout_s: float = 30.0  # longest wait for a connection or for the next bytes
    part_rows: int = 20_000  # blobs per Parquet file, the most that a killed run loses
    limit_rows: int = 0  # stop after this many blobs; 0 takes all
    min_success: float = 0.95  # minimum share of blobs with text; below it the run ends

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        found = at_least("source.blobs", self, 1, "connections", "attempts", "part_rows")
        found += at_least("source.blobs", self, 0, "limit_rows") + above_zero("source.blobs", self, "timeout_s")
        return found + between("source.blobs", self, 0.0, 1.0, "min_success")


@dataclass(kw_only=True, slots=True)
class HubSource:
    """A dataset on the Hugging Face hub, or on a server with the same protocol (HF_ENDPOINT, or `endpoint`)."""

    kind: str = "hub"  # the kind of source, set by source=
    repo: str = MISSING  # owner/name
    revision: str = "main"  # branch, tag or commit; the commit of a branch is requested once and kept in the cache
    endpoint: str | None = None  # null leaves it to huggingface_hub, which reads HF_ENDPOINT
    mode: HubMode = HubMode.download
    subsets: dict[str, HubPart] = MISSING  # parts of the corpus by name
    connections: int = 4  # concurrent files
    attempts: int = 5  # attempts per file before the run ends
    part_mb: float = 256.0  # MB of uncompressed text per Parquet file (stream), the most that a killed run loses
    blobs: BlobSettings = field(default_factory=BlobSettings)
    on_error: OnError = OnError.fail  # what happens to lines, rows and files that cannot be read as text

    def problems(self) -> list[Problem]:
        """Returns what is wrong with the values."""
        found = at_least("source", self, 1, "connections", "attempts") + above_zero("source", self, "part_mb")
        if len([part for part in self.repo.split("/") if part]) != 2 or self.repo.count("/") != 1:
            found.append(Problem("source.repo", self.repo, "must be owner/name", "try HuggingFaceTB/smollm-corpus"))
        if not self.revision:
            found.append(Problem("source.revision", "", "must not be empty", "try main"))
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            advice = "leave it out for the hub"
            found.append(Problem("source.endpoint", self.endpoint, "must begin with http:// or https://", advice))
        if not self.subsets:
            advice = "try source.subsets='{text:{files:*.parquet}}'"
            found.append(Problem("source.subsets", {}, "must name at least one part", advice))
        for name, subset in self.subsets.items():
            found += subset.problems(name)
        return found + self.blobs.problems()
