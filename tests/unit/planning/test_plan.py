"""The plan of a run: the paper's numbers, layouts, the learning rate, and the printed table."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from ssa_pretrain.cli import CONF, read_config, resolve_config
from ssa_pretrain.config import Batches, Config, OptimConfig, Schedule
from ssa_pretrain.config.machine import Machine
from ssa_pretrain.data.manifest import Manifest
from ssa_pretrain.planning.plan import Plan, make_plan
from ssa_pretrain.planning.table import GIB, describe
from ssa_pretrain.rates import learning_rate
from ssa_pretrain.settings.problems import ConfigError
from support.small_datasets import cut, write_dataset


def experiment(*overrides: str, world_size: int = 1) -> Config:
    return resolve_config("plan", overrides, Machine(world_size=world_size, has_files=False))


def planned(*overrides: str, world_size: int = 1) -> Plan:
    return make_plan(experiment(*overrides, world_size=world_size), world_size, vocab_size=4000)


@dataclasses.dataclass
class Length:
    """The fields of a plan that a schedule reads."""

    steps: int
    warmup_steps: int
    batches: Batches = dataclasses.field(default_factory=lambda: Batches(((0, 1),)))


def test_plan_of_the_first_stage_of_the_paper() -> None:
    plan = planned("experiment=ssa_1b_8k", world_size=64)
    assert (plan.rows_per_step, plan.tokens_per_step) == (384, 3_145_728)
    assert (plan.dp, plan.num_microbatches) == (64, 3)
    assert plan.steps == 31_790  # the first multiple of a step at or past 100B tokens
    assert plan.total_tokens - plan.tokens_per_step < 100_000_000_000 <= plan.total_tokens
    assert plan.warmup_steps == 318
    assert plan.vocab_size == plan.padded_vocab_size == 128_256


def test_second_stage_of_the_paper_has_the_same_step_and_model() -> None:
    first, second = planned("experiment=ssa_1b_8k", world_size=32), planned("experiment=ssa_1b_32k", world_size=32)
    assert second.rows_per_step == 96
    assert (second.tokens_per_step, second.parameters) == (first.tokens_per_step, first.parameters)


def test_parameters_of_the_1b_model_by_hand() -> None:
    """The sum: embedding (tied), 16 layers of q, k, v, gate, output, three SwiGLU matrices and two norms, and the final norm."""
    layer = 2048 * (2048 + 2 * 128 + 32) + 2048 * 2048 + 3 * 2048 * 8192 + 2 * 2048
    plan = planned("experiment=ssa_1b_8k")
    assert plan.parameters == plan.parameters_per_rank == 128_256 * 2048 + 16 * layer + 2048 == 1_211_697_152


def test_qk_norm_and_key_convolution_cost_weights_and_activations() -> None:
    """Two norms of 64 and three filters of 128 channels by layer; the projection, and the plain and convolved keys, of a layer's tokens."""
    paper = ("experiment=ssa_1b_8k", "training.micro_batch_size=1", "parallel=tp2")
    plain, norm, filters, both = (
        planned(*paper, *more, world_size=2)
        for more in (
            (),
            ("model.qk_norm=true",),
            ("attention.key_convolution=3",),
            ("model.qk_norm=true", "attention.key_convolution=3"),
        )
    )
    assert [p.parameters - plain.parameters for p in (norm, filters)] == [16 * 2 * 64, 16 * 128 * 3]
    assert [p.parameters_per_rank - plain.parameters_per_rank for p in (norm, filters)] == [2048, 16 * 64 * 3]
    projection, keys = (32 * 64 + 2 * 128 + 32) * 2 // 2, 128 * 2 // 2
    kept = [(p.activation_bytes - plain.activation_bytes) / (16 * 8192) for p in (norm, filters, both)]
    assert kept == pytest.approx([projection, keys, projection + 2 * keys], abs=1)


def test_llama_3_shapes_have_the_published_sizes() -> None:
    """Without our gate, Meta's models have 3.21B (tied) and 8.03B parameters."""
    no_gate = ("experiment=ssa_1b_8k", "attention.gate=false")
    assert planned(*no_gate, "model=llama_3b").parameters == 3_212_749_824
    assert planned(*no_gate, "model=llama_8b").parameters == 8_030_261_248


