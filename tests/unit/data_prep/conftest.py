"""A small corpus, and a command line that runs in this process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.cli import main
from support.texts import sentences


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A JSON-lines file of 300 documents."""
    path = tmp_path / "corpus.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(sentences(300, seed=0)))
    )
    return path


@pytest.fixture
def run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Returns a function that runs the command line and returns (exit code, its output on stderr)."""
    monkeypatch.chdir(tmp_path)

    def run_here(*arguments: str) -> tuple[int, str]:
        code = main(list(arguments))
        return code, capsys.readouterr().err

    return run_here
