"""Context parallelism trains like one process for any documents: every metric and gradient, fp32, to 1e-5 relative."""

import json
from pathlib import Path

import pytest
import torch

from support.errors import relative
from support.layout_results import TOLERANCE, assemble
from support.processes import run_workers

pytestmark = pytest.mark.timeout(1800)  # the first test waits for all processes of all cases
WORKER = Path(__file__).with_name("context_worker.py")

TP, PP, CP, SP = "parallel.tp", "parallel.pp", "parallel.cp", "parallel.sequence_parallel"
WORLD = "world"
LAYOUTS = {
    "cp2": {CP: 2},
    "cp4": {CP: 4},
    "cp2_tp2": {CP: 2, TP: 2},
    "cp2_tp2_sp": {CP: 2, TP: 2, SP: True},
    "cp2_pp2": {CP: 2, PP: 2},
    "cp2_dp2": {CP: 2, WORLD: 4},
}
# Two steps of warm-up and two of sparse attention; two index heads.
INDEXED = {
    "attention.score": "indexer",
    "attention.counterpart_share": 0.5,
    "attention.indexer.warmup_steps": 2,
    "attention.indexer.heads": 2,
    "attention.indexer.loss_weight": 30.0,
}
METHODS = {
    "ssa_full": {"attention.full_ratio": 1.0},
    "ssa_sparse": {"attention.full_ratio": 0.0},
    "ssa_drawn": {"attention.full_ratio": 0.5},
    "ssa_drawn_once": {"attention.full_ratio": 0.5, "attention.stream_draw": "step"},
    "ssa_quarter": {"attention.full_ratio": 0.5, "attention.counterpart_share": 0.25},
    "full": {"attention.method": "full"},
    "full_muon": {"attention.method": "full", "optim.name": "muon", "training.z_loss": 0.01, "model.mup.base_width": 8},
    "moba": {"attention.method": "moba", "attention.score": "per_head"},
    "ssa_keys": {"attention.full_ratio": 0.5, "model.qk_norm": True, "attention.key_convolution": 5},
    "indexer": INDEXED | {"attention.method": "indexer", "attention.full_ratio": 0.0},
    "ssa_indexer": INDEXED | {"attention.full_ratio": 0.5, "attention.counterpart_share": 0.25},
    "nsa": {"attention.method": "nsa", "attention.score": "compressed", "attention.window": 11},
}
SMALL = {"model.num_layers": 2, "training.global_batch_tokens": 4 * 96}
VARIANTS = {
    "no_distributed_optimizer": {"engine.distributed_optimizer": False},
    "selective": {"engine.recompute": "selective"},
    "full_recompute": {"engine.recompute": "full"},
    "two_rows": {"training.micro_batch_size": 2},
    "overlap": {"engine.overlap_grad_reduce": True, "engine.overlap_param_gather": True},
}


