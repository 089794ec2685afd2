"""Estimates on a cluster: sums by hand, what each setting changes, the search, the curves, goodput, and the printed tables."""

import re
from dataclasses import replace

import pytest

from ssa_pretrain.cli import read_config, resolve_config
from ssa_pretrain.config import Auto, EngineName, OptimizerName, Recompute
from ssa_pretrain.config.hardware import PlanConfig
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.planning.calibration import calibration
from ssa_pretrain.planning.checkpoint_interval import best_interval, lost_share
from ssa_pretrain.planning.communication import communication
from ssa_pretrain.planning.estimate import Estimate
from ssa_pretrain.planning.goodput import goodput
from ssa_pretrain.planning.measured import hardware_of
from ssa_pretrain.planning.memory import workspace_bytes
from ssa_pretrain.planning.plan import make_plan
from ssa_pretrain.planning.scaling import efficiency, gpu_counts, strong_curve, weak_curve
from ssa_pretrain.planning.search import all_choices, search, settings_of, smaller, with_settings
from ssa_pretrain.settings.problems import ConfigError


@pytest.fixture(scope="module")
def paper() -> PlanConfig:
    """Returns the 1B model's stage at 8k, planned for H100s."""
    return resolve_config("plan", ["experiment=ssa_1b_8k"], Machine(world_size=1, has_files=False))


def planned(config: PlanConfig, gpus: int = 64, *words: str) -> Estimate:
    config = with_settings(config, words)
    return Estimate(config, make_plan(config, gpus), calibration())


def test_parts_of_a_step_add_up_to_the_measured_time(paper: PlanConfig) -> None:
    """One H200: eight microbatches took 2,387.5 and 2,355.2 ms (docs/results/h200.md), a peak of 45.1 GiB."""
    config = replace(paper, hardware=hardware_of("h200"))
    tokens = 8 * 2 * 8192
    config = with_settings(config, [f"training.global_batch_tokens={tokens}"])
    found = planned(config, 1)
    step = found.step
    parts = sum(step.work.values()) + step.waiting_for_host + step.bubble + step.imbalance + sum(step.groups.values())
    assert step.total == pytest.approx(parts)
    assert step.total == pytest.approx(2.371, rel=0.03)
    assert found.peak_bytes / 2**30 == pytest.approx(45.1, rel=0.01)
    assert found.tokens_per_second == pytest.approx(tokens / step.total)
    assert found.mfu == pytest.approx(0.493, rel=0.03)
    assert found.is_measured and not planned(paper, 64).is_measured
    nsa = ("attention.method=nsa", "attention.score=compressed")
    assert planned(config, 1, *nsa).is_measured and not planned(config, 2, *nsa).is_measured
    assert sum(found.memory_parts.values()) == pytest.approx(found.peak_bytes)


def test_counterpart_share_and_documents_count(paper: PlanConfig) -> None:
    """The measured ratios of docs/results/counterpart.md at 8k: 1/4 over 1 is 61,591 / 54,695; real documents at 1/4 about as fast as full."""
    whole, quarter = planned(paper, 8), planned(paper, 8, "attention.counterpart_share=0.25")
    assert whole.step.total / quarter.step.total == pytest.approx(61_591 / 54_695, rel=0.03)
    assert quarter.peak_bytes < whole.peak_bytes
    real = planned(replace(paper, document_tokens=960), 8)
    assert real.step.total < 0.9 * whole.step.total
    assert real.row.full_attention < 0.3 * whole.row.full_attention


def test_waiting_for_drawn_streams_is_counted_in_time(paper: PlanConfig) -> None:
    """One microbatch per data rank at a share of 1/4: half of the ranks are full and set the time of all."""
    words = ("attention.counterpart_share=0.25", "training.micro_batch_size=1")
    found = planned(paper, 384, *words)
    full, sparse = found.device_seconds("full", 0.375), found.device_seconds("sparse", 0.125)
    assert found.step.imbalance == pytest.approx(full - (full + sparse) / 2, rel=0.02)
    assert planned(paper, 128, *words).step.imbalance == pytest.approx(0.0, abs=1e-9)


