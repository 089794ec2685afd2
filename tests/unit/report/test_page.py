"""ssa_pretrain/report: a run's folder as a table and as a self-contained page."""

import json
import math
import re
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import pytest

from ssa_pretrain.config import Config, Method
from ssa_pretrain.monitor.environment import record_start
from ssa_pretrain.report.__main__ import main
from ssa_pretrain.report.page import page
from ssa_pretrain.report.summary import ReportError, read_summary
from ssa_pretrain.report.table import table
from ssa_pretrain.settings.convert import save_config

MANIFEST = {
    "tokenizer": {"name": "bpe8192", "vocab_size": 8192},
    "splits": {"train": [{"tokens": 900_000}, {"tokens": 100_000}], "heldout": [{"tokens": 50_000}]},
    "sources": [{"name": "english"}, {"name": "english"}, {"name": "python"}],
    "unigram_entropy_nats": {"train": 7.4, "heldout": 7.2},
}
PROMPT = "Once <upon>"


def code_of(arguments: list[str]) -> int:
    """Returns the exit code of a report that fails."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert isinstance(left.value.code, int)
    return left.value.code


def train(step: int) -> dict:
    return {
        "kind": "train",
        "step": step,
        "tokens": 1000 * step,
        "cross_entropy": 9.0 - step / 10,
        "alignment_loss": 0.1 / step,
        "captured_mass": 0.8,
        "captured_mass_by_layer": [0.7 + step / 100, 0.9],
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "tokens_per_second": 100.0 * step,
        "seconds": 2.0,
        "mfu": None,
        "cross_entropy_by_source": {"<web>": 9.0 - step / 10} | ({"code": 4.0} if step % 2 else {}),
        "labels_by_source": {"<web>": 900} | ({"code": 90} if step % 2 else {}),
        "tokens_by_source": {"<web>": 900 * step, "code": 100 * step},
        "epochs_by_source": {"<web>": step / 40, "code": step / 4},
    }


def evaluation(step: int, mode: str, loss: float) -> dict:
    found = {"kind": "evaluation", "step": step, "tokens": 1000 * step, "split": "heldout", "mode": mode}
    return found | {"cross_entropy": loss, "perplexity": math.exp(loss), "captured_mass": None}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a-run"
    (folder / "data").mkdir(parents=True)
    config = Config(name="a <run>")
    config.data.path = str(tmp_path / "elsewhere")
    config.parallel.tp = 2
    save_config(config, folder / "config.yaml")
    records = [evaluation(0, "full", 9.0), evaluation(0, "sparse", 9.1), *(train(step) for step in range(1, 11))]
    records += [evaluation(10, "full", 5.0), evaluation(10, "sparse", 5.5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "data" / "manifest.json").write_text(json.dumps(MANIFEST))
    samples = [
        {"prompt": PROMPT, "mode": mode, "text": text}
        for mode, text in (("full", "</pre><script>"), ("sparse", PROMPT + " a time"))
    ]
    (folder / "samples.json").write_text(json.dumps(samples))
    return folder


class Page(HTMLParser):
    """Collects a page's text and everything in it that could load a resource or run code."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "path", "rect", "circle"):
            self.open.append(tag)
        self.loads += [
            f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset") or name.startswith("on")
        ]
        self.loads += [tag] if tag in ("script", "link", "iframe", "img", "object") else []

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(html: str) -> Page:
    reader = Page()
    reader.feed(html)
    assert reader.open == [], "every element is closed"
    return reader


def test_page_is_complete_and_self_contained(run: Path) -> None:
    html = page(read_summary(run))
    reader = parsed(html)
    assert reader.loads == [] and "url(" not in html and "@import" not in html
    text = " ".join(reader.text)
    assert html.count("<svg") - html.count('<svg width="22"') == 7, (
        "loss, mass, alignment, norm, rate, speed, loss by source"
    )
    for shown in (
        "a <run>",
        f"{math.exp(5):.1f}",
        f"{math.exp(5.5):.1f}",
        "7.200",
        "80.0%",
        PROMPT,
        "</pre><script>",
        " a time",
    ):
        assert shown in text, shown
    assert text.count(PROMPT) == 2, "a continuation that repeats its prompt shows the prompt once"


