"""Entry point: `python -m ssa_pretrain.bench cases=8k,32k`, or under torchrun with two processes `cases=dp2,tp2`.

Times forward and backward of our methods and of plain megatron-core in turns, in one process on one device, and prints
the ratios that the project has goals for. Results are written as soon as they are measured. Options, as key=value:

    cases      any of 8k, 32k, optimizer, fp8, recompute; under two processes dp2, tp2, tp2_overlap (user buffers),
               which measure one GPU first
    model      a file in conf/model, default llama_1b
    length     tokens per row, default 8192; the case 32k uses four times as many
    rows       rows per microbatch, default 2
    rounds     turns per variant, default 4
    runs       runs per turn, default 3
    precision  bf16 or fp32
    out        folder for the results, default outputs/bench

Without a GPU only small cases run: model=tiny length=256 rows=1 precision=fp32. Exit codes: 0 done, 3 wrong options.
"""

import os
import subprocess
import sys
from pathlib import Path

from ssa_pretrain.bench.options import Options, bench_config, read_options, require_small
from ssa_pretrain.config.machine import has_gpu
from ssa_pretrain.process import command, hide_library_warnings
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
    """Measures the cases and writes the tables."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    options = read_options(sys.argv[1:], world_size)
    if not has_gpu():
        require_small(options)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    if world_size > 1 and os.environ.get("RANK") == "0":
        _measure_one_gpu(options)
    hide_library_warnings()
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


def _measure_one_gpu(options: Options) -> None:
    """Measures the whole step on one GPU in a process of its own, before the processes join: the baseline of the layouts."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith("TORCHELASTIC")
    }
    same = [f"{name}={getattr(options, name)}" for name in Options.__slots__ if name != "cases"]
    subprocess.run([sys.executable, "-m", "ssa_pretrain.bench", "cases=optimizer", *same], env=environment, check=True)


if __name__ == "__main__":
    with command("ssa_pretrain.bench"), pipe_may_close():
        main()