def test_workspaces_are_those_that_the_kernels_state(paper: PlanConfig) -> None:
    """ssa_kernels/sparse_attention/autograd.py: 336 MB of segment sums and 17 MB of index for 65,536 tokens; 2.2 GB for blocks of 128."""
    found = workspace_bytes(with_settings(paper, ["training.micro_batch_size=8"]))
    assert found.segment_sums / 1e6 == pytest.approx(336, abs=1)
    assert found.index / 1e6 == pytest.approx(17, abs=1)
    wide = workspace_bytes(with_settings(paper, ["training.micro_batch_size=8", "attention.block_size=128"]))
    assert wide.segment_sums / 1e9 == pytest.approx(2.2, abs=0.1)
    assert workspace_bytes(with_settings(paper, ["attention.method=full"])).segment_sums == 0


def test_pipeline_waits_for_its_first_and_last_microbatches(paper: PlanConfig) -> None:
    found = planned(paper, 64, "parallel.pp=4")
    step, count = found.step, found.plan.num_microbatches
    per_microbatch = (step.total - step.bubble - step.groups["dp"] - step.imbalance) / count
    assert step.bubble == pytest.approx(3 * per_microbatch, rel=0.01)
    halved = planned(paper, 64, "parallel.pp=4", "parallel.vpp=2").step
    assert halved.bubble == pytest.approx(step.bubble / 2, rel=0.05)
    # The stage with the output layer sets the time: four layers and the logits take more than a quarter of all.
    assert sum(step.work.values()) > 1.3 * sum(planned(paper, 16).step.work.values()) / 4


def test_short_last_stage_balances_the_output_layer(paper: PlanConfig) -> None:
    """TP 2 x PP 2 x DP 2: with 8 of 16 layers the last stage sets the time, with 7 less, with 4 the first one does."""
    words = (
        "parallel.tp=2",
        "parallel.pp=2",
        "parallel.sequence_parallel=true",
        "training.global_batch_tokens=1048576",
    )
    times = {last: planned(paper, 8, *words, f"parallel.layers_on_last_stage={last}") for last in (0, 4, 7, 8)}
    assert times[0].step.total == times[8].step.total
    assert times[7].step.total < 0.95 * times[8].step.total and times[7].step.total < times[4].step.total
    assert times[4].rank.layers == 12 and not times[4].rank.has_output
    assert times[7].rank.layers in (7, 9)
    # The first stage holds more layers, each with several microbatches in flight.
    assert times[7].plan.parameters_per_rank > times[8].plan.parameters_per_rank
    assert times[7].peak_bytes > times[8].peak_bytes


def test_what_groups_send_by_hand(paper: PlanConfig) -> None:
    """dp: fp32 gradients summed, bf16 weights gathered. tp with sequence parallelism: ten hidden states per layer, four more at the ends."""
    n = 1_211_697_152
    reduce, gather = planned(paper, 64).traffic
    assert (reduce.bytes, gather.bytes) == (n * 4 * 63 / 64, n * 2 * 63 / 64)
    assert (reduce.group.num_nodes, reduce.group.per_node) == (8, 8)
    assert reduce.bandwidth(paper.hardware, 1.25) == pytest.approx(min(450 / 1.25, 8 * 50 * 0.8) * 1e9)
    found = planned(paper, 8, "parallel.tp=2", "parallel.sequence_parallel=true")
    tp = next(traffic for traffic in found.traffic if traffic.group.name == "tp")
    hidden = 2 * 8192 * 2048 * 2
    assert tp.bytes == found.plan.num_microbatches * (16 * 10 + 4) * hidden / 2
    cp = next(traffic for traffic in planned(paper, 8, "parallel.cp=4").traffic if traffic.group.name == "cp")
    microbatches = planned(paper, 8, "parallel.cp=4").plan.num_microbatches
    assert cp.bytes == microbatches * 16 * (2 * 2 * 8192 * 128) * (2 + 4) * 3 / 4
    assert communication(paper, paper.hardware, planned(paper, 1).rank, 1) == []