def test_table_has_the_same_values(run: Path) -> None:
    lines = table(read_summary(run)).splitlines()
    assert lines[0] == "a <run>: held-out text after 10 steps"
    assert lines[1].split() == ["full", "sparse", "unigram"]
    assert lines[2].split()[-3:] == ["5.000", "5.500", "7.200"]
    assert lines[3].split()[-3:] == ["148.4", "244.7", f"{math.exp(7.2):.1f}"]
    assert "0: 0.71 -> 0.80  1: 0.90 -> 0.90" in lines[5]
    found = dict(line.split(None, 1) for line in lines[6:])
    assert found["data"] == "english, python: 1.00M tokens train, 50.0k tokens heldout"
    assert found["layout"].startswith("tp 2,") and found["speed"] == "600 tokens/s (median)"
    assert found["length"] == "10 steps, 10,000 tokens"


def test_data_by_source_is_a_table_and_a_chart(run: Path) -> None:
    summary = read_summary(run)
    text = parsed(page(summary)).text
    assert "Data by source" in text and "<web>" in text
    cells = text[text.index("<web>") :]
    assert cells[: len(cells)].count("9.00k") and "2.5" in cells and "4.000" in cells
    assert "  <web>    9.00k  90.0%    0.25  8.450" in table(summary).splitlines()
    assert "  code     1.00k  10.0%     2.5  4.000" in table(summary).splitlines()


def test_main_writes_the_page_and_prints_the_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run)])
    assert (run / "report.html").read_text() == page(read_summary(run))
    out = capsys.readouterr().out
    assert out.startswith("a <run>: held-out") and out.endswith(f"report: {run / 'report.html'}\n")
    assert not list(run.glob("*.tmp"))


def test_evaluation_file_is_used_unless_training_evaluated_later(run: Path) -> None:
    modes = {
        "full": {"cross_entropy": 4.0, "captured_mass_by_layer": []},
        "sparse": {"cross_entropy": 4.1, "captured_mass_by_layer": [0.5, 0.7]},
    }
    (run / "evaluation.json").write_text(json.dumps({"step": 10, "modes": modes}))
    final = read_summary(run).final
    assert final["full"]["cross_entropy"] == 4.0 and final["full"]["captured_mass"] is None
    assert final["sparse"]["captured_mass"] == pytest.approx(0.6)
    (run / "evaluation.json").write_text(json.dumps({"step": 9, "modes": modes}))
    assert read_summary(run).final["full"]["cross_entropy"] == 5.0


def test_report_names_the_evaluation_of_each_value(run: Path) -> None:
    """During training, from `evaluate`, or one mode from each. Values that a file lacks are left out."""
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + "".join(json.dumps(r) + "\n" for r in (train(11), train(12))))

    def shown() -> str:
        summary = read_summary(run)
        lines = table(summary).splitlines()
        (text,) = [line.split(None, 1)[1] for line in lines if line.startswith("evaluation ")]
        assert f"{text}." in " ".join(parsed(page(summary)).text)
        return f"{lines[0].partition('after ')[2]}: {text}"

    assert shown() == "10 steps: full and sparse: step 10, 10,000 tokens, during training"
    later = [evaluation(12, mode, 4.5) | {"rows": 1064} for mode in ("full", "sparse")]
    path.write_text(path.read_text() + "".join(json.dumps(record) + "\n" for record in later))
    assert shown() == "12 steps: full and sparse: step 12, 12,000 tokens, 1,064 held-out rows, during training"
    written = {"step": 12, "modes": {"full": {"cross_entropy": 4.0}}}
    (run / "evaluation.json").write_text(json.dumps(written))
    during = "sparse: step 12, 12,000 tokens, 1,064 held-out rows, during training"
    assert shown() == f"12 steps: full: step 12, by ssa_pretrain.evaluate; {during}"
    (run / "evaluation.json").write_text(json.dumps(written | {"tokens": 12_000, "rows": 2000}))
    assert shown() == f"12 steps: full: step 12, 12,000 tokens, 2,000 held-out rows, by ssa_pretrain.evaluate; {during}"
    assert "Drawn from the weights of step 12 by ssa_pretrain.evaluate" in page(read_summary(run))


