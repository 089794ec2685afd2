"""Comparison of several runs: the table, the page, and the message for bad arguments."""

import json
import sys

import pytest

from ssa_pretrain.errors import UsageError
from ssa_pretrain.report import compare, several
from ssa_pretrain.report.summary import read_summary


def write(folder, mass):
    folder.mkdir()
    records = [{"kind": "train", "step": s, "tokens": 100 * s, "cross_entropy": 5.0 - s} for s in (1, 2)]
    for step in (1, 2):
        for mode in ("full", "sparse"):
            metrics = {"cross_entropy": 4.0 - step, "perplexity": 20.0, "captured_mass": mass}
            records.append({"kind": "evaluation", "step": step, "tokens": 100 * step, "mode": mode, **metrics})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_table_has_the_last_evaluation_of_each_mode(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a", 0.5)
    write(tmp_path / "b", None)
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    compare.main()
    assert capsys.readouterr().out.splitlines() == [
        "| run | tokens | mode | cross entropy | perplexity | captured mass |",
        "|---|---|---|---|---|---|",
        "| a | 200 | full | 2.0000 | 20.00 | 0.500 |",
        "| a | 200 | sparse | 2.0000 | 20.00 | 0.500 |",
        "| b | 200 | full | 2.0000 | 20.00 | – |",
        "| b | 200 | sparse | 2.0000 | 20.00 | – |",
    ]


def test_page_is_that_of_the_report(tmp_path, monkeypatch):
    write(tmp_path / "a", 0.5)
    write(tmp_path / "b <>", 0.6)
    out = tmp_path / "x" / "page.html"
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "a"), str(tmp_path / "b <>"), f"out={out}"])
    compare.main()
    text = out.read_text()
    assert text.count("b &lt;&gt;</span>") == 1 and "b <>" not in text
    assert (
        "<td>20.00</td>" in text
        and "a, full: 0.5 at 100 tokens" in text
        and "b &lt;&gt;, full: 0.6 at 200 tokens" in text
    )


def test_first_tenth_of_a_run_is_not_drawn(tmp_path):
    write(tmp_path / "a", 0.5)
    summary = read_summary(tmp_path / "a")
    summary.steps = [{"kind": "train", "tokens": i, "cross_entropy": 100.0 if i < 10 else 2.0} for i in range(200)]
    points = several._training(summary)
    assert len(points) == 180 and {round(y, 9) for _, y in points} == {2.0}
    summary.steps = []
    assert several._training(summary) == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [([], "no run given"), (["nowhere"], "no metrics.jsonl in nowhere"), (["here", "out=x.png"], "out=x.png")],
)
def test_bad_arguments_are_reported_in_one_line(arguments, problem, tmp_path, monkeypatch):
    write(tmp_path / "here", 0.5)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    with pytest.raises(UsageError) as stopped:
        compare.main()
    usage = "give folders of runs, and out=FILE.html for a page with charts"
    assert stopped.value.exit_code == 3 and str(stopped.value) == f"{problem}; {usage}"
