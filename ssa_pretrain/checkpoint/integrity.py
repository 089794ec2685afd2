"""Checks the files of published checkpoints and caches the verdicts.

`checkpoint.json` lists size and sha256 of every file, and has a checksum of its own text. Those of older versions have none. A name that leads out of the folder is damage, and so is a file that is read as a pickle but is
not listed: nothing may be unpickled whose sha256 has not been compared. Hashing a checkpoint takes as long as reading it, so a verdict is kept as long as the files'
sizes and times do not change; changing a file in place changes its times.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ssa_pretrain.checkpoint.storage import patiently
from ssa_pretrain.settings.files import file_sha256, leads_outside

PICKLES = (".metadata", ".distcp", ".pt")  # ends of the names of files that the engines unpickle
FACTS = "checkpoint.json"
SCHEMA = 1
HASHED_AT_ONCE = 4  # files of a rank
FIELDS = {"schema", "step", "facts", "files"}
Stamp = tuple[str, int, int, int]  # of a file: name, bytes, times of the last change of content and of metadata


class Verdicts:
    """This process's verdicts on checkpoints; files are read again only after they have changed.

    Attributes:
        in_use: checkpoints that must not be removed now, such as one that is being uploaded.
    """

    def __init__(self) -> None:
        self.in_use: set[Path] = set()
        self._found: dict[Path, tuple[list[Stamp], str | None]] = {}

    def damage(self, folder: Path) -> str | None:
        """Returns the result of `find_damage`; the files are read only if there is no verdict or they have changed."""
        if not self.knows(folder):
            stamps = _stamps(folder)
            self._found[folder] = (stamps, find_damage(folder))
        return self._found[folder][1]

    def knows(self, folder: Path) -> bool:
        """Returns whether there is a verdict and it still holds."""
        return folder in self._found and bool(self._found[folder][0]) and self._found[folder][0] == _stamps(folder)

    def known_bytes(self, folder: Path) -> int:
        """Returns the size of a checkpoint's files when its verdict was found; 0 without one."""
        return sum(stamp[1] for stamp in self._found[folder][0]) if folder in self._found else 0

    def note_intact(self, folder: Path) -> None:
        """Records that a checkpoint is intact, because this run has just written and hashed its files."""
        self._found[folder] = (_stamps(folder), None)


def find_damage(folder: Path) -> str | None:
    """Returns the first damage to a published checkpoint's files; None if intact or of another schema.

    Damage is a missing file, another size or sha256, a file outside the folder, and a file with pickles that is not listed.
    """
    try:
        record, is_sound = _read(folder)
        if not is_sound:
            return f"{FACTS} does not match its own checksum"
        if record["schema"] != SCHEMA:
            return None
        files = [(name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in record["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{FACTS} cannot be read"
    with ThreadPoolExecutor(HASHED_AT_ONCE) as threads:
        for damage in threads.map(lambda file: _damage_of_file(folder, *file), files):
            if damage:
                threads.shutdown(wait=False, cancel_futures=True)
                return damage
    listed = {name for name, _, _ in files}
    found = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.name.endswith(PICKLES))
    return next((f"{name} is not listed in {FACTS}" for name in found if name not in listed), None)


def _damage_of_file(folder: Path, name: str, size: int, digest: str) -> str | None:
    path = folder / name
    if leads_outside(folder, name):
        return f"{FACTS} lists {name}, which is outside the folder"

    def compare() -> str | None:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        return f"{name} has another sha256" if file_sha256(path) != digest else None

    try:
        return patiently(compare, f"checking {path}")
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def record_text(content: dict[str, Any]) -> str:
    """Returns the text of `checkpoint.json`: the content and, as the last field, the sha256 of its text without that."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    checksum = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps(content | {"checksum": checksum}, indent=1)


def _read(folder: Path) -> tuple[dict[str, Any], bool]:
    """Returns a checkpoint's `checkpoint.json`, and whether it is as it was written."""
    text = patiently((folder / FACTS).read_text, f"reading {folder / FACTS}")
    record = json.loads(text)
    return record, _is_sound(text, record)


def _is_sound(text: str, record: dict[str, Any]) -> bool:
    """Returns whether a `checkpoint.json` is as it was written, to the bit. Without a checksum, only its fields are checked."""
    if "checksum" in record:
        return text == record_text(record)
    return record["schema"] != SCHEMA or record.keys() <= FIELDS


def is_of_another_schema(folder: Path) -> bool:
    """Returns whether a checkpoint has another version's schema; this version cannot check its files."""
    try:
        record, is_sound = _read(folder)
        return record["schema"] != SCHEMA and is_sound
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _stamps(folder: Path) -> list[Stamp]:
    """Returns every file's name, size and times, sorted by name; empty if the folder cannot be read."""
    try:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        found = [(str(p.relative_to(folder)), p.stat()) for p in files]
    except OSError:
        return []
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in found]
