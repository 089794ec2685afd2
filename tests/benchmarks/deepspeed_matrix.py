"""The whole matrix of engine=deepspeed against engine=megatron, by hand: ZeRO 0 to 3 x TP 1, 2 (SP on and off) x DP 1, 2, twenty steps each.

    PYTHONPATH=tests python tests/benchmarks/deepspeed_matrix.py OUT.md [STEPS]

Prints and writes one line a case: the largest relative difference over all steps and both evaluations of the cross entropy, the gradient norm, and
every layer's alignment and captured mass. Exit code 1 if one exceeds 1e-5. The subset that tests run is test_deepspeed.py.
"""

import json
import sys
import tempfile
from pathlib import Path

from support.processes import SUPPORT, run_workers

WORKER = SUPPORT / "deepspeed_worker.py"
TOLERANCE = 1e-5
LAYOUTS = {
    1: {"tp1 dp1": {}},
    2: {
        "tp1 dp2": {},
        "tp2 dp1": {"parallel.tp": 2},
        "tp2+sp dp1": {"parallel.tp": 2, "parallel.sequence_parallel": True},
    },
    4: {
        "tp2 dp2": {"parallel.tp": 2},
        "tp2+sp dp2": {"parallel.tp": 2, "parallel.sequence_parallel": True},
    },
}


def main() -> int:
    """Run all cases and return the exit code."""
    out, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20
    rows = [
        "| layout | ZeRO | cross entropy | gradient norm | alignment, captured mass |",
        "|---|---|---|---|---|",
    ]
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for world, layouts in LAYOUTS.items():
            jobs = []
            for layout, place in layouts.items():
                jobs.append({"name": f"{layout} megatron", "do": "train", "set": place, "stop": steps})
                for stage in range(4):
                    own = {"engine.name": "deepspeed", "deepspeed.zero_stage": stage}
                    jobs.append({"name": f"{layout} {stage}", "do": "train", "set": place | own, "stop": steps})
            listing = Path(folder) / f"jobs{world}.json"
            listing.write_text(json.dumps(jobs))
            run_workers(WORKER, world, str(listing), folder, timeout=3600)
            found = {job["name"]: json.loads((Path(folder) / f"{job['name']}.0.json").read_text()) for job in jobs}
            for layout in layouts:
                for stage in range(4):
                    errors = differences(found[f"{layout} {stage}"], found[f"{layout} megatron"])
                    worst = max(worst, *errors)
                    rows.append(f"| {layout} | {stage} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")
                    print(rows[-1], flush=True)
    out.write_text("\n".join(rows) + "\n")
    return int(worst > TOLERANCE)


def differences(found: list, wanted: list) -> tuple[float, float, float]:
    """Return the largest relative differences of the cross entropy, the gradient norm and all else."""
    errors = [[abs(a - b) / abs(b) for a, b in zip(x, y, strict=True)] for x, y in zip(found, wanted, strict=True)]
    return max(e[0] for e in errors), max(e[1] for e in errors), max(max(e[2:]) for e in errors)


if __name__ == "__main__":
    sys.exit(main())
