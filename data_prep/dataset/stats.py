"""The stage `stats`: statistics of a finished dataset as stats.json and as a page, and the cost of preparing a full-size dataset.

The statistics come from the indices, the manifest and the measured rates of the runs that made the shards. No token is
read. Lengths are counted in bins of a quarter octave, so memory does not grow with the number of documents. Statistics
of the same manifest and settings are not computed twice.

Cost: the rate of one core is measured as text bytes over processor seconds of the workers. Nodes are assumed to scale until their disks
are saturated, which is the limit with the fastest backend.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset.merging import lengths_of
from data_prep.dataset.stats_page import BINS_PER_OCTAVE, page
from data_prep.errors import InputError
from data_prep.files import dataset_lock, read_json, write_json
from data_prep.progress import Log
from data_prep.readers import format_skipped
from data_prep.run_config import StatsConfig
from data_prep.shards.binaries import with_suffix
from ssa_pretrain.data.indexed_format import token_dtype
from ssa_pretrain.data.manifest import SPLITS, Manifest, load_manifest
from ssa_pretrain.settings.files import file_sha256, write_atomically

NODES = (1, 8, 64)
SCHEMA = 2


@dataclass(frozen=True, slots=True)
class Lengths:
    """Document lengths of one part and split, in tokens."""

    documents: int
    tokens: int
    longest: int
    histogram: list[int]  # documents with a length from 2^(i / 4) to below 2^((i + 1) / 4)
    as_long_as_a_row: int  # documents at least as long as a row
    tokens_in_those: int

    @property
    def mean(self) -> float:
        """Mean tokens per document."""
        return self.tokens / max(1, self.documents)


def write_stats(out: Path, config: StatsConfig, log: Log) -> str:
    """Writes stats.json and stats.html and returns the statistics as a table.

    Raises:
        InputError: there is no finished dataset in `out`.
    """
    try:
        manifest = load_manifest(out)
    except ValueError as error:
        raise InputError(str(error)) from None
    with dataset_lock(out):
        key = {"schema": SCHEMA, "manifest": file_sha256(out / "manifest.json"), **asdict(config)}
        known = read_json(out / "stats.json")
        if isinstance(known, dict) and known.get("key") == key and (out / "stats.html").is_file():
            log(f"{out / 'stats.json'} is up to date")
            return table(known, out)
        stats = {"key": key, **collect(manifest, config, read_rates(out))}
        write_atomically(out / "stats.html", page(stats).encode())
        write_json(out / "stats.json", stats)
    return table(stats, out)


def collect(manifest: Manifest, config: StatsConfig, rates: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns all statistics of a dataset as plain data."""
    parts = {split: _parts(manifest, split, config.sequence_length) for split in SPLITS}
    details, tokens = manifest.details, manifest.tokens("train")
    shares = manifest.weights or {part: own.tokens / max(1, tokens) for part, own in parts["train"].items()}
    return {
        "dataset": manifest.root.name,
        "tokenizer": manifest.tokenizer.name,
        "policy": manifest.policy,
        "text_bytes": details["text_bytes"],
        "bytes_per_token": manifest.bytes_per_token,
        "source_documents": details["source_documents"],
        "empty_documents": details["empty_documents"],
        "skipped": details.get("skipped", {}),
        "shards": details["shards"],
        "files": {split: len(manifest.splits[split]) for split in SPLITS},
        "bytes_on_disk": sum(s.bin_bytes + s.idx_bytes for files in manifest.splits.values() for s in files),
        "splits": {s: {n: asdict(own) | {"mean": own.mean} for n, own in parts[s].items()} for s in SPLITS},
        "bytes_per_token_histograms": details["bytes_per_token_histograms"],
        "sources": list(manifest.sources),
        "fill": fill(manifest, parts["train"], config.sequence_length),
        "budget": {
            "tokens": config.budget_tokens,
            "epochs": {name: shares[name] * config.budget_tokens / own.tokens for name, own in parts["train"].items()},
        },
        "plan": cost(manifest, config, rates),
    }


