"""A dataset records the settings that made it. Advice is a command that repairs it, and no other text gets into it."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.recipe import read_recipe
from ssa_pretrain.data.manifest import load_manifest, verify_hashes
from support.texts import sentences

SETTINGS = ("source=jsonl", "source.paths=[corpus.jsonl]", "tokenizer.vocab_size=512", "split.heldout_fraction=0.1")
MADE = (*SETTINGS, "shard_mb=0.02", "workers=1", "merge.files=2", "stage=prepare")
NAMES = ("train/text_00001.bin", "train/text_00001.idx", "heldout/text_00000.idx", "tokenizer.json", "manifest.json")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and, under a name that needs quotes, its dataset in merged files; made with a relative path."""
    folder = tmp_path_factory.mktemp("recipe")
    lines = [json.dumps({"text": text}) + "\n" for text in sentences(200, seed=0)]
    (folder / "corpus.jsonl").write_text("".join(lines))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main([*MADE, "out='größe x'"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def dataset(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of both, moved with its text; the original's text is inaccessible."""
    shutil.copytree(original, tmp_path / "moved")
    recipe = tmp_path / "moved" / "größe x" / "recipe.json"
    assert str(original) in recipe.read_text()
    (original / "corpus.jsonl").rename(original / "hidden")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "moved" / "größe x"
    (original / "hidden").rename(original / "corpus.jsonl")


def files_of(root: Path) -> dict[str, bytes]:
    kept = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(root)): path.read_bytes() for path in kept}


def follow(output: str) -> int:
    """Runs the command that a message advises, exactly as printed."""
    (command,) = re.findall(r"`(python -m data_prep [^`]*)`", output)
    return main(shlex.split(command)[3:])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", NAMES)
def test_advice_for_each_kind_of_damage_repairs_the_dataset(dataset, name, damage, capsys):
    before = files_of(dataset)
    damage(dataset / name)
    if name.endswith(".idx") and damage is flip:
        shutil.rmtree(dataset / "work")  # may be deleted: everything is rebuilt
    capsys.readouterr()
    assert main(["stage=validate", f"out='{dataset}'"]) == 4
    assert follow(capsys.readouterr().err) == 0
    assert {key: before[key] for key in NAMES} == {key: files_of(dataset)[key] for key in NAMES}
    verify_hashes(load_manifest(dataset))


def test_advice_for_a_damaged_shard_repairs_it(dataset, capsys):
    os.chdir(dataset.parent)
    assert main([*MADE[:-1], "out=d", "stage=tokenize"]) == 0
    flip(dataset.parent / "d" / "work" / "shards" / "train" / "text_00001.bin")
    os.chdir("/")
    capsys.readouterr()
    assert main([f"out={dataset.parent}/d", "stage=merge"]) == 4
    output = capsys.readouterr().err
    assert (
        "shard text_00001 cannot be merged: " in output
        and "text_00001.bin changed after it was written; repair" in output
    )
    assert follow(output) == 0
    assert load_manifest(dataset.parent / "d").to_json() == load_manifest(dataset).to_json()


def test_stage_without_its_input_names_the_command_to_run_first(dataset, capsys):
    os.chdir(dataset.parent)
    assert main([*MADE[:-1], "out=d", "stage=merge"]) == 4
    os.chdir("/")
    assert follow(capsys.readouterr().err) == 0
    assert "stage=merge` to make a dataset of them" in (output := capsys.readouterr().out) and follow(output) == 0
    assert load_manifest(dataset.parent / "d").to_json() == load_manifest(dataset).to_json()


def test_repair_keeps_the_tokenizer_even_if_the_library_would_train_another(dataset, monkeypatch, capsys):
    before = (dataset / "manifest.json").read_bytes()
    shutil.rmtree(dataset / "work")
    flip(dataset / "train" / "text_00000.bin")
    monkeypatch.setattr("tokenizers.__version__", "99.0")
    monkeypatch.setattr("data_prep.tokenizer.bpe.train_bpe", lambda *_: pytest.fail("it was trained again"))
    assert main([f"out='{dataset}'", "verify=full", "stage=prepare"]) == 0
    assert (dataset / "manifest.json").read_bytes() == before


def test_training_advises_the_same_command(dataset):
    from ssa_pretrain.data.rows import TrainingRows
    from ssa_pretrain.errors import DamagedData

    manifest = load_manifest(dataset)
    path = dataset / f"{manifest.splits['train'][0].prefix}.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    rows = TrainingRows(manifest, sequence_length=32, seed=0, weights={})
    with pytest.raises(DamagedData, match="the file is damaged; repair it with `python -m data_prep ") as caught:
        for number in range(100):
            rows.row(number)
    assert follow(str(caught.value)) == 0
    verify_hashes(load_manifest(dataset))


def test_run_without_a_source_uses_the_recipe(dataset, capsys):
    before = files_of(dataset)
    assert main([f"out='{dataset}'", "stage=prepare"]) == 0
    output = capsys.readouterr().err
    assert "no source is given, so its recipe is used (source=jsonl, tokenizer=bpe)" in output
    assert "is up to date: nothing to do" in output
    changed = {name for name, content in files_of(dataset).items() if before.get(name) != content}
    assert changed <= {"recipe.json", "work/inputs.json", "work/plan.json"}  # the paths of the files, which have moved
    recipe = read_recipe(dataset)
    assert recipe.settings["source"]["paths"] == [str(dataset.parent / "corpus.jsonl")] and recipe.out == str(dataset)
    assert main([f"out='{dataset}'", "merge.files=1", "stage=prepare"]) == 0
    assert len(load_manifest(dataset).splits["train"]) == 1


OTHER = [
    (("source=quickstart",), "its text came from source=jsonl"),
    (("source=quickstart", "stage=fetch"), "its text came from source=jsonl"),
    (("source=quickstart", "stage=plan"), "its text came from source=jsonl"),
    (
        ("source=jsonl", "source.paths=[other.jsonl]", *SETTINGS[2:]),
        "its text differs from the text in that dataset",
    ),
    (("source=jsonl", "source.paths=[other.jsonl]", *SETTINGS[2:], "stage=plan"), "its text differs from the text"),
    (("source.paths=[other.jsonl]",), "its text differs from the text in that dataset"),
    (("split.seed=5",), "made with split.seed=0, not with split.seed=5"),
    (("tokenizer.vocab_size=600", "stage=tokenize"), "made with tokenizer.vocab_size=512, not with"),
    (("mix.target_tokens=100",), ""),
]


@pytest.mark.parametrize(
    "change,reason,manifest",
    # Without a recipe a source has to be given; the user's own text is then compared by its content.
    [(*case, state) for state in ("sound", "damaged", "missing") for case in OTHER]
    + [(*case, "older") for case in OTHER[:3]],
)
def test_other_text_or_settings_are_rejected_before_anything_is_written(dataset, change, reason, manifest, capsys):
    (dataset.parent.parent / "other.jsonl").write_text('{"text": "other words"}\n' * 50)
    if manifest == "damaged":
        truncate(dataset / "manifest.json")
    elif manifest == "missing":
        (dataset / "manifest.json").unlink()
    elif manifest == "older":
        (dataset / "recipe.json").unlink()
    before = files_of(dataset)
    assert main([f"out='{dataset}'", *change]) == 4
    output = capsys.readouterr().err
    assert "holds a dataset made from other text or settings; choose another out=, or add overwrite=true" in output
    assert reason in output
    assert files_of(dataset) == before


def test_dataset_without_a_recipe_needs_its_settings(dataset, capsys):
    (dataset / "recipe.json").unlink()
    before = files_of(dataset)
    assert main([f"out='{dataset}'", "verify=full"]) == 4
    output = capsys.readouterr().err
    assert (
        "holds a dataset without a recipe.json (an older version made it)" in output and "repeat the command" in output
    )
    assert files_of(dataset) == before
    os.chdir(dataset.parent)
    assert main([*MADE, f"out='{dataset}'"]) == 0
    assert "is up to date" in capsys.readouterr().err and read_recipe(dataset).fingerprint  # the run wrote one


def test_damaged_recipe_is_reported_and_not_used(dataset, capsys):
    text = (dataset / "recipe.json").read_text()
    for damaged in (text.replace("512", "513"), text[:-9]):
        (dataset / "recipe.json").write_text(damaged)
        assert main([f"out='{dataset}'", "verify=full"]) == 4
        assert "recipe.json is damaged (" in capsys.readouterr().err
        assert main([f"out='{dataset}'", "stage=validate"]) == 4
        output = capsys.readouterr().err
        assert "damaged: " in output and "repair it with" not in output
    load_manifest(dataset)
    os.chdir(dataset.parent)
    assert main([*MADE, f"out='{dataset}'"]) == 0
    assert main([f"out='{dataset}'", "stage=validate"]) == 0


def test_missing_text_is_named(dataset, capsys):
    (dataset.parent / "corpus.jsonl").rename(dataset.parent / "elsewhere.jsonl")
    before = files_of(dataset)
    assert main([f"out='{dataset}'", "verify=full"]) == 4
    output = capsys.readouterr().err
    assert (
        "/corpus.jsonl, which does not exist any more; restore it, name its new place with source.paths=[…]" in output
    )
    assert files_of(dataset) == before
    (dataset / "manifest.json").unlink()
    assert main([f"out='{dataset}'", "stage=prepare", f'source.paths=["{dataset.parent}/elsewhere.jsonl"]']) == 0
    load_manifest(dataset)


def test_interrupted_run_continues_without_its_settings(original, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(original)
    out = f"out={tmp_path}/d"
    assert main([*MADE[:-1], out, "stage=tokenize"]) == 0
    assert main([f"{out}", "stage=validate"]) == 4
    assert follow(capsys.readouterr().err) == 0
    assert load_manifest(tmp_path / "d").to_json() == load_manifest(original / "größe x").to_json()


def test_mixed_dataset_is_repaired_by_its_recipe(original, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(original / "corpus.jsonl", tmp_path / "a=b.jsonl")
    (tmp_path / "t").mkdir()
    for number, text in enumerate(sentences(40, seed=3)):
        (tmp_path / "t" / f"{number}.txt").write_text(text)
    made = [
        "source=mixed", "source.parts.web.kind=jsonl", "source.parts.web.paths=['a=b.jsonl']", "source.parts.own.kind=text",
        "source.parts.own.paths=[t]", "mix.weights={web:0.7,own:0.3}", *SETTINGS[2:], "tokenizer.sample_mb=1", "out=d", "workers=1",
    ]  # fmt: skip
    assert main([*made, "stage=prepare"]) == 0
    before = (tmp_path / "d" / "manifest.json").read_bytes()
    flip(tmp_path / "d" / "manifest.json")
    monkeypatch.chdir("/")
    assert main([f"out={tmp_path}/d", "stage=prepare"]) == 0
    assert "repairing: " in capsys.readouterr().err
    assert (tmp_path / "d" / "manifest.json").read_bytes() == before


def test_recipe_has_no_credentials(tmp_path):
    from data_prep.cli import read_config
    from data_prep.recipe import recipe_of, write_recipe

    arguments = ["source=hub", "source.repo=a/b", "source.endpoint='https://me:pass@host:8/x?token=t'", "out=d"]
    arguments += ["source.blobs.endpoint='http://key@other'"]
    write_recipe(tmp_path, recipe_of(read_config(arguments), tmp_path))
    text = (tmp_path / "recipe.json").read_text()
    assert '"endpoint": "https://host:8/x"' in text and '"endpoint": "http://other"' in text
    assert not re.search("me:|pass@|token=|key@", text)


def test_new_dataset_uses_the_defaults(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen: list[str] = []
    log: Callable[[str], None] = seen.append
    from data_prep.own_settings import own_settings

    for overrides in (["out=new"], [], ["out=new", "source=jsonl"], ["out='"], ["out=${oc.env:NOT_SET}"]):
        assert own_settings(overrides, log) == {} and not seen
