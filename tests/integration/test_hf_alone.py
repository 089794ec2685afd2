"""A folder generates in an environment that has torch, transformers and what those two need, and nothing else."""

import json
import os
import subprocess
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from support.hf_models import draw_documents, lively_model

SCRIPT = """
import json, sys
from importlib.util import find_spec
import torch
from transformers import AutoModelForCausalLM

found = [name for name in ("ssa_pretrain", "ssa_kernels", "data_prep", "megatron", "hydra", "triton", "pytest") if find_spec(name)]
tokens = torch.tensor([json.loads(sys.argv[2])])
texts = []
for mode in ("full", "sparse"):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attention_mode=mode, trust_remote_code=True)
    texts.append(model.generate(tokens, max_new_tokens=40, do_sample=False)[0].tolist())
print(json.dumps({"found": found, "module": type(model).__module__, "texts": texts}))
"""


def needed(*names: str) -> set[str]:
    """Returns the distributions that some need, themselves included."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name.lower() in found:
            continue
        found.add(name.lower())
        requirements = map(Requirement, distribution(name).requires or [])
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def environment(folder: Path) -> Path:
    """Returns the interpreter of a new environment with links to the files of torch, transformers and their needs."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    for name in needed("torch", "transformers"):
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or []} - {"..", "bin", "__pycache__"}:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(installed.locate_file(top))))
    return python


def test_folder_generates_with_torch_and_transformers_only(tmp_path):
    model = lively_model(attention_mode="full")
    model.save_pretrained(tmp_path / "model")
    tokens = draw_documents([70])[0]
    python = environment(tmp_path / "environment")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python), "-I", "-c", SCRIPT, str(tmp_path / "model"), json.dumps(tokens.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["found"] in ([], ["triton"]), "a CUDA build of torch needs triton"
    assert result["module"].startswith("transformers_modules.")
    for mode, text in zip(("full", "sparse"), result["texts"], strict=True):
        model.config.attention_mode = mode
        with torch.no_grad():
            wanted = model.generate(tokens[None], max_new_tokens=40, do_sample=False)[0].tolist()
        assert text == wanted, mode


def test_needs_are_found_through_needs():
    assert {"torch", "transformers", "huggingface-hub", "numpy", "sympy", "mpmath"} <= {
        name.replace("_", "-") for name in needed("torch", "transformers")
    }
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        needed("no_such_package")
