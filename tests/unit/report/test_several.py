"""The page of several runs, and the cards that it shares with the page of one: goodput, tasks, health."""

import json
import re
import sys
from pathlib import Path

import pytest

from ssa_pretrain.config import Config
from ssa_pretrain.errors import UsageError
from ssa_pretrain.incidents import ROLLED_BACK, WENT_ON, Incident, write_incident
from ssa_pretrain.monitor.names import AXES, GROUPS, METRICS
from ssa_pretrain.monitor.timeline import Timeline
from ssa_pretrain.monitor.tracking_rows import flatten
from ssa_pretrain.report.__main__ import main
from ssa_pretrain.report.health import MOST_SHOWN, RunHealth
from ssa_pretrain.report.page import page
from ssa_pretrain.report.several import names_of
from ssa_pretrain.report.several import page as several_page
from ssa_pretrain.report.summary import ReportError, read_summary
from ssa_pretrain.report.workspace import NOT_DRAWN, workspace
from ssa_pretrain.report.workspace import main as save_workspace
from ssa_pretrain.run_folder import lock_folder
from ssa_pretrain.settings.convert import save_config
from ssa_pretrain.settings.files import unlock


def train(step: int, **more: object) -> dict:
    losses = {"cross_entropy": 5.0 - step / 10, "alignment_loss": 0.1, "grad_norm": 1.0}
    layers = {"captured_mass": 0.8, "captured_mass_by_layer": [0.7, 0.9]}
    return {"kind": "train", "step": step, "tokens": 100 * step, **losses, **layers, "seconds": 2.0} | more


def evaluation(step: int, mode: str) -> dict:
    values = {"cross_entropy": 4.0, "perplexity": 54.6, "captured_mass": 0.6, "captured_mass_by_layer": [0.5, 0.7]}
    return {"kind": "evaluation", "step": step, "tokens": 100 * step, "split": "heldout", "mode": mode, **values}


def task(step: int, mode: str, accuracy: float) -> dict:
    values = {"acc": 0.1, "acc_norm": accuracy, "acc_norm_stderr": 0.02, "num_questions": 9}
    return {"kind": "task", "step": step, "tokens": 100 * step, "task": "arc <x>", "mode": mode, **values}


def write(folder: Path, records: list[dict], **settings: float) -> Path:
    folder.mkdir(parents=True)
    config = Config(name=folder.name)
    for key, value in settings.items():
        setattr(config.optim, key, value)
    save_config(config, folder / "config.yaml")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """A run with everything, and one of an older version that has trained with another learning rate, without sparse attention."""
    records = [train(s) for s in range(1, 31)]
    records[6] |= {"skipped": True, "skip_reason": "not finite", "cross_entropy": None}
    records[7] |= {"skipped": True, "skip_reason": "not finite", "cross_entropy": None}
    records[20] |= {"spike": "sparse", "spike_cross_entropy": 9.5, "spike_deviations": 12.0}
    records += [evaluation(30, mode) for mode in ("full", "sparse")]
    records += [task(step, mode, step / 100) for step in (10, 30) for mode in ("full", "sparse")]
    records.append({"kind": "failed_save", "step": 24, "reason": "step 24 could not be saved in /full"})
    first = write(tmp_path / "a" / "run", records)
    for step, decision in ((15, ROLLED_BACK), (21, WENT_ON)):
        write_incident(
            first,
            Incident(
                step=step,
                stream="full",
                cross_entropy=8.0,
                median=4.0,
                deviation=0.1,
                threshold=8.0,
                decision=decision,
                reason="" if decision == ROLLED_BACK else "the run has no checkpoint yet",
                checkpoint_step=10,
                skipped_steps=[11, 15] if decision == ROLLED_BACK else [],
                skipped_rows=[],
                time=0.0,
            ),
        )
    checkpoint = first / "checkpoints" / "step_00000030"
    checkpoint.mkdir(parents=True)
    (checkpoint / "health.json").write_text('{"skipped": 5, "skipped_in_a_row": 0}')
    (first / "hang.txt").write_text("2026-11-29 10:00:00 hang: rank 1 does not move\n  rank 1: training step 4\n")
    timeline = Timeline(first)
    timeline.begin(0)
    timeline.enter("training", 0)
    timeline.end("finished", 30)
    bare = [train(s, alignment_loss=None, captured_mass=None, captured_mass_by_layer=[]) for s in range(1, 31)]
    second = write(tmp_path / "b" / "run", [*bare, evaluation(30, "full")], lr=0.5)
    return first, second


def test_page_of_one_run_shows_goodput_tasks_and_health(runs: tuple[Path, Path]) -> None:
    summary = read_summary(runs[0])
    html = page(summary)
    assert summary.health.sentence() == "5 skipped steps, 2 loss spikes, 1 rollback, 1 failed save, 1 hang"
    for shown in (
        "7 to 8",
        "back to step 10, without the data of steps 11 to 15",
        "the run has no checkpoint yet",
        "step 24 could not be saved in /full",
        "rank 1 does not move",
        "arc &lt;x&gt;",
        "0.300 ± 0.020",
        "Where the time went",
        "goodput: share of the time that trained",
        "ended (finished) 20",
    ):
        assert shown in html, shown
    assert "sparse cross entropy 9.500" not in html, "a spike with a decision is shown once"
    assert "<x>" not in html
    # Two evaluations of the task: a chart with two lines of two points.
    assert html.count("arc &lt;x&gt;: acc_norm</text>") == 1 and "full: 0.3 at 3.00k tokens" in html


