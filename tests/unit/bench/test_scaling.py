"""benchmarks/scaling: what it would measure, how it reads a trace, how it judges, and what it keeps when something fails."""

import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.scaling import jobs
from benchmarks.scaling.__main__ import main
from benchmarks.scaling.cases import SIZES, Case, Job, case_config, scaling, two_gpus, with_equal_share
from benchmarks.scaling.exchange import parts
from benchmarks.scaling.jobs import Host, last_error, run_jobs
from benchmarks.scaling.judged import checks
from benchmarks.scaling.tables import page, plot, write

H200 = "NVIDIA H200"
ABOUT = {"date": "d", "device": "8 x H200", "cores": 1, "versions": {"torch": "2"}, "commit": "c"}
ABOUT |= {"command": "python -m benchmarks.scaling", "seconds": {"speed": 1.0}}


def result(layout: str, speed: float, *, variant: str = "ssa", length: str = "8k", **more) -> dict:
    values = {"case": f"{layout}, {length}", "layout": layout, "length": length, "gpus": 1, "variant": variant}
    numbers = {"microbatches": 8, "ms": 10.0, "tokens_per_second": speed, "mfu": 0.5, "planned_gib": 10.0}
    return values | numbers | {"device": H200, "spread": 0.0, "peak_gib": 10.0} | more


