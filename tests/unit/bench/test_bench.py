"""The benchmark's options, ratios and tables, and a complete benchmark of a tiny model in a separate process."""

import csv
import math
import os
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ssa_pretrain.bench import __main__ as bench
from ssa_pretrain.bench.documents import SMOLLM_CORPUS, Documents, document_starts
from ssa_pretrain.bench.goals import GOALS, Goal
from ssa_pretrain.bench.measure import measure
from ssa_pretrain.bench.methods import attention_of, own_layers
from ssa_pretrain.bench.options import bench_config, read_options
from ssa_pretrain.bench.parts import read_parts, write_parts
from ssa_pretrain.bench.share import layers_that_fit, share_variants
from ssa_pretrain.bench.tables import Result, append, ratio, read, verdict, write_ratios
from ssa_pretrain.bench.timing import Timing, mean_timing
from ssa_pretrain.bench.variants import Variant, long_rows
from ssa_pretrain.config import Config, Method
from ssa_pretrain.engine.step import Microbatches
from ssa_pretrain.model.spec import ATTENTION
from ssa_pretrain.schedule import Place, counterpart_spans, main_stream, share_drawn
from support.processes import ROOT


def result(variant: str, rate: float | None, ms: float = 10.0, peak: float | None = None) -> Result:
    return Result(
        case="8k",
        model="llama_1b",
        variant=variant,
        ms=ms,
        spread=0.0,
        tokens_per_second_per_gpu=rate,
        model_tflops_per_gpu=None,
        mfu=None,
        peak_gib=peak,
        world_size=1,
        device="NVIDIA H200",
        versions="v",
        command="c",
    )