def build_cases() -> dict[int, dict[str, dict]]:
    """Returns the cases by world size, named layout.variant.method: every method on cp 2 and cp 4, and each pair of features at least once."""
    cases: dict[int, dict[str, dict]] = {1: {}, 2: {}, 4: {}}

    def add(layout: str, variant: str, *methods: str) -> None:
        degrees = dict(LAYOUTS.get(layout, {}))
        world = degrees.pop(WORLD, 0) or degrees.get(TP, 1) * degrees.get(PP, 1) * degrees.get(CP, 1)
        for method in methods:
            changes = SMALL | degrees | VARIANTS.get(variant, {}) | METHODS[method]
            cases[world][f"{layout}.{variant}.{method}"] = changes

    add("single", "plain", *METHODS)
    add("cp2", "plain", "ssa_full", "ssa_sparse", "full", "full_muon", "moba")
    add("cp2", "no_distributed_optimizer", "ssa_sparse")
    add("cp2", "selective", "ssa_full", "full", "moba")
    add("cp2", "full_recompute", "ssa_sparse", "full", "moba")
    add("cp2", "two_rows", "ssa_drawn_once")
    add("cp2", "plain", "ssa_quarter")
    add("cp2", "full_recompute", "ssa_quarter")
    add("cp2", "plain", "ssa_keys")
    add("cp4", "full_recompute", "ssa_keys")
    add("cp2_tp2_sp", "plain", "ssa_keys")
    add("cp4", "plain", "ssa_quarter")
    add("cp2_tp2_sp", "plain", "ssa_quarter")
    add("cp2_pp2", "plain", "ssa_quarter")
    add("cp2_dp2", "plain", "ssa_quarter")
    add("cp4", "plain", "ssa_full", "ssa_sparse", "full", "moba", "nsa")
    add("cp2_tp2", "plain", "ssa_sparse")
    add("cp2_tp2_sp", "plain", "ssa_full", "moba")
    add("cp2_tp2_sp", "full_recompute", "nsa")
    add("cp2_pp2", "plain", "ssa_full")
    add("cp2_pp2", "full_recompute", "ssa_sparse")
    add("cp2_dp2", "plain", "ssa_full")
    add("cp2_dp2", "overlap", "ssa_drawn")
    add("cp2_dp2", "no_distributed_optimizer", "ssa_sparse")
    add("cp2", "plain", "indexer", "ssa_indexer")
    add("cp4", "plain", "ssa_indexer")
    add("cp2_tp2_sp", "plain", "indexer", "ssa_indexer")
    add("cp2_tp2", "plain", "indexer")
    add("cp2_pp2", "full_recompute", "indexer")
    add("cp2_dp2", "overlap", "indexer")
    return cases


CASES = build_cases()
COMPARED = [name for cases in CASES.values() for name in cases if not name.startswith("single.plain")]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """Runs all cases once, one set of processes per world size. The single process comes first: the others load its checkpoint."""
    folder = tmp_path_factory.mktemp("context")
    for world, cases in CASES.items():
        listing = folder / f"cases{world}.json"
        listing.write_text(json.dumps(cases))
        run_workers(WORKER, world, str(listing), str(folder), timeout=1500)
    found = {}
    for name in (name for cases in CASES.values() for name in cases):
        parts = [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"{name}.*.pt"))]
        found[name] = assemble(folder, name) | {"parts": parts}
    return found


def single(name: str) -> str:
    """Returns the name of the single-process case that a case must equal."""
    return f"single.plain.{name.rsplit('.', 1)[1]}"


@pytest.mark.parametrize("name", COMPARED)
def test_context_parallelism_equals_the_single_process(results, name):
    found, wanted = results[name], results[single(name)]
    for part in found["parts"]:
        for what in ("records", "evaluated"):
            ours, theirs = (torch.tensor(p[what], dtype=torch.float64) for p in (part, wanted["parts"][0]))
            steps = len(ours)  # some take a fifth step, from a checkpoint
            assert steps == (5 if name.endswith(".plain.ssa_full") else 4) or what == "evaluated"
            torch.testing.assert_close(
                ours, theirs[:steps], rtol=TOLERANCE, atol=0.0, msg=lambda text, w=what: f"{w}: {text}"
            )
        assert relative(part["logits"], wanted["parts"][0]["logits"]) < TOLERANCE
    names = {key.removeprefix("output:") for key in found["parameters"]}
    assert names == set(wanted["parameters"]), "the layouts hold different parameters"
    for key, tensors in found["parameters"].items():
        error = relative(tensors["grad"], wanted["parameters"][key.removeprefix("output:")]["grad"])
        assert error < TOLERANCE, f"{key}: gradient off by {error:.1e}"


def test_streams_differ(results):
    """If the streams were equal or the alignment negligible, the comparison above would prove nothing."""
    records = results["single.plain.ssa_full"]["records"]
    alignment, mass = records[:, 2:4], records[:, 4:6]
    assert alignment.min() > 1e-3 and mass.max() < 0.99
    gradients = [results[f"single.plain.{method}"]["parameters"] for method in ("ssa_full", "full")]
    key = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert relative(gradients[1][key]["grad"], gradients[0][key]["grad"]) > 1e-3
