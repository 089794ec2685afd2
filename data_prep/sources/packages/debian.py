"""Debian packages as data: downloaded with apt, unpacked into a cache, never installed. No root is needed.

If the system has no package lists (a fresh container) or they lack a package, lists are fetched into the cache, and apt
keeps all its state there. apt checks signatures as always.

All missing packages are requested together, because apt reads its lists in every call, a second each, and downloads
over one connection. Unpacking is decompression, so packages are unpacked in parallel.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import InputError
from ssa_pretrain.settings.files import temporary_path

PROGRAMS = ("apt-get", "apt-cache", "dpkg-deb")


@dataclass(frozen=True, slots=True)
class Package:
    """An unpacked package: its full name ("perl-doc 5.36.0-7") and the folder of its files."""

    full_name: str
    folder: Path


def unpacked_packages(names: list[str], cache: Path) -> dict[str, Package]:
    """Returns the unpacked packages, in the order of `names`, fetching those that the cache lacks.

    A metapackage such as postgresql-doc, which is empty and depends on the package of the current version, is resolved.

    Args:
        names: packages of Debian or Ubuntu.
        cache: folder of downloads.

    Raises:
        InputError: apt is missing, the package is unknown, or there is no connection.
    """
    folder = cache / "debian"
    known = {name: package for name in names if (package := _cached(name, folder))}
    if missing := [name for name in dict.fromkeys(names) if name not in known]:
        _check_programs()
        folder.mkdir(parents=True, exist_ok=True)
        apt = _with_lists(missing, cache)
        archives = _download(_resolved(missing, apt), folder, apt)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            packages = pool.map(lambda name: _unpack(name, archives[name], folder), archives)
            known |= dict(zip(archives, packages, strict=True))
    return {name: known[name] for name in names}


def _cached(name: str, folder: Path) -> Package | None:
    found = sorted(folder.glob(f"{name}=*.d"))
    return Package(found[-1].name.replace("=", " ").removesuffix(".d"), found[-1]) if found else None


def _check_programs() -> None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise InputError(
            f"the source needs {missing[0]}, which this system lacks (Debian and Ubuntu have it); use source=quickstart"
        )


def _with_lists(names: list[str], cache: Path) -> list[str]:
    """Returns the apt options with which all packages are known; fetches lists into the cache if the system's lack one."""
    own: list[str] = []
    for key, place in (("Dir::State::lists", "lists"), ("Dir::Cache", "cache")):
        path = (cache / "apt" / place).absolute()
        (path / ("partial" if place == "lists" else "archives/partial")).mkdir(parents=True, exist_ok=True)
        own += ["-o", f"{key}={path}"]
    own += [
        "-o",
        "APT::Sandbox::User=root",
    ]  # otherwise apt, run by root, switches to a user that cannot enter the cache
    for options in ([], own):
        if not _unknown(names, options):
            return options
    _run(["apt-get", *own, "-qq", "update"], "apt-get could not fetch package lists; check the network connection")
    if unknown := _unknown(names, own):
        raise InputError(
            f"package {unknown[0]} is unknown to apt here; leave it out of source.packages, or use source=quickstart"
        )
    return own


def _unknown(names: list[str], options: list[str]) -> list[str]:
    found = subprocess.run(["apt-cache", *options, "show", *names], capture_output=True, text=True, check=False)
    known = set(re.findall(r"^Package: (\S+)$", found.stdout, re.MULTILINE))
    return [name for name in names if name not in known]


def _resolved(names: list[str], options: list[str]) -> dict[str, str]:
    """Returns the real package of each name: the dependency with the same name and a version, else the package itself."""
    listing = _run(["apt-cache", *options, "depends", *names], "apt-cache depends failed; run apt-get update")
    blocks = {block.split("\n", 1)[0].strip(): block for block in re.split(r"^(?=\S)", listing, flags=re.MULTILINE)}
    real = {}
    for name in names:
        pattern = re.escape(name)
        pattern = pattern.replace("python3", r"python3\.\d+") if "python3" in name else pattern + r"-[\d.]+"
        found = re.search(rf"Depends: ({pattern})$", blocks.get(name, ""), re.MULTILINE)
        real[name] = found[1] if found else name
    return real


def _download(real: dict[str, str], folder: Path, options: list[str]) -> dict[str, Path]:
    """Returns the archive of each package, by the requested name."""
    place = folder / f"{os.getpid()}.download"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    command = ["apt-get", *options, "-q", "-o", "APT::Sandbox::User=root", "download", *dict.fromkeys(real.values())]
    names = ", ".join(real.values())
    try:
        _run(command, f"packages {names} could not be downloaded; check the network connection", place)
        archives = {}
        for name, package in real.items():
            archives[name] = folder / next(place.glob(f"{package}_*.deb")).name
        for archive in set(archives.values()):
            (place / archive.name).replace(archive)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return archives


def _unpack(name: str, archive: Path, folder: Path) -> Package:
    version = archive.name.split("_")[1].replace("%3a", ":")
    final = folder / f"{name}={version}.d"
    unfinished = temporary_path(folder / f"{name}={version}")
    _run(["dpkg-deb", "-x", str(archive), str(unfinished)], f"{archive} cannot be unpacked; delete it and run again")
    unfinished.rename(final)
    archive.unlink()
    return Package(f"{name} {version}", final)


def _run(command: list[str], failure: str, folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        raise InputError(f"{failure} ({reason[-1] if reason else f'exit code {done.returncode}'})")
    return done.stdout