def test_command_line_options():
    options = read_options(["cases=8k,32k", "length=64", "rows=1"], 1)
    assert options.cases == ("8k", "32k") and options.length == 64 and options.rows == 1 and options.model == "llama_1b"
    assert read_options(["cases=share,share_8k,8k"], 1).cases == ("share_8k", "share_32k", "8k")
    assert "methods" not in read_options([], 1).cases and read_options(["cases=methods", "parts=1"], 1).parts == 1
    assert read_options([], 2).cases == ("dp2", "tp2", "tp2_overlap")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["cases=9k"],
            "cases=9k must be among 8k, 32k, nsa_8k, nsa_32k, share, share_8k, share_32k, share_128k, methods, optimizer, fp8, recompute, "
            "indexer, keys with 1 process",
        ),
        (["cases=dp2"], "need torchrun --nproc-per-node 2"),
        (["parts=2"], "parts=2 must be 0 or 1"),
        (["rounds=0"], "rounds=0 must be a positive whole number"),
        (["model=huge"], "model=huge is not a file in conf/model; try .*llama_1b"),
        (["--halp"], "'--halp' is not an option; the options are cases=, model="),
        (["precision=fp8"], "precision=fp8 must be bf16 or fp32"),
    ],
)
def test_bad_command_line_prints_one_line(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    with pytest.raises(SystemExit) as left:
        bench.main()
    assert left.value.code == 3 and re.fullmatch(f"ssa_pretrain.bench: .*{sentence}.*\n", capsys.readouterr().err)


def test_ratios_and_verdicts(tmp_path):
    results = {r.variant: r for r in (result("a", 90.0, 5.0, 12.0), result("b", 100.0, 100.0, 10.0), result("c", None))}
    faster = Goal(label="x", over="a", under="b", must=0.91, aim=0.95)
    assert ratio(faster, results) == pytest.approx(0.9) and verdict(faster, 0.9) == "missed"
    assert [verdict(faster, v) for v in (0.92, 0.96)] == ["must reached", "aim reached"]
    leaner = Goal(label="x", over="a", under="b", of="memory", must=1.25, aim=1.15)
    assert ratio(leaner, results) == pytest.approx(1.2) and verdict(leaner, 1.2) == "must reached"
    assert ratio(Goal(label="x", over="a", under="b", of="time"), results) == pytest.approx(0.05)
    assert ratio(Goal(label="x", over="c", under="b"), results) is None
    assert ratio(Goal(label="x", over="z", under="b"), results) is None
    append(tmp_path, [result("full 8k", 50.0), result("plain 8k", 48.0)])
    append(tmp_path, [result("full 8k", 51.0)])  # the newest counts
    text = write_ratios(tmp_path, read(tmp_path))
    assert f"| full over plain megatron-core, 8k | {51 / 48:.3f} | ≥ 1 | ≥ 1.05 | aim reached |" in text
    other = {name: replace(r, device="NVIDIA A100") for name, r in read(tmp_path).items()}
    assert f"| full over plain megatron-core, 8k | {51 / 48:.3f} |  |  |  |" in write_ratios(tmp_path, other)


def test_goals_have_distinct_labels():
    assert len({g.label for g in GOALS}) == len(GOALS)


def test_cut_model_is_named_and_has_no_goals(tmp_path):
    full, quarter = result("share full 8k", 50.0), result("share ssa r=1/4 8k", 53.0)
    append(tmp_path, [full, quarter])
    assert "| ssa r=1/4 over full, 8k | 1.060 | ≥ 1.05 | ≥ 1.08 | must reached |" in write_ratios(
        tmp_path, read(tmp_path)
    )
    append(tmp_path, [replace(r, model="llama_1b, 8 of 16 layers") for r in (full, quarter)])
    text = write_ratios(tmp_path, read(tmp_path))
    assert "| ssa r=1/4 over full, 8k | 1.060 |  |  |  |" in text
    assert "| share full 8k | llama_1b, 8 of 16 layers | 10.00 |" in text


def test_mean_timing_weighs_its_parts():
    parts = [(0.25, Timing(100.0, 0.01, 5)), (0.75, Timing(20.0, 0.03, 9))]
    assert mean_timing(parts) == Timing(40.0, 0.03, 9)
    assert mean_timing([(1.0, Timing(1.0, 0.0, None))]).peak_bytes is None


def test_lengths_of_a_part_have_its_mean_and_the_lognormal_median():
    for part in SMOLLM_CORPUS.values():
        lengths = part.lengths(np.random.default_rng(0), 200_000)
        mean = part.tokens / part.documents
        assert lengths.min() >= 1 and lengths.mean() == pytest.approx(mean, rel=0.02)
        assert np.median(lengths) == pytest.approx(mean * math.exp(-(part.log_deviation**2) / 2), rel=0.02)


@pytest.mark.parametrize(("kind", "mean"), [(Documents.short, 1024), (Documents.real, 960)])
def test_documents_have_the_documented_mean_and_repeat(kind, mean):
    num_tokens = 10_000_000
    starts = document_starts(kind, np.random.default_rng(0), num_tokens)
    assert starts.shape == (num_tokens,) and num_tokens / starts.sum() == pytest.approx(mean, rel=0.03)
    assert np.array_equal(starts, document_starts(kind, np.random.default_rng(0), num_tokens))
    assert not document_starts(Documents.whole, np.random.default_rng(0), 100).any()


def test_parts_of_the_corpus_are_weighted_as_the_mix_of_the_recipe():
    mix = yaml.safe_load((ROOT / "data_prep/conf/mix/smollm1_corpus.yaml").read_text(encoding="utf-8"))
    assert {name: part.weight for name, part in SMOLLM_CORPUS.items()} == mix["weights"]


def test_layers_are_cut_until_the_model_fits():
    config = long_rows(bench_config(read_options(["cases=share_128k"], 1)), 16)
    assert config.data.sequence_length == 131072 and config.training.micro_batch_size == 1
    vocab = config.model.vocab_size
    assert layers_that_fit(config, vocab, None) == 16 == layers_that_fit(config, vocab, 400 << 30)
    assert layers_that_fit(config, vocab, 139 << 30) == 5
    assert layers_that_fit(config, vocab, 1 << 30) == 1


class RecordingEngine:
    """Records the attention settings of each pass in place of computing it."""

    def __init__(self, config):
        self.config = config
        self.placement: Any = SimpleNamespace(dp=1, dp_rank=0)
        self.microbatches = Microbatches(config, self.placement, context=self.placement)
        self.passes = []

    def forward_backward(self, batches, *, step):
        assert self.microbatches.config is self.config
        attention = self.config.attention
        self.passes.append((attention.method, attention.full_ratio, attention.counterpart_share, len(batches), step))


def test_share_forces_the_main_stream_and_weighs_by_full_ratio():
    config = bench_config(read_options(["cases=share", "model=tiny", "length=64"], 1))
    engine: Any = RecordingEngine(replace(config, attention=replace(config.attention, full_ratio=0.75)))
    microbatches: Any = [None, None]
    variants = {v.name: v for v in share_variants(engine, "8k", microbatches, [Fraction(1, 4)])}
    assert variants["share ssa r=1/4 8k"].mean_of == {
        "share ssa r=1/4 8k, main full": 0.75,
        "share ssa r=1/4 8k, main sparse": 0.25,
    }
    names = ["full 8k", "moba 8k", "ssa r=1/4 8k, main full", "ssa r=1/4 8k, main sparse", "ssa r=1/4 8k, main full"]
    for name in names:
        run = variants[f"share {name}"].run
        assert run is not None
        run()
    full, moba, main_full, main_sparse, again = engine.passes
    assert full[0] is Method.full and moba[0] is Method.moba
    assert main_full == (Method.ssa, 1.0, pytest.approx(0.3), 2, 0)
    assert main_sparse == (Method.ssa, 0.0, pytest.approx(0.1), 2, 0)
    # The second run draws the next step's sample.
    assert again == (*main_full[:-1], 1)
    assert {v.tokens for v in variants.values()} == {2 * 2 * 64}


@pytest.mark.parametrize("share", [1, Fraction(1, 4), Fraction(1, 8)])
@pytest.mark.parametrize(("length", "rows"), [(8192, 2), (32768, 1)])
def test_forced_kinds_draw_the_queries_that_training_draws(share, length, rows):
    config = bench_config(read_options(["cases=share", "model=tiny", f"length={length}", f"rows={rows}"], 1))
    engine: Any = RecordingEngine(config)
    microbatches: Any = [None]
    for variant in share_variants(engine, "8k", microbatches, [share]):
        if variant.run is not None:
            variant.run()
    trained = replace(config.attention, counterpart_share=float(share))
    for main, (_, full_ratio, drawn, *_) in zip(("full", "sparse"), engine.passes[2:], strict=True):
        forced = replace(config.attention, full_ratio=full_ratio, counterpart_share=drawn)
        for step in range(10):
            place = Place(seed=0, step=step, microbatch=0, num_microbatches=1)
            assert main_stream(forced, place) == main
            spans = counterpart_spans(forced, place, rows=rows, row_length=length)
            expected = rows * length * share_drawn(trained, main)
            assert sum(count for _, count in spans) == expected


def test_benchmark_runs_on_a_cpu(tmp_path):
    command = [
        "-m",
        "ssa_pretrain.bench",
        "cases=8k,nsa_8k,share,share_128k,methods,optimizer,indexer,keys",
        "model=tiny",
        "length=64",
        "rows=1",
        "rounds=1",
        "runs=1",
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, *command, "precision=fp32", f"out={tmp_path}"],
        env=environment, capture_output=True, text=True, cwd=ROOT, check=False, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "results.csv").open() as file:
        found = {line["variant"]: line for line in csv.DictReader(file)}
    steps = {name for name in found if not name.startswith(("share ", "nsa case, "))}
    methods = {"full 8k", "full 8k unfused", "full 8k short", "ssa 8k", "ssa 8k short", "moba 8k"}
    indexed = {"indexer 8k warm-up", "indexer 8k sparse", "ssa with indexer 8k"}
    options = {"ssa 8k plain keys", "ssa 8k QK-norm", "ssa 8k key convolution"}
    assert steps == {"plain 8k", *methods, *indexed, *options, "ssa step", "optimizer"}
    assert {f"nsa case, {method} 8k" for method in ("full", "moba", "nsa")} <= set(found)
    shares = {name for goal in GOALS for name in (goal.over, goal.under) if name.startswith("share ")}
    assert shares <= set(found) and all(float(line["ms"]) > 0 for line in found.values())
    assert {f"share {name} 64" for name in ("full", "moba", "ssa r=1", "ssa r=1/4", "ssa r=1/8")} <= set(found)
    parts = [float(found[f"share ssa r=1/4 8k, main {main}"]["ms"]) for main in ("full", "sparse")]
    assert float(found["share ssa r=1/4 8k"]["ms"]) == pytest.approx(sum(parts) / 2)
    for label in ("ssa over full, 8k", "fused in neither", "ssa r=1/8 over full, 32k", "optimizer's share"):
        assert label in done.stdout


