"""--explain: the meaning of a key, from the comments in the dataclasses, in both command lines."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest

from data_prep.cli import main as data_prep
from data_prep.config import Config as DataConfig
from data_prep.sources.hub.settings import HubPart
from ssa_pretrain.cli import CONF, read_config
from ssa_pretrain.config import Config
from ssa_pretrain.settings.convert import known_keys
from ssa_pretrain.settings.explain import field_comments
from ssa_pretrain.settings.kinds import sections_in


def printed(*arguments: str, capsys: pytest.CaptureFixture[str], entry: str = "train") -> str:
    with pytest.raises(SystemExit) as left:
        read_config(entry, arguments)
    out, err = capsys.readouterr()
    assert (left.value.code, err) == (0, "")
    return out


def dataclasses_of(cls: Any) -> Iterator[Any]:
    yield cls
    for field in dataclasses.fields(cls):
        for section in sections_in(field.type):
            yield from dataclasses_of(section)


ALL = [cls for root in (Config, DataConfig, HubPart) for cls in dataclasses_of(root)]


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_field_has_a_comment_with_its_meaning(cls: Any) -> None:
    comments = field_comments(cls)
    for field in dataclasses.fields(cls):
        by_type = dataclasses.is_dataclass(field.type) or (
            isinstance(field.type, type) and issubclass(field.type, Enum)
        )
        assert comments[field.name] or (by_type and field.type.__doc__), f"{cls.__name__}.{field.name} has no comment"


def test_explanation_of_one_key(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("--explain", "optim.lr", "experiment=quickstart", "optim.lr=3e-4", capsys=capsys)
    assert text == (
        "optim.lr: peak learning rate, reached after the warm-up\n"
        "  type     number; must be above 0; must be at most 1\n"
        "  default  0.001\n"
        "  here     0.0003\n"
    )
    assert printed("--explain=optim.lr=3e-4", "experiment=quickstart", capsys=capsys) == text
    assert printed("--explain", "optim.lr=3e-4", capsys=capsys, entry="plan") == text
    assert printed("optim.lr=3e-4", "--explain", "optim.lr", capsys=capsys, entry="evaluate") == text


def test_explanation_has_choices_ranges_and_required_keys(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("--explain", "precision.fp8_recipe", capsys=capsys)
    assert "  type     one of\n           tensorwise  by the largest value of the tensor\n" in text
    assert "; must be 16, 32, 64 or 128 keys\n" in printed("--explain", "attention.block_size", capsys=capsys)
    assert "number; must lie in 1 to 64\n" in printed("--explain", "model.rope_scaling.factor", capsys=capsys)
    assert "  default  none; must be set\n" in printed("--explain", "data.path", capsys=capsys)
    assert "data.weights: tokens by source" in printed("--explain", "data.weights.web", capsys=capsys)


def test_sections_groups_and_patterns_list_their_keys(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("--explain", "attention", "attention.top_k=3", capsys=capsys).splitlines()
    assert text[:2] == [
        "attention: The attention method and its constants",
        "  options of the group: full, indexer, moba or ssa",
    ]
    assert "attention.top_k 3 N, blocks per query, including its own" in [" ".join(line.split()) for line in text]
    assert printed("--explain", "logging.wandb", capsys=capsys).startswith("logging.wandb: ")
    assert printed("--explain", "experiment", capsys=capsys).startswith("experiment: a group of whole settings; ")
    found = [line.split()[0] for line in printed("--explain", "*.interval", capsys=capsys).splitlines()]
    assert found == ["evaluation.interval", "checkpoint.interval", "logging.interval"]
    everything = printed("--explain", capsys=capsys)
    assert all(f"\n  {key} " in everything for key in known_keys(Config))


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("optim.lrr", "optim.lrr is not a known key; did you mean optim.lr?"),
        ("learning_rate", "learning_rate is not a known key; did you mean optim.lr?"),
        ("experment", "experment is not a known key; did you mean experiment?"),
        ("zz*", "zz* matches no key; try 'model.*', or --explain without a key for all keys"),
    ],
)
def test_unknown_key_gets_suggestions_and_exits_with_3(
    asked: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        read_config("train", ["--explain", asked])
    assert left.value.code == 3
    assert capsys.readouterr().err.splitlines()[1] == f"  {line}"


def test_data_prep_explains_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert data_prep(["--explain", "split.heldout_fraction", "split.heldout_fraction=0.5"]) == 0
    assert capsys.readouterr().out == (
        "split.heldout_fraction: share of the documents; 1 makes a dataset for evaluation only\n"
        "  type     number; must lie in 0 to 1\n"
        "  default  0.02\n"
        "  here     0.5\n"
    )
    assert data_prep(["--explain", "source", "source=jsonl", "source.paths=[a]"]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0] == "source: where the text comes from" and "jsonl" in text[1]
    assert "  source.paths        [a]    files, folders or glob patterns" in text
    assert data_prep(["--explain"]) == 0
    assert "\n  out " in capsys.readouterr().out
    assert data_prep(["--explain", "source.paths"]) == 3
    line = "  source.paths belongs to source=jsonl, parquet or text, and source is of the kind quickstart; add source=jsonl"
    assert capsys.readouterr().err.splitlines()[1] == line
    assert data_prep(["--explain", "zz*"]) == 3
    assert "zz* matches no key; try 'source.*'" in capsys.readouterr().err


def test_torch_is_not_imported() -> None:
    program = "import sys\nfrom ssa_pretrain.cli import read_config\ntry:\n    read_config('train')\nfinally:\n    print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(CONF.parent)}
    command = [sys.executable, "-c", program, "--explain", "optim.lr"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("False\n")
