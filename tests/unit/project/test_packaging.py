"""pyproject.toml, constraints.txt, Makefile and launchers/setup.sh: imports are declared, requirements are pinned, and set-up names what
a machine lacks in one line.
"""

import ast
import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from setuptools import Distribution

from support.processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LINES = (ROOT / "constraints.txt").read_text().splitlines()


def holds(requirement: Requirement) -> bool:
    """Returns whether a requirement is one of this interpreter's."""
    return requirement.marker is None or requirement.marker.evaluate()


PINS = [Requirement(line) for line in LINES if "==" in line and not line.startswith("#")]
PINNED = {pin.name: next(iter(pin.specifier)).version for pin in PINS if holds(pin)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return [found for found in map(Requirement, lines) if holds(found)]


def imported(folder: Path) -> dict[str, Path]:
    """Returns the top-level names that a folder's files import, each with one of those files."""
    found: dict[str, Path] = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            else:
                continue
            found |= {name.split(".")[0]: path for name in names}
    return found


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("ssa_pretrain", ("gpu", "deepspeed", "bench", "evaluation", "hub", "huggingface", "trackers")),
        ("data_prep", ("llama3", "gigatoken", "cluster", "hub")),
        ("kernels", ("gpu", "bench")),
        ("tests", ("gpu", "deepspeed", "llama3", "gigatoken", "cluster", "hub", "evaluation", "trackers", "dev")),
    ],
)
def test_imported_packages_are_declared(folder: str, extras: tuple[str, ...]) -> None:
    declared = {normal(requirement.name) for requirement in requirements(*extras)}
    providers = importlib.metadata.packages_distributions()
    ours = {"ssa_pretrain", "data_prep", "ssa_kernels", "bench", "benchmarks", "support", "faults"} | {
        path.stem for path in (ROOT / folder).rglob("*.py")
    }
    for name, path in imported(ROOT / folder).items():
        if name in sys.stdlib_module_names or name in ours:
            continue
        candidates = {normal(provider) for provider in providers.get(name, [name])}
        assert candidates & declared, f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not declare"


def test_constraints_pin_every_requirement_within_its_range() -> None:
    pins = {normal(name): version for name, version in PINNED.items()}
    extras = (
        "quickstart",
        "llama3",
        "gigatoken",
        "cluster",
        "deepspeed",
        "hub",
        "bench",
        "evaluation",
        "huggingface",
        "trackers",
        "dev",
    )
    for requirement in requirements(*extras):
        assert normal(requirement.name) in pins, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pins[normal(requirement.name)]), (
            f"the pin of {requirement.name} is out of range"
        )


def test_constraints_pin_transitive_requirements() -> None:
    """Every distribution that the pinned ones need on a CPU is pinned too, so that all set-ups are equal."""
    pins = {normal(name) for name in PINNED}
    for name in pins:
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in needed:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert normal(requirement.name) in pins or cuda(requirement.name), (
                    f"{name} needs {requirement.name}, not pinned"
                )


def cuda(name: str) -> bool:
    """Returns whether only CUDA builds of torch install this."""
    return normal(name).startswith(("nvidia-", "cuda-"))


def test_environment_matches_the_constraints() -> None:
    """The tests run on the versions of constraints.txt. Results of another environment would not prove that those work."""
    for name in ("torch", "megatron-core", "numpy", "hydra-core", "omegaconf", "wandb", "tokenizers"):
        assert importlib.metadata.version(name).split("+")[0] == PINNED[name]