def test_parts_are_times_by_kind_of_operator_and_means_follow(tmp_path):
    matrix = torch.ones(64, 64)
    variants = [
        Variant(name="products", run=lambda: matrix @ matrix),
        Variant(name="sorts", run=lambda: matrix.sort()),
        Variant(name="both", mean_of={"products": 0.25, "sorts": 0.75}),
    ]
    write_parts(tmp_path, variants[:1])
    write_parts(tmp_path, variants)
    found = read_parts(tmp_path)
    assert found["products"]["matrix products"] > 0 and found["sorts"]["attention, sparse"] > 0
    assert found["both"]["matrix products"] == pytest.approx(found["products"]["matrix products"] / 4, abs=1e-3)
    assert read_parts(tmp_path / "elsewhere") == {}


def test_models_of_a_case_are_gone_before_the_next():
    """A model is in cycles, so it stays until Python collects them; the next case's peaks would include it."""
    models = []

    def build(config: Config, placement: Any, vocab: int) -> list[Variant]:
        model = torch.nn.Module()
        model.cycle = [model]
        models.append(weakref.ref(model))
        return [Variant(name="full 8k", run=model.extra_repr)]

    options = read_options(["rounds=1", "runs=1"], 1)
    placement: Any = SimpleNamespace(device=torch.device("cpu"), world_size=1, is_rank_0=True)
    measure(build, "8k", bench_config(options), placement, options)
    assert models[0]() is None


def test_methods_with_a_layer_of_their_own_get_their_settings():
    assert set(own_layers()) == {method for method in Method if ATTENTION[method] is not ATTENTION[Method.ssa]}
    assert attention_of(Method.moba).alignment_weight == 0.0 and attention_of(Method.ssa).alignment_weight == 10.0
