"""Measures the 1B model on several GPUs of one host and writes one table: `make test-gpu2` and `launchers/scaling.sh`.

    python -m benchmarks.scaling --suite two_gpus --table docs/results/two_gpus.md      # with tests/ on PYTHONPATH
    python -m benchmarks.scaling --suite scaling --parts "speed restart" --dry-run

    two_gpus   speed: dp 2, tp 2, cp 2, pp 2 (interleaved too) and FP8 beside one GPU; layouts: tests/gpu's tests of two GPUs; save: an
               asynchronous checkpoint under dp 2, resumed on tp 2; deepspeed: ZeRO 1 to 3 beside the megatron engine
    scaling    speed: 1, 2, 4 and 8 GPUs, as many as there are; save: a sharded model's checkpoint, resumed under data parallelism; restart:
               kill -9 of a rank

Each part has a time limit, and the table is written after each part. A case that fails is named in the table, and the others are measured.
Exit codes: 0 everything was measured and every requirement reached, 1 not so, 3 wrong options.
"""

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.scaling import cases, tables
from benchmarks.scaling.cases import SIZES, Case, Job, case_config, with_equal_share
from benchmarks.scaling.jobs import ROOT, Host, run_jobs, run_logged
from benchmarks.scaling.judged import checks, has_requirements
from ssa_pretrain.monitor.environment import versions
from ssa_pretrain.planning.estimate import as_plan_config, estimate
from ssa_pretrain.planning.measured import hardware_of
from ssa_pretrain.planning.plan import make_plan

SECONDS = {
    "two_gpus": {"speed": 270, "layouts": 120, "save": 50, "deepspeed": 100, "rows": 90},
    "scaling": {"speed": 300, "save": 75, "restart": 95},
}  # limits of the parts: nine minutes without those ON_REQUEST, and eight
ON_REQUEST = ("rows",)
SIZE = {"two_gpus": "1b_half", "scaling": "1b"}
TITLES = {"two_gpus": "Two GPUs", "scaling": "Scaling"}
TESTS = ("tests/gpu/test_layouts_gpu.py", "tests/gpu/test_context.py")
PACKAGES = ("python", "torch", "triton", "megatron-core", "transformer-engine", "deepspeed")


def main(arguments: Sequence[str]) -> int:
    """Measures the chosen parts and returns the exit code."""
    options = read_options(arguments)
    jobs = suite_jobs(options.suite, options.gpus)
    parts = options.parts.split() or [part for part in SECONDS[options.suite] if part not in ON_REQUEST]
    if wrong := [part for part in parts if part not in SECONDS[options.suite]]:
        print(f"--parts={' '.join(wrong)} must be among {', '.join(SECONDS[options.suite])}", file=sys.stderr)
        return 3
    if options.dry_run:
        print("\n".join(plan_lines({part: jobs.get(part, []) for part in parts}, options)))
        return 0
    if (found := num_gpus()) and found < options.gpus:
        print(f"--gpus={options.gpus} must be at most {found}, the GPUs of this machine", file=sys.stderr)
        return 3
    try:
        for folder in filter(None, (options.out, options.scratch)):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out and --scratch must be folders that can be written: {error}", file=sys.stderr)
        return 3
    results: list[dict[str, Any]] = []
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"{options.gpus} x {device_name()}",
        "cores": os.cpu_count(),
        "versions": {k: v for k, v in versions().items() if k in PACKAGES} | drivers(),
        "commit": commit(),
        "command": "python -m benchmarks.scaling " + shlex.join(arguments),
        "seconds": {},
    }
    with tempfile.TemporaryDirectory(prefix="scaling_", dir=options.scratch) as scratch:
        host = Host(gpus=options.gpus, size=options.size, folder=options.out, scratch=Path(scratch))
        for part in parts:
            begin = time.monotonic()
            measured = {result["case"] for result in results if "error" not in result}
            new = run_part(part, without(jobs.get(part, []), measured), host, limit(part, options))
            results += [result | {"part": part} for result in new]
            about["seconds"][part] = time.monotonic() - begin
            text = tables.page(TITLES[options.suite], results, about=about, size=options.size)
            tables.write(options.table, text, results, about)
            print(f"{part}: {about['seconds'][part]:.0f} s", flush=True)
    if options.plot:
        tables.plot(options.table.with_suffix(".png"), results)
    print(text)
    return exit_code(results, options.size)


