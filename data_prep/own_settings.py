"""A run that names no source means the dataset that lies in `out`: the dataset's recipe takes the place of the defaults.

Settings of the command line come on top of it, so `merge.files=8` joins the same dataset into other files, and `source.paths=[…]` gives the
place to which its text has moved. Paths that are gone are looked for where they lay beside the dataset when it was made. The stages
that only read a dataset (validate, stats) need no recipe.
"""

import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.errors import InputError
from data_prep.recipe import Recipe, holds_dataset, plain_sources, read_recipe
from ssa_pretrain.data.repair import out_argument, quoted_value

NAME = "recipe"  # of our choice in each group of settings
READING = ("validate", "stats")


def own_settings(overrides: list[str], schemas: dict[str, dict[str, Any]], say: Callable[[str], None]) -> list[str]:
    """Returns the overrides that stand for the recipe of the dataset in `out`; none where a source is given or `out` is new.

    Args:
        overrides: the command line.
        schemas: by group and kind, the dataclass of the settings.
        say: takes a line for the user.

    Raises:
        InputError: the dataset has no recipe, a damaged one, or one whose text is gone.
    """
    given = {override.lstrip("+~").partition("=")[0]: override for override in overrides}
    text, stage = _value(given.get("out")), _value(given.get("stage"))
    if not text or "source" in given or stage in READING:
        return []
    out = Path(text).expanduser().absolute()
    recipe = read_recipe(out)
    if recipe is None:
        if holds_dataset(out):
            raise InputError(
                f"out={text} holds a dataset without a recipe.json (an older version made it), so its settings are not known; repeat the "
                "command that made it, with its source= and other settings"
            )
        return []
    settings = recipe.settings
    if not any(key.startswith("source.") for key in given):
        for source in plain_sources(settings["source"]):
            if "paths" in source:
                source["paths"] = [_found(path, recipe, out, "source.paths=[…]") for path in source["paths"]]
    if settings["tokenizer"].get("path") and not any(key.startswith("tokenizer") for key in given):
        settings["tokenizer"]["path"] = _found(settings["tokenizer"]["path"], recipe, out, "tokenizer.path=…")
    kinds = ", ".join(f"{group}={settings[group]['kind']}" for group in ("source", "tokenizer") if group not in given)
    say(f"out={text}: no source is given, so its recipe is used ({kinds})")
    try:
        return _overrides(settings, given, schemas)
    except (KeyError, OmegaConfBaseException) as error:
        raise InputError(
            f"{out / 'recipe.json'} is of another version ({str(error).splitlines()[0]}); repeat the command that made the dataset, with its "
            "source= and other settings"
        ) from None


def kind_of(group: str) -> str:
    """Returns the kind of the settings that the recipe in use has for a group."""
    return ConfigStore.instance().load(f"{group}/{NAME}.yaml").node.kind


def _overrides(settings: dict[str, Any], given: dict[str, str], schemas: dict[str, dict[str, Any]]) -> list[str]:
    store, found = ConfigStore.instance(), []
    for group in ("source", "tokenizer", "mix", "packing"):
        if group in given:
            continue
        node = settings[group]
        if group in schemas:
            node = OmegaConf.merge(OmegaConf.structured(schemas[group][node["kind"]]), node)
        store.store(group=group, name=NAME, node=node)
        found.append(f"{group}={NAME}")
    for section in ("policy", "split", "merge"):
        found += [f"{section}.{key}={_shown(value)}" for key, value in settings[section].items()]
    found.append(f"shard_mb={settings['shard_mb']}")
    if Path(settings["cache"]).is_dir():
        found.append(f"cache={_shown(settings['cache'])}")
    return found


def _shown(value: Any) -> str:
    return quoted_value(value) if isinstance(value, str) else str(value)


def _value(override: str | None) -> str:
    """Returns the text of an override's value, empty where there is none that can be read."""
    if override is None:
        return ""
    try:
        value = OverridesParser.create().parse_override(override).value()
        if not isinstance(value, str):
            return override.partition("=")[2]  # a name that looks like a number
        return str(OmegaConf.create({"value": value}).value)
    except (HydraException, OmegaConfBaseException):
        return ""


def _found(path: str, recipe: Recipe, out: Path, setting: str) -> str:
    """Returns a path of the recipe where it lies now: as recorded, or moved together with the dataset."""
    moved = os.path.normpath(out / os.path.relpath(path, recipe.out))
    for place in (path, moved):
        if os.path.lexists(place) or glob.glob(place, recursive=True):
            return place
    raise InputError(
        f"out={out} was made from {path}, which does not exist any more; restore it, name its new place with {setting} in `python -m "
        f"data_prep {out_argument(out)} verify=full`, or copy the damaged files from another copy of the dataset"
    )
