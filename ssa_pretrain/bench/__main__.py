"""Entry point: `python -m ssa_pretrain.bench cases=8k,32k`, or under torchrun with two processes `cases=dp2,tp2`.

Times forward and backward of our methods and of plain megatron-core in turns, in one process on one device, and prints
the ratios that the project has goals for. Results are written as soon as they are measured. Options, as key=value:

    cases      any of 8k, 32k, share, share_128k, methods, optimizer, fp8, recompute, indexer, keys (QK-norm, key convolution); under
               two processes dp2, tp2, tp2_overlap (user buffers), which measure one GPU first. share is
               share_8k,share_32k: attention.counterpart_share 1, 1/4 and 1/8 over full attention; methods is every
               method, ssa also at those shares
    model      a file in conf/model, default llama_1b
    length     tokens per row, default 8192; 32k cases use four times as many, share_128k 16 times
    rows       rows per microbatch, default 2
    rounds     turns per variant, default 4
    runs       runs per turn, default 3
    parts      1 also profiles one run of each variant: parts.csv has the device's time by kind of kernel; default 0
    precision  bf16 or fp32
    out        folder for the results, default outputs/bench

About four minutes on one H200: cases=share rounds=2 runs=1

Without a GPU only small cases run: model=tiny length=256 rows=1 precision=fp32. Exit codes: 0 done, 3 wrong options.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ssa_pretrain.libraries import hide_library_warnings, import_megatron_core
from ssa_pretrain.process import command
from ssa_pretrain.settings.output import pipe_may_close

LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
)


def main() -> None:
    """Reads the command line and measures, or prints its help."""
    with command("ssa_pretrain.bench"), pipe_may_close():
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(__doc__)
        else:
            measure_cases(sys.argv[1:], int(os.environ.get("WORLD_SIZE", "1")))


def measure_cases(arguments: Sequence[str], world_size: int) -> None:
    """Measures the cases that the arguments ask for and writes the tables."""
    from ssa_pretrain.bench.options import bench_config, read_options, require_small
    from ssa_pretrain.config.machine import has_gpu

    options = read_options(arguments, world_size)
    if not has_gpu():
        require_small(options)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    if world_size > 1 and os.environ.get("RANK") == "0":
        _measure_one_gpu(arguments)
    hide_library_warnings()
    import_megatron_core()
    from ssa_pretrain.bench.cases import CASES, LAYOUTS
    from ssa_pretrain.bench.measure import measure
    from ssa_pretrain.bench.tables import append, read, write_ratios
    from ssa_pretrain.parallel.state import reset_layout, start, stop

    for case in options.cases:
        config = bench_config(options, **LAYOUTS.get(case, {}))
        placement = start(config.parallel, seed=config.seed)
        results = measure(CASES["optimizer" if case in LAYOUTS else case], case, config, placement, options)
        if placement.is_rank_0:
            append(folder, results)
            print(write_ratios(folder, read(folder)), flush=True)
        reset_layout()
    stop()


def _measure_one_gpu(arguments: Sequence[str]) -> None:
    """Measures the whole step on one GPU in a process of its own, before the processes join: the baseline of the layouts."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith("TORCHELASTIC")
    }
    same = [argument for argument in arguments if not argument.startswith("cases=")]
    subprocess.run([sys.executable, "-m", "ssa_pretrain.bench", "cases=optimizer", *same], env=environment, check=True)


if __name__ == "__main__":
    main()