class Parser(argparse.ArgumentParser):
    """A parser whose error is the exit code of wrong options."""

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits."""
        self.exit(3, f"{self.prog}: {message}\n")


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options of a command line."""
    lines = __doc__.splitlines()
    parser = Parser("benchmarks.scaling", description=lines[0], epilog="\n".join(lines[1:]))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--suite", choices=list(SECONDS), default="scaling")
    parser.add_argument("--parts", default="", help="names, separated by spaces; empty: all of the suite")
    parser.add_argument("--gpus", type=int, default=0, choices=(0, 1, 2, 4, 8), help="0: as many as there are, up to 8")
    parser.add_argument("--size", choices=list(SIZES), help="default: the 1B model; toy runs on CPUs")
    parser.add_argument("--out", type=Path, default=Path("outputs/scaling"), help="for logs")
    parser.add_argument("--table", type=Path, help="the page to write; its JSON and plot go beside it")
    parser.add_argument(
        "--scratch", type=Path, help="for checkpoints, about 20 GiB; default: the system's temporary folder"
    )
    parser.add_argument("--patience", type=float, default=1.0, help="factor on the time limits of the parts")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured, start nothing")
    options = parser.parse_args(arguments)
    options.size = options.size or SIZE[options.suite]
    options.plot = options.suite == "scaling"
    options.out = options.out.absolute()
    options.table = (options.table or options.out / f"{options.suite}.md").absolute()
    found = num_gpus()
    options.gpus = options.gpus or (
        2 if options.suite == "two_gpus" else next(n for n in (8, 4, 2, 1) if n <= max(1, found))
    )
    return options


def suite_jobs(suite: str, gpus: int) -> dict[str, list[Job]]:
    """Returns the jobs of a suite by part. Parts that are not jobs are missing."""
    return cases.two_gpus() if suite == "two_gpus" else cases.scaling(gpus)


def run_part(part: str, jobs: list[Job], host: Host, seconds: float) -> list[dict[str, Any]]:
    """Returns the results of a part."""
    if part == "layouts":
        return run_tests(host, seconds)
    if part == "restart":
        from benchmarks.scaling.restart import killed_and_restarted

        return killed_and_restarted(host, seconds)
    return run_jobs(part, jobs, host, seconds)


def run_tests(host: Host, seconds: float) -> list[dict[str, Any]]:
    """Runs the tests of two GPUs; the result has pytest's last line, and the names of the tests that failed."""
    parallel = ["-n", "2", "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []
    command = ["-m", "pytest", "-q", "-m", "gpu", "-k", "not 4-", *parallel, *TESTS]  # four ranks would share the GPUs
    code, text = run_logged([sys.executable, *command], host.folder / "layouts.log", seconds)
    lines = [line for line in text.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR "))]
    result = {"case": "tests", "kind": "tests", "command": f"python {shlex.join(command)}"}
    result["tests"] = lines[-1].strip("= ") if lines else "no output"
    if code:
        result["error"] = "; ".join(failed)[:1000] or f"exit code {code}"
    return [result | ({"error": f"did not end within {seconds:.0f} s"} if code is None else {})]


def without(jobs: list[Job], measured: set[str]) -> list[Job]:
    """Returns the jobs without cases that another part has measured."""
    left = [Job(gpus=job.gpus, cases=[case for case in job.cases if case.name not in measured]) for job in jobs]
    return [job for job in left if job.cases]


def limit(part: str, options: argparse.Namespace) -> float:
    """Returns the seconds that a part may take."""
    return options.patience * SECONDS[options.suite][part]


def plan_lines(jobs: dict[str, list[Job]], options: argparse.Namespace) -> list[str]:
    """Returns what would be measured, each case with its plan."""
    size, rows = SIZES[options.size], []
    for part, listed in jobs.items():
        for job in listed:
            rows += [_planned(part, case, size, options.gpus) for case in job.cases]
        if not listed:
            rows.append((part, "–", "–", str(options.gpus), *["–"] * 5))
    columns = ("part", "layout", "rows", "GPUs", "microbatches", "tokens per step", "GiB", "ms", "variants")
    total = sum(limit(part, options) for part in jobs)
    head = [
        f"{options.suite}: {options.size}, {options.gpus} GPUs, at most {total:.0f} s; GiB and ms of ssa as planned on H200s",
        "",
    ]
    return [*head, *tables.table(columns, rows)]


def _planned(part: str, case: Case, size: cases.Size, host_gpus: int) -> tuple[str, ...]:
    config = case_config(case, size, host_gpus)
    config = with_equal_share(config, case, size)
    plan = make_plan(config, case.gpus)
    costs = estimate(as_plan_config(config, hardware_of("h200")), plan)
    numbers = (str(case.gpus), str(plan.num_microbatches), f"{plan.tokens_per_step:,}")
    predicted = (f"{costs.peak_bytes / 2**30:.1f}", f"{costs.step.total * 1e3:,.0f}")
    return (part, case.layout, case.length, *numbers, *predicted, ", ".join(case.variants))


def exit_code(results: list[dict[str, Any]], size: str) -> int:
    """Returns 1 if something was not measured or a requirement was missed, else 0."""
    missed = [check.what for check in checks(results) if not check.passed] if has_requirements(results, size) else []
    failed = [result["case"] for result in results if "error" in result]
    for what in (*(f"missed: {name}" for name in missed), *(f"not measured: {name}" for name in failed)):
        print(what, file=sys.stderr)
    return int(bool(missed or failed))


def num_gpus() -> int:
    """Returns the number of GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()


def device_name() -> str:
    """Returns the name of the first GPU."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"


def drivers() -> dict[str, str]:
    """Returns the versions of NCCL and of the driver; empty without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0]
    return {"NCCL": ".".join(map(str, torch.cuda.nccl.version())), "driver": driver.strip()}


def commit() -> str:
    """Returns the commit of this checkout, "unknown" outside a repository."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
