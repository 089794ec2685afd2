"""The benchmark's parts that need no GPU: locality, verdicts, the table of bounds, the plot."""

import importlib
import math
import sys

import numpy as np
import pytest
import torch

from bench import shapes
from bench.activations import activation_rows
from bench.bounds import Stage, table
from bench.cases import Row
from bench.locality import load_activations, shared_fraction, sink_fraction
from ssa_kernels import build_layout


def layout_of(*ends):
    return build_layout(torch.tensor([0, *ends]), num_tokens=ends[-1], block_size=2)


def test_locality_of_groups_sharing_all_none_and_half_of_their_blocks():
    layout = layout_of(8)
    same = torch.tensor([[0, 1]] * 8).view(8, 1, 2)
    assert shared_fraction(same, layout, 4) == 1 / 4
    distinct = torch.arange(16).view(8, 1, 2)
    assert shared_fraction(distinct, layout, 4) == 1
    half = torch.tensor([[0, 1], [0, 2]] * 4).view(8, 1, 2)  # three distinct of four
    assert shared_fraction(half, layout, 2) == 3 / 4


def test_locality_skips_groups_over_two_documents_and_short_choices():
    same = torch.tensor([[0, 1]] * 8).view(8, 1, 2)
    same[2:4] = torch.tensor([5, 6])
    assert shared_fraction(same, layout_of(3, 8), 4) == 1 / 4  # only the second group lies in one document
    same[5, 0, 1] = -1
    assert math.isnan(shared_fraction(same, layout_of(3, 8), 4))


def test_sink_counts_block_0_unless_it_is_the_own_block():
    layout = layout_of(6)
    indices = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1], [0, 2], [1, 2]]).view(6, 1, 2)
    assert sink_fraction(indices, layout) == 3 / 4


@pytest.mark.parametrize("eighths", [1, 3, 8])
@pytest.mark.parametrize("shape", [shapes.SHAPE_8K, shapes.SHAPE_32K], ids=lambda shape: shape.name)
def test_sample_is_a_share_of_each_row_at_the_mean_cost(shape, eighths):
    slices = shapes.mirrored_slices(shape, eighths / 8)
    queries = torch.cat([torch.arange(first, first + length) for first, length in slices])
    assert torch.equal(queries, queries.unique())
    per_row = torch.full((shape.num_rows,), shape.row_length * eighths // 8)
    assert torch.equal(torch.bincount(queries // shape.row_length), per_row)
    assert (queries % shape.row_length + 1).double().mean().item() == (shape.row_length + 1) / 2


@pytest.mark.parametrize(
    ("value", "higher", "verdict"),
    [(5.3, True, "aim"), (4.5, True, "must"), (3.9, True, "missed"), (3.9, False, "aim"), (4.5, False, "missed")],
)
def test_verdicts(value, higher, verdict):
    bounds = (4.0, 5.2) if higher else (4.2, 4.0)
    assert Row.bounded("a", value, "x", bounds, higher=higher).verdict == verdict
    assert Row("a", value, "x").verdict == ""


def stage():
    return Stage("sparse fwd", 2.0, 1e12, 4e9, 8e9, 0.0, {"memory": 1.0, "L2": 1.5})


def test_largest_floor_binds():
    assert stage().binds == "L2"
    assert "500.0   2.00     4.00   1.500 ms by L2: 75%" in table([stage()])
    assert stage().as_record()["share"] == 0.75


def test_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.plot import roofline

    roofline([stage()], 4.3e12, 8e14, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_benchmark_without_matplotlib_skips_the_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its import fails
    for name in [name for name in sys.modules if name.split(".")[0] == "bench"]:
        monkeypatch.delitem(sys.modules, name)
    bench = importlib.import_module("bench.__main__")
    bench.plot.roofline([stage()], 4.3e12, 8e14, tmp_path / "roofline.png")
    assert "roofline.png is left out: install matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_activations_without_a_tensor_are_refused(tmp_path):
    torch.save({"q": torch.zeros(1)}, tmp_path / "layer.pt")
    with pytest.raises(ValueError, match="lacks cu_seqlens, k, v"):
        load_activations(tmp_path / "layer.pt", torch.device("cpu"))


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_locality_of_activations_runs_on_a_cpu(tmp_path, suffix):
    tensors = {name: torch.randn(400, heads, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    tensors["cu_seqlens"] = torch.tensor([0, 400])
    path = tmp_path / f"layer{suffix}"
    if suffix == ".pt":
        torch.save(tensors, path)
    else:
        np.savez(path, **{name: x.numpy() for name, x in tensors.items()})
    rows = {row.name.split(": ")[1]: row.value for row in activation_rows(path, torch.device("cpu"))}
    assert 1 / 4 < rows["rho_4"] < rows["rho_2"] < 1
    assert 0 < rows["choices that hold block 0"] < 1
