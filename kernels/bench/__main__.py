"""`PYTHONPATH=kernels python -m bench`: measures the kernels' speed relative to baselines, in one process on one GPU.

It prints a table, and writes CSV files and a roofline plot. Before that it checks selection, both streams, gate and alignment (check.py), and
stops if a result is wrong. `--quick` leaves out rows beyond 32k, and `--only decode` (or `indexer`) everything but decoding (the trained scorer). `--activations` adds the locality of real activations (.pt or .npz files
with q, k, v and cu_seqlens of one layer), which works on a CPU too. It measures neither a whole training step nor several GPUs.
"""

import argparse
import csv
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from . import bounds, cases, decode, indexer, plot, shapes
from .activations import activation_rows
from .cases import Row
from .check import failures
from .timing import copy_bandwidth, matmul_rate


def main() -> int:
    """Runs the benchmark and returns the exit status: 1 if a check failed or a bound was missed."""
    arguments = _parse()
    if not torch.cuda.is_available():
        if not arguments.activations:
            print(
                "The benchmark needs an NVIDIA GPU; without one it only computes the locality of --activations.",
                file=sys.stderr,
            )
            return 1
        for path in arguments.activations:
            print(*map(_line, activation_rows(path, torch.device("cpu"))), sep="\n")
        return 0
    wrong = indexer.failures() if arguments.only == "indexer" else decode.failures()
    if arguments.only is None:
        wrong += indexer.failures() + failures()
        wrong += failures(heads=32, kv_heads=8, head_dim=128) + failures(heads=16, kv_heads=2, head_dim=256)
    if wrong:
        print("Wrong results, so nothing is timed:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    copy, matmul = copy_bandwidth(), matmul_rate()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copy / 1e12:.2f} TB/s, bf16 {matmul / 1e12:.0f} TFLOP/s"
    )
    rows = []
    for row in _rows(arguments, copy):
        rows.append(row)
        print(_line(row), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = f"{arguments.only or 'kernels'}.csv"
    _write(arguments.out / table, [{**asdict(row), "verdict": row.verdict} for row in rows])
    if arguments.only is None:
        stages = bounds.measure(shapes.SHAPE_8K, copy, matmul) + bounds.measure(shapes.SHAPE_32K, copy, matmul)
        print(bounds.table(stages))
        _write(arguments.out / "bounds.csv", [stage.as_record() for stage in stages])
        plot.roofline(stages, copy, matmul, arguments.out / "roofline.png")
    return int(any(row.verdict == "missed" for row in rows))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="PYTHONPATH=kernels python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/kernel_bench"),
        help="folder for kernels.csv, bounds.csv, roofline.png",
    )
    parser.add_argument("--quick", action="store_true", help="only 8k and 32k")
    parser.add_argument("--only", choices=["decode", "indexer"], help="only this case, which writes its own table")
    parser.add_argument(
        "--activations",
        type=Path,
        nargs="*",
        default=[],
        help="files with q, k, v and cu_seqlens of a layer, .pt or .npz",
    )
    return parser.parse_args()


def _rows(arguments: argparse.Namespace, copy: float) -> Iterator[Row]:
    """Yields the table's rows with their bounds, in the order of README.md."""
    if arguments.only == "decode":
        yield from decode.rows(arguments.quick)
        return
    if arguments.only == "indexer":
        yield from indexer.rows(shapes.SHAPE_8K)
        yield from indexer.rows(shapes.SHAPE_32K)
        return
    yield from cases.streams(shapes.SHAPE_8K, (4.8, 5.2), (3.0, 3.7))
    yield from cases.streams(shapes.SHAPE_32K, (13.0, 15.0), (6.2, 8.5))
    yield from cases.plain_boundaries(shapes.SHAPE_8K, 1.3, 1.05)
    yield from cases.layer(shapes.SHAPE_8K, 1.20, 1.17)
    yield from cases.layer(shapes.SHAPE_32K, 1.085, 1.06)
    yield from cases.gate(shapes.SHAPE_8K, copy)
    yield from cases.documents(shapes.SHAPE_8K, 1024, 1.0, 0.8)
    yield from cases.sink(shapes.SHAPE_8K, 1.05, 1.02)
    yield from cases.sink(shapes.SHAPE_32K, 1.05, 1.02)
    yield from cases.streams(shapes.SHAPE_8K_G4, (1.7, 2.2))
    yield from cases.wide_heads(shapes.SHAPE_8K_D256)
    yield from cases.memory(shapes.SHAPE_8K, 0.4)
    yield from cases.memory(shapes.SHAPE_32K, 0.4)
    yield from decode.rows(arguments.quick)
    yield from indexer.rows(shapes.SHAPE_8K)
    yield from indexer.rows(shapes.SHAPE_32K)
    for path in arguments.activations:
        yield from activation_rows(path, torch.device("cuda"))
    if not arguments.quick:
        yield from cases.streams(shapes.SHAPE_64K, (16.0, 22.0))
        yield from cases.streams(shapes.SHAPE_128K, (24.0, 32.0))


def _line(row: Row) -> str:
    bounds_text = (
        "" if row.must is None else f"must {row.must:g}" + (f", aim {row.aim:g}" if row.aim is not None else "")
    )
    return f"{row.name:<62} {row.value:8.3f} {row.unit:<2}  {bounds_text:<20} {row.verdict:<6}  {row.detail}"


def _write(path: Path, records: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may close the pipe
    sys.exit(main())