def test_group_across_nodes_uses_the_adapters_of_its_ranks(paper: PlanConfig) -> None:
    """Eight tensor ranks per node leave one rank of each data group on a node, with one adapter."""
    rack = replace(paper, hardware=hardware_of("gb200"))
    reduce = planned(rack, 64).traffic[0]
    assert reduce.group.num_nodes == 1
    wide = with_settings(paper, ["model.num_kv_heads=8", "parallel.tp=8", "parallel.sequence_parallel=true"])
    groups = {traffic.group.name: traffic for traffic in planned(wide, 64).traffic}
    assert (groups["dp"].group.per_node, groups["dp"].group.num_nodes) == (1, 8)
    assert groups["dp"].bandwidth(paper.hardware, 1.25) == pytest.approx(50e9 * 0.8)
    assert groups["tp"].group.num_nodes == 1


def test_host_that_launches_slowly_sets_the_time(paper: PlanConfig) -> None:
    words = ("parallel.cp=16", "training.micro_batch_size=1")
    slow = planned(paper, 512, *words)
    assert slow.step.waiting_for_host > sum(slow.step.work.values())
    fast = planned(replace(paper, hardware=replace(paper.hardware, host_speed=100.0)), 512, *words)
    assert fast.step.waiting_for_host == 0.0


def test_run_costs_its_time_and_price(paper: PlanConfig) -> None:
    found = planned(paper, 64)
    assert found.gpu_hours == pytest.approx(found.run_seconds / 3600 * 64)
    assert found.cost == pytest.approx(3.0 * found.gpu_hours)
    assert found.run_seconds > found.plan.steps * found.step.total
    assert found.evaluation_seconds == pytest.approx(32 * 2 * 512 * found.step.total / 384 / 3)


