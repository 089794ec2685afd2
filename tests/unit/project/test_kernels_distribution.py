"""ssa_kernels as a distribution of its own: its wheel is built, installed into an empty folder and used without ssa_pretrain."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from support.processes import ROOT

KERNELS = tomllib.loads((ROOT / "kernels/pyproject.toml").read_text())["project"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USE = """
import sys
sys.modules["ssa_pretrain"] = None  # importing it fails
import torch, ssa_kernels
assert ssa_kernels.__file__.startswith(sys.argv[1]), ssa_kernels.__file__
q, k = torch.randn(40, 4, 16), torch.randn(40, 2, 16)
cu_seqlens = torch.tensor([0, 15, 40])
chosen = ssa_kernels.select_blocks(q, k, block_size=4, top_k=3, cu_seqlens=cu_seqlens)
o, _ = ssa_kernels.sparse_attention(q, k, k, chosen, block_size=4, cu_seqlens=cu_seqlens)
cache = ssa_kernels.build_cache((1, 25, 2, 16), block_size=4, dtype=torch.float32)
cache.seq_lens.add_(25)
ssa_kernels.append_to_cache(cache, k[None, 15:], k[None, 15:])
last, _ = ssa_kernels.decode_attention(q[None, -1:], cache, top_k=3)
torch.testing.assert_close(last[0, 0], o[-1])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Returns the wheel, built from a copy, because setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("kernels")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT / "kernels", folder / "source", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", folder, folder / "source"], check=True, cwd=folder)
    [found] = folder.glob("*.whl")
    return found


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"ssa_kernels-{KERNELS['version']}-py3-none-any.whl"
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels/ssa_kernels").rglob("*.py")}
    assert held == sources
    licence = f"ssa_kernels-{KERNELS['version']}.dist-info/licenses/LICENSE"
    assert zipfile.ZipFile(wheel).read(licence) == (ROOT / "LICENSE").read_bytes()


def test_wheel_works_without_ssa_pretrain(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel]
    subprocess.run(install, check=True, cwd=tmp_path)
    environment = os.environ | {"PYTHONPATH": str(target), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", USE, target], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_both_distributions_agree() -> None:
    for key in ("version", "license", "requires-python"):
        assert KERNELS[key] == PROJECT[key], key
    torch, triton = KERNELS["dependencies"]
    assert torch in PROJECT["dependencies"]
    assert triton.split(";")[0] in PROJECT["optional-dependencies"]["gpu"]
