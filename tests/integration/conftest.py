"""The quickstart's corpus, prepared once a session by the README's command."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "distributed")]

from training import ROOT, environment


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Return the folder of the prepared corpus: real English and Python."""
    out = tmp_path_factory.mktemp("corpus") / "data"
    subprocess.run(
        [sys.executable, "-m", "data_prep", "source=quickstart", "tokenizer=bpe4k", f"out={out}"],
        env=environment(),
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return out
