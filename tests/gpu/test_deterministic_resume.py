"""In torch's deterministic mode a resumed run equals the uninterrupted one bit for bit: gradients, their norm, weights and moments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import ROOT

pytestmark = pytest.mark.gpu
WORKER = Path(__file__).with_name("deterministic_worker.py")


@pytest.mark.parametrize("spec", ["local", "transformer_engine"])
def test_resume_is_bit_identical(spec, tmp_path):
    """Names the first stage and tensor that differ. A process of its own: cuBLAS reads its variable once."""
    if spec == "transformer_engine":
        pytest.importorskip("transformer_engine")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(WORKER), spec, str(tmp_path)],
        env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    differing = json.loads(done.stdout.splitlines()[-1])
    assert not any(differing.values()), {stage: names[:5] for stage, names in differing.items() if names}