def test_run_that_has_just_started_has_a_report(run: Path) -> None:
    for name in ("config.yaml", "samples.json"):
        (run / name).unlink()
    (run / "data" / "manifest.json").unlink()
    (run / "metrics.jsonl").write_text("")
    summary = read_summary(run)
    assert "No training step is recorded yet." in " ".join(parsed(page(summary)).text)
    assert table(summary).startswith("a-run: held-out text after 0 steps")


def test_full_attention_has_no_alignment_loss_and_no_captured_mass(run: Path) -> None:
    config = Config(name="full")
    config.attention.method = Method.full
    save_config(config, run / "config.yaml")
    records = [
        train(step) | {"alignment_loss": None, "captured_mass": None, "captured_mass_by_layer": []} for step in (1, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = " ".join(parsed(page(read_summary(run))).text)
    assert "full attention" in text and "Alignment loss" not in text and "Captured attention mass" not in text


def test_charts_leave_out_steps_whose_loss_is_not_finite(run: Path) -> None:
    records = [train(1), train(2) | {"cross_entropy": None, "grad_norm": None}, train(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = read_summary(run)
    assert [x for x, _ in summary.series("cross_entropy")] == [1000, 3000]
    parsed(page(summary))


def test_bad_arguments_print_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of([str(tmp_path / "none")]) == 4
    expected = (
        f"report: {tmp_path / 'none'} has no metrics.jsonl; give the output_dir of a run, such as outputs/quickstart\n"
    )
    assert capsys.readouterr().err == expected
    (run / "samples.json").write_text("{")
    assert code_of([str(run)]) == 4
    assert "samples.json cannot be read" in capsys.readouterr().err
    with pytest.raises(ReportError, match="remove it or write it again"):
        read_summary(run)
    assert code_of([]) == 3


def test_unwritable_page_is_reported_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "config.yaml" / "x.html"
    assert code_of([str(run), "--out", str(out)]) == 3
    message = f"{out} cannot be written (File exists); give --out=FILE in an existing, writable folder"
    assert capsys.readouterr() == ("", f"report: {message}\n")


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"step": 1}, "kind"),
        ({"step": 1, "kind": "train"}, "tokens"),
        ({"step": 1, "kind": "evaluation", "cross_entropy": 1.0}, "mode"),
        ({"step": 1, "kind": "evaluation", "mode": "full"}, "cross_entropy"),
    ],
)
def test_incomplete_record_is_reported_with_its_line(
    run: Path, record: dict, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "metrics.jsonl"
    count = len(path.read_text().splitlines())
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    assert code_of([str(run)]) == 4
    message = f"{path}:{count + 1} has no {key!r}; remove the line, or give the output_dir of another run"
    assert capsys.readouterr().err == f"report: {message}\n"


def test_report_names_last_host(run: Path) -> None:
    assert "ran on" not in table(read_summary(run))
    record_start(run, step=0, device="CPU", processes=1)
    record_start(run, step=5, device="NVIDIA H200", processes=2)
    with (run / "environment.jsonl").open("a") as file:
        file.write('{"step": 9, "started": "cut off by a ki')
    text = table(read_summary(run))
    assert re.search(r"ran on +2 x NVIDIA H200", text)
    assert f"torch {version('torch')}" in text