def fill(manifest: Manifest, parts: dict[str, Lengths], row: int) -> dict[str, float]:
    """Returns the share of real tokens in training rows, for either packing.

    megatron: documents flow over rows, and the rest at the end of a part is not used. official_row: each row is one padded sequence. A
    longer document gives several sequences, each with its own EOS.
    """
    tokens = sum(own.tokens for own in parts.values())
    used = sum((own.tokens - 1) // row * row for own in parts.values())
    if limit := manifest.policy.get("row_tokens"):
        rows = sum(own.documents for own in parts.values())
        return {"official_row": tokens / max(1, rows * limit)}
    rows = real = 0
    for shard in manifest.splits["train"]:
        for lengths in lengths_of(with_suffix(manifest.prefix_path(shard), ".idx"), shard.documents):
            pieces = np.maximum(1, -(-(lengths.astype(np.int64) - 1) // (row - 1)))
            rows += int(pieces.sum())
            real += int(lengths.sum(dtype=np.int64) + pieces.sum() - len(lengths))
    return {"megatron": used / max(1, tokens), "official_row": real / max(1, rows * row)}


def cost(manifest: Manifest, config: StatsConfig, rates: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the cost of preparing `budget_tokens` of such text: bytes, files, and time at the measured rates."""
    per_token = manifest.bytes_per_token
    itemsize = token_dtype(manifest.tokenizer.vocab_size).itemsize
    sequences = sum(s.documents for files in manifest.splits.values() for s in files)
    tokens = sum(s.tokens for files in manifest.splits.values() for s in files)
    documents = round(config.budget_tokens * sequences / max(1, tokens))
    text = config.budget_tokens * per_token
    plan: dict[str, Any] = {
        "text_bytes": round(text),
        "bin_bytes": round(config.budget_tokens * itemsize),
        "idx_bytes": 20 * documents,
        "documents": documents,
        "shards": math.ceil(text / 512e6),
        "files_a_part_and_split": manifest.details["merge_files"],
        "core_mb_per_s": None,
        "core_hours": None,
        "hours": {},
    }
    local = [rate for rate in rates if rate["cpu_seconds"]]
    if local:
        last = max(local, key=lambda rate: rate["text_bytes"])
        core = last["text_bytes"] / last["cpu_seconds"]
        node = min(core * config.cores_per_node, config.disk_mb_per_s * 1e6)
        plan |= {
            "backend": last["backend"],
            "core_mb_per_s": round(core / 1e6, 2),
            "core_hours": round(text / core / 3600, 2),
            "hours": {str(nodes): round(text / (nodes * node) / 3600, 3) for nodes in NODES},
            "bound_by": "cores" if core * config.cores_per_node <= config.disk_mb_per_s * 1e6 else "disk",
            "cores_per_node": config.cores_per_node,
        }
    return plan


def read_rates(out: Path) -> list[dict[str, Any]]:
    """Returns the measured rates of the runs that made the shards; skips an incomplete last line."""
    try:
        lines = (out / "work" / "rates.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    rates = []
    for line in lines:
        try:
            rates.append(json.loads(line))
        except ValueError:
            continue
    return rates


def table(stats: dict[str, Any], out: Path) -> str:
    """Returns the statistics of the dataset in `out` as text; the last line is the path of the page."""
    rows = [("split", "part", "documents", "tokens", "mean", "longest", "epochs")]
    for split, parts in stats["splits"].items():
        for name, own in parts.items():
            epochs = f"{stats['budget']['epochs'].get(name, 0):.2f}" if split == "train" else ""
            counts = (
                f"{own['documents']:,}",
                f"{own['tokens']:,}",
                f"{own['mean']:.0f}",
                f"{own['longest']:,}",
                epochs,
            )
            rows.append((split, name, *counts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines.append(f"{stats['bytes_per_token']:.3f} bytes per token, {stats['empty_documents']} empty documents left out")
    if stats["skipped"]:
        lines.append(f"left out by on_error=skip: {format_skipped(stats['skipped'])}")
    length = stats["key"]["sequence_length"]
    lines += [f"fill of rows of {length} as {name}: {100 * share:.1f} %" for name, share in stats["fill"].items()]
    plan, budget = stats["plan"], stats["budget"]["tokens"]
    lines.append(
        f"{budget / 1e9:g} B tokens of such text: {plan['text_bytes'] / 1e9:,.0f} GB of text, {plan['bin_bytes'] / 1e9:,.0f} GB "
        f"of tokens, {plan['idx_bytes'] / 1e9:.1f} GB of indices, {plan['shards']:,} shards"
    )
    if plan["core_hours"]:
        hours = ", ".join(f"{h:.2f} h on {n}" for n, h in plan["hours"].items())
        lines.append(
            f"at {plan['core_mb_per_s']} MB/s per core ({plan['backend']}): {plan['core_hours']} core-hours; {hours} nodes of "
            f"{plan['cores_per_node']} cores, limited by {plan['bound_by']}"
        )
    lines.append(f"statistics: {out / 'stats.html'}")
    return "\n".join(lines) + "\n"


def _parts(manifest: Manifest, split: str, row: int) -> dict[str, Lengths]:
    parts = {}
    for name in dict.fromkeys(shard.part for shard in manifest.splits[split]):
        histogram = np.zeros(32 * BINS_PER_OCTAVE, dtype=np.int64)
        documents = tokens = longest = long_documents = long_tokens = 0
        for shard in (shard for shard in manifest.splits[split] if shard.part == name):
            for lengths in lengths_of(with_suffix(manifest.prefix_path(shard), ".idx"), shard.documents):
                bins = np.floor(np.log2(np.maximum(lengths, 1)) * BINS_PER_OCTAVE).astype(np.int64)
                histogram += np.bincount(bins, minlength=len(histogram))
                documents += len(lengths)
                tokens += int(lengths.sum(dtype=np.int64))
                longest = max(longest, int(lengths.max()))
                long_documents += int((lengths >= row).sum())
                long_tokens += int(lengths[lengths >= row].sum(dtype=np.int64))
        parts[name] = Lengths(documents, tokens, longest, histogram.tolist(), long_documents, long_tokens)
    return parts
