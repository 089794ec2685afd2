"""Debian packages as data: downloaded with apt, unpacked into a cache, never installed. No root is needed.

Where the system has no package lists (a fresh container), or lacks a package, lists are fetched into the cache, with apt told to
keep all its state there. Signatures are checked by apt as always.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from data_prep.errors import InputError


def unpacked_package(name: str, cache: Path) -> tuple[str, Path]:
    """Returns the full name ("perl-doc 5.36.0-7") and the folder of a package's files, fetching it unless it is there.

    A metapackage such as postgresql-doc, which is empty and depends on the one for the current version, is followed.

    Args:
        name: a package of Debian or Ubuntu.
        cache: folder of downloads.

    Raises:
        InputError: no apt here, no such package, or no connection.
    """
    folder = cache / "debian"
    known = sorted(folder.glob(f"{name}=*"))
    if known:
        return known[-1].name.replace("=", " ").removesuffix(".d"), known[-1]
    missing = [program for program in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(program) is None]
    if missing:
        raise InputError(
            f"source=local_docs needs {missing[0]}, which Debian and Ubuntu have and this system lacks; use source=quickstart"
        )
    folder.mkdir(parents=True, exist_ok=True)
    apt = _with_lists(name, cache)
    real = _followed(name, apt)
    archive = _download(real, folder, apt)
    version = archive.name.split("_")[1].replace("%3a", ":")
    final = folder / f"{name}={version}.d"
    unfinished = folder / f"{name}={version}.{os.getpid()}.tmp"
    _run(["dpkg-deb", "-x", str(archive), str(unfinished)], f"{archive} cannot be unpacked; delete it and run again")
    unfinished.rename(final)
    archive.unlink()
    return f"{name} {version}", final


def _with_lists(name: str, cache: Path) -> list[str]:
    """Returns the apt options under which the package is known; fetches lists into the cache if the system's lack it."""
    own: list[str] = []
    for key, place in (("Dir::State::lists", "lists"), ("Dir::Cache", "cache")):
        path = (cache / "apt" / place).absolute()
        (path / ("partial" if place == "lists" else "archives/partial")).mkdir(parents=True, exist_ok=True)
        own += ["-o", f"{key}={path}"]
    own += ["-o", "APT::Sandbox::User=root"]  # else, run by root, apt drops to a user that cannot enter the cache
    for options in ([], own):
        if _knows(name, options):
            return options
    _run(["apt-get", *own, "-qq", "update"], "apt-get could not fetch package lists; check the network connection")
    if not _knows(name, own):
        raise InputError(
            f"package {name} is unknown to apt here; leave it out of source.packages, or use source=quickstart"
        )
    return own


def _knows(name: str, options: list[str]) -> bool:
    found = subprocess.run(["apt-cache", *options, "show", name], capture_output=True, text=True, check=False)
    return found.returncode == 0 and f"Package: {name}\n" in found.stdout


def _followed(name: str, options: list[str]) -> str:
    """Returns the package that a metapackage stands for: the dependency of its name with a version in it, else itself."""
    listing = _run(["apt-cache", *options, "depends", name], f"apt-cache depends {name} failed; run apt-get update")
    pattern = re.escape(name).replace("python3", r"python3\.\d+") if "python3" in name else re.escape(name) + r"-[\d.]+"
    found = re.search(rf"Depends: ({pattern})$", listing, re.MULTILINE)
    return found[1] if found else name


def _download(name: str, folder: Path, options: list[str]) -> Path:
    place = folder / f"{name}.{os.getpid()}.download"
    place.mkdir(exist_ok=True)
    command = ["apt-get", *options, "-q", "-o", "APT::Sandbox::User=root", "download", name]
    _run(command, f"package {name} could not be downloaded; check the network connection", place)
    archive = next(place.glob("*.deb"))
    final = folder / archive.name
    archive.rename(final)
    place.rmdir()
    return final


def _run(command: list[str], failure: str, folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        raise InputError(f"{failure} ({reason[-1] if reason else f'exit code {done.returncode}'})")
    return done.stdout