def test_dry_run_lists_every_layout_with_a_plan_that_the_rules_accept(capsys):
    assert main(["--dry-run", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    for layout in ("dp8", "tp2 dp4", "pp2 dp4", "pp2 vpp2 dp4", "tp2 pp2 dp2", "dp8 zero2"):
        assert f"| speed | {layout} | 8k | 8 |" in text
    for layout in ("one GPU | 32k | 1", "dp2 | 32k | 2", "dp4 | 32k | 4", "cp2 dp4 | 32k | 8", "cp4 dp2 | 32k | 8"):
        assert f"| speed | {layout} |" in text
    assert "| save | tp2 pp2 dp2 | 8k | 8 |" in text and "| restart |" in text and "at most 470 s" in text
    row = r"\| speed \| dp8 \| 8k \| 8 \| 8 \| 1,048,576 \| [\d.]+ \| [\d,]+ \| ssa, full, ssa r=1/4 \|"
    assert re.search(row, text), "with the planned memory and time"


@pytest.mark.parametrize("arguments", [["--parts", "sped"], ["--suite", "two_gpus", "--parts", "restart"]])
def test_unknown_part_is_refused(arguments, capsys):
    assert main(arguments) == 3
    assert capsys.readouterr().err.startswith(f"--parts={arguments[-1]} must be among speed")


def test_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["--gpus", "1", "--out", str(tmp_path), "--scratch", str(tmp_path / "file" / "scratch")]) == 3
    assert capsys.readouterr().err.startswith("--out and --scratch must be folders that can be written: ")


def test_wrong_option_is_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--gpus", "3"])
    assert left.value.code == 3 and re.fullmatch("benchmarks.scaling: argument --gpus: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_smaller_hosts_have_the_layouts_that_fit(gpus):
    found = [case for listed in scaling(gpus).values() for job in listed for case in job.cases]
    assert all(case.gpus <= gpus for case in found) and len({case.name for case in found}) == len(found)
    layouts = {case.layout for case in found}
    assert ("tp2 pp2" in layouts) == (gpus == 4) and ("cp2" in layouts) == (gpus == 2)


def test_batches_and_overlap_of_layouts():
    """Weak scaling gives each GPU the same tokens; gradients are reduced during the backward wherever ranks share weights."""
    cases = {case.name: case for listed in two_gpus().values() for job in listed for case in job.cases}
    for name, replicas in (("tp2, 8k", 1), ("cp2, 32k", 2), ("dp2, 32k", 2)):
        fixed = case_config(cases[name], SIZES["1b_half"], 2)
        weak = with_equal_share(fixed, cases[name], SIZES["1b_half"])
        assert weak.training.global_batch_tokens == 2 * 65_536 and fixed.training.global_batch_tokens == 65_536
        assert fixed.engine.overlap_grad_reduce == fixed.engine.overlap_param_gather == (replicas > 1)
        assert Case.from_json(json.loads(json.dumps(cases[name].to_json()))) == cases[name]


def kernel(name: str, begin: float, duration: float, *, stream: int = 7, launch: int | None = None) -> dict:
    found = {"ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": duration, "tid": stream}
    return found | ({"args": {"correlation": launch}} if launch is not None else {})


def launch(number: int, thread: int) -> dict:
    name = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": number, "dur": 1.0, "tid": thread}
    return name | {"args": {"correlation": number}}


def test_exposed_time_by_kind_direction_and_stream():
    gather, scatter = "ncclDevKernel_AllGather_RING_LL(x)", "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(x)"
    trace = [
        *(launch(1, 100), launch(2, 100), launch(3, 200), launch(4, 200), launch(5, 200)),
        kernel(gather, 0, 1000, stream=20, launch=1),  # nothing runs beside it
        kernel("gemm", 1000, 1000, launch=2),
        kernel(scatter, 1500, 1500, stream=20, launch=3),  # 500 under the product, 500 alone, 500 beside the next
        kernel("gemm", 2500, 500, launch=4),
        kernel(gather, 2000, 2000, stream=24, launch=5),  # the scatter's wait counts once; alone from 3000 on
    ]
    found = {(p["kind"], p["direction"], p["stream"]): p for p in parts(trace)}
    assert list(found) == [
        ("all-gather", "forward", "20"),
        ("all-gather", "backward", "24"),
        ("reduce-scatter", "backward", "20"),
    ]
    exposed = {key: part["exposed"] for key, part in found.items()}
    assert list(exposed.values()) == pytest.approx([1.0, 1.0, 0.5])
    assert [part["busy"] for part in found.values()] == pytest.approx([1.0, 2.0, 1.5])
    assert parts([]) == []


def test_requirements_beside_one_gpu_the_plan_and_full_attention():
    results = [
        result("one GPU", 100.0, losses=[[2.0, 1.0]], fixed_tokens=8, fixed_tokens_per_second=50.0),
        result("one GPU", 125.0, variant="full"),
        result(
            "dp8",
            94.0,
            losses=[[2.02, 1.0]],
            fixed_tokens=8,
            fixed_tokens_per_second=40.0,
            peak_gib=12.0,
            planned_ms=9.5,
        )
        | {"exposed": 0.02, "hidden": 0.1, "idle": 0.0, "traced_ms": 100.0},
        result("dp8", 110.0, variant="full"),
        result("dp8", 95.0, variant="ssa r=1/4", exposed=0.05, hidden=0.1, idle=0.0, traced_ms=90.0),
        result("tp2 pp2 dp2", 76.0),
        result("the other GPU", 98.0),
    ]
    results[2]["parts"] = [
        {"kind": "all-gather", "direction": "forward", "stream": "20", "calls": 3, "busy": 5.0, "exposed": 2.0}
    ]
    found = {check.what: check for check in checks(results)}
    speed, sharded = (f"{name}, 8k: tokens/s per GPU over one GPU" for name in ("dp8", "tp2 pp2 dp2"))
    assert not found[speed].passed and found[sharded].passed
    assert not found["dp8, 8k: losses beside one GPU's"].passed
    assert found["dp8, 8k: planned memory"].value == pytest.approx(2 / 12)
    assert found["dp8, 8k: planned time"].value == pytest.approx(0.05) and found["dp8, 8k: planned time"].passed
    moved = found["dp8, 8k: ssa over full beside one GPU's"]
    assert moved.value == pytest.approx(abs(94 / 110 / 0.8 - 1)) and not moved.passed
    assert not found["dp8, 8k: exposed, r=1/4 minus r=1"].passed
    text = page("Scaling", results, about=ABOUT, size="1b")
    assert f"| {speed} | 0.949 | ≥ 0.95 | **missed** |" in text and f"| {sharded} | 0.768 | ≥ 0.75 | reached |" in text
    assert "| dp8 | 8k | ssa | 94 | 0.949 | 0.855 | 50.0% | 10 | 10 (-5%) | 0.0% | 12.0 | 10.0 (-17%) |" in text
    assert "| dp8 | 8k | ssa | all-gather, forward, stream 20 | 3 | 5.0 | 2.0 | 2.00% |" in text
    assert "missed" not in page("Scaling", results, about=ABOUT, size="toy")


def test_page_and_json_of_parts_that_failed(tmp_path):
    results = [
        {"case": "tp2, 8k", "layout": "tp2", "length": "8k", "gpus": 2, "kind": "speed", "error": "out of memory"},
        {"case": "tests", "kind": "tests", "command": "python -m pytest", "tests": "1 failed, 30 passed", "error": "x"},
        {"case": "dp2, 8k, saved", "layout": "dp2", "gib": 17.0, "copy_seconds": 0.2, "save_seconds": 9.0}
        | {"step_beside": 1.01, "resumed_on": "parallel.tp=2", "losses": [[2.0, 1]], "resumed_losses": [[2.1, 1]]},
        {"case": "kill -9 of a rank", "layout": "dp2", "difference": 0.0, "seconds_to_new_step": 30.2, "exit_code": 0},
    ]
    text = page("Two GPUs", results, about=ABOUT, size="1b")
    write(tmp_path / "two.md", text, results, ABOUT)
    plot(tmp_path / "two.png", results)
    assert "- tp2, 8k: out of memory" in text and "`python -m pytest`: 1 failed, 30 passed" in text
    assert "losses differ by 4.8e-02" in text and "the first new step 30 s after the kill" in text
    assert not {check.what: check.passed for check in checks(results)}["dp2, 8k, saved: resumed losses"]
    assert json.loads((tmp_path / "two.json").read_text())["results"] == results
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")


# Measures a job's cases in turn; the case "dp2" fails, and "slow" does not end.
MEASURE = """
import json, sys, time
for case in json.load(open(sys.argv[1]))["cases"]:
    if case["layout"] == "slow":
        time.sleep(60)
    if case["layout"] == "dp2":
        sys.exit("torch.OutOfMemoryError: CUDA out of memory")
    line = {"name": f"{case['layout']}, {case['length']}", "results": [{"case": case["layout"]}]}
    open(sys.argv[2], "a").write(json.dumps(line) + chr(10))
"""


@pytest.fixture
def host(tmp_path, monkeypatch) -> Host:
    monkeypatch.setattr(jobs, "command", lambda n, job, out: [sys.executable, "-c", MEASURE, str(job), str(out)])
    return Host(gpus=2, size="toy", folder=tmp_path, scratch=tmp_path)


def some(*layouts: str, gpus: int = 2) -> Job:
    return Job(gpus=gpus, cases=[Case(layout=layout, length="8k", gpus=gpus) for layout in layouts])


def test_failed_case_is_named_and_the_others_are_measured(host):
    found = run_jobs("speed", [some("one GPU", gpus=1), some("tp2", "dp2", "cp2")], host, 60)
    assert sorted(r["case"] for r in found if "error" not in r) == ["cp2", "one GPU", "tp2"]
    (failed,) = [r for r in found if "error" in r]
    assert (failed["case"], failed["error"]) == ("dp2, 8k", "torch.OutOfMemoryError: CUDA out of memory")


def test_time_limit_keeps_what_was_measured(host, monkeypatch):
    def now() -> float:
        """The time is over when the first case has been measured."""
        measured = host.folder / "speed_0.jsonl"
        return 3.0 if measured.exists() and measured.read_text().endswith("\n") else 0.0

    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=now, sleep=time.sleep))
    found = run_jobs("speed", [some("tp2", "slow", "cp2"), some("pp2")], host, 2)
    assert [r["case"] for r in found if "error" not in r] == ["tp2"]
    assert [r["case"] for r in found if r.get("error") == jobs.LATE] == ["slow, 8k", "cp2, 8k", "pp2, 8k"]


def test_error_is_the_first_processes_own():
    log = "x\nTraceback\n  raise ValueError\nValueError: the first\nRuntimeError: the second\nChildFailedError: all\n"
    assert last_error(log) == "ValueError: the first"
    assert last_error("") == "no output"


def test_devices_are_those_that_the_user_lets_see(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    assert jobs.devices(2) == ["3", "5"] and jobs.environment(["5"])["CUDA_VISIBLE_DEVICES"] == "5"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert jobs.environment(["0"])["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert jobs.devices(2) == ["0", "1"]
