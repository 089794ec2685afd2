"""Dockerfile and .dockerignore: two targets that do not run as root, contain only named files and hold no secret."""

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from support.processes import ROOT


def instructions() -> list[tuple[str, str]]:
    """Returns (instruction, arguments) of the Dockerfile in order, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.partition(" ") for line in re.sub(r"\\\n\s*", "", text).splitlines())
        if word
    ]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Returns the instructions of each stage by its name."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            base, name = rest.split(" AS ")
            assert re.fullmatch(r"\$\{\w+_BASE\}", base), "the base is an argument"
            found[name] = []
        elif name:
            found[name].append((word, rest))
    return found


def ignored() -> list[str]:
    """Returns the lines of .dockerignore."""
    text = (ROOT / ".dockerignore").read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def taken() -> set[str]:
    """Returns the files and folders of the repository that a build sees."""
    return {line[1:] for line in ignored() if line.startswith("!")}


def test_every_base_is_an_argument_with_a_tag_and_a_digest() -> None:
    defaults = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "_BASE" in rest)
    assert re.fullmatch(r"python:3\.12-slim@sha256:[0-9a-f]{64}", defaults["CPU_BASE"])
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3@sha256:[0-9a-f]{64}", defaults["GPU_BASE"])


def test_hadolint_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    bad = subprocess.run([linter, "-"], input="FROM python\nRUN cd /tmp\n", capture_output=True, text=True)
    assert bad.returncode == 1 and "DL3006" in bad.stdout  # it does look


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_target_has_a_non_root_user_and_an_existing_entry_point(target: str) -> None:
    stage = stages()[target]
    words = [word for word, _ in stage]
    user = next(rest for word, rest in reversed(stage) if word == "USER")
    assert int(user) > 0 and words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")
    entry = next(rest for word, rest in stage if word == "ENTRYPOINT")
    program = re.match(r'\["/opt/ssa_pretrain/([^"]+)"', entry)
    assert program and (ROOT / program[1]).stat().st_mode & 0o111
    assert any("PYTHONSAFEPATH=1" in rest for word, rest in stage if word == "ENV")


def test_gpu_image_has_both_engines() -> None:
    """DeepSpeed has the tested version. Nothing else comes from constraints.txt, whose torch is a CPU build."""
    (install,) = [rest for word, rest in stages()["gpu"] if word == "RUN" and "constraints.txt" in rest]
    pattern = re.search(r"""--no-build-isolation "\$\(grep '(\S+)' constraints\.txt\)\"""", install)
    assert pattern, install
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if re.search(pattern[1], line)]
    assert len(pins) == 1 and re.fullmatch(r"deepspeed==[\d.]+", pins[0])


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_code_is_copied_after_every_dependency_is_installed(target: str) -> None:
    """What is copied exists and goes into the image, every installation has its files, and no layer of dependencies depends on the code."""
    copied: list[str] = []
    installs: list[bool] = []  # of dependencies, or of the project
    for word, rest in stages()[target]:
        if word == "COPY":
            *sources, _ = rest.split()
            copied += sources
            assert all((ROOT / source).exists() for source in sources)
            assert all(source.split("/")[0] in {*taken(), "."} for source in sources)
        elif word == "RUN" and "pip install" in rest:
            needed = set(re.findall(r"[\w/]+\.(?:txt|py)", rest)) - {"tmp/requirements.txt", "/tmp/requirements.txt"}
            assert "." in copied or needed <= set(copied), rest
            installs.append("--editable ." in rest)
            assert installs[-1] == ("." in copied) and installs[-1] == ("--no-deps" in rest)
            assert "--no-cache-dir" in rest
    assert installs[-1] and installs.count(True) == 1 and len(installs) == 3
    assert "pyproject.toml" not in copied[: copied.index("constraints.txt") + 1]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_image_has_labels_and_a_revision_that_rebuilds_nothing(target: str) -> None:
    stage = stages()[target]
    words = [word for word, _ in stage]
    (labels,) = [rest for word, rest in stage if word == "LABEL"]
    names = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', labels))
    assert set(names) == {"title", "description", "licenses", "revision"}
    assert names["licenses"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert "RUN" not in words[stage.index(("ARG", "REVISION=unknown")) :]


def test_requirements_are_the_projects_and_those_of_the_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    command = [sys.executable, "launchers/requirements.py"]
    done = subprocess.run([*command, "quickstart,bench"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        *project["dependencies"],
        *project["optional-dependencies"]["quickstart"],
        *project["optional-dependencies"]["bench"],
    ]
    done = subprocess.run([*command, "nope"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("requirements.py: nope is not an extra of pyproject.toml; ")


def test_set_up_installs_in_the_steps_of_the_cpu_image() -> None:
    """So every fresh environment runs them: torch, then what the project depends on, then the project."""
    steps = ["torch", "--requirement", "--no-deps --editable"]
    image = " ".join(rest for word, rest in stages()["cpu"] if word == "RUN" and "pip install" in rest)
    lines = (ROOT / "launchers" / "setup.sh").read_text().splitlines()
    script = " ".join(line for line in lines if line.strip().startswith("install "))
    for text in (image, script):
        places = [text.rindex(step) for step in steps]
        assert places == sorted(places), text
    assert "constraints.txt" in image and 'requirements.py" "$extras"' in "\n".join(lines)


def test_build_neither_stores_nor_asks_for_secrets() -> None:
    secret = re.compile(r"key|token|secret|passw", re.IGNORECASE)
    assert [
        rest for word, rest in instructions() if word in ("ARG", "ENV", "COPY", "ADD") and secret.search(rest)
    ] == []


def test_image_has_only_named_files_and_all_that_the_build_needs() -> None:
    lines = ignored()
    assert lines[0] == "*", "the first line leaves everything out"
    assert taken() <= {path.name for path in ROOT.iterdir()}
    assert {
        "ssa_pretrain",
        "data_prep",
        "kernels",
        "conf",
        "launchers",
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
    } == taken()
    last = lines[-1]
    assert fnmatch.fnmatch("conf/.env.local", last), "a file of keys stays out, even inside a folder that goes in"
