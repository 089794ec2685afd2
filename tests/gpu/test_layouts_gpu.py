"""Layouts of two and four ranks train like one rank: in fp32 to 1e-5 in every gradient, in bf16 and FP8 with the kernels about as far from fp32.

The cases run in the processes of tests/support/layout_worker.py over NCCL: on a GPU each, or where there are fewer, on GPUs that they share.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ssa_pretrain.checkpoint.weights import canonical_name
from support import gpu_ranks
from support.errors import relative, require_as_near, require_means_as_near
from support.layout_results import assemble
from support.processes import SUPPORT

WORKER = SUPPORT / "layout_worker.py"
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

TP, PP = "parallel.tp", "parallel.pp"
TP2_SP = {TP: 2, "parallel.sequence_parallel": True}
OVERLAP = {"engine.overlap_grad_reduce": True, "engine.overlap_param_gather": True}
LAYOUTS = {
    2: {
        "tp2": {TP: 2},
        "tp2_sp": TP2_SP,
        "pp2": {PP: 2},
        "pp2_vpp2": {PP: 2, "parallel.vpp": 2},
        "dp2": OVERLAP,
    },
    4: {
        "tp2_sp_pp2": TP2_SP | {PP: 2},
        "tp2_sp_dp2": TP2_SP | OVERLAP,
        "pp2_dp2": {PP: 2} | OVERLAP,
        "pp2_dp2_small_buckets": {PP: 2} | OVERLAP,
    },
}
STREAMS = {
    "full": {"attention.full_ratio": 1.0},
    "sparse": {"attention.full_ratio": 0.0},
    "nsa": {"attention.method": "nsa", "attention.score": "compressed", "attention.window": 20},
    "quarter": {"attention.full_ratio": 0.5, "attention.counterpart_share": 0.25},
    # Without a choice of blocks: where rounding changes one, errors of bf16 are two or three times those of another run.
    "keys": {"attention.method": "full", "model.qk_norm": True, "attention.key_convolution": 3},
    "untied": {"attention.method": "full", "model.tie_embeddings": False},
}
BOTH = ("full", "sparse")
KERNELS = {"attention.impl": "auto", "engine.layer_spec": "auto"}  # Transformer Engine's layers where it is installed
# The 1B model's head shape, so that the kernels of its size run.
BF16 = KERNELS | {
    "precision.name": "bf16",
    "model.num_layers": 4,
    "model.hidden_size": 256,
    "model.ffn_hidden_size": 512,
    "model.num_attention_heads": 32,
    "model.head_dim": 64,
    "model.init_std": 0.05,
    "training.micro_batch_size": 2,
}
PRECISIONS = {"fp32": {}, "bf16": BF16, "fp8": BF16 | {"precision.name": "fp8"}}
# Streams of each layout and precision: those that change what is exchanged, where they change it.
RUN = {
    ("tp2", "pp2", "pp2_vpp2"): dict.fromkeys(PRECISIONS, BOTH),
    ("tp2_sp",): {"fp32": (*BOTH, "quarter"), "bf16": (*BOTH, "nsa", "quarter", "keys"), "fp8": BOTH},
    ("dp2",): {"fp32": (*BOTH, "untied"), "bf16": (*BOTH, "quarter", "keys", "untied"), "fp8": BOTH},
    ("tp2_sp_pp2", "tp2_sp_dp2"): {"fp32": BOTH, "bf16": ("sparse", "quarter"), "fp8": ("sparse",)},
    ("pp2_dp2",): {"fp32": (*BOTH, "untied"), "bf16": ("sparse", "keys", "untied")},
    ("pp2_dp2_small_buckets",): {"fp32": ("untied", "keys"), "bf16": ("untied", "keys")},
}
# Only these need Transformer Engine's user buffers, and GPUs of their own.
OVERLAPPED = TP2_SP | {"engine.overlap_tp": True}
EXACT = BF16 | {"precision.name": "fp32", "attention.impl": "reference", "engine.layer_spec": "local"}
FP32_TOLERANCE = 1e-5
COPIES = (
    2**-4
)  # tensor ranks' copies of one gradient, each a sum of rounded products; each is judged by the exact one besides


def cases() -> dict[int, dict[str, dict]]:
    """Returns the cases by world size, named layout.precision.stream, with those of one rank that they are compared with."""
    found: dict[int, dict[str, dict]] = {1: {}, 2: {}, 4: {}}
    worlds = {layout: world for world, layouts in LAYOUTS.items() for layout in layouts}
    for layouts, precisions in RUN.items():
        for precision, streams in precisions.items():
            for stream in streams:
                common = PRECISIONS[precision] | STREAMS[stream]
                found[1][f"single.{precision}.{stream}"] = common
                found[1][f"single.exact.{stream}"] = EXACT | STREAMS[stream]
                for layout in layouts:
                    world = worlds[layout]
                    found[world][f"{layout}.{precision}.{stream}"] = common | LAYOUTS[world][layout]
    for stream in BOTH:
        found[2][f"tp2_overlap.bf16.{stream}"] = BF16 | STREAMS[stream] | OVERLAPPED
    return found


CASES = cases()


def missing(name: str, world: int) -> str:
    """Returns what a case needs that this machine lacks, "" if nothing."""
    if ".fp8." in name and not find_spec("transformer_engine"):
        return "Transformer Engine"
    if "overlap" in name and gpu_ranks.are_shared(world):
        return "a GPU for each rank"
    return ""


def run(world: int, folder: Path) -> None:
    """Runs the cases of a number of ranks in one set of processes."""
    listing = folder / f"cases{world}.json"
    listing.write_text(json.dumps({name: case for name, case in CASES[world].items() if not missing(name, world)}))
    gpu_ranks.run([str(WORKER), str(listing), str(folder)], world, timeout=800)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Path:
    """Returns the folder of the results, those of one rank."""
    folder = tmp_path_factory.mktemp("layouts")
    run(1, folder)
    return folder


@pytest.fixture(scope="module")
def folder(request, one_rank) -> Path:
    """Returns the folder of the results, those of so many ranks among them."""
    run(request.param, one_rank)
    return one_rank


@pytest.mark.parametrize(
    ("folder", "name"), [(world, name) for world in LAYOUTS for name in CASES[world]], indirect=["folder"]
)
def test_ranks_equal_one(request, folder, name):
    if what := missing(name, request.node.callspec.params["folder"]):
        pytest.skip(f"needs {what}")
    _, precision, stream = name.split(".")
    if precision == "fp32":
        wanted, found = (assemble(folder, case) for case in (f"single.fp32.{stream}", name))
        torch.testing.assert_close(found["records"], wanted["records"], rtol=FP32_TOLERANCE, atol=1e-6)
    else:
        wanted, found, exact = (
            assemble(folder, case, COPIES) for case in (f"single.{precision}.{stream}", name, f"single.exact.{stream}")
        )
        require_means_as_near(found["records"], wanted["records"], exact["records"])
        # The exact model has the local layers' names, the others Transformer Engine's.
        truths = {canonical_name(key): entry["grad"] for key, entry in exact["parameters"].items()}
    assert {key.removeprefix("output:") for key in found["parameters"]} == set(wanted["parameters"])
    for key, entry in found["parameters"].items():
        target = wanted["parameters"][key.removeprefix("output:")]["grad"]
        if precision == "fp32":
            assert relative(entry["grad"], target) < FP32_TOLERANCE, key
        else:
            truth = truths[canonical_name(key.removeprefix("output:"))]
            require_as_near(entry["grad"], target, truth, factor=1.5, name=key)
