"""Every layout trains like one process: losses, alignment, captured mass and every gradient, fp32, to 1e-5 relative."""

import json
from pathlib import Path

import pytest
import torch

from support.errors import relative
from support.layout_results import TOLERANCE, assemble
from support.processes import SUPPORT, run_workers

pytestmark = pytest.mark.timeout(2000)  # the first test waits for all processes of all cases
WORKER = SUPPORT / "layout_worker.py"

TP, PP, DP = "parallel.tp", "parallel.pp", "world"
TWO = {
    "tp2": {TP: 2},
    "tp2_sp": {TP: 2, "parallel.sequence_parallel": True},
    "pp2": {PP: 2},
    "pp2_vpp2": {PP: 2, "parallel.vpp": 2},
    "pp2_last1": {PP: 2, "parallel.layers_on_last_stage": 1},
    "dp2": {DP: 2},
}
FOUR = {
    "tp2_pp2": TWO["tp2"] | TWO["pp2"],
    "tp2_dp2": TWO["tp2"] | TWO["dp2"],
    "tp2_sp_pp2": TWO["tp2_sp"] | TWO["pp2"],
    "pp2_dp2": TWO["pp2"] | TWO["dp2"],
    "pp2_vpp2_dp2": {PP: 2, "parallel.vpp": 2, DP: 2},
    "pp4_vpp2": {PP: 4, "parallel.vpp": 2, "model.num_layers": 8},
}
LAYOUTS = {"single": {}, "single_of_8": {"model.num_layers": 8}} | TWO | FOUR
STREAMS = {"full": 1.0, "sparse": 0.0, "drawn": 0.5}
NSA = {"attention.method": "nsa", "attention.score": "compressed", "attention.window": 11}  # "nsa", a stream of its own
QUARTER = {"attention.full_ratio": 0.5, "attention.counterpart_share": 0.25}  # the stream called "quarter"
OVERLAP = {"engine.overlap_grad_reduce": True, "engine.overlap_param_gather": True}
VARIANTS = {
    "plain": {},
    "no_distributed_optimizer": {"engine.distributed_optimizer": False},
    "accumulate_2": {"training.micro_batch_size": 2},
    "one_microbatch": {"training.micro_batch_size": 4},
    "no_alignment": {"attention.alignment_weight": 0.0},
    "selective": {"engine.recompute": "selective"},
    "full_recompute": {"engine.recompute": "full"},
    "overlap": OVERLAP,
    "keys": {"model.qk_norm": True, "attention.key_convolution": 3},
    "untied": {"model.tie_embeddings": False},
    # The output layer's weight is gathered by itself, as in a large model.
    "untied_small_buckets": {"model.tie_embeddings": False} | OVERLAP,
    "muon": {"optim.name": "muon"},
    "muon_replicated": {"optim.name": "muon", "engine.distributed_optimizer": False},
    "scaled": {"model.mup.base_width": 8, "model.mup.base_head_dim": 2, "training.z_loss": 0.01},
}
OTHER_MATHEMATICS = ("keys", "untied", "muon", "scaled")  # compared with one process of the same
BOTH = ("full", "sparse")
# Layouts and streams of each variant. On two processes a layout's own code meets each stream; four processes combine two layouts, and there a drawn
# stream runs both. A variant is crossed with the layouts whose communication it changes or repeats: the optimizer's with data parallelism and with
# the norm over tensor and pipeline ranks, larger microbatches with every kind of message, recomputation with tensor parallelism and the pipelines.
VARIED: dict[str, dict[str, tuple[str, ...]]] = {
    "plain": {"single": (*STREAMS, "quarter", "nsa"), "single_of_8": tuple(STREAMS)}
    | dict.fromkeys(TWO, tuple(STREAMS))
    | dict.fromkeys(FOUR, ("drawn",))
    | {"dp2": (*STREAMS, "quarter"), "tp2_sp": (*STREAMS, "quarter", "nsa"), "tp2_pp2": ("drawn", "quarter", "nsa")}
    | {"pp2_vpp2": ("drawn",), "pp2_last1": ("drawn",), "pp2_dp2": (), "pp2_vpp2_dp2": ()},
    "no_distributed_optimizer": {
        "single": BOTH,
        "dp2": BOTH,
        "pp2": ("sparse",),
        "tp2_sp": ("full",),
        "tp2_dp2": ("sparse",),
        "tp2_sp_pp2": ("full",),
    },
    "accumulate_2": {
        "single": BOTH,
        "dp2": ("full",),
        "pp2": ("sparse",),
        "tp2": ("full",),
        "tp2_dp2": ("full",),
        "tp2_sp_pp2": ("sparse",),
    },
    "selective": {
        "single": BOTH,
        "tp2": ("full",),
        "tp2_sp": ("sparse",),
        "pp2": ("full",),
        "tp2_pp2": ("sparse",),
        "pp2_vpp2": ("full",),
        "pp4_vpp2": ("full",),
    },
    "full_recompute": {
        "single": BOTH,
        "tp2": ("sparse",),
        "tp2_sp": ("full",),
        "pp2": ("sparse", "nsa"),
        "tp2_sp_pp2": ("full", "quarter"),
        "pp4_vpp2": ("sparse",),
    },
    "overlap": dict.fromkeys(("dp2", "tp2_dp2", "pp2_dp2", "pp2_vpp2_dp2"), ("drawn",)),
    "untied": {"single": ("drawn",)},
    "untied_small_buckets": {"dp2": ("drawn",), "pp2_dp2": ("drawn",)},
    "keys": {"single": BOTH, "dp2": ("full",), "tp2": ("sparse",), "tp2_sp": ("full",), "tp2_pp2": ("sparse",)},
    "muon": dict.fromkeys(("single", "dp2", "pp2", "tp2_sp", "tp2_dp2", "pp2_vpp2_dp2"), ("drawn",)),
    "muon_replicated": {"dp2": ("drawn",)},
    "scaled": dict.fromkeys(("single", "dp2", "tp2_sp", "pp2"), ("drawn",)),
    "one_microbatch": {"single": BOTH},
    "no_alignment": {"single": BOTH},
}


