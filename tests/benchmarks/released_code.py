"""The code that SSA's authors released, as it is, against an import of the same random weights: logits in full and in sparse mode, on one GPU.

    pip install --no-deps --target SITE transformers==4.54.0 tokenizers==0.21.4 huggingface_hub==0.36.0 liger-kernel==0.6.2 fla-core==0.4.0
    git clone https://github.com/zhenyi4/ssa SSA; git clone https://github.com/fla-org/native-sparse-attention NSA
    PYTHONPATH=tests:. python tests/benchmarks/released_code.py --site SITE --ssa SSA --nsa NSA

The released code runs on no transformers that exports run on, so it gets an environment of its own: a process that sees SITE first. It is installed as
the release says: its `hf_files/parallel.py` over that of native-sparse-attention, and the modelling file of `configs/ssa-1b-init`. FlashAttention is not
needed: full attention is transformers' eager one, and the window is off. Everything is in fp32, Triton's products included.

A folder in the released layout with two layers of the 1B model's head shape is written, run there, imported by `import_hf`, and run by the training
model under score=official_compat. Each document's last logits must agree to 1e-5. In sparse mode two blocks can be so nearly equal that rounding decides
between them, so there a third of the documents may differ. tests/unit/huggingface/test_released.py compares with a computation that is
written from the mathematics; this program is for the code itself.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from ssa_pretrain.config import Config, Score
from ssa_pretrain.parallel.state import start, stop
from support.foreign_llama import SIZES, random_tensors, released_record, write_folder
from support.imported import import_to, training_logits

MODES = ("full", "sparse")
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 128}
LENGTHS = (17, 31, 160, 272, 527, 560, 1040, 1536)
TOLERANCE, TIES = 1e-5, 1 / 3
RELEASED = """
import json, sys
import torch, transformers
from safetensors.torch import load_file

scratch, folder, documents, out = sys.argv[1:]
sys.path.insert(0, scratch)
from release.configuration_llama_nsa import LlamaNSAConfig
from release.modeling_llama_nsa import LlamaNSAForCausalLM

config = LlamaNSAConfig(**json.load(open(folder + "/config.json")))
config._attn_implementation = "eager"
model = LlamaNSAForCausalLM(config).eval()
missing, unexpected = model.load_state_dict(load_file(folder + "/model.safetensors"), strict=False)
assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
model.lm_head.weight = model.model.embed_tokens.weight
model.cuda()
found = {}
for mode in ("full", "sparse"):
    model.config.inference_mode = mode
    with torch.no_grad():
        found[mode] = torch.stack([model(d[None].cuda(), use_cache=False).logits[0, -1].float().cpu() for d in torch.load(documents)])
torch.save(found, out)
print("released code on transformers", transformers.__version__)
"""


def main() -> int:
    """Compares; returns 1 if the logits differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=Path, required=True, help="folder with the packages of the released code")
    parser.add_argument("--ssa", type=Path, required=True, help="checkout of github.com/zhenyi4/ssa")
    parser.add_argument(
        "--nsa", type=Path, required=True, help="checkout of github.com/fla-org/native-sparse-attention"
    )
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(SIZES["vocab_size"], (length,), generator=generator) for length in LENGTHS]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        install(arguments.ssa, arguments.nsa, scratch)
        sizes = SIZES | HEADS
        tensors = random_tensors(gate_rows=3, tied=True, sizes=sizes)
        folder = write_folder(scratch / "folder", sizes | released_record(block_counts=16), tensors)
        theirs = released_logits(arguments.site, scratch, folder, documents)
        placement = start(Config().parallel, seed=1)
        config = import_to(folder, scratch / "run")
        config = replace(config, attention=replace(config.attention, score=Score.official_compat))
        failed = 0
        for mode in MODES:
            ours = training_logits(config, scratch / "run", placement, mode, documents).cpu()
            errors = ((ours - theirs[mode]).norm(dim=1) / theirs[mode].norm(dim=1)).tolist()
            wrong = sum(not error <= TOLERANCE for error in errors)
            failed += wrong > (TIES * len(errors) if mode == "sparse" else 0)
            print(
                f"{mode}: relative errors "
                + ", ".join(f"{n} tokens {e:.1e}" for n, e in zip(LENGTHS, errors, strict=True))
            )
        moved = float((theirs["full"] - theirs["sparse"]).norm() / theirs["full"].norm())
        print(f"the two modes differ by {moved:.2f}; {'the logits differ' if failed else 'the logits agree'}")
        stop()
    return int(failed > 0 or moved < 0.01)


def install(ssa: Path, nsa: Path, scratch: Path) -> None:
    """Puts the released code into packages below a folder, as its README says."""
    ops = scratch / "native_sparse_attention" / "ops"
    ops.mkdir(parents=True)
    for package in (ops, ops.parent):
        (package / "__init__.py").write_text("")
    shutil.copy(nsa / "native_sparse_attention/ops/utils.py", ops)
    shutil.copy(ssa / "hf_files/parallel.py", ops)
    release = scratch / "release"
    release.mkdir()
    (release / "__init__.py").write_text("")
    for file in ("configuration_llama_nsa.py", "modeling_llama_nsa.py"):
        shutil.copy(ssa / "configs/ssa-1b-init" / file, release)


def released_logits(site: Path, scratch: Path, folder: Path, documents: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the released code's logits after each document's last token, [documents, V] by mode, from a process of its own."""
    torch.save(documents, scratch / "documents.pt")
    paths = [str(scratch / "documents.pt"), str(scratch / "logits.pt")]
    own = {"PYTHONPATH": str(site.resolve()), "TRITON_F32_DEFAULT": "ieee", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RELEASED, str(scratch), str(folder), *paths]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, cwd=scratch, check=False)
    if done.returncode:
        raise SystemExit(f"the released code ended with {done.returncode}:\n{done.stderr[-3000:]}")
    print(done.stdout.strip())
    return torch.load(scratch / "logits.pt")


if __name__ == "__main__":
    sys.exit(main())
