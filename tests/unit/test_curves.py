"""Runs beside each other: the table, the smoothing, and what a wrong command line is told."""

import json
import sys

import pytest

from ssa_pretrain.bench import curves


def write(folder, mass):
    folder.mkdir()
    records = [{"kind": "train", "step": s, "tokens": 100 * s, "cross_entropy": 5.0 - s} for s in (1, 2)]
    for step in (1, 2):
        for mode in ("full", "sparse"):
            figures = {"cross_entropy": 4.0 - step, "perplexity": 20.0, "captured_mass": mass}
            records.append({"kind": "evaluation", "step": step, "tokens": 100 * step, "mode": mode, **figures})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_the_table_has_the_last_evaluation_of_each_mode(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a", 0.5)
    write(tmp_path / "b", None)
    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path / "a"), str(tmp_path / "b")])
    curves.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| a | 200 | full | 2.0000 | 20.00 | 0.500 |",
        "| a | 200 | sparse | 2.0000 | 20.00 | 0.500 |",
        "| b | 200 | full | 2.0000 | 20.00 | – |",
        "| b | 200 | sparse | 2.0000 | 20.00 | – |",
    ]


def test_the_plot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    write(tmp_path / "a", 0.5)
    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path / "a"), f"out={tmp_path / 'x' / 'plot.png'}"])
    curves.main()
    assert (tmp_path / "x" / "plot.png").stat().st_size > 0


def test_smoothing():
    assert curves.smoothed([2.0, 4.0]) == [2.0, 3.0]
    assert curves.smoothed([0.0] + [1.0] * 10)[-1] == 1.0


@pytest.mark.parametrize("arguments", [[], ["nowhere"]])
def test_a_wrong_command_line_ends_in_a_sentence(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["curves", *arguments])
    with pytest.raises(SystemExit) as left:
        curves.main()
    assert left.value.code == 3 and "give folders of runs" in capsys.readouterr().err
