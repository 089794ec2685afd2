"""A run without a source means the dataset in `out`: the dataset's recipe replaces the defaults.

Settings of the command line are applied on top of it, so `merge.files=8` joins the same dataset into other files, and `source.paths=[…]` gives
the new place of its text. A path that no longer exists is looked up at the same position relative to the dataset. The stages
that only read a dataset (validate, stats) need no recipe.
"""

import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.config import Config
from data_prep.errors import InputError
from data_prep.recipe import Recipe, holds_dataset, plain_sources, read_recipe
from ssa_pretrain.data.repair import out_argument
from ssa_pretrain.settings.convert import NOT_SET, config_from_dict

READING = ("validate", "stats")
GROUPS = ("source", "tokenizer", "mix", "packing")


def own_settings(overrides: list[str], log: Callable[[str], None]) -> dict[str, Any]:
    """Returns the settings of the dataset in `out`, by section; empty if a source is given or `out` is new.

    Args:
        overrides: the command line.
        log: prints a line for the user.

    Raises:
        InputError: the dataset has no recipe, a damaged one, or one whose text is gone.
    """
    given = {override.lstrip("+~").partition("=")[0]: override for override in overrides}
    text, stage = _value(given.get("out")), _value(given.get("stage"))
    if not text or "source" in given or stage in READING:
        return {}
    out = Path(text).expanduser().absolute()
    recipe = read_recipe(out)
    if recipe is None:
        if holds_dataset(out):
            raise InputError(
                f"out={text} holds a dataset without a recipe.json (an older version made it), so its settings are not known; repeat the "
                "command that made it, with its source= and other settings"
            )
        return {}
    settings = recipe.settings
    if not any(key.startswith("source.") for key in given):
        for source in plain_sources(settings["source"]):
            if "paths" in source:
                source["paths"] = [_found(path, recipe, out, "source.paths=[…]") for path in source["paths"]]
    if settings["tokenizer"].get("path") and not any(key.startswith("tokenizer") for key in given):
        settings["tokenizer"]["path"] = _found(settings["tokenizer"]["path"], recipe, out, "tokenizer.path=…")
    kinds = ", ".join(
        f"{group}={settings[group].get('kind')}" for group in ("source", "tokenizer") if group not in given
    )
    log(f"out={text}: no source is given, so its recipe is used ({kinds})")
    return _known(settings, out, given)


def _known(settings: dict[str, Any], out: Path, given: dict[str, str]) -> dict[str, Any]:
    """The recipe's settings that the command line does not replace; InputError if this version does not know them."""
    _, problems = config_from_dict(Config, settings)
    if unknown := [problem for problem in problems if problem.rule != NOT_SET]:
        raise InputError(
            f"{out / 'recipe.json'} is of another version ({unknown[0]}); repeat the command that made the dataset, with its "
            "source= and other settings"
        )
    sections = {name: settings[name] for name in (*GROUPS, "policy", "split", "merge", "shard_mb")}
    if Path(settings["cache"]).is_dir():
        sections["cache"] = settings["cache"]
    return {name: value for name, value in sections.items() if name not in GROUPS or name not in given}


def _value(override: str | None) -> str:
    """Returns the text of an override's value; empty if there is none that can be read."""
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
    """Returns where a path of the recipe lies now: as recorded, or moved together with the dataset."""
    moved = os.path.normpath(out / os.path.relpath(path, recipe.out))
    for place in (path, moved):
        if os.path.lexists(place) or glob.glob(place, recursive=True):
            return place
    raise InputError(
        f"out={out} was made from {path}, which does not exist any more; restore it, name its new place with {setting} in `python -m "
        f"data_prep {out_argument(out)} verify=full`, or copy the damaged files from another copy of the dataset"
    )
