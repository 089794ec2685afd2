"""ssa_pretrain/evaluation/results.py, table.py, records.py and plots.py: names, what is compared, what people and W&B see."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssa_pretrain.config import LoggingConfig, WandbMode
from ssa_pretrain.evaluate import show
from ssa_pretrain.evaluation.plots import buckets, plot
from ssa_pretrain.evaluation.records import records
from ssa_pretrain.evaluation.results import require_own, result_name
from ssa_pretrain.evaluation.table import table
from ssa_pretrain.settings.problems import ConfigError
from support.wandb_runs import history

SETTINGS = {
    "checkpoint": "step_00000100",
    "step": 100,
    "data.path": "data/a",
    "data.fingerprint": "f",
    "data.sequence_length": 4096,
    "model.rope_scaling": {"enabled": False, "factor": 4.0},
    "attention.block_size": 16,
    "attention.top_k": 8,
}


def metrics(cross_entropy: float) -> dict:
    return {
        "cross_entropy": cross_entropy,
        "perplexity": 20.0,
        "word_perplexity": 123456.0,
        "captured_mass_by_layer": [0.5, 0.7],
        "alignment_by_layer": [0.1, 0.1],
        "num_labels": 6,
        "cross_entropy_by_position": [3.0, 0.0, 4.0, 0.0],
        "labels_by_position": [1, 0, 2, 0],
    }


def result() -> dict:
    """Returns a result with everything that one may have."""
    heads = {"captured_mass_by_head": [[0.2, 0.4], [0.6, 0.8]], "entropy_by_head": [[1.0, 2.0], [3.0, 4.0]]}
    cells = [{"length": n, "depth": d, "accuracy": 0.5} for n in (256, 512) for d in (0, 50, 100)]
    needle = {"metrics": {"accuracy": 0.5}, "details": {"cells": cells}}
    return {
        "name": "one",
        "settings": SETTINGS,
        "trained_with": {"attention.top_k": 16},
        "step": 100,
        "tokens": 5000,
        "split": "heldout",
        "rows": 8,
        "modes": {"full": metrics(3.0), "sparse": metrics(3.5)},
        "heads": {"full": heads, "sparse": heads},
        "tasks": {
            "arc": {m: {"metrics": {"acc": 0.25, "acc_stderr": 0.1, "n": 4}, "details": {}} for m in ("full", "sparse")},
            "needle": {"full": needle, "sparse": needle},
        },
        "lm_eval": {"piqa": {"full": {"acc": 0.75, "acc_stderr": 0.1}, "sparse": {"acc": 0.5}}},
    }  # fmt: skip


def test_name_has_step_length_blocks_rope_and_differs_with_any_setting():
    name = result_name(SETTINGS)
    assert name.startswith("step_00000100_length4096_B16_S8_") and len(name.rpartition("_")[2]) == 8
    stretched = SETTINGS | {"model.rope_scaling": {"enabled": True, "factor": 8.0}}
    assert result_name(stretched).startswith("step_00000100_length4096_B16_S8_rope8_")
    names = {result_name(SETTINGS | {key: "another"}) for key in ("checkpoint", "data.fingerprint")}
    assert len(names | {name}) == 3
    assert result_name(SETTINGS | {"data.path": "moved/a"}) == name
    assert result_name(SETTINGS, "mine") == "mine"


def test_only_the_same_evaluation_may_use_a_name(tmp_path: Path):
    (tmp_path / "evaluations").mkdir()
    require_own(tmp_path, "one", SETTINGS)
    path = tmp_path / "evaluations" / "one.json"
    path.write_text(json.dumps({"settings": SETTINGS}))
    require_own(tmp_path, "one", SETTINGS | {"data.path": "moved"})
    for content, differing in ((json.dumps({"settings": SETTINGS | {"step": 5}}), "step"), ("{", ", ".join(SETTINGS))):
        path.write_text(content)
        with pytest.raises(ConfigError) as caught:
            require_own(tmp_path, "one", {key: value for key, value in SETTINGS.items() if key != "data.path"})
        wanted = differing.replace("data.path, ", "")
        assert f"evaluation.name=one names another evaluation's results ({path} differs in {wanted}); try one_2" in str(
            caught.value
        )


def test_table_has_every_metric_and_what_differs_from_training():
    lines = [" ".join(line.split()) for line in table(result()).splitlines()]
    assert lines[:3] == [
        "step 100, 8 held-out rows of 4,096 tokens, blocks of 16, top 8",
        "attention.top_k: 8 (trained with 16)",
        "full sparse",
    ]
    assert lines[3:] == [
        "cross entropy (nats) 3.0000 3.5000",
        "perplexity per token 20.0000 20.0000",
        "perplexity per word 123456. 123456.",
        "captured mass 0.6000 0.6000",
        "attention entropy (nats) 2.5000 2.5000",
        "arc: acc 0.2500 0.2500",
        "needle: accuracy 0.5000 0.5000",
        "lm_eval piqa: acc 0.7500 0.5000",
    ]


def test_positions_are_means_over_the_labels_of_their_bucket():
    assert buckets(metrics(3.0)) == [(1, 3.0), (4, 2.0)]


def test_figure_has_the_panels_that_have_values(tmp_path: Path):
    from matplotlib.image import imread

    plot(result(), tmp_path / "all.png")
    plot(result() | {"heads": {"full": {}, "sparse": {}}, "tasks": {}}, tmp_path / "few.png")
    (high, wide, _), (low, same, _) = (imread(tmp_path / name).shape for name in ("all.png", "few.png"))
    assert wide == same and high == 4 * low


def test_wandb_gets_every_metric_in_a_run_beside_the_training(tmp_path: Path):
    kinds = [(record["kind"], record.get("task"), record["mode"]) for record in records(result())]
    assert kinds[:2] == [("evaluation", None, "full"), ("evaluation", None, "sparse")]
    assert kinds[2:] == [("task", task, mode) for task in ("arc", "needle", "piqa") for mode in ("full", "sparse")]
    logging = LoggingConfig()
    logging.wandb.mode = WandbMode.offline
    lines: list[str] = []
    run = SimpleNamespace(config=SimpleNamespace(name="mine", logging=logging), print=lines.append)
    show(run, result(), tmp_path / "one.json")
    (row,) = history(tmp_path / "one.wandb")
    assert row["heldout/sparse/cross_entropy"] == 3.5 and row["heldout/full/captured_mass"] == pytest.approx(0.6)
    assert row["task/arc/full/acc"] == 0.25 and row["task/piqa/sparse/acc"] == 0.5 and row["heldout_step"] == 100
    assert len(lines) == 1 and lines[0].startswith("W&B wrote offline")
    assert (tmp_path / "one.png").is_file()
