"""Reports from prepared result files: what each measure reads, means and pairs over seeds, unfinished and failed jobs, every recipe's report."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from ssa_pretrain.config import Config, TrainingConfig
from ssa_pretrain.experiments import measures
from ssa_pretrain.experiments.contents import Evidence, contents, state_of
from ssa_pretrain.experiments.jobs import BenchJob, EvaluationJob, TrainJob
from ssa_pretrain.experiments.recipe import Bench, Claim, Comparison, Measure, Panel, Recipe, Setting, Table, below
from ssa_pretrain.experiments.recipes import RECIPES
from ssa_pretrain.experiments.report import write_report
from ssa_pretrain.experiments.results import RunResult
from ssa_pretrain.experiments.sizes import METHODS, SIZES
from ssa_pretrain.experiments.verdicts import Verdict

STEPS = 8


def write_run(
    out: Path, setting: str, seed: int, *, loss: float, steps: int = STEPS, checkpoint: bool = True
) -> TrainJob:
    """Writes a run that has got to `steps` of STEPS steps; its losses at step n in full and sparse mode are loss + 1/n and 0.1 more."""
    name = f"{setting}_{seed}"
    config = Config(name=name, training=TrainingConfig(steps=STEPS, global_batch_tokens=10))
    job = TrainJob(name, out, setting=setting, seed=seed, config=config)
    job.folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        norm = 1.0 + (0.5 * loss) * (step % 2)
        head = {"step": step, "tokens": 10 * step}
        lines.append(
            {"kind": "train", **head, "cross_entropy": loss + 0.01 * (step % 3), "grad_norm": norm, "seconds": 0.5}
        )
        if step % 4 == 0:
            for mode, more in (("full", 0.0), ("sparse", 0.1)):
                layers = [0.5 + loss / 100, 0.7 + loss / 100]
                values = {
                    "cross_entropy": loss + 1 / step + more,
                    "captured_mass": sum(layers) / 2,
                    "captured_mass_by_layer": layers,
                }
                values |= {"attention_entropy": 3.0 - loss, "attention_entropy_by_layer": [2.0, 4.0 - 2 * loss]}
                lines.append({"kind": "evaluation", **head, "split": "heldout", "mode": mode, **values})
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if steps == STEPS and checkpoint:
        record = job.folder / "checkpoints" / f"step_{STEPS:08d}" / "checkpoint.json"
        record.parent.mkdir(parents=True)
        record.write_text("{}")
    return job


def write_evaluation(job: TrainJob, name: str, step: int = STEPS, **parts: Any) -> None:
    folder = job.folder / "evaluations"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"step": step, "modes": {}, "heads": {}, "tasks": {}, **parts}))


def small_recipe(**more: Any) -> Recipe:
    return Recipe(name="small", title="A small one", about="About.", settings=[Setting("a"), Setting("b")], **more)


def report_of(recipe: Recipe, runs: list[TrainJob], **more: Any) -> dict[str, Any]:
    return contents(Evidence(recipe, runs, more.get("evaluations", ()), more.get("benches", ())), "command")


def test_table_uses_the_newest_step_that_all_begun_seeds_have(tmp_path) -> None:
    runs = [write_run(tmp_path, "a", 1, loss=1.0), write_run(tmp_path, "a", 2, loss=2.0, steps=6)]
    runs += [write_run(tmp_path, "a", 3, loss=9.0, steps=2), write_run(tmp_path, "b", 1, loss=3.0)]
    table = report_of(small_recipe(tables=[Table("T", [measures.FULL, measures.GAP, measures.MASS])]), runs)["tables"][
        0
    ]
    first, second = table["rows"]
    assert (first["setting"], first["step"], first["seeds"]) == ("a", 4, 2), "the third seed has no evaluation yet"
    assert first["values"][0] == pytest.approx([1.25, 2.25]) and first["cells"][0]["mean"] == pytest.approx(1.75)
    assert first["cells"][0]["error"] == pytest.approx(0.5) and first["cells"][1]["mean"] == pytest.approx(0.1)
    assert (second["step"], second["cells"][0]["count"]) == (8, 1) and second["cells"][2]["mean"] == pytest.approx(0.63)


def test_comparisons_pair_seeds_at_equal_steps_and_claims_need_finished_runs(tmp_path) -> None:
    losses = {"a": (1.0, 2.0, 3.0), "b": (1.2, 2.21, 3.19)}
    runs = [write_run(tmp_path, s, seed, loss=x) for s, ones in losses.items() for seed, x in enumerate(ones, start=1)]
    recipe = small_recipe(
        comparisons=[Comparison("a", "b", [measures.SPARSE])],
        claims=[
            Claim("a is below b", [below(measures.SPARSE, "a", "b")]),
            Claim("b is below a", [below(measures.FULL, "b", "a")]),
        ],
    )
    found = report_of(recipe, runs)
    assert [row["step"] for row in found["comparisons"][0]["rows"]] == [4, 8]
    cell = found["comparisons"][0]["rows"][1]["cells"][0]
    assert cell["mean"] == pytest.approx(-0.2) and cell["error"] == pytest.approx(0.01 / 3**0.5) and cell["count"] == 3
    assert [claim["verdict"] for claim in found["claims"]] == ["holds", "does not hold"]
    assert found["claims"][0]["tests"][0]["values"] == pytest.approx([-0.2, -0.21, -0.19])
    unfinished = [replace_steps(run, 2 * STEPS) if run.setting == "a" else run for run in runs]
    assert {claim["verdict"] for claim in report_of(recipe, unfinished)["claims"]} == {Verdict.cannot_be_told}


def replace_steps(run: TrainJob, steps: int) -> TrainJob:
    training = replace(run.config.training, steps=steps)
    return TrainJob(
        run.name, run.out, setting=run.setting, seed=run.seed, config=replace(run.config, training=training)
    )


def test_evaluations_count_only_at_the_last_step(tmp_path) -> None:
    run = write_run(tmp_path, "a", 1, loss=1.0)
    write_evaluation(run, "new", modes={"sparse": {"cross_entropy": 0.5}}, bound={"full": {"gap_by_layer": [1.0, 3.0]}})
    write_evaluation(run, "old", step=4, modes={"sparse": {"cross_entropy": 0.5}})
    write_evaluation(run, "hay", tasks={"needle": {"full": {"metrics": {"accuracy": 0.25}}}})
    (run.folder / "evaluations" / "broken.json").write_text("{")
    result = run.result
    assert measures.evaluated("new", "sparse", "x", "cross_entropy").value(result, 8) == 0.5
    assert measures.evaluated("old", "sparse", "x", "cross_entropy").value(result, 8) is None
    assert measures.evaluated("new", "full", "x", "cross_entropy").value(result, 8) is None
    assert measures.layer_mean("new", "full", "x", "bound", "gap_by_layer").value(result, 8) == 2.0
    assert measures.by_layer("new", "full", "bound", "gap_by_layer")(result) == [(1.0, 1.0), (2.0, 3.0)]
    assert measures.evaluated("hay", "full", "x", "tasks", "needle", "metrics", "accuracy").value(result, 8) == 0.25
    assert measures.by_evaluation([(1.0, "new"), (2.0, "old")], "sparse", "cross_entropy")(result) == [(1.0, 0.5)]
    job = EvaluationJob(
        "a_1.evaluations",
        tmp_path,
        run=run,
        evaluations=[_evaluation("new"), _evaluation("old"), _evaluation("broken")],
    )
    assert [e.name for e in job.missing] == ["old", "broken"] and state_of(job)["state"] == "1 of 3 evaluations"
    assert job.command[3:] == [str(run.folder), "--", "old", "k=1", "--", "broken", "k=1"]


def _evaluation(name: str) -> Any:
    from ssa_pretrain.experiments.recipe import Evaluation

    return Evaluation(name, ("k=1",))


def test_stability_is_the_variance_over_the_last_half(tmp_path) -> None:
    import math
    from statistics import variance

    result = write_run(tmp_path, "a", 1, loss=2.0).result  # norms 2, 1, 2, 1 at steps 5 to 8
    assert measures.NORM_VARIANCE.value(result, 8) == pytest.approx(variance([math.log(x) for x in (2, 1, 2, 1)]))
    flat = RunResult(
        "b", 1, tmp_path, 4, [{"kind": "train", "step": i, "cross_entropy": 1.0, "grad_norm": 1.0} for i in range(1, 5)]
    )
    steep = RunResult(
        "b", 1, tmp_path, 8, [{"kind": "train", "step": i, "cross_entropy": 1.0 - i} for i in range(1, 9)]
    )
    jumpy = RunResult(
        "b", 1, tmp_path, 8, [{"kind": "train", "step": i, "cross_entropy": 1.0 + i % 2} for i in range(1, 9)]
    )
    lost = RunResult("b", 1, tmp_path, 2, [{"kind": "train", "step": i, "grad_norm": math.inf} for i in (2, 3)])
    assert measures.NORM_VARIANCE.value(flat, 4) == 0.0 and measures.NORM_VARIANCE.value(lost, 2) == math.inf
    assert measures.LOSS_VARIANCE.value(jumpy, 8) == pytest.approx(0.25)
    assert measures.LOSS_VARIANCE.value(steep, 8) == pytest.approx(0.25), (
        "a steady fall of 1 per step leaves half a step"
    )


def test_failed_jobs_are_reported_with_their_reason_and_lose_no_others(tmp_path) -> None:
    good, bad = write_run(tmp_path, "a", 1, loss=1.0), write_run(tmp_path, "b", 1, loss=1.0, steps=3)
    bad.log.write_text("starting\nloss is not finite\n")
    bad.ended(6)
    unsaved = write_run(tmp_path, "b", 2, loss=1.0, checkpoint=False)
    recipe = small_recipe(
        tables=[Table("T", [measures.FULL])],
        panels=[Panel("P", "x", "y", measures.over_training("cross_entropy", "full"))],
    )
    path = write_report(Evidence(recipe, [good, bad, unsaved], (), ()), tmp_path, "the command")
    text, content = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    assert [job["state"] for job in content["jobs"]] == ["done", "failed with exit code 6", "at step 8 of 8"]
    assert "loss is not finite" in text and "| a | 1 | 8 | 1.1250 |" in text and "the command" in text
    assert imread(path.with_suffix(".png")).shape[1] > 500
    record = bad.folder / "metrics.jsonl"
    record.write_text((good.folder / "metrics.jsonl").read_text())
    (bad.folder / "checkpoints" / f"step_{STEPS:08d}").mkdir(parents=True)
    (bad.folder / "checkpoints" / f"step_{STEPS:08d}" / "checkpoint.json").write_text("{}")
    bad.ended(0)
    assert bad.failure is None and not (tmp_path / "b_1.failed").exists()


RESULTS = """case,model,variant,ms,spread,tokens_per_second_per_gpu,model_tflops_per_gpu,mfu,peak_gib,world_size,device,versions,command
methods,llama_75m,share full 8192,20,0.01,100,,,1,1,GPU,torch,bench
methods,llama_75m,share moba 8192,10,0.01,200,,,1,1,GPU,torch,bench
methods,llama_75m,"share ssa r=1 8192, main full",{ssa},0.01,100,,,1,1,GPU,torch,bench
methods,llama_75m,share ssa r=1 8192,{ssa},0.01,100,,,1,1,GPU,torch,bench
"""


@pytest.mark.parametrize(("ssa", "verdict"), [(11.4, "holds"), (11.7, "cannot be told"), (12.5, "does not hold")])
def test_overhead_is_judged_with_the_spread_of_its_times(tmp_path, ssa, verdict) -> None:
    job = BenchJob("bench_x", tmp_path, bench=Bench("x", ("cases=methods",)))
    folder = tmp_path / "bench_x.unfinished"
    folder.mkdir()
    (folder / "results.csv").write_text(RESULTS.format(ssa=ssa))
    (folder / "parts.csv").write_text("variant,part,ms\nshare moba 8192,selection,2.5\n")
    assert not job.is_done
    job.ended(0)
    assert job.is_done and not folder.exists()
    found = report_of(RECIPES["overhead"](SIZES["75m"]), [], benches=[job])
    assert found["claims"][0]["verdict"] == verdict
    rows = found["benches"][0]["rows"]
    assert [row["variant"] for row in rows] == ["full 8192", "moba 8192", "ssa r=1 8192"]
    assert rows[2]["over_moba"] == pytest.approx(ssa / 10) and rows[1]["parts"] == {"selection": 2.5}
    path = write_report(Evidence(RECIPES["overhead"](SIZES["75m"]), [], [], [job]), tmp_path, "c")
    assert "| moba 8192 | 10.00 | 1.0% | 1.000 | 0.500 |" in path.read_text()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_report_of_all_or_nothing(tmp_path, name, size) -> None:
    recipe = RECIPES[name](SIZES[size])
    assert recipe.name == name and len({s.name for s in recipe.settings}) == len(recipe.settings)
    assert len({e.name for e in recipe.evaluations}) == len(recipe.evaluations)
    names = {setting.name for setting in recipe.settings}
    mentioned = {x for c in recipe.comparisons for x in (c.first, c.second)} | {
        x for e in recipe.evaluations for x in e.settings
    }
    assert mentioned <= names
    jobs = [TrainJob(f"{s}_1", tmp_path, setting=s, seed=1, config=Config()) for s in names]
    empty = report_of(recipe, jobs)
    assert all(claim["verdict"] == "cannot be told" for claim in empty["claims"])
    assert not any(table["rows"] for table in empty["tables"]) and not any(p["curves"] for p in empty["panels"])
    runs = [
        write_run(tmp_path, s.name, seed, loss=1.0 + 0.1 * i + 0.01 * seed)
        for i, s in enumerate(recipe.settings)
        for seed in (1, 2)
    ]
    layers = {f"{key}_by_layer": [0.1, 0.2] for key in ("gap", "bound", "dropped_mass", "violations", "largest_ratio")}
    both = {mode: {"cross_entropy": 1.0, "captured_mass_by_layer": [0.5, 0.6]} for mode in ("full", "sparse")}
    needles = {"needle": {mode: {"metrics": {"accuracy": 0.5}} for mode in ("full", "sparse")}}
    for run in runs:
        for evaluation in recipe.evaluations_of(run.setting):
            write_evaluation(run, evaluation.name, modes=both, bound={"full": layers}, tasks=needles)
    full = report_of(recipe, runs)
    for table in full["tables"]:
        assert table["rows"], table["title"]
        cells = [cell for row in table["rows"] for cell in row["cells"]]
        assert any(cells), f"{table['title']} reads nothing that runs write"
    assert all(panel["curves"] for panel in full["panels"])
    for claim in full["claims"]:
        for test in claim["tests"]:
            assert len(test["values"]) == 2, f"{claim['text']}: {test['label']}"


@pytest.mark.parametrize(("ssa", "verdict"), [(0.0, "cannot be told"), (0.5, "holds"), (0.01, "does not hold")])
def test_needles_that_nobody_finds_say_nothing(tmp_path, ssa, verdict) -> None:
    recipe = RECIPES["length"](SIZES["tiny"])
    runs = [write_run(tmp_path, name, seed, loss=1.0) for name in ("full", "ssa") for seed in (1, 2)]
    for run in runs:
        found = {"needle": {"full": {"metrics": {"accuracy": ssa if run.setting == "ssa" else 0.0}}}}
        for evaluation in recipe.evaluations:
            write_evaluation(run, evaluation.name, tasks=found)
    claims = {claim["text"]: claim["verdict"] for claim in report_of(recipe, runs)["claims"]}
    assert next(found for text, found in claims.items() if "needles" in text) == verdict


def test_methods_are_those_that_the_configuration_knows() -> None:
    assert {"full", "moba", "ssa"} <= set(METHODS)
    assert [setting.name for setting in SIZES["75m"].methods()] == list(METHODS)


def test_a_measure_without_a_value_leaves_its_column_out(tmp_path) -> None:
    run = write_run(tmp_path, "a", 1, loss=1.0)
    nothing = Measure("nothing", lambda run, step: None)
    path = write_report(
        Evidence(small_recipe(tables=[Table("T", [measures.FULL, nothing])]), [run], (), ()), tmp_path, "c"
    )
    assert "nothing" not in path.read_text() and "full mode" in path.read_text()
