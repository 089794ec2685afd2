"""From the command line to jobs and estimates: shared runs, resolved settings, what is refused, device time and memory."""

import json
from pathlib import Path

import pytest

from ssa_pretrain.errors import ExitCode, UsageError
from ssa_pretrain.experiments.__main__ import main
from ssa_pretrain.experiments.devices import Device, planned
from ssa_pretrain.experiments.estimates import START_SECONDS, Estimates
from ssa_pretrain.experiments.options import read_options
from ssa_pretrain.experiments.planning import plan
from ssa_pretrain.experiments.sizes import METHODS
from ssa_pretrain.planning.estimate import GIB
from ssa_pretrain.settings.convert import save_config
from ssa_pretrain.settings.problems import ConfigError


def planned_jobs(tmp_path: Path, *words: str):
    return plan(read_options([*words, f"out={tmp_path}", "--dry-run"]))


def test_recipes_share_runs_and_every_setting_resolves(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    found = planned_jobs(tmp_path, "switching", "selection", "theorem", "seeds=1,2", "training.steps=384")
    names = [run.name for run in found.runs]
    assert names == [f"{s}_{seed}" for seed in (1, 2) for s in (*METHODS, "ssa_official")], (
        "the first seed of all comes first"
    )
    official = next(run for run in found.runs if run.name == "ssa_official_2")
    assert official.config.attention.score == "official_compat" and official.steps == 384 and official.config.seed == 2
    assert official.overrides[-3:] == ["seed=2", "name=ssa_official_2", f"output_dir={tmp_path}/ssa_official_2"]
    assert (
        "logging.wandb.group=selection" in official.overrides and "logging.wandb.mode=online" not in official.overrides
    )
    moba = next(run for run in found.runs if run.name == "moba_1").config
    assert (moba.attention.method, moba.attention.top_k, moba.data.path) == ("moba", 16, "data/debian_8k")
    by_run = {job.run.name: [e.name for e in job.evaluations] for job in found.evaluations}
    assert by_run["ssa_1"] == ["select_exact", "select_official", "theorem"] and by_run["full_2"] == ["theorem"]
    only = planned_jobs(tmp_path, "switching", "--only=moba", "seeds=3")
    assert [run.name for run in only.runs] == ["moba_3"]


def test_key_of_wandb_turns_it_on(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    run = planned_jobs(tmp_path, "switching", "--only=ssa", "seeds=1").runs[0]
    assert run.config.logging.wandb.mode == "online" and run.config.logging.wandb.group == "switching"


def test_mistakes_are_found_before_anything_starts(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"full:optim\.lrr"):
        planned_jobs(tmp_path, "switching", "optim.lrr=1")
    with pytest.raises(UsageError, match="--only=mob must be among full, moba"):
        planned_jobs(tmp_path, "switching", "--only=mob")
    run = planned_jobs(tmp_path, "switching", "--only=ssa", "seeds=1").runs[0]
    run.folder.mkdir()
    save_config(run.config, run.folder / "config.yaml")
    planned_jobs(tmp_path, "switching", "--only=ssa", "seeds=1", "logging.interval=5")
    with pytest.raises(
        UsageError, match=r"holds the run ssa_1 with training\.steps=768, and this command has 384; try another out="
    ):
        planned_jobs(tmp_path, "switching", "--only=ssa", "seeds=1", "training.steps=384")


def test_estimates_are_the_planners_until_something_is_measured(tmp_path) -> None:
    found = planned_jobs(tmp_path, "switching", "length", "seeds=1")
    moba, ssa = (next(run for run in found.runs if run.setting == s) for s in ("moba", "ssa"))
    alone, four = (Estimates(found.runs, planned("h200", "")[0], shared, None) for shared in (1, 4))
    assert 300 < alone.seconds(ssa) < 700 and alone.seconds(ssa) < four.seconds(ssa) < 4 * alone.seconds(ssa)
    assert 4 < four.memory(ssa) / GIB < 8
    evaluation = next(job for job in found.evaluations if job.run is ssa)
    assert four.memory(evaluation) > 2 * four.memory(ssa), "rows four times as long"
    assert Estimates(found.runs, Device("cpu"), 1, None).memory(ssa) == 0
    ssa.folder.mkdir()
    lines = [{"kind": "train", "step": i, "seconds": 2.0} for i in range(1, 101)]
    (ssa.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert four.step_seconds(ssa) == 2.0 and four.step_seconds(moba) < 1.0
    assert four.seconds(ssa) == pytest.approx(START_SECONDS + 668 * 2.0, rel=0.1)


def test_dry_run_prints_jobs_and_totals_and_starts_nothing(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    words = ["overhead", "theorem", f"out={out}", "seeds=1", "--dry-run", "--hardware=h200", "--gpus=0,1"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    text = capsys.readouterr().out
    assert ended.value.code == ExitCode.DONE and not out.exists()
    assert "| ssa_1 | not begun |" in text and "768 steps of 65,536 tokens" in text
    assert "minutes on 2 x NVIDIA H200, 4 jobs at once on each" in text
    with pytest.raises(SystemExit) as ended:
        main(["theorem", "size=big"])
    assert ended.value.code == ExitCode.CONFIGURATION
    assert capsys.readouterr().err == "experiments: size=big must be 75m or tiny\n"


def test_report_of_nothing(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["switching", f"out={tmp_path}", "seeds=1", "--report"])
    assert ended.value.code == ExitCode.DONE and "| ssa_1 | not begun |" in capsys.readouterr().out
