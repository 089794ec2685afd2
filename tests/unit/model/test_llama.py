"""Runs support/model_checks.py in a separate process, because the engine redirects torch's CUDA calls for its whole process."""

import os
import subprocess
import sys

from support.processes import ROOT, SUPPORT

CHECKS = SUPPORT / "model_checks.py"


def test_model_passes_model_checks():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name in [n for n in environment if n.startswith("PYTEST")]:
        del environment[name]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:xdist", str(CHECKS)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]
