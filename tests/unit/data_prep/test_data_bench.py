"""What the benchmark refuses: one sentence and code 3, before a row runs."""

import pytest

from data_prep.bench.__main__ import main


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["none.jsonl"], "none.jsonl does not exist; name a file of JSON lines first"),
        (["bad.jsonl"], "bad.jsonl:1: no key 'text'"),
        (["a.jsonl.gz"], "a.jsonl.gz is compressed, which not every row reads; unpack it first"),
        (["a.jsonl", "rounds=x"], "rounds=x must be a whole number from 1; try rounds=1"),
        (["a.jsonl", "processes=0"], "processes=0 must be a whole number from 1"),
        (["a.jsonl", "round=1"], "round=1 is no option; the options are work=, rounds="),
        (["a.jsonl", "peers=/none/python"], "peers=/none/python does not exist; correct the path"),
        (["a.jsonl", "rows=raw hf,foo"], "rows=foo is no row; the rows are raw hf, raw tiktoken"),
    ],
)
def test_wrong_arguments_end_with_code_3(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data_prep.bench.__main__.llama3_json", lambda *_: tmp_path / "tokenizer.json")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(b"x")
    (tmp_path / "bad.jsonl").write_text('{"body": "a"}\n')
    assert main(arguments) == 3
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1, said