def build_cases() -> dict[int, dict[str, dict]]:
    """Returns the cases by world size, named layout.variant.stream."""
    cases: dict[int, dict[str, dict]] = {1: {}, 2: {}, 4: {}}
    for variant, layouts in VARIED.items():
        for layout, streams in layouts.items():
            degrees = dict(LAYOUTS[layout])
            world = degrees.get(TP, 1) * degrees.get(PP, 1) * degrees.pop(DP, 1)
            for stream in streams:
                own = {"quarter": QUARTER, "nsa": NSA}
                drawn = own[stream] if stream in own else {"attention.full_ratio": STREAMS[stream]}
                cases[world][f"{layout}.{variant}.{stream}"] = degrees | VARIANTS[variant] | drawn
    return cases


CASES = build_cases()
NAMES = [name for cases in CASES.values() for name in cases]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns the folder of the processes' results."""
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def results(folder) -> dict[str, dict]:
    """Runs all cases once, one set of processes per world size."""
    for world, cases in CASES.items():
        listing = folder / f"cases{world}.json"
        listing.write_text(json.dumps(cases))
        run_workers(WORKER, world, str(listing), str(folder), timeout=1700)
    return {name: assemble(folder, name) for name in NAMES}


@pytest.mark.parametrize("name", ["dp2.overlap.drawn", "tp2_dp2.overlap.drawn"])
def test_save_right_after_a_step_contains_its_weights(results, folder, name):
    parts = [torch.load(path, weights_only=True, map_location="cpu") for path in sorted(folder.glob(f"{name}.*.pt"))]
    for part in parts:
        (twin,) = [p for p in parts if p["tp_rank"] == part["tp_rank"] and p["dp_rank"] != part["dp_rank"]]
        assert part["saved"].keys() == twin["saved"].keys() != set()
        for key, weight in part["saved"].items():
            assert torch.equal(weight, twin["saved"][key]), f"{key} differs between data ranks"


def reference(name: str) -> str:
    """Returns the single-process case that a case must equal."""
    layout, variant, stream = name.split(".")
    variant = variant.partition("_")[0] if variant.startswith(OTHER_MATHEMATICS) else "plain"
    return f"{'single_of_8' if 'model.num_layers' in LAYOUTS[layout] else 'single'}.{variant}.{stream}"


AFTER_THE_LAST_STREAMS = (
    "decoder.layers.3.mlp",
    "decoder.layers.3.pre_mlp_layernorm",
    "decoder.layers.3.self_attention.linear_proj",
    "decoder.final_layernorm",
)
COMPARED = [n for n in NAMES if n != reference(n) and "no_alignment" not in n]


@pytest.mark.parametrize("name", COMPARED)
def test_layout_equals_single_process(results, name):
    found, wanted = results[name], results[reference(name)]
    torch.testing.assert_close(found["records"], wanted["records"], rtol=TOLERANCE, atol=0.0)
    names = {key.removeprefix("output:") for key in found["parameters"]}
    assert names == set(wanted["parameters"]), "the layouts hold different parameters"
    for key, tensors in found["parameters"].items():
        target = wanted["parameters"][key.removeprefix("output:")]
        assert (
            torch.equal(tensors["weight"], target["weight"]) or relative(tensors["weight"], target["weight"]) == 0.0
        ), key
        error = relative(tensors["grad"], target["grad"])
        assert error < TOLERANCE, f"{key}: gradient off by {error:.1e}"


@pytest.mark.parametrize("stream", ["full", "sparse"])
def test_alignment_contributes_to_every_gradient(results, stream):
    """The comparison above would detect a lost or doubled alignment gradient, because it changes every gradient by far more than the tolerance."""
    on, off = results[f"single.plain.{stream}"], results[f"single.no_alignment.{stream}"]
    for key, tensors in on["parameters"].items():
        if key.startswith(AFTER_THE_LAST_STREAMS):
            continue
        assert relative(off["parameters"][key]["grad"], tensors["grad"]) > 1e-3, key


@pytest.mark.parametrize("layout", ["single", "single_of_8"])
def test_streams_differ_and_both_are_drawn(results, layout):
    """Otherwise a layout with drawn streams would not prove that it runs both in each step."""
    full, sparse, drawn = (results[f"{layout}.plain.{stream}"] for stream in STREAMS)
    for one, other in ((full, sparse), (full, drawn), (sparse, drawn)):
        key = "decoder.layers.0.self_attention.linear_qkv.weight"
        assert relative(other["parameters"][key]["grad"], one["parameters"][key]["grad"]) > 1e-2
        steps, others = one["records"][:2], other["records"][:2]
        assert ((steps - others).abs() / steps).amax(dim=1).min() > 1e-3  # one norm alone can be equal by chance
