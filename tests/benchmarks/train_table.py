"""Trains a table of settings and seeds, several runs at once on each GPU, and prints held-out losses as mean ± standard error over seeds.

    python tests/benchmarks/train_table.py tests/benchmarks/tables/shares.txt --out outputs/shares --gpus 2 --per-gpu 4 -- data.path=data/debian_8k
    python tests/benchmarks/train_table.py tests/benchmarks/tables/shares.txt --out outputs/shares --show quarter-all eighth-all

A line of the table is a name and the overrides of `python -m ssa_pretrain.train`. Each setting is trained with each seed as the run NAME_SEED: all
settings with the first seed, then all with the second. A run is one process on one GPU; what follows `--` goes to all of them. The same command
again goes on where it stopped. Small models leave a GPU idle between their kernels. Several at once fill it, best under NVIDIA's MPS
(`nvidia-cuda-mps-control -d`).

`--show A-B` prints the difference of two settings, paired by seed, at each evaluation. `--csv FILE` writes all evaluations. A number of runs does
not share a GPU evenly, so their speeds mean nothing.
"""

import argparse
import csv
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

Evaluation = dict[tuple[int, str], tuple[float, float | None]]  # by (step, mode): cross entropy, captured mass


def main() -> int:
    """Trains, unless only asked to show; returns 1 if a run failed."""
    own, extra = split_at_dashes(sys.argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="lines of: NAME key=value ...")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--per-gpu", type=int, default=4, help="runs at once on each GPU")
    parser.add_argument("--show", nargs="*", metavar="A-B", help="train nothing; print the table and these differences")
    parser.add_argument("--csv", type=Path, help="write all evaluations")
    arguments = parser.parse_args(own)
    lines = [line.split() for line in arguments.table.read_text().splitlines() if line.strip() and line[0] != "#"]
    settings = {name: overrides for name, *overrides in lines}
    failed = 0
    if arguments.show is None:
        failed = train(settings, extra, arguments)
    found = {
        (name, seed): evaluations(arguments.out / f"{name}_{seed}") for name in settings for seed in arguments.seeds
    }
    print_table(found, list(settings))
    for pair in arguments.show or ():
        print_difference(found, *pair.split("-"))
    if arguments.csv:
        write_csv(found, arguments.csv)
    return int(failed > 0)


def split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments before and after `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def train(settings: dict[str, list[str]], extra: list[str], arguments: argparse.Namespace) -> int:
    """Trains all runs; returns how many failed."""
    waiting: queue.Queue[tuple[str, list[str]]] = queue.Queue()
    for seed in arguments.seeds:
        for name, overrides in settings.items():
            waiting.put((f"{name}_{seed}", [*overrides, f"seed={seed}", *extra]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []

    def work(gpu: int) -> None:
        while True:
            try:
                name, overrides = waiting.get_nowait()
            except queue.Empty:
                return
            begin, folder = time.monotonic(), arguments.out / name
            command = [sys.executable, "-m", "ssa_pretrain.train", *overrides, f"name={name}", f"output_dir={folder}"]
            with (arguments.out / f"{name}.log").open("a") as log:
                code = subprocess.call(
                    command, env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}, stdout=log, stderr=subprocess.STDOUT
                )
            failed.extend([name] if code else ())
            print(f"{name}: exit code {code} after {time.monotonic() - begin:.0f} s on GPU {gpu}", flush=True)

    workers = [
        threading.Thread(target=work, args=(gpu,)) for _ in range(arguments.per_gpu) for gpu in range(arguments.gpus)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(failed)


def evaluations(run: Path) -> Evaluation:
    """Returns a run's held-out evaluations so far; none if it has not started."""
    file = run / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {
        (record["step"], record["mode"]): (record["cross_entropy"], record["captured_mass"])
        for record in records
        if record["kind"] == "evaluation"
    }


def mean_and_error(values: list[float]) -> str:
    """Returns mean ± standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


def print_table(found: dict[tuple[str, int], Evaluation], names: list[str]) -> None:
    """Prints each setting at the last step that all its seeds have evaluated."""
    print(
        "| setting | seeds | step | full mode | sparse mode | sparse - full | captured mass, full mode |\n|"
        + "---|" * 7
    )
    for name in names:
        runs = [run for (setting, _), run in found.items() if setting == name and run]
        steps = set.intersection(*({step for step, _ in run} for run in runs)) if runs else set()
        if not steps:
            continue
        step = max(steps)
        full, sparse = ([run[step, mode][0] for run in runs] for mode in ("full", "sparse"))
        gaps = [b - a for a, b in zip(full, sparse, strict=True)]
        mass = [run[step, "full"][1] or math.nan for run in runs]
        columns = (mean_and_error(values) for values in (full, sparse, gaps, mass))
        print(f"| {name} | {len(runs)} | {step} |", " | ".join(columns), "|")


def print_difference(found: dict[tuple[str, int], Evaluation], first: str, second: str) -> None:
    """Prints first minus second, paired by seed, at each step that both have evaluated with two seeds or more."""
    print(f"\n{first} minus {second}\n\n| step | seeds | full mode | sparse mode |\n|---|---|---|---|")
    seeds = [seed for name, seed in found if name == first and (second, seed) in found]
    for step in sorted({step for seed in seeds for step, _ in found[first, seed]}):
        both = [
            (found[first, seed], found[second, seed])
            for seed in seeds
            if (step, "full") in found[first, seed] and (step, "full") in found[second, seed]
        ]
        if len(both) > 1:
            gaps = ([a[step, mode][0] - b[step, mode][0] for a, b in both] for mode in ("full", "sparse"))
            print(f"| {step} | {len(both)} |", " | ".join(map(mean_and_error, gaps)), "|")


def write_csv(found: dict[tuple[str, int], Evaluation], path: Path) -> None:
    """Writes one line per evaluation."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("setting", "seed", "step", "mode", "cross_entropy", "captured_mass"))
        for (name, seed), run in found.items():
            for (step, mode), (loss, mass) in sorted(run.items()):
                writer.writerow((name, seed, step, mode, f"{loss:.6f}", "" if mass is None else f"{mass:.6f}"))


if __name__ == "__main__":
    sys.exit(main())
