"""One process of a job, started by torchrun: measures the job's cases one after another.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.scaling.worker JOB.json RESULTS.jsonl

Rank 0 appends each result as soon as it is measured, so that a later failure loses none.
"""

import json
import os
import sys
import time
from pathlib import Path

from ssa_pretrain.libraries import hide_library_warnings


def main(job_file: str, results_file: str) -> None:
    """Measures the cases of a job."""
    hide_library_warnings()
    from benchmarks.scaling.cases import SIZES, Case, case_config
    from benchmarks.scaling.saving import save_and_resume
    from benchmarks.scaling.steps import measure
    from ssa_pretrain.parallel.state import reset_layout, start, stop

    job = json.loads(Path(job_file).read_text())
    size, host_gpus = SIZES[job["size"]], job["host_gpus"]
    for values in job["cases"]:
        case, begin = Case.from_json(values), time.monotonic()
        parallel = case_config(case, size, host_gpus).parallel
        placement = start(parallel, seed=1)
        if case.kind == "save":
            folder = Path(job["scratch"]) / "checkpoint"
            found, placement = save_and_resume(case, size, placement, host_gpus, folder)
        else:
            found = measure(case, size, placement, host_gpus)
        if placement.is_rank_0:
            line = {"name": case.name, "results": found, "seconds": time.monotonic() - begin}
            with Path(results_file).open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{case.name}: {line['seconds']:.0f} s", flush=True)
        reset_layout()
    stop()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
