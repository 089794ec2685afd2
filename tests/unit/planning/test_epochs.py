"""The plan's lines on the data over time, and the documents that the planner takes best fit to make."""

from pathlib import Path

import pytest

from ssa_pretrain.config import Config, RowPacking, StageConfig
from ssa_pretrain.data.manifest import Manifest
from ssa_pretrain.data.mixture import Stage
from ssa_pretrain.data.packed_index import prepare
from ssa_pretrain.planning.documents import document_lengths, packed_lengths, typical_row
from ssa_pretrain.planning.epochs import epoch_lines, mixture_stages, stage_line
from support.small_datasets import cut, write_dataset


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    """Rows of 32 tokens: 99 and 19 per epoch, in documents that are cut."""
    folder = tmp_path_factory.mktemp("epochs")
    return write_dataset(folder, {"english": cut(3200), "python": cut(640 + 7)}, {})


def configured(*stages: StageConfig, packing: RowPacking = RowPacking.flow) -> Config:
    """Returns a run of 30 steps of 8 rows of 32 tokens."""
    config = Config()
    config.data.sequence_length, config.data.stages, config.data.packing = 32, list(stages), packing
    config.training.steps, config.training.global_batch_tokens = 30, 256
    return config


CODE = StageConfig(from_step=11, weights={"python": 1.0})
BOTH = StageConfig(from_tokens=20 * 256 - 5, weights={"english": 3.0, "python": 1.0})


def test_stages_begin_at_steps() -> None:
    config = configured(CODE, BOTH)
    assert mixture_stages(config) == [Stage(0, {}), Stage(80, {"python": 1.0}), Stage(160, BOTH.weights)]
    assert [step for step in range(30) if stage_line(config, step)] == [10, 20]
    assert stage_line(config, 20) == "stage 3 of the mixture begins with step 21: english 3, python 1"


def test_plan_has_tokens_and_epochs_by_stage(manifest: Manifest) -> None:
    lines = epoch_lines(configured(CODE, BOTH), 30, manifest)
    assert [line for line in lines if line[0] in ("stages", "") and ": steps" in line[1]] == [
        (
            "stages",
            "1: steps 1 to 10: english 2.14k tokens (83.8%, epochs 0.677), python 416 tokens (16.2%, epochs 0.684)",
        ),
        ("", "2: steps 11 to 20: python 2.56k tokens (100.0%, epochs 4.21)"),
        ("", "3: steps 21 to 30: english 1.92k tokens (75.0%, epochs 0.606), python 640 tokens (25.0%, epochs 1.05)"),
    ]
    assert lines[0] == ("epochs", "2.03 over 118 rows: python 5.95, english 1.28")
    shorter = epoch_lines(configured(CODE, BOTH), 15, manifest)
    assert shorter[-1][1].startswith("2: steps 11 to 15: python 1.28k"), (
        "a stage that the run does not reach has no line"
    )


def test_plan_counts_rows_of_the_index(manifest: Manifest, tmp_path: Path) -> None:
    config = configured(packing=RowPacking.best_fit)
    config.data.index_path = str(tmp_path)
    lines = dict(epoch_lines(config, 30, manifest))
    assert lines["epochs"].startswith("about 1.98 over 121 rows: ")
    assert lines["packing"] == "best fit: the first run builds the index; rows are taken to be full until then"
    prepare(manifest, 32, str(tmp_path))
    lines = dict(epoch_lines(config, 30, manifest))
    rows = int(lines["epochs"].split()[2])
    assert lines["epochs"].startswith(f"{240 / rows:.3g} over {rows} rows: ") and rows >= 121
    assert lines["packing"].startswith(f"best fit: {rows} rows, ")


@pytest.mark.parametrize("rule", ["lognormal:960", "geometric:300", "lognormal:20000"])
def test_packed_documents_are_cut_only_at_row_lengths(rule: str) -> None:
    length, longest = 4096, 256
    flowing, (own, padding) = document_lengths(rule, length), packed_lengths(rule, length, longest)
    assert (sum(own) + sum(padding)) % length == 0 and max(own) <= length
    assert max(padding) <= longest and sum(padding) < 0.04 * sum(own), "rows are nearly full"
    assert len(own) / sum(own) < len(flowing) / sum(flowing), "fewer pieces than where the ends of rows cut"
    cut = sum(n == length for n in own)
    assert (cut > 0) == (max(flowing) == length)


def test_typical_row_under_best_fit_has_more_pairs_and_pays_for_padding() -> None:
    """Documents that nothing cuts have more (query, key) pairs per row, and the linear layers compute padding too."""
    config = Config()
    shape = (config.model, config.attention, 4096, 1000, "lognormal:960")
    flow, packed = typical_row(*shape), typical_row(*shape, 256)
    assert packed.full_attention > flow.full_attention
    assert packed.linear == pytest.approx(flow.linear, rel=1e-9)
    assert typical_row(*shape[:4], "whole", 256) == typical_row(*shape[:4], "whole")
