"""Errors of datasets: one sentence with the problem and the command that repairs it. Standard library only.

A dataset keeps the settings that it was prepared with in recipe.json (data_prep/recipe.py), so the repair command names
only the folder.
"""

import hashlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any


class DatasetError(ValueError):
    """A dataset cannot be used; str() is one sentence.

    Attributes:
        what: the file and its problem.
        remedy: the remedy, with a command if there is one.
    """

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = what, remedy
        super().__init__(what, remedy)

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


def command(root: Path, settings: str) -> str:
    """Returns the shell command that runs data_prep with the recipe of the dataset in a folder."""
    return f"python -m data_prep {out_argument(root.absolute())} {settings}"


def out_argument(root: Path) -> str:
    """Returns `out=FOLDER` quoted for Hydra's grammar and for a shell."""
    path = str(root)
    if re.fullmatch(r"[A-Za-z0-9_/.+@%-]+", path):
        return f"out={path}"
    quoted = f"out={quoted_value(path)}"
    return shlex.quote(quoted) if re.search(r'["$`\\!]', quoted) else f'"{quoted}"'


def quoted_value(text: str) -> str:
    """Returns a text as a quoted value in Hydra's grammar, which escapes only quotes and the backslashes before them."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def repair_advice(root: Path) -> str:
    """Returns how to repair the dataset in a folder. With a recipe it needs no settings."""
    if has_recipe(root):
        return f"repair it with `{command(root, 'verify=full')}`"
    return "copy the file again, or repeat the data_prep command that made the dataset, with verify=full"


def beginning_advice(root: Path) -> str:
    """Returns how to prepare a dataset in a folder that has no manifest."""
    out = out_argument(root.absolute())
    if has_recipe(root):
        return f"run `python -m data_prep {out} verify=full` to finish it"
    return (
        f"run `python -m data_prep source=quickstart {out}` for the sample corpus, or correct the path (docs/data.md)"
    )


def has_recipe(root: Path) -> bool:
    """Returns whether a dataset has an undamaged recipe.json."""
    try:
        content = json.loads((root / "recipe.json").read_bytes())
        return content["checksum"] == content_checksum(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def content_checksum(content: dict[str, Any]) -> str:
    """Returns the sha256 of the content of one of our JSON files, without its field `checksum` and its indentation."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def dangling_link(path: Path, root: Path) -> Path | None:
    """Returns the dangling link on the path from `root` to a file, or None."""
    below = [path, *(place for place in path.parents if root in place.parents)]
    return next((place for place in reversed(below) if os.path.islink(place) and not os.path.exists(place)), None)


def dangling_link_error(link: Path, root: Path) -> DatasetError:
    """Returns the error for a link in a dataset whose target is missing."""
    remedy = "fetch the file that it points to"
    if has_recipe(root):
        remedy += f", or {repair_advice(root)}"
    return DatasetError(f"{link} is a dangling link: {os.readlink(link)} does not exist", remedy)