def test_goodput_is_that_of_young_and_daly(paper: PlanConfig) -> None:
    """With interval=auto no other interval keeps more of the time, and a higher failure rate costs more."""
    auto = replace(paper, checkpoint=replace(paper.checkpoint, interval=Auto.auto, asynchronous=False))
    found = goodput(auto, 18.1 * 2**30, 1024, 1.0)
    assert found.interval == best_interval(found.cost, found.hours)
    assert found.lost == pytest.approx(lost_share(found.cost, found.hours, found.interval))
    for other in (1, found.interval // 2, found.interval * 2):
        fixed = replace(auto, checkpoint=replace(auto.checkpoint, interval=other))
        assert goodput(fixed, 18.1 * 2**30, 1024, 1.0).share <= found.share
    often = replace(auto, checkpoint=replace(auto.checkpoint, mean_hours_between_failures=0.5))
    assert 0.0 < goodput(often, 18.1 * 2**30, 1024, 1.0).share < found.share < 1.0
    beside = replace(auto, checkpoint=replace(auto.checkpoint, asynchronous=True))
    assert goodput(beside, 18.1 * 2**30, 1024, 1.0).share > found.share


def test_search_ranks_what_fits_by_time(paper: PlanConfig) -> None:
    config = replace(paper, hardware=replace(paper.hardware, memory_gib=25.0))
    choices = replace(all_choices(config), vpp=(1, 2), cp=(1, 2, 4), pp=(1, 4))
    found = search(config, 64, calibration(), choices)
    assert 0 < len(found.ranked) < found.num_tried
    assert all(layout.needed_bytes <= 25.0 * 2**30 for layout in found.ranked)
    times = [layout.step.total for layout in found.ranked[:8]]
    assert times == sorted(times)
    best = found.ranked[0]
    again = planned(config, 64, *[word for word in settings_of(best.config) if word != "engine=deepspeed"])
    assert again.step.total == pytest.approx(best.step.total)
    kinds = {
        (layout.plan.pp, layout.plan.vpp, layout.plan.cp, layout.config.engine.recompute) for layout in found.ranked
    }
    assert {kind[0] for kind in kinds} == {1, 4} and {kind[1] for kind in kinds} == {1, 2}
    assert {kind[3] for kind in kinds} == set(Recompute)
    tiny = replace(config, hardware=replace(config.hardware, memory_gib=2.0))
    nothing = search(tiny, 64, calibration(), replace(choices, vpp=(1,), pp=(1,)))
    assert not nothing.ranked and nothing.smallest is not None


def test_changes_that_make_a_run_fit_do(paper: PlanConfig) -> None:
    config = replace(paper, hardware=replace(paper.hardware, memory_gib=30.0))
    too_large = planned(config, 8)
    assert not too_large.fits
    changes = smaller(too_large)
    assert changes[0][1].step.total == min(found.step.total for _, found in changes)
    for words, found in changes:
        assert found.fits and planned(config, 8, *words.split()).fits
    assert any("training.micro_batch_size=1" in words for words, _ in changes)
    two = smaller(planned(replace(config, hardware=replace(config.hardware, memory_gib=12.0)), 8))
    assert two and all(found.fits for _, found in two) and any(" " in words for words, _ in two)
    assert smaller(planned(replace(config, hardware=replace(config.hardware, memory_gib=3.0)), 8)) == []


def test_curves_reach_2048_gpus(paper: PlanConfig) -> None:
    assert gpu_counts(paper) == [8 << power for power in range(9)]
    config = with_settings(
        replace(paper, nodes=8), ["attention.method=full"]
    )  # draws no streams, which take long to simulate
    strong, weak = (curve(config, calibration()) for curve in (strong_curve, weak_curve))
    assert [point.gpus for point in strong] == [point.gpus for point in weak] == gpu_counts(paper)
    assert all(point.estimate is not None for point in [*strong, *weak])
    speeds = [efficiency(point, strong) or 0.0 for point in strong]
    assert speeds[0] == 1.0 and speeds == sorted(speeds, reverse=True)
    assert speeds[-1] < 0.5  # 384 rows cannot feed 2,048 GPUs
    assert all((efficiency(point, weak) or 0.0) > 0.95 for point in weak)
    steps = [point.estimate.plan.tokens_per_step for point in weak if point.estimate]
    assert steps[gpu_counts(paper).index(64)] == paper.training.global_batch_tokens and steps[-1] == 32 * steps[3]
    shares = [point.estimate.goodput.share for point in weak if point.estimate]
    assert shares == sorted(shares, reverse=True)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Returns what `python -m ssa_pretrain.plan` prints."""
    with pytest.raises(SystemExit) as left:
        read_config("plan", [*words, "data.path=/nowhere"])
    assert left.value.code == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_plan_prints_every_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("experiment=ssa_1b_8k", "hardware=h200", "nodes=8", "hardware.price_per_gpu_hour=10")
    table = shown(capsys, *words)
    for line in (
        "hardware   h200: 64 GPUs in 8 nodes of 8; 140.4 GiB",
        "layout     64 processes = tp 1 x pp 1 x cp 1 x dp 64",
        r"memory     \d+\.\d\d GiB ± \d\.\d% at the peak on the fullest rank .*: it fits",
        r"           +2\.26 GiB  weights",
        r"           +4\.51 GiB  gradients",
        r"activations of the layers",
        r"segment sums \d+\.\d MiB",
        r"with engine\.recompute=none / selective / full: 31\.\d / 27\.\d / 12\.\d GiB and 0\.\d+ / 0\.\d+ / 1\.\d+ s per step",
        r"step time  0\.\d+ s ± \d+%, of 3 microbatches per rank, one document per row",
        r"           +0\.\d+ s +\d+\.\d%  full stream",
        r"sends      dp 64 \(8 nodes\): 4\.44 GiB per rank and step",
        r"speed      [\d,]+ tokens/s, [\d,]+ per GPU, \d+\.\d% MFU",
        r"time       0\.\d+ days .* GPU-hours, \$\d,\d+ at \$10 per GPU-hour",
        r"goodput    99\.\d+% of the time: a checkpoint every 500 steps",
        r"estimated  by a model fitted to \d+ measured runs: times within",
        r"none of this kind was measured",
        r"files .*checkpoints of about 18\.1 GiB",
        r"command    torchrun --nnodes 8 --nproc-per-node 8 .* experiment=ssa_1b_8k data\.path=/nowhere\n",
    ):
        assert re.search(line, table), line
    assert "40% MFU" not in table


def test_plan_that_does_not_fit_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    table = shown(
        capsys, "experiment=ssa_1b_32k", "engine.recompute=none", "hardware.memory_gib=40", "nodes=2", "--search"
    )
    assert re.search(r"search: \d+ layouts of 16 GPUs that the rules accept, \d+ of them fit", table)
    assert re.search(r"for the first: .*(engine\.recompute|parallel\.[tpc]+)=", table)
    table = shown(capsys, "experiment=ssa_1b_32k", "engine.recompute=none", "hardware.memory_gib=40", "nodes=2")
    assert "it does not fit" in table
    assert re.search(r"to fit     (engine|parallel)\.\S+.*: \d+\.\d GiB, \S+ s per step\n           or ", table)


def test_views_print_curves_and_measured_runs(capsys: pytest.CaptureFixture[str]) -> None:
    table = shown(capsys, "experiment=ssa_1b_8k_quarter", "nodes=8", "--scale", "--measured")
    assert re.search(r"\n2048  \d+ x \d+ x \d+ x \d+ ", table)
    assert re.search(r"From [\d,]+ GPUs on less than half of a step computes: .*", table)
    assert "measured runs beside the model fitted to them" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("nodes=3", "parallel.pp=16"),
            "nodes=3 has 24 GPUs, which must be a multiple of tp * pp * cp = 1 * 16 * 1 = 16; try 2 or 4",
        ),
        (
            ("nodes=2", "parallel.world_size=8"),
            "nodes=2 has 16 GPUs (hardware.gpus_per_node=8), but parallel.world_size=8; leave one of them out",
        ),
        (("hardware=h10",), "hardware=h10 is not an option of the group hardware; did you mean hardware=h100?"),
        (("hardware.memory_gib=0",), "hardware.memory_gib=0.0 must be above 0; try 79.6"),
        (("nodes=-1",), "nodes=-1 must be at least 0; try 0"),
        (("document_tokens=-5",), "document_tokens=-5 must be at least 0; try 0"),
        (
            ("nodes=7",),
            "training.global_batch_tokens=3145728 must be a multiple of sequence_length * micro_batch_size * dp",
        ),
    ],
)
def test_wrong_cluster_is_refused_with_one_sentence(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_config("plan", ["experiment=ssa_1b_8k", *words], Machine(world_size=1, has_files=False))
    assert [str(problem).startswith(message) for problem in error.value.problems] == [True], str(error.value)


def test_other_commands_know_no_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("hardware=h100", "nodes=8"):
        with pytest.raises(ConfigError, match=f"{word.partition('=')[0]}=.* is not a known key"):
            resolve_config("train", ["experiment=ssa_1b_8k", word], Machine(world_size=1, has_files=False))
    with pytest.raises(SystemExit) as left:
        read_config("plan", ["experiment=ssa_1b_8k", "--explain", "hardware.price_per_gpu_hour"])
    assert left.value.code == 0
    assert "price of a GPU and its share of the node, in USD per hour" in capsys.readouterr().out


def test_muon_under_zero_gathers_updates_and_shares_no_orthogonalisation(paper: PlanConfig) -> None:
    """Megatron-core's data ranks share 45 TFLOP (docs/optimizers.md); under ZeRO each of 64 computes them all and receives 63/64 of the updates in bf16."""
    config = with_settings(replace(paper, hardware=hardware_of("h200")), ["engine.overlap_param_gather=false"])
    zero = replace(config, engine=replace(config.engine, name=EngineName.deepspeed))
    by_name = {
        name: (
            planned(replace(each, optim=replace(each.optim, name=OptimizerName.adamw))),
            planned(replace(each, optim=replace(each.optim, name=OptimizerName.muon))),
        )
        for name, each in (("core", config), ("zero", zero))
    }
    products = {
        name: muon.step.work["products"] - adamw.step.work["products"] for name, (adamw, muon) in by_name.items()
    }
    assert products["zero"] == pytest.approx(64 * products["core"], rel=1e-6)
    sent = [sum(t.bytes for t in each.traffic if t.group.name == "dp") for each in by_name["zero"]]
    matrices = 16 * 2048 * (2048 + 2 * 128 + 32 + 2048 + 3 * 8192)
    assert sent[1] - sent[0] == pytest.approx(2 * matrices * 63 / 64)