def test_page_of_several_runs(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    main([*map(str, runs)])
    out = capsys.readouterr().out
    assert "| a/run | 3,000 | sparse | 4.0000 | 54.60 | 0.600 |" in out, "folders of the same name are told apart"
    assert out.endswith(f"report: {runs[0] / 'comparison.html'}\n")
    html = (runs[0] / "comparison.html").read_text()
    assert "<script" not in html and "src=" not in html
    assert html.count("Captured mass by layer: ") == 2, "without sparse attention, from held-out text"
    assert "Measured in training." in html and "Measured on held-out text, full attention." in html
    for cells in (
        ("optim.lr", "0.001", "0.5"),
        ("arc &lt;x&gt;", "acc_norm", "0.300 ± 0.020", "0.300 ± 0.020", "–", "–"),
    ):
        position = 0
        for cell in cells:
            position = html.find(f">{cell}<", position)
            assert position >= 0, cell
    assert "no skipped step, spike, rollback, failed save or hang" in html and "optim.min_lr" not in html
    assert html.count('class="a" d="M') > 3 and html.count('class="b" d="M') > 2, "a colour per run"


def test_a_running_run_without_any_step_has_a_place_on_the_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    started = write(tmp_path / "c", [])
    html = several_page([("a", read_summary(runs[0])), ("c", read_summary(started))])
    assert ">c<" in html


def test_report_knows_whether_a_run_is_running_or_was_killed(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", [train(1)])
    Timeline(folder).begin(0)
    held = lock_folder(folder)
    assert held is not None
    assert "still running, last line" in page(read_summary(folder))
    unlock(held)
    assert "was killed 20" in page(read_summary(folder))


def test_results_of_evaluate_count_for_tasks(runs: tuple[Path, Path]) -> None:
    """A task of training that `evaluate` ran later, and one of lm_eval."""
    metrics = {mode: {"metrics": {"acc": 0.9, "acc_norm": 0.8}} for mode in ("full", "sparse")}
    lm_eval = {"wikitext": {mode: {"word_perplexity": 123.4} for mode in ("full", "sparse")}}
    result = {"step": 30, "tokens": 3000, "tasks": {"arc <x>": metrics}, "lm_eval": lm_eval}
    (runs[0] / "evaluations").mkdir()
    (runs[0] / "evaluations" / "e.json").write_text(json.dumps(result))
    written = {"step": 30, "modes": {}, "details": "evaluations/e.json"}
    (runs[0] / "evaluation.json").write_text(json.dumps(written))
    rows = [task.row() for task in read_summary(runs[0]).tasks]
    assert rows == [
        ["arc <x>", "acc_norm", "0.800", "0.800", "30"],
        ["wikitext", "word_perplexity", "123.4", "123.4", "30"],
    ]


def test_many_events_are_cut_short() -> None:
    health = RunHealth(skipped=[(2 * step, "not finite") for step in range(40)])
    events = health.events()
    assert len(events) == MOST_SHOWN + 1 and events[0] == ("", "skipped", f"{40 - MOST_SHOWN} more before")
    assert events[-1][0] == "78"


def test_damaged_incident_is_reported(runs: tuple[Path, Path]) -> None:
    (runs[0] / "incidents" / "step_00000015.json").write_text("{")
    with pytest.raises(
        ReportError, match=r"step_00000015.json is not an incident record .*; restore it, or move it away"
    ):
        read_summary(runs[0])


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    assert names_of([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]
    assert names_of([tmp_path / "p" / "x", tmp_path / "q" / "x"]) == ["p/x", "q/x"]
    assert len(names_of([tmp_path / "x", tmp_path / "x"])) == 2


@pytest.mark.filterwarnings("ignore:Pydantic V1 style")
def test_workspace_has_a_panel_for_every_metric_that_a_run_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_workspace(["--entity", "lab", "--project", "p", "--out", str(tmp_path / "w.json")])
    assert capsys.readouterr().out == f"workspace: {tmp_path / 'w.json'}\n"
    stored = json.loads((tmp_path / "w.json").read_text())
    sections = stored["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == list(GROUPS.values())
    configs = [panel["config"] for section in sections for panel in section["panels"]]
    drawn = {name: config["xAxis"] for config in configs for name in config.get("metrics", ())}
    patterns = {config["metricRegex"]: config["xAxis"] for config in configs if "metricRegex" in config}
    samples = [
        train(1, loss=1.0, mfu=0.4, skipped=True),
        evaluation(2, "full"),
        evaluation(2, "sparse"),
        task(2, "full", 0.5),
    ]
    for record in samples:
        axis = AXES[record.get("split", record["kind"])]
        for name in flatten(record):
            if "/" not in name or name.rpartition("/")[2] in NOT_DRAWN:
                continue
            axes = [x for y, x in drawn.items() if y == name] + [x for y, x in patterns.items() if re.search(y, name)]
            assert axes == [axis], name
    known = {metric.stem for metric in METRICS}
    assert {name.rpartition("/")[2] for name in drawn} <= known
    media = [config["mediaKeys"] for config in configs if "mediaKeys" in config]
    assert media == [["heldout/full/captured_mass_map", "heldout/sparse/captured_mass_map"]]


def test_workspace_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(UsageError, match=r"try pip install 'ssa-pretrain\[trackers\]'"):
        workspace("e", "p")
