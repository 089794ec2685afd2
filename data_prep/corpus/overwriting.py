"""Refusing to replace the dataset in `out` by another one."""

from pathlib import Path
from typing import Any

from data_prep.config import Config
from data_prep.errors import InputError
from data_prep.plain import without_keys, without_unset
from data_prep.recipe import Recipe, known_dataset, plain_sources, recipe_of
from data_prep.run_config import Packing
from data_prep.sources.catalog import SOURCES
from data_prep.sources.mixed import fetched_and_own

# Settings of a source that change how text is fetched, not which text.
TRANSFER_SETTINGS = ("endpoint", "connections", "attempts", "timeout_s")


def overwrite_error(config: Config, reason: str = "") -> InputError:
    """Returns the refusal to replace the dataset in `out`."""
    return InputError(
        f"out={config.out} holds a dataset made from other text or settings; choose another out=, or add overwrite=true "
        f"to replace it{reason and f' ({reason})'}"
    )


def check_same_source(config: Config, out: Path) -> None:
    """Raises InputError if the settings show that `out` holds another dataset. Runs before anything is written.

    Compared by their settings are the sources that fetch text into the folder, a tokenizer that is trained there, and
    what is part of the dataset's fingerprint. The user's own files are compared by their content, once it is read.
    """
    known = known_dataset(out)
    if known is None or config.overwrite:
        return
    fetched, _ = fetched_and_own(config.source)
    if fetched and known.recipe is None and known.kind and known.kind != config.source.kind:
        raise overwrite_error(config, f"its text came from source={known.kind}, not from source={config.source.kind}")
    if known.recipe is None:
        return
    requested, existing = recipe_of(config, out), known.recipe
    if fetched and _fetched_sources(requested) != _fetched_sources(existing):
        old, new = existing.settings["source"]["kind"], config.source.kind
        raise overwrite_error(
            config, f"its text came from source={old}" + (" with other settings" if old == new else "")
        )
    sections = ["split", "policy", "mix"]
    sections += ["tokenizer"] if config.tokenizer.kind == "bpe" else []  # the path of another tokenizer may change
    sections += ["packing"] if config.packing.kind is Packing.official_row else []
    for section in sections:
        for key, value in requested.settings[section].items():
            if (old := existing.settings[section].get(key, value)) != value:
                raise overwrite_error(config, f"made with {section}.{key}={old}, not with {section}.{key}={value}")


def _fetched_sources(recipe: Recipe) -> list[Any]:
    """Returns the settings of the sources that fetch text, without those that only change the transfer."""
    sources = [source for source in plain_sources(recipe.settings["source"]) if SOURCES[source["kind"]].fetched]
    return [without_unset(without_keys(source, TRANSFER_SETTINGS), "max_repeated") for source in sources]
