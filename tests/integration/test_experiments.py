"""A tiny recipe as a real command: it is killed on the way, takes its runs with it, and the same command goes on and reports."""

import json
import subprocess
import sys
import time
from pathlib import Path

from ssa_pretrain.experiments.results import RunResult
from support.processes import ROOT, environment
from support.training import descendants, is_alive, records

STEPS, EVERY = 24, 3  # the run must not come to its end before it is killed
SETTINGS = (
    "theorem",
    "size=tiny",
    "seeds=1",
    "--only=ssa",
    f"training.steps={STEPS}",
    f"evaluation.interval={STEPS // 2}",
)


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "ssa_pretrain.experiments", *SETTINGS, f"data.path={corpus}", f"out={out}", *more]


def test_killed_command_goes_on_and_reports(corpus, tmp_path) -> None:
    out = tmp_path / "out"
    log = (tmp_path / "log").open("w")
    first = subprocess.Popen(command(corpus, out), env=environment(), cwd=ROOT, stdout=log, stderr=log)
    run = out / "ssa_1"
    while not list((run / "checkpoints").glob("step_*/checkpoint.json")):
        assert first.poll() is None, "the command ended before its run had saved"
        time.sleep(0.02)
    family = descendants(first.pid)
    first.kill()
    first.wait()
    while any(map(is_alive, family)):
        time.sleep(0.02)
    begun = RunResult("ssa", 1, run, STEPS).step
    assert EVERY <= begun < STEPS, "the run has ended with the command"

    done = subprocess.run(
        command(corpus, out), env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + (out / "ssa_1.log").read_text()
    lines = [json.loads(line) for line in (run / "timeline.jsonl").read_text().splitlines()]
    starts = [line["step"] for line in lines if line["event"] == "start"]
    assert starts[0] == 0 and starts[1] in range(EVERY, begun + 1, EVERY), "it goes on from its newest checkpoint"
    assert [record["step"] for record in records(run, "train")] == list(range(1, STEPS + 1))
    entropies = [r["attention_entropy_by_layer"] for r in records(run, "evaluation")]
    assert len(entropies) == 4 and all(len(layers) == 2 and min(layers) > 1 for layers in entropies)
    bound = json.loads((run / "evaluations" / "theorem.json").read_text())["bound"]["full"]
    assert bound["violations_by_layer"] == [0.0, 0.0] and all(0 < x < 1 for x in bound["largest_ratio_by_layer"])
    report = (out / "report_theorem.md").read_text()
    assert "2 of 2 done" in report and f"| ssa | 1 | {STEPS} |" in report and "cannot be told" in report
    assert (out / "report_theorem.png").stat().st_size > 10_000
    assert json.loads((out / "report_theorem.json").read_text())["tables"][0]["rows"][0]["setting"] == "ssa"
