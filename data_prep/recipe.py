"""The recipe of a dataset: the settings that made it, kept in out/recipe.json, so that a repair does not need them again.

It holds what determines the dataset (source, tokenizer, policy, split, packing, mix, merge, shard_mb) and the folder of
downloads. It does not hold how a run is executed (executor, workers, backend). Paths are absolute. Users and passwords
in URLs are left out. data_prep/own_settings.py turns a recipe into the settings of a run.

A recipe belongs to the dataset with its fingerprint. A recipe without a fingerprint is that of a run with unfinished
shards. It does not protect the folder from being overwritten.
"""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data_prep.config import Config
from data_prep.errors import InputError
from data_prep.files import digest, read_json, write_json
from data_prep.plain import to_plain
from ssa_pretrain.data.manifest import read_manifest
from ssa_pretrain.data.repair import DatasetError, content_checksum

SCHEMA = 1
SECTIONS = ("source", "tokenizer", "policy", "split", "packing", "mix", "merge")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The content of recipe.json."""

    settings: dict[str, Any]  # plain data by section, and `cache` and `shard_mb`
    out: str  # the dataset's folder when it was made
    inputs: str = ""  # sha256 of the text; empty until it is known
    fingerprint: str = ""  # of the dataset; empty until all its shards are finished


@dataclass(frozen=True, slots=True)
class KnownDataset:
    """What is known of the finished dataset in a folder. Its files may be damaged."""

    fingerprint: str
    inputs: str  # sha256 of its text; empty if unknown
    kind: str  # of its source; empty if unknown
    recipe: Recipe | None  # None if recipe.json is missing, damaged or another dataset's


def recipe_of(config: Config, out: Path, inputs: str = "", fingerprint: str = "") -> Recipe:
    """Returns the recipe of a run."""
    settings = {section: to_plain(getattr(config, section)) for section in SECTIONS}
    for source in plain_sources(settings["source"]):
        if "paths" in source:
            source["paths"] = [_absolute(path) for path in source["paths"]]
    if settings["tokenizer"].get("path"):
        settings["tokenizer"]["path"] = _absolute(settings["tokenizer"]["path"])
    settings |= {"shard_mb": config.shard_mb, "cache": _absolute(config.cache)}
    return Recipe(settings, str(out), inputs, fingerprint)


def write_recipe(out: Path, recipe: Recipe) -> None:
    """Writes out/recipe.json, unless it has exactly this content."""
    content = {"schema": SCHEMA, **asdict(recipe)}
    try:
        if read_recipe(out) == recipe:
            return
    except InputError:
        pass
    write_json(out / "recipe.json", content | {"checksum": content_checksum(content)})


def read_recipe(out: Path) -> Recipe | None:
    """Returns the recipe of a dataset, or None if there is none; InputError if it is damaged."""
    path = out / "recipe.json"
    try:
        content = json.loads(path.read_bytes())
        if content["checksum"] != content_checksum(content):
            raise ValueError("it does not match its own checksum")
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema={content['schema']} is not {SCHEMA}, the one that this version reads")
        return Recipe(**{field.name: content[field.name] for field in fields(Recipe)})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged ({error}); repeat the command that made the dataset, with its source= and other settings, "
            "which writes it again"
        ) from None


def known_dataset(out: Path) -> KnownDataset | None:
    """Returns what is known of the finished dataset in a folder, or None if there is none.

    The source is the manifest, or the recipe if the manifest is missing or damaged.
    """
    try:
        recipe = read_recipe(out)
    except InputError:
        recipe = None
    try:
        manifest = read_manifest(out)
        fingerprint, sources, inputs = manifest.fingerprint, manifest.sources, manifest.details.get("inputs")
    except DatasetError:
        if recipe and recipe.fingerprint:
            return KnownDataset(recipe.fingerprint, recipe.inputs, recipe.settings["source"]["kind"], recipe)
        damaged = read_json(out / "manifest.json")
        if not isinstance(damaged, dict) or not damaged.get("fingerprint"):
            return None
        fingerprint, sources, inputs = damaged["fingerprint"], (), None
    kind = sources[0].get("kind", "") if sources else ""
    own = recipe if recipe and recipe.fingerprint == fingerprint else None
    return KnownDataset(fingerprint, digest(list(inputs.values())) if inputs else "", kind, own)


def holds_dataset(out: Path) -> bool:
    """Returns whether a folder holds files of a dataset, finished or not."""
    patterns = ("manifest.json", "work/shards/*.json", "train/*.bin", "heldout/*.bin")
    return any(any(out.glob(pattern)) for pattern in patterns)


def plain_sources(source: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the plain settings of each source: those inside a mixed one, else the one itself."""
    return list(source["parts"].values()) if source["kind"] == "mixed" else [source]


def _absolute(path: str) -> str:
    return os.path.normpath(Path(path).expanduser().absolute())
