"""Who may import what, where import-linter's layers are too coarse: a table of names and the only files that may import them."""

import ast
import functools
import re
from pathlib import Path

import pytest

from support.processes import ROOT

SOURCES = [path for folder in ("ssa_pretrain", "data_prep", "kernels") for path in (ROOT / folder).rglob("*.py")]


@functools.cache
def names(path: Path) -> set[str]:
    """Returns every module that a file imports and every dotted name that it uses, as written."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return found


def users(name: str) -> set[str]:
    """Returns the files, relative to the root, that import a module or a part of it."""
    found = set()
    for path in SOURCES:
        if any(used == name or used.startswith(name + ".") for used in names(path)):
            found.add(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("wandb", ["ssa_pretrain/monitor/tracking_process.py", "ssa_pretrain/report/workspace.py"]),
        ("ssa_pretrain.monitor.tracking_process", []),
        (
            "hydra",
            [
                "ssa_pretrain/settings/command_line.py",
                "ssa_pretrain/settings/compose.py",
                "ssa_pretrain/settings/typed.py",
                "data_prep/own_settings.py",
            ],
        ),
        (
            "transformers",
            [f"ssa_pretrain/huggingface/{name}.py" for name in ("checking", "modelling_nsa", "modelling_ssa")],
        ),
        ("megatron.core.parallel_state", ["ssa_pretrain/parallel/"]),
        ("triton", ["kernels/"]),
        ("pickle", ["ssa_pretrain/checkpoint/unpickling.py"]),
        (
            "torch.load",
            ["ssa_pretrain/checkpoint/unpickling.py", "ssa_pretrain/engine/deepspeed/universal.py", "kernels/bench/"],
        ),
    ],
)
def test_only_allowed_files_import_module(name: str, allowed: list[str]) -> None:
    strangers = {path for path in users(name) if not any(path.startswith(prefix) for prefix in allowed)}
    assert strangers == set()


def test_nothing_asks_for_objects_without_a_list() -> None:
    """SECURITY.md: pickles, arrays, YAML and models from elsewhere are read without running their code."""
    unsafe = re.compile(
        r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|trust_remote_code\s*=\s*True|yaml\.(unsafe_|full_)?load(_all)?\("
    )
    found = {str(path.relative_to(ROOT)) for path in SOURCES if unsafe.search(path.read_text())}
    texts = {
        "card.py",
        "modelling_nsa.py",
        "modelling_ssa.py",
    }  # they tell the reader of an exported folder what to write
    assert found == {f"ssa_pretrain/huggingface/{name}" for name in texts}


def test_kernels_import_only_torch_and_triton() -> None:
    import sys

    known = sys.stdlib_module_names | {"torch", "triton", "ssa_kernels", "transformer_engine"}
    for path in (ROOT / "kernels" / "ssa_kernels").rglob("*.py"):
        modules = {
            (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
            for alias in node.names
        }
        assert modules <= known, f"{path.relative_to(ROOT)} imports {sorted(modules - known)}"


def test_only_set_up_reads_environment_variables() -> None:
    """Launchers and the set-up of a process read the environment; models, data, metrics and kernels do not.

    DeepSpeed itself reads from the environment where it runs and compiles: engine/deepspeed/setup.py prepares its processes.
    """
    for folder in ("ssa_pretrain/model", "ssa_pretrain/data", "ssa_pretrain/engine"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != ROOT / "ssa_pretrain/engine/deepspeed/setup.py":
                assert not {"os.environ", "os.getenv"} & names(path), path.relative_to(ROOT)