def test_vocabulary_padding_does_not_depend_on_the_layout() -> None:
    plans = [planned("experiment=quickstart"), planned("experiment=quickstart", "parallel=tp2", world_size=2)]
    assert [(p.vocab_size, p.padded_vocab_size) for p in plans] == [(4000, 4096)] * 2
    assert plans[0].parameters == plans[1].parameters


def test_each_rank_holds_its_share() -> None:
    paper = ("experiment=ssa_1b_8k",)
    whole, tp2 = planned(*paper), planned(*paper, "parallel=tp2", world_size=2)
    norms = (2 * 16 + 1) * 2048
    assert tp2.parameters_per_rank == (whole.parameters - norms) // 2 + norms
    pp2 = planned(*paper, "parallel=pp2", world_size=2)
    embedding = 128_256 * 2048
    assert pp2.parameters_per_rank == (whole.parameters - embedding - 2048) // 2 + embedding + 2048


def test_memory_follows_precision_and_sharding() -> None:
    paper = ("experiment=ssa_1b_8k",)
    one, eight = planned(*paper), planned(*paper, world_size=8)
    n = one.parameters
    assert (one.weight_bytes, one.gradient_bytes, one.optimizer_bytes) == (2 * n, 4 * n, 12 * n)
    assert eight.optimizer_bytes == -(-12 * n // 8)
    unsharded = ("engine.distributed_optimizer=false", "engine.overlap_param_gather=false")
    assert planned(*paper, *unsharded, world_size=8).optimizer_bytes == 12 * n
    for stage, shards in ((0, (1, 1, 1)), (1, (1, 1, 8)), (2, (1, 8, 8)), (3, (8, 8, 8))):
        more = ("engine=deepspeed", f"deepspeed.zero_stage={stage}", "precision.grad_reduce_in_fp32=false")
        found = planned(*paper, *more, world_size=8)
        wanted = tuple(-(-size * n // shard) for size, shard in zip((2, 2, 12), shards, strict=True))
        assert (found.weight_bytes, found.gradient_bytes, found.optimizer_bytes) == wanted
    offloaded = planned(*paper, "engine=deepspeed", "deepspeed.offload_optimizer=true", world_size=8)
    assert offloaded.optimizer_bytes == 0
    fp32 = planned(*paper, "precision=fp32")
    assert (fp32.weight_bytes, fp32.gradient_bytes, fp32.optimizer_bytes) == (4 * n, 4 * n, 8 * n)
    assert fp32.activation_bytes > 1.5 * one.activation_bytes
    recomputed = [planned(*paper, f"engine.recompute={how}").activation_bytes for how in ("none", "selective", "full")]
    assert recomputed[0] > recomputed[1] > recomputed[2]


def test_activation_estimate_is_near_a_measured_peak() -> None:
    """Plain GPTModel, full attention, 1B, 2 x 8,192 tokens, bf16, no optimizer step: 42.6 GiB measured on an H100.

    Core's cross entropy holds the logits twice in fp32 beside the one buffer that ours works in.
    """
    plan = planned("experiment=full_1b_8k", "attention.gate=false")
    core_logits = 2 * 8192 * plan.padded_vocab_size * 8
    estimate = (plan.weight_bytes + plan.gradient_bytes + plan.activation_bytes + core_logits) / GIB
    assert estimate == pytest.approx(42.6, rel=0.1)


def test_second_stream_is_kept_for_its_share_of_the_queries() -> None:
    """Per layer and token: the output of 32 heads of 64 in bf16, and their log-sum-exps in fp32.

    At share 1/4, 3/8 of the queries of a microbatch with a full main stream keep it.
    """
    found = [planned("experiment=ssa_1b_8k", f"attention.counterpart_share={r}").activation_bytes for r in (1, 0.25, 0)]
    stream = 16 * 2 * 8192 * (32 * 64 * 2 + 32 * 4)
    assert [found[0] - other for other in found[1:]] == [5 / 8 * stream, stream]


def test_pipelines_hold_the_microbatches_in_flight() -> None:
    eight = ("experiment=ssa_1b_8k", "model=llama_8b", "model.vocab_size=1024", "training.micro_batch_size=1")
    stages = {pp: planned(*eight, f"parallel.pp={pp}", world_size=pp).activation_bytes for pp in (1, 4)}
    assert stages[4] == pytest.approx(stages[1], rel=0.02)  # a quarter of the layers, four microbatches
    interleaved = planned(*eight, "parallel.pp=4", "parallel.vpp=2", world_size=4).activation_bytes
    assert interleaved > stages[4]


def test_context_parallel_ranks_hold_their_tokens_and_all_keys() -> None:
    """A layer keeps 1 / cp of everything but the keys and values of the whole row. The optimizer shards over all ranks with the same weights."""
    stage = ("experiment=ssa_1b_32k", "engine.recompute=none")
    one, four = planned(*stage), planned(*stage, "parallel.cp=4", world_size=4)
    keys = 16 * 32_768 * 2 * 2 * 64 * 2  # layers, tokens, k and v, kv heads, head dim, bytes
    assert four.activation_bytes == (one.activation_bytes - keys) // 4 + keys
    assert (four.dp, four.num_microbatches, four.rows_per_step) == (1, one.num_microbatches, one.rows_per_step)
    assert four.optimizer_bytes == -(-one.optimizer_bytes // 4)
    assert (four.weight_bytes, four.gradient_bytes) == (one.weight_bytes, one.gradient_bytes)
    assert four.row == one.row and four.flops_per_token == one.flops_per_token
    config = experiment(*stage, "parallel.cp=4", "parallel.world_size=8", world_size=1)
    table = describe(config, make_plan(config, 8))
    assert "8 processes = tp 1 x pp 1 x cp 4 x dp 2" in table
    assert "ranks 4-7     replica 1, stage 0" in table
    held = "a rank holds 8,192 of a microbatch's 32,768 queries and all keys"
    assert f"{held}: 16.0 MiB gathered and 32.0 MiB of gradients reduced per layer" in table


def test_schedule_is_exact_at_its_ends() -> None:
    plan = Length(steps=100, warmup_steps=9)
    cosine = OptimConfig(lr=1.0, min_lr=0.2, schedule=Schedule.cosine)
    assert [learning_rate(step, cosine, plan) for step in range(10)] == pytest.approx([0.1 * n for n in range(1, 11)])
    # Half way from step 9 to step 100 lies between steps 54 and 55.
    assert (learning_rate(54, cosine, plan) + learning_rate(55, cosine, plan)) / 2 == pytest.approx(0.6, abs=1e-3)
    assert learning_rate(99, cosine, plan) > 0.2
    assert learning_rate(100, cosine, plan) == learning_rate(10**9, cosine, plan) == pytest.approx(0.2)
    linear = OptimConfig(lr=1.0, min_lr=0.0, schedule=Schedule.linear)
    assert learning_rate(9 + 13, linear, plan) == pytest.approx(1 - 13 / 91)
    constant = OptimConfig(lr=1.0, schedule=Schedule.constant)
    assert [learning_rate(step, constant, plan) for step in (9, 50, 99)] == [1.0] * 3


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (10, 0), (10, 10), (300, 15)])
def test_learning_rate_is_never_zero_or_above_the_peak(schedule: Schedule, steps: int, warmup: int) -> None:
    plan = Length(steps=steps, warmup_steps=warmup)
    rates = [learning_rate(step, OptimConfig(lr=0.5, schedule=schedule), plan) for step in range(steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_coordinates_equal_megatron_core() -> None:
    from megatron.core.parallel_state import RankGenerator

    shape = dataclasses.replace(planned("experiment=quickstart"), world_size=48, tp=2, pp=3, cp=2, dp=4)
    core = RankGenerator(tp=2, ep=1, dp=4, pp=3, cp=2, order="tp-cp-ep-dp-pp")
    for axis, place in (("tp", 0), ("cp", 1), ("dp", 2), ("pp", 3)):
        for group in core.get_ranks(axis):
            coordinates = [shape.coordinates(rank) for rank in group]
            assert [c[place] for c in coordinates] == list(range(len(group)))
            assert len({c[:place] + c[place + 1 :] for c in coordinates}) == 1


@pytest.mark.parametrize(
    ("overrides", "world_size", "vocab", "message"),
    [
        (("experiment=ssa_1b_8k",), 5, None, r"training\.global_batch_tokens=3145728 must be a multiple"),
        (
            ("experiment=ssa_1b_8k", "parallel=tp2", "parallel.world_size=2"),
            3,
            None,
            r"world_size=3 must be a multiple",
        ),
        (("experiment=quickstart",), 1, None, r"model\.vocab_size=0 is the tokenizer's, but no data was found"),
    ],
)
def test_impossible_plan_is_refused_with_the_reason(
    overrides: tuple[str, ...], world_size: int, vocab: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(experiment(*overrides), world_size, vocab)


def test_table_shows_layout_steps_and_command() -> None:
    config = experiment("experiment=ssa_1b_8k", "parallel=tp2_pp2", "parallel.world_size=64")
    table = describe(config, make_plan(config, 64), ["experiment=ssa_1b_8k", "parallel.world_size=64", "dry_run=true"])
    for words in (
        "64 processes = tp 2 x pp 2 x cp 1 x dp 16",
        "ranks 2-3     replica 1, stage 0",
        "3,145,728 tokens = 384 rows = dp 16 x 12 microbatches of 2",
        "31,790 steps, 318 of warm-up; 100,002,693,120 tokens",
        "8.88 GFLOP per token",
        "64 checkpoints of about 18.1 GiB, the newest 2 kept",
        "torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
        "-m ssa_pretrain.train experiment=ssa_1b_8k",
    ):
        assert words in table
    assert "dry_run" not in table
    start = experiment("experiment=ssa_1b_32k", world_size=1)
    assert "weights of outputs/ssa_1b_8k" in describe(start, make_plan(start, 1))


def test_table_shows_the_trained_scorer() -> None:
    config = experiment("experiment=indexer_1b_8k")
    table = describe(config, make_plan(config, 1))
    assert "full for 1,000 steps, then sparse with 16 blocks of 128 = 2048 keys by a trained scorer" in table
    assert "its loss on 0.125 of the queries" in table and "indexer adds " in table
    inside = experiment("experiment=ssa_1b_8k", "attention.score=indexer")
    assert "sparse with 16 blocks of 16 = 256 keys by a trained scorer; alignment" in describe(
        inside, make_plan(inside, 1)
    )


def epochs(manifest: Manifest, *overrides: str) -> list[str]:
    """Returns the plan's lines on epochs for 30 steps of 8 rows of 32 tokens."""
    run = ("experiment=quickstart", "data.sequence_length=32", "training.global_batch_tokens=256", "training.steps=30")
    config = experiment(*run, "training.micro_batch_size=1", "attention.top_k=1", *overrides)
    lines = describe(config, make_plan(config, 1, 4000), manifest=manifest).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("epochs"))
    return [line[11:] for line in lines[first : first + 2] if not line.startswith("memory")]


def test_plan_counts_epochs(tmp_path: Path) -> None:
    """240 rows of two sources of 99 and 19 rows: without weights both are read equally often."""
    both = write_dataset(tmp_path / "both", {"english": cut(3200), "python": cut(640 + 7)}, {})
    left = "the first epoch leaves out the last 69 tokens, summed over the parts; the second reads them"
    assert epochs(both) == ["2.03 over 118 rows: python 2.05, english 2.03", left]
    assert epochs(both, "data.weights={english:1,python:1}")[0] == "2.03 over 118 rows: python 6.32, english 1.21"
    mix = dataclasses.replace(both, weights={"english": 1.0, "python": 0.0})
    left = "the first epoch leaves out the last 31 tokens, summed over the parts; the second reads them"
    assert epochs(mix) == ["2.03 over 118 rows: english 2.42, python 0", left]
    one = write_dataset(tmp_path / "one", {"english": cut(3200)}, {})
    assert epochs(one) == ["2.42 over 99 rows", "the first epoch leaves out the last 31 tokens; the second reads them"]
    six = write_dataset(tmp_path / "six", {f"s{i}": cut(32 * (i + 4), base=i) for i in range(6)}, {})
    assert epochs(six, "data.weights={s0:6,s1:5,s2:4,s3:3,s4:2,s5:1}")[0].endswith(" … s5 1.38, the lowest of 6")
    packed = dataclasses.replace(one, policy={"packing": "official_row", "row_tokens": 32})
    documents = one.splits["train"][0].documents
    assert epochs(packed) == [f"{240 / documents:.3g} over {documents} rows"]


def test_plan_explains_why_it_counts_no_epochs(tmp_path: Path) -> None:
    short = write_dataset(tmp_path / "short", {"english": cut(60)}, {"english": cut(99)})
    words = f"unknown: data.sequence_length=32 needs at least 65 tokens of each part, but english (train) in {short.root} has 60; "
    assert epochs(short)[0] == words + "shorten the rows or prepare more text"
    held = dataclasses.replace(short, splits={"train": (), "heldout": short.splits["heldout"]})
    config = experiment("experiment=quickstart")
    for manifest in (None, held):
        assert "epochs" not in describe(config, make_plan(config, 1, 4000), manifest=manifest)


@pytest.mark.parametrize(
    ("world_size", "words"),
    [
        (12, "torchrun --nnodes 2 --nproc-per-node 6 --rdzv"),
        (13, "torchrun --nnodes 13 --nproc-per-node 1 --rdzv"),
        (8, "torchrun --standalone --nproc-per-node 8 -m"),
    ],
)
def test_command_fills_nodes_of_up_to_eight(world_size: int, words: str) -> None:
    tokens = f"training.global_batch_tokens={world_size * 2 * 8192}"
    config = experiment("experiment=ssa_1b_8k", tokens, world_size=world_size)
    assert words in describe(config, make_plan(config, world_size))


def test_printed_command_can_be_pasted() -> None:
    config = experiment("experiment=ssa_1b_8k", "profile.at=[20,21]", world_size=1)
    shown = describe(config, make_plan(config, 1), ["experiment=ssa_1b_8k", "profile.at=[20,21]", "dry_run=true"])
    assert "python -m ssa_pretrain.train experiment=ssa_1b_8k 'profile.at=[20,21]'\n" in shown + "\n"


@pytest.mark.parametrize(
    ("method", "length", "warns"), [("ssa", 256, True), ("moba", 128, True), ("ssa", 272, False), ("full", 256, False)]
)
def test_blocks_that_cover_the_row_give_a_warning(
    method: str, length: int, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        read_config("plan", ["experiment=ssa_300m_8k", f"attention={method}", f"data.sequence_length={length}",
                             "training.micro_batch_size=1", f"training.global_batch_tokens={length}"])  # fmt: skip
    assert caught.value.code == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == warns * [
        f"warning    attention.top_k=16 blocks of attention.block_size=16 cover whole rows of data.sequence_length={length}, so sparse "
        "attention is full attention: alignment 0, captured mass 1; lower top_k or lengthen the rows"
    ]


@pytest.mark.parametrize("entry", ["plan", "train"])
def test_dry_run_prints_the_table_and_exits(entry: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read_config(entry, ["experiment=ssa_300m_8k", "parallel.world_size=512", "training.micro_batch_size=1",
                            "training.global_batch_tokens=4194304", *["--dry-run"] * (entry == "train")])  # fmt: skip
    assert caught.value.code == 0
    assert "512 processes = tp 1 x pp 1 x cp 1 x dp 512" in capsys.readouterr().out


def test_entry_point_plans_and_checks_without_torch(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = "import runpy, sys\ntry:\n runpy.run_module('ssa_pretrain.plan', run_name='__main__')\n"
        program += "finally:\n print('torch' in sys.modules, file=sys.stderr)"
        command = [sys.executable, "-c", program, *arguments]
        environment = {"PYTHONPATH": str(CONF.parent), "PATH": "/usr/bin:/bin"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    shown = run("experiment=ssa_1b_8k", "parallel.world_size=64")
    assert (shown.returncode, shown.stderr) == (0, "False\n")
    assert shown.stdout.startswith("run        ssa_1b_8k\n")
    refused = run("--check", "experiment=quickstart", "optim.lrr=1")
    assert (refused.returncode, refused.stdout) == (3, "")
    assert refused.stderr.startswith("ssa_pretrain.train: 2 problems in the configuration; nothing was started.\n")
    assert list(tmp_path.iterdir()) == []
