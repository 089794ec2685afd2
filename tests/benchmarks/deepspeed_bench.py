"""Compares DeepSpeed's ZeRO stages with the megatron engine: tokens/s and peak memory of the 1B model at 8k, in one table.

    python tests/benchmarks/deepspeed_bench.py --gpus 1 --out results        # megatron; ZeRO 1, 2, 3; ZeRO 2 with offload
    python tests/benchmarks/deepspeed_bench.py --gpus 2 --out results        # the same on dp 2, and on tp 2 with sequence parallelism
    python tests/benchmarks/deepspeed_bench.py --gpus 1 --only megatron zero1 --microbatches 16

Each case is a torchrun of its own on random tokens. A time is the mean over the steps after the warm-up, with a synchronisation at both ends. The table
goes to `deepspeed_N.csv` and `deepspeed_N.md`. A case that fails becomes a line with its error, and the exit code is then 1. `ratio` is tokens/s
relative to the megatron engine on the same layout. The table also has the loss of the last step, so that a fast but wrong case is seen.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("case", "gpus", "tokens_per_second", "ratio", "seconds_a_step", "peak_gib", "loss", "grad_norm", "error")


def cases(gpus: int) -> dict[str, list[str]]:
    """Returns the overrides of each case by name."""
    layouts = {"": []} if gpus == 1 else {"dp2.": [], "tp2.": ["parallel=tp2_sp"]}
    found = {}
    for prefix, layout in layouts.items():
        found[f"{prefix}megatron"] = layout
        for stage in (1, 2, 3):
            found[f"{prefix}zero{stage}"] = [*layout, "engine=deepspeed", f"deepspeed.zero_stage={stage}"]
        if prefix != "tp2.":
            found[f"{prefix}zero2_offload"] = [*found[f"{prefix}zero2"], "deepspeed.offload_optimizer=true"]
    return found


def main() -> int:
    """Runs the cases, writes the table and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--experiment", default="ssa_1b_8k")
    parser.add_argument("--microbatches", type=int, default=8, help="per step and rank")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds per case")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="further settings, for every case")
    arguments = parser.parse_intermixed_args()
    if arguments.case:
        measure(arguments, json.loads(arguments.case))
        return 0
    rows = [launch(arguments, name, own) for name, own in cases(arguments.gpus).items() if chosen(arguments.only, name)]
    for row in rows:
        reference = next(
            (r for r in rows if r["case"] == row["case"].rpartition(".")[0] + "." * ("." in row["case"]) + "megatron"),
            None,
        )
        if reference and reference["tokens_per_second"] and row["tokens_per_second"]:
            row["ratio"] = round(row["tokens_per_second"] / reference["tokens_per_second"], 3)
    write(rows, arguments.out / f"deepspeed_{arguments.gpus}")
    return int(any(row["error"] for row in rows))


def chosen(only: list[str] | None, name: str) -> bool:
    return not only or name in only or name.rpartition(".")[2] in only


def launch(arguments: argparse.Namespace, name: str, own: list[str]) -> dict:
    """Runs one case in processes of its own and returns its row."""
    flags = [
        f"--{flag.replace('_', '-')}={getattr(arguments, flag)}"
        for flag in ("gpus", "experiment", "microbatches", "micro_batch_size", "steps", "warmup")
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={arguments.gpus}",
        __file__,
        *flags,
    ]
    row = dict.fromkeys(COLUMNS, "") | {"case": name, "gpus": arguments.gpus}
    try:
        done = subprocess.run(
            [*command, f"--case={json.dumps([*own, *arguments.overrides])}"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
            capture_output=True,
            text=True,
            timeout=arguments.timeout,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode == 0 and lines:
            row |= json.loads(lines[-1].removeprefix("RESULT "))
        else:
            errors = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()[-1:]
            row["error"] = errors[0].strip()[:200] if errors else f"exit code {done.returncode}"
            print(done.stderr[-4000:], file=sys.stderr)
    except subprocess.TimeoutExpired:
        row["error"] = f"did not end within {arguments.timeout:g} s"
    print(row, flush=True)
    return row


def measure(arguments: argparse.Namespace, own: list[str]) -> None:
    """Times one case on this rank; rank 0 prints the result."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from ssa_pretrain.cli import resolve_config
    from ssa_pretrain.config.machine import Machine
    from ssa_pretrain.data.batches import collate
    from ssa_pretrain.data.rows import Row
    from ssa_pretrain.engine import build_engine
    from ssa_pretrain.parallel.state import start, stop

    def settings(dp: int) -> list[str]:
        return [
            f"experiment={arguments.experiment}",
            *own,
            "data.path=none",
            "model.vocab_size=128256",
            f"training.micro_batch_size={arguments.micro_batch_size}",
            f"training.global_batch_tokens={arguments.microbatches * arguments.micro_batch_size * dp * length}",
        ]

    length = next((int(w.split("=")[1]) for w in own if w.startswith("data.sequence_length=")), 8192)
    tp = 2 if "parallel=tp2_sp" in own else 1
    machine = Machine(world_size=arguments.gpus, has_files=False)
    config = resolve_config("train", settings(arguments.gpus // tp), machine)
    placement = start(config.parallel, seed=1)
    engine = build_engine(config, placement, config.model.vocab_size)
    generator = np.random.default_rng(placement.dp_rank)

    def row() -> Row:
        starts = np.zeros(length + 1, dtype=bool)
        starts[generator.choice(np.arange(1, length), size=4, replace=False)] = True
        return Row(generator.integers(0, config.model.vocab_size, length + 1), starts)

    def batches() -> list:
        rows = [[row() for _ in range(arguments.micro_batch_size)] for _ in range(arguments.microbatches)]
        return [collate(part, index=i * placement.dp + placement.dp_rank) for i, part in enumerate(rows)]

    made = [batches() for _ in range(2)]
    on_gpu = placement.device.type == "cuda"
    for step in range(arguments.warmup + arguments.steps):
        if step == arguments.warmup:
            if on_gpu:
                torch.cuda.synchronize()
            dist.barrier()
            begin = time.perf_counter()
        pending = engine.train_step(made[step % 2], step=step, learning_rate=1e-4)
    result = pending.result()
    if on_gpu:
        torch.cuda.synchronize()
    dist.barrier()
    seconds = (time.perf_counter() - begin) / arguments.steps
    peak = torch.tensor(
        torch.cuda.max_memory_allocated() if on_gpu else 0, dtype=torch.float64, device=placement.device
    )
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if placement.is_rank_0:
        results = {
            "tokens_per_second": round(config.training.global_batch_tokens / seconds),
            "seconds_a_step": round(seconds, 4),
            "peak_gib": round(float(peak) / 2**30, 1),
            "loss": round(result.cross_entropy, 4),
            "grad_norm": round(result.grad_norm, 4),
        }
        print("RESULT " + json.dumps(results), flush=True)
    stop()


def write(rows: list[dict], stem: Path) -> None:
    """Writes the table as CSV and markdown, and prints the latter."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(row[c]) for c in COLUMNS) + " |" for row in rows]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
