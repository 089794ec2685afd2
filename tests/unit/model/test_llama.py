"""Runs the checks of support/ that build engines in a separate process, because the engine redirects torch's CUDA calls for its whole process."""

import os

from support.processes import SUPPORT, run_ranks

CHECKS = [SUPPORT / name for name in ("model_checks.py", "optimizer_checks.py", "indexer_checks.py")]


def test_model_passes_model_checks():
    own = {name: "" for name in os.environ if name.startswith("PYTEST")}  # of the pytest that runs this test
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:xdist"]
    (done,) = run_ranks(["-m", "pytest", *options, *map(str, CHECKS)], [own], timeout=500)
    assert done.code == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]
