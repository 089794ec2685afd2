"""Several sources in one dataset: their parts, what is fetched only once, and what is rejected."""

import json
from pathlib import Path

import pytest

from data_prep.cli import read_config
from data_prep.sources.files import JsonlSource
from data_prep.sources.hub.settings import HubSource
from ssa_pretrain.settings.problems import ConfigError
from support.hub_server import start_hub, table
from support.texts import sentences

COMMON = (
    "out=data",
    "tokenizer.vocab_size=600",
    "backend=hf",
    "workers=1",
    "stage=prepare",
    "split.heldout_fraction=0.1",
)


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))


def parts(out: Path) -> dict[str, int]:
    """Returns the documents of both splits by part."""
    found: dict[str, int] = {}
    for entries in json.loads((out / "manifest.json").read_text())["splits"].values():
        for entry in entries:
            found[entry["name"]] = found.get(entry["name"], 0) + entry["documents"]
    return found


def mixed(hub_url: str) -> list[str]:
    """Returns the source of these tests: a dataset on the hub, JSON lines and plain files of the user."""
    return [
        "source=mixed",
        f"source.parts.hub={{kind:hub,repo:owner/corpus,endpoint:'{hub_url}',subsets:{{web:{{files:'data/*.parquet'}}}}}}",
        "source.parts.essays.kind=jsonl",
        "source.parts.essays.paths=[mine/*.jsonl]",
        "source.parts.essays.text_column=body",
        "source.parts.notes={kind:text,paths:[notes]}",
        "mix.weights={web:0.5,essays:0.3,notes:0.2}",
    ]


@pytest.fixture
def hub(tmp_path):
    """A hub with one dataset, and files of the user."""
    write(tmp_path / "mine" / "a.jsonl", sentences(100, seed=1))
    (tmp_path / "notes").mkdir()
    for number, text in enumerate(sentences(30, seed=2)):
        (tmp_path / "notes" / f"{number:02d}.md").write_text(text)
    running, stop = start_hub({"data/train.parquet": table(20, "web"), "README.md": b"# corpus"})
    yield running
    stop()


def test_hub_and_own_files_become_one_dataset(run, tmp_path, hub):
    code, output = run(*mixed(hub.url), *COMMON)
    assert code == 0, output
    assert parts(tmp_path / "data") == {"web": 20, "essays": 100, "notes": 30}
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert {entry["name"]: entry["origin"] for entry in manifest["sources"]} == {
        "web": "hub",
        "essays": "jsonl",
        "notes": "text",
    }
    assert manifest["weights"] == {"web": 0.5, "essays": 0.3, "notes": 0.2}


@pytest.mark.parametrize("mode", ["download", "stream"])
def test_hub_source_is_fetched_once(run, tmp_path, hub, mode):
    alone = ("source=hub", "source.repo=owner/corpus", f"source.endpoint={hub.url}", f"source.mode={mode}")
    alone = (*alone, "split.heldout_fraction=0.3")
    code, output = run(*alone, *COMMON)
    assert code == 0, output
    assert parts(tmp_path / "data") == {"text": 20}
    hub.requests.clear()
    assert run(*alone, *COMMON)[0] == 0
    assert hub.requests == []


def test_hub_is_fetched_once_and_own_files_are_searched_in_every_run(run, tmp_path, hub):
    assert run(*mixed(hub.url), *COMMON)[0] == 0
    hub.requests.clear()
    assert run(*mixed(hub.url), *COMMON)[0] == 0
    assert hub.requests == []
    write(tmp_path / "mine" / "b.jsonl", sentences(50, seed=3))
    code, output = run(*mixed(hub.url), *COMMON)
    assert code == 4 and "made from other text" in output
    assert run(*mixed(hub.url), *COMMON, "overwrite=true")[0] == 0
    assert hub.requests == []
    assert parts(tmp_path / "data") == {"web": 20, "essays": 150, "notes": 30}