def isolated(code: str, safe: str) -> subprocess.CompletedProcess[str]:
    """Runs code from the repository's root as the launchers do (safe="1"), or as a bare `python -c` does (safe="")."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONSAFEPATH": safe},
        capture_output=True,
        text=True,
        timeout=120,
    )


PROBE = """
import importlib.metadata, importlib.util
spec = importlib.util.find_spec("kernels")
print("absent" if spec is None else "package" if spec.origin else "folder")
import ssa_kernels
print(ssa_kernels.__name__)
"""


def test_kernels_folder_is_not_taken_for_a_package() -> None:
    """Transformers looks for a package `kernels` and fails if it finds one without a version."""
    assert isolated(PROBE, "1").stdout.split() == ["absent", "ssa_kernels"]
    assert isolated(PROBE, "").stdout.split() == ["folder", "ssa_kernels"], (
        "without the flag it is a folder, but never a package"
    )
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert importlib.util.find_spec("kernels") is None, "tests/kernels passes for a package in the tests' own process"


def test_report_and_metrics_do_not_import_torch() -> None:
    code = "import sys, ssa_pretrain.report.page, ssa_pretrain.report.table, ssa_pretrain.report.compare, ssa_pretrain.monitor.metrics; print([m for m in ('torch', 'megatron', 'hydra', 'matplotlib') if m in sys.modules])"
    assert isolated(code, "1").stdout.strip() == "[]"


def test_package_finds_its_configuration() -> None:
    from ssa_pretrain.cli import CONF

    assert (CONF / "config.yaml").is_file() and (CONF / "experiment" / "quickstart.yaml").is_file()


def test_wheels_hold_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **settings: given.update(settings))
    monkeypatch.setattr("setuptools.command.build_py.build_py.run", lambda _: None)
    runpy.run_path(str(ROOT / "setup.py"))
    command = given["cmdclass"]["build_py"](Distribution())
    command.build_lib, command.editable_mode = str(tmp_path), False
    command.run()
    found, wanted = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.yaml")}
        for folder in (tmp_path / "ssa_pretrain" / "conf", ROOT / "conf")
    )
    assert found == wanted and len(wanted) > 50


def tools(folder: Path, *names: str) -> Path:
    """Returns a folder that holds only links to the named programs, for use as PATH."""
    folder.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "env", "mkdir", "touch", *names):
        (folder / name).symlink_to(shutil.which(name) or name)
    return folder


def script(path: Path, text: str) -> None:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def set_up(path: Path, tmp_path: Path, **environment: str) -> str:
    """Runs setup.sh with one folder as PATH, expects it to fail, and returns its last line."""
    clean = {"PATH": str(path), "HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    command = [str(ROOT / "launchers" / "setup.sh"), str(tmp_path / "venv"), "dev"]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    lines = done.stderr.strip().splitlines()
    assert sum(line.startswith("set-up: ") for line in lines) == 1 and lines[-1].startswith("set-up: ")
    return lines[-1].removeprefix("set-up: ")


def test_set_up_without_python(tmp_path: Path) -> None:
    assert set_up(tools(tmp_path / "bin"), tmp_path) == (
        "no Python 3.11, 3.12 or 3.13 was found; install one (Debian 12, Ubuntu 24.04: sudo apt install python3 python3-venv) or run "
        "make PYTHON=/path/to/python."
    )


def test_set_up_with_an_old_python(tmp_path: Path) -> None:
    path = tools(tmp_path / "bin")
    script(path / "python3", '[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    assert set_up(path, tmp_path).startswith("no Python 3.11, 3.12 or 3.13 was found")
    assert set_up(path, tmp_path, PYTHON="python3") == (
        "PYTHON=python3 is Python 3.9.2, and 3.11, 3.12 or 3.13 is needed; give the path of one."
    )
    assert (
        set_up(path, tmp_path, PYTHON="/none")
        == "PYTHON=/none does not exist; give the path of a Python 3.11, 3.12 or 3.13."
    )


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_set_up_with_a_python_without_venv(tmp_path: Path, missing: str) -> None:
    """Debian packages venv and ensurepip separately from the interpreter; the test hides one of them."""
    path = tools(tmp_path / "bin", "cc")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / f"{missing}.py").write_text("raise ImportError\n")
    script(path / "python3", f'PYTHONPATH={tmp_path / "hidden"} exec {sys.executable} "$@"\n')
    assert set_up(path, tmp_path) == (
        "python3 has no venv module; install it (Debian, Ubuntu: sudo apt install python3-venv) or run make PYTHON=/path/to/another/python."
    )


def test_set_up_without_a_compiler(tmp_path: Path) -> None:
    path = tools(tmp_path / "bin")
    script(path / "python3", f'exec {sys.executable} "$@"\n')
    expected = "no C compiler was found; install one (Debian, Ubuntu: sudo apt install build-essential)."
    assert set_up(path, tmp_path) == expected


def test_set_up_without_a_network(tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", "cc")
    script(path / "python3", f'exec {Path(sys.executable).resolve()} "$@"\n')
    nobody = "http://127.0.0.1:9/simple"
    sentence = set_up(path, tmp_path, PIP_INDEX_URL=nobody, TORCH_INDEX=nobody)
    assert sentence == (
        "pip could not fetch or build a package (its message is above); check the network, or point pip at a mirror with "
        "PIP_INDEX_URL, and run make again."
    )


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_second_set_up_is_skipped_unless_its_sources_changed(tmp_path: Path) -> None:
    stamp = tmp_path / ".dev"
    stamp.touch()
    assert make("--question", f"VENV={tmp_path}", str(stamp)).returncode == 0
    os.utime(stamp, (0, 0))
    assert make("--question", f"VENV={tmp_path}", str(stamp)).returncode == 1


def test_make_help_names_every_target() -> None:
    text = make("help").stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    for target in phony[1].split():
        assert f"make {target} " in text
