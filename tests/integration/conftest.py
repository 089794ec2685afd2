"""The quickstart's corpus, prepared once for all workers of a session by the README's command."""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from support.training import ROOT, environment


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, worker_id) -> Path:
    """Return the folder of the prepared corpus, which no test may change: real English and Python."""
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent
    out = shared / "corpus"
    with (shared / "corpus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "manifest.json").exists():
            command = [sys.executable, "-m", "data_prep", "source=quickstart", "tokenizer=bpe4k", f"out={out}"]
            subprocess.run(command, env=environment(), cwd=ROOT, check=True, capture_output=True)
    return out
