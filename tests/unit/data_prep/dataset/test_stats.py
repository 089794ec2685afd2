"""The statistics match the documents, the page shows them, and a second run changes neither."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_prep.dataset.stats import cost, read_rates
from ssa_pretrain.data.indexed_format import read_lengths
from ssa_pretrain.data.manifest import load_manifest

SETTINGS = ("source=jsonl", "source.paths=[corpus.jsonl]", "tokenizer.vocab_size=512", "split.heldout_fraction=0.1")
ROWS = ("stats.sequence_length=32", "stats.budget_tokens=1e6", "workers=1")


@pytest.fixture
def dataset(run, corpus, tmp_path) -> Path:
    assert run(*SETTINGS, *ROWS, "shard_mb=0.1", "out=d")[0] == 0
    return tmp_path / "d"


def lengths(root: Path) -> np.ndarray:
    return np.concatenate([read_lengths(Path(f"{root / s.prefix}.idx")) for s in load_manifest(root).splits["train"]])


def test_statistics_match_the_documents(dataset):
    stats = json.loads((dataset / "stats.json").read_text())
    own, real = stats["splits"]["train"]["text"], lengths(dataset)
    assert (own["documents"], own["tokens"], own["longest"]) == (len(real), real.sum(), real.max())
    assert sum(own["histogram"]) == len(real)
    middle = int(np.median(real))
    assert sum(own["histogram"][: int(4 * np.log2(middle))]) <= (real < middle).sum()
    assert own["as_long_as_a_row"] == (real >= 32).sum() and own["tokens_in_those"] == real[real >= 32].sum()
    assert stats["budget"]["epochs"]["text"] == pytest.approx(1e6 / real.sum())
    assert sum(stats["bytes_per_token_histograms"]["text"]) == stats["source_documents"] == 300


def test_fill_of_both_packings(dataset):
    fill = json.loads((dataset / "stats.json").read_text())["fill"]
    real = lengths(dataset)
    assert fill["megatron"] == pytest.approx((real.sum() - 1) // 32 * 32 / real.sum())
    pieces = [max(1, -(-(int(n) - 1) // 31)) for n in real]
    assert fill["official_row"] == pytest.approx((real.sum() - len(real) + sum(pieces)) / (32 * sum(pieces)))


def test_official_row_has_the_predicted_fill(run, corpus, tmp_path, dataset):
    predicted = json.loads((dataset / "stats.json").read_text())["fill"]["official_row"]
    packing = ("packing=official_row", "packing.row_tokens=32")
    assert run(*SETTINGS, *ROWS, *packing, "shard_mb=0.1", "out=o")[0] == 0
    stats = json.loads((tmp_path / "o" / "stats.json").read_text())
    assert stats["fill"] == {"official_row": pytest.approx(predicted)}
    assert lengths(tmp_path / "o").max() == 32


def test_page_shows_every_part_and_loads_nothing(dataset):
    text = (dataset / "stats.html").read_text()
    HTMLParser().feed(text)
    assert text.startswith("<!doctype html>") and text.count('<svg class="chart"') == 3
    assert "http" not in text and "<script" not in text and "src=" not in text
    assert f"{lengths(dataset).sum():,}" in text


def test_second_run_keeps_the_page_unless_the_budget_changed(run, dataset):
    before = (dataset / "stats.html").stat().st_mtime_ns
    assert "stats.json is up to date" in run("stage=stats", *ROWS, "out=d")[1]
    assert (dataset / "stats.html").stat().st_mtime_ns == before
    run("stage=stats", "stats.sequence_length=32", "stats.budget_tokens=2e6", "out=d")
    assert json.loads((dataset / "stats.json").read_text())["budget"]["tokens"] == 2e6


def test_cost_scales_with_nodes_until_the_disk_is_the_limit(dataset):
    from data_prep.run_config import StatsConfig

    manifest = load_manifest(dataset)
    rate = {"text_bytes": 20_000_000, "cpu_seconds": 2.0, "backend": "hf"}
    plan = cost(manifest, StatsConfig(budget_tokens=1e9, cores_per_node=10), [rate])
    text = 1e9 * manifest.bytes_per_token
    assert plan["core_mb_per_s"] == 10 and plan["bound_by"] == "cores"
    assert plan["core_hours"] == pytest.approx(text / 10e6 / 3600, abs=0.01)
    assert plan["hours"]["1"] == pytest.approx(text / 100e6 / 3600, abs=1e-3)
    assert plan["hours"]["64"] == pytest.approx(plan["hours"]["1"] / 64, abs=1e-3)
    slow = cost(manifest, StatsConfig(budget_tokens=1e9, cores_per_node=1000), [rate])
    assert slow["bound_by"] == "disk" and slow["hours"]["1"] == pytest.approx(text / 1e9 / 3600, abs=1e-3)
    assert plan["bin_bytes"] == 2e9 and cost(manifest, StatsConfig(), [])["core_hours"] is None


def test_incomplete_line_of_rates_is_skipped(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "rates.jsonl").write_text('{"text_bytes": 1}\n{"text_by')
    assert read_rates(tmp_path) == [{"text_bytes": 1}]


def test_stats_without_a_dataset(run):
    code, logged = run("stage=stats", "out=nothing")
    assert code == 4 and "there is no finished dataset" in logged