def test_two_formats_in_one_part_are_rejected(run, tmp_path, hub):
    more = [
        "source.parts.more={kind:quickstart}",
        "source.parts.hub.subsets={python:{files:'data/*.parquet'}}",
        "mix=all",
    ]
    code, output = run(*mixed(hub.url)[:2], *more, *COMMON)
    assert code == 4
    assert (
        "part python would have files of parquet with the text in text and of jsonl with the text in text; give one of"
        in output
    )


def test_part_has_the_files_that_its_source_has_alone(run, tmp_path, hub):
    assert run(*mixed(hub.url), *COMMON)[0] == 0
    tokenizer = tmp_path / "data" / "tokenizer.json"
    alone = ("source=jsonl", "source.name=essays", "source.paths=[mine/*.jsonl]", "source.text_column=body")
    file = ("tokenizer=file", f"tokenizer.path={tokenizer}", "tokenizer.eos_token='<|end_of_text|>'")
    code, output = run(*alone, *file, "out=alone", *COMMON[2:])
    assert code == 0, output
    for split in ("train", "heldout"):
        found, expected = (
            {path.name: path.read_bytes() for path in (tmp_path / out / split).glob("essays_*")}
            for out in ("data", "alone")
        )
        assert found == expected != {}


def test_all_problems_of_all_parts_are_reported_together(run):
    code, output = run(
        "source=mixed",
        "source.parts.a={kind:jsnol,paths:[x]}",
        "source.parts.b={kind:jsonl}",
        "source.parts.c={kind:jsonl,paths:[x],colunm:body}",
        "source.parts.d={kind:hub,repo:nobody,subsets:{e:{}}}",
        "source.parts.e={kind:text,paths:[x]}",
        "source.parts.f={kind:parquet,paths:x}",
        "out=data",
    )
    assert code == 3
    for sentence in (
        "source.parts.a.kind=jsnol must be quickstart, local_docs, hub, jsonl, parquet or text; did you mean jsonl?",
        "source.parts.b.paths is not set and has no default; give source.parts.b.paths=…",
        "source.parts.c.colunm=body is not a known key of source.parts.c; it has the keys kind, name, paths, text_column and on_error",
        "source.parts.d.repo=nobody must be owner/name; try HuggingFaceTB/smollm-corpus",
        "source.parts.d and source.parts.e both make a part e; give one of them another name",
        "source.parts.f.paths=x must be a list; try [x]",
    ):
        assert sentence in output
    code, output = run("source=mixed", "out=data")
    line = "  source.parts={} must name at least one source; try source.parts.web.kind=jsonl 'source.parts.web.paths=[web]'"
    assert (code, output.splitlines()[1]) == (3, line)


def test_published_mix_has_text_for_all_but_one_of_its_parts():
    config = read_config(["source=smollm1", "mix=smollm1", "tokenizer=llama3", "out=data"])
    datasets = config.source.settings()
    assert all(isinstance(source, HubSource) for source in datasets)
    made = {name for source in datasets for name in source.subsets}
    assert set(config.mix.weights) - made == {"stackoverflow"}
    more = ["source.parts.stackoverflow.kind=jsonl", "source.parts.stackoverflow.paths=[so]"]
    config = read_config(["source=smollm1", *more, "out=data"])
    assert config.source.settings()[-1] == JsonlSource(name="stackoverflow", paths=["so"])


@pytest.mark.parametrize(
    "override,sentence",
    [
        (
            "source.parts.web.kind=jsonl",
            "source.parts={...} belongs to source=mixed, and source is of the kind quickstart; add source=mixed",
        ),
        (
            "executor.sbatch.account=x",
            "executor.sbatch={...} belongs to executor=slurm, and executor is of the kind local; add executor=slurm",
        ),
    ],
)
def test_setting_of_another_kind_is_rejected(run, override, sentence):
    code, output = run("source=quickstart", override, "out=data")
    assert code == 3 and sentence in output


def test_part_of_another_type_is_rejected():
    with pytest.raises(ConfigError, match=r"source.parts.web.kind=null must be quickstart, local_docs, "):
        read_config(["source=mixed", "source.parts.web.paths=[x]", "out=data"])
