"""Each stage runs alone, reports what it lacks and repeats no work. Mixes, packings and blends are as configured."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ssa_pretrain.data.indexed_format import read_lengths
from ssa_pretrain.data.manifest import load_manifest
from ssa_pretrain.data.rows import HeldOutRows, TrainingRows
from support.texts import edit_manifest

SETTINGS = ("source=jsonl", "source.paths=[corpus.jsonl]", "tokenizer.vocab_size=512", "split.heldout_fraction=0.1")
SMALL = (*SETTINGS, "shard_mb=0.02", "workers=1", "out=d")


def test_stages_one_by_one_equal_one_run(run, corpus, tmp_path):
    for stage in ("plan", "fetch", "tokenize", "merge", "validate", "stats"):
        code, output = run(f"stage={stage}", *SMALL)
        assert code == 0, output
        assert (tmp_path / "d" / "manifest.json").exists() == (stage in ("merge", "validate", "stats"))
    assert run(*SETTINGS, "shard_mb=0.02", "workers=1", "out=whole")[0] == 0
    for name in ("manifest.json", "train/text_00000.bin", "heldout.blend"):
        assert (tmp_path / "d" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes().replace(b"whole", b"d")
    assert "is up to date: nothing to do" in run("stage=merge", *SMALL)[1]
    assert "tokenizing" not in run("stage=tokenize", *SMALL)[1]
    unfinished = tmp_path / "d" / "stats.html.12345.tmp"  # as of a run that was killed in its last moment
    unfinished.touch()
    assert "is up to date: nothing to do" in run(*SMALL)[1] and not unfinished.exists()


def test_stage_without_its_input_names_the_stage_to_run_first(run, corpus):
    assert "shards are missing in out=d; run stage=tokenize first" in run("stage=merge", *SMALL)[1]
    quickstart = ("source=quickstart", "out=q")
    code, output = run("stage=tokenize", *quickstart)
    assert code == 4 and "the text of source=quickstart is not in out=q yet; run stage=fetch first" in output
    code, output = run("stage=plan", *quickstart)
    assert code == 0 and "the text of source=quickstart comes first; run stage=fetch" in output
    for stage in ("validate", "stats"):
        assert "there is no finished dataset" in run(f"stage={stage}", "out=q")[1]


def test_plan_lists_every_shard(run, corpus, tmp_path):
    assert run("stage=plan", *SMALL)[0] == 0
    plan = json.loads((tmp_path / "d" / "work" / "plan.json").read_text())
    assert plan["fetched"] and plan["input_bytes"] == corpus.stat().st_size
    assert sum(shard["bytes"] for shard in plan["shards"]) == plan["input_bytes"]


def test_merged_dataset_is_up_to_date_without_shards(run, corpus, tmp_path):
    assert run(*SMALL, "merge.files=2")[0] == 0
    root = tmp_path / "d"
    assert len(load_manifest(root).splits["train"]) == 2
    assert not list((root / "work" / "shards" / "train").glob("*.bin"))
    inode = (root / "train" / "text_00000.bin").stat().st_ino
    (root / "manifest.json").unlink()
    output = run(*SMALL, "merge.files=2")[1]
    assert "tokenizing" not in output and (root / "train" / "text_00000.bin").stat().st_ino == inode
    path = root / "train" / "text_00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    output = run(*SMALL, "merge.files=2")[1]
    assert "repairing: " in output and "reusing" in output
    assert run("stage=validate", "out=d")[0] == 0
    shutil.rmtree(root / "work")
    assert "is up to date: nothing to do" in run(*SMALL, "stage=prepare", "merge.files=2")[1]


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_flipped_byte_in_a_joined_file_is_repaired(run, corpus, tmp_path, suffix):
    settings = (*SMALL, "merge.files=2", "stage=prepare")
    assert run(*settings)[0] == 0
    path = tmp_path / "d" / "train" / f"text_00001.{suffix}"
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    code, output = run(*settings, "verify=full")
    assert code == 0 and "repairing: " in output
    assert path.read_bytes() == whole
    assert run("stage=validate", "out=d")[0] == 0


def test_another_number_of_files_rebuilds_the_shards_that_it_needs(run, corpus, tmp_path):
    assert run(*SMALL, "merge.files=4")[0] == 0
    assert run(*SMALL, "merge.files=4", "stage=merge")[0] == 0
    for files in (2, 32):
        code, output = run(*SMALL, f"merge.files={files}", "stage=merge")
        assert code == 4 and "shards are missing in out=d; run stage=tokenize first" in output
        assert load_manifest(tmp_path / "d"), "the dataset is still there"
        assert run(*SMALL, f"merge.files={files}")[0] == 0
        assert (
            run(*SETTINGS, "shard_mb=0.02", "workers=1", "out=whole", f"merge.files={files}", "overwrite=true")[0] == 0
        )
        for path in (tmp_path / "whole" / "train").glob("*.*"):
            assert path.read_bytes() == (tmp_path / "d" / "train" / path.name).read_bytes()


def test_larger_budget_extends_a_merged_dataset(run, corpus, tmp_path):
    settings = (*SMALL, "merge.files=2", "overwrite=true")
    for tokens in (2_000, 8_000, 3_000):
        code, output = run(*settings, f"mix.target_tokens={tokens}")
        assert code == 0, output
        fresh = (*SETTINGS, "shard_mb=0.02", "workers=1", "out=fresh", "merge.files=2", "overwrite=true")
        shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
        assert run(*fresh, f"mix.target_tokens={tokens}")[0] == 0
        ours, theirs = (load_manifest(tmp_path / name) for name in ("d", "fresh"))
        assert [s.bin_sha256 for s in ours.splits["train"]] == [s.bin_sha256 for s in theirs.splits["train"]]


def test_rejected_run_leaves_the_dataset_valid(run, corpus, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text().replace('"text": "', '"text": "Other. '))
    assert run(*SMALL)[0] == 0
    plan = (tmp_path / "d" / "work" / "plan.json").read_bytes()
    for change in ("source.paths=[other.jsonl]", "split.seed=5"):
        for stage in ("all", "tokenize"):
            code, output = run(*SMALL, change, f"stage={stage}")
            assert code == 4 and "holds a dataset made from other text or settings" in output
    assert (tmp_path / "d" / "work" / "plan.json").read_bytes() == plan
    assert "encoded again, match the dataset" in run_out(run, "stage=validate", "out=d")


def test_work_of_another_run_does_not_invalidate_a_dataset(run, corpus, tmp_path):
    assert run(*SMALL, "merge.files=2")[0] == 0
    manifest = (tmp_path / "d" / "manifest.json").read_bytes()
    assert run(*SMALL, "merge.files=2", "split.seed=5", "overwrite=true", "stage=tokenize")[0] == 0
    assert (tmp_path / "d" / "manifest.json").read_bytes() == manifest
    assert "no document was encoded again: out/work is another run's" in run_out(run, "stage=validate", "out=d")
    assert run(*SMALL, "merge.files=2")[0] == 0


def test_damaged_tokenizer_file_is_repaired(run, corpus, tmp_path):
    assert run(*SMALL)[0] == 0
    path = tmp_path / "d" / "tokenizer.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert "repairing: " in run(*SMALL)[1]
    assert path.read_bytes() == whole


def test_blends_and_statistics_survive_a_move(run, corpus, tmp_path):
    assert run(*SMALL)[0] == 0
    for name in ("train.blend", "stats.json", "stats.html", "manifest.json"):
        assert str(tmp_path) not in (tmp_path / "d" / name).read_text()
    assert (tmp_path / "d" / "train.blend").read_text().split()[1] == "train/text_00000"
    before = {path.name: path.read_bytes() for path in (tmp_path / "d").glob("*.*")}
    (tmp_path / "d").rename(tmp_path / "e")
    output = run_out(run, *SMALL[:-1], "out=e")
    assert f"statistics: {tmp_path}/e/stats.html" in output
    kept = {path.name: path.read_bytes() for path in (tmp_path / "e").glob("*.*") if path.name != "recipe.json"}
    assert kept.items() <= before.items()


def test_changed_text_is_found_by_encoding_it_again(run, corpus, tmp_path):
    assert run(*SMALL)[0] == 0
    assert "encoded again, match the dataset" in run_out(run, "stage=validate", "out=d")
    root = tmp_path / "d"

    def swap(content):
        members = content["details"]["members"]
        members["text_00000"], members["text_00001"] = members["text_00001"], members["text_00000"]

    edit_manifest(
        root, swap
    )  # as if the files of two shards had been given each other's names before they were committed
    code, output = run("stage=validate", "out=d")
    assert (
        code == 4
        and "document 0 does not match the text that begins '0: " in output
        and "(shard text_00000, " in output
    )


def run_out(run, *arguments: str) -> str:
    code, output = run(*arguments)
    assert code == 0, output
    return subprocess.run(
        [sys.executable, "-m", "data_prep", *arguments], capture_output=True, text=True, check=True
    ).stdout


def test_official_row_cuts_long_documents_and_training_pads_the_rows(run, corpus, tmp_path):
    packing = ("packing=official_row", "packing.row_tokens=64")
    assert run(*SMALL, *packing)[0] == 0
    manifest = load_manifest(tmp_path / "d")
    eos = manifest.tokenizer.eos_id
    lengths = np.concatenate([read_lengths(Path(f"{manifest.prefix_path(s)}.idx")) for s in manifest.splits["train"]])
    assert lengths.max() == 64 and len(lengths) > 300 and manifest.policy["packing"] == "official_row"
    rows = TrainingRows(manifest, sequence_length=64, seed=0, weights={})
    seen = []
    for n in range(len(lengths)):
        row = rows.row(n)
        real = row.tokens[: len(row.tokens) - row.padding]
        assert len(row.tokens) == 65 and real[-1] == eos and (row.tokens[len(real) :] == eos).all()
        assert np.flatnonzero(row.starts).tolist() == [0, len(real)]
        seen.append(len(real))
    assert sorted(seen) == sorted(lengths.tolist())  # each sequence once an epoch
    assert HeldOutRows(manifest, sequence_length=64, rows=3).row(0).padding > 0
    with pytest.raises(ValueError, match=r"data.sequence_length=32 must be 64: .* was packed as official_row"):
        TrainingRows(manifest, sequence_length=32, seed=0, weights={})


def test_padding_has_no_loss(run, corpus, tmp_path):
    from ssa_pretrain.data.batches import collate

    assert run(*SMALL, "packing=official_row", "packing.row_tokens=64")[0] == 0
    row = TrainingRows(load_manifest(tmp_path / "d"), sequence_length=64, seed=0, weights={}).row(0)
    batch = collate([row], index=0)
    assert batch.loss_mask.sum() == 64 - row.padding
    assert batch.cu_seqlens.tolist()[:2] == [0, 65 - row.padding] or row.padding == 1


def test_dataset_for_evaluation_has_all_documents_in_the_held_out_split(run, corpus, tmp_path):
    assert run(*SMALL)[0] == 0
    tokenizer = (
        "tokenizer=file",
        f"tokenizer.path={tmp_path}/d/tokenizer.json",
        "tokenizer.eos_token='<|end_of_text|>'",
    )
    settings = ("source=jsonl", "source.paths=[corpus.jsonl]", *tokenizer, "shard_mb=0.02", "out=m")
    code, output = run(*settings, "split.heldout_fraction=1")
    assert code == 0 and (tmp_path / "m" / "stats.html").is_file(), output
    manifest = load_manifest(tmp_path / "m")
    assert not manifest.splits["train"] and (tmp_path / "m" / "train.blend").read_text() == ""
    assert sum(shard.documents for shard in manifest.splits["heldout"]) == 300
    assert HeldOutRows(manifest, sequence_length=64, rows=3).row(0).padding == 0
    with pytest.raises(ValueError, match=r"m has no train documents; .* split.heldout_fraction below 1"):
        TrainingRows(manifest, sequence_length=64, seed=0, weights={})
    assert "is up to date: nothing to do" in run(*settings, "split.heldout_fraction=1")[1]


def test_mix_weights_reach_training_and_megatron_core(run, tmp_path):
    lines = [json.dumps({"text": f"web {n} " + "keys and blocks " * 20}) for n in range(240)]
    (tmp_path / "web.jsonl").write_text("\n".join(lines) + "\n")
    lists = ["tokenizer.vocab_size=512", "split.heldout_fraction=0.1", "workers=1"]
    code, output = run(
        "source=jsonl", "source.paths=[web.jsonl]", "source.name=web", *lists, "out=m", "shard_mb=0.01",
        "mix.weights.web=1", "mix.target_tokens=2000",
    )  # fmt: skip
    assert code == 0, output
    manifest = load_manifest(tmp_path / "m")
    assert 2000 <= manifest.tokens("train") < 6000 and manifest.weights == {"web": 1.0}
    assert manifest.details["shards"] < manifest.details["of_shards"]
    prefixes, weights = manifest.blend("train")
    assert sum(weights) == pytest.approx(1) and all(Path(p + ".bin").is_file() for p in prefixes)
    pairs = (tmp_path / "m" / "train.blend").read_text().split()
    assert [f"{tmp_path}/m/{name}" for name in pairs[1::2]] == prefixes and [
        float(w) for w in pairs[::2]
    ] == pytest.approx(weights, rel=1e-6)
    code, output = run("source=jsonl", "source.paths=[web.jsonl]", *lists, "out=n", "mix=smollm1")
    assert code == 3 and "mix.weights has no weight for text" in output


def test_leftovers_of_a_killed_run_are_removed(run, corpus, tmp_path):
    assert run("stage=tokenize", *SMALL)[0] == 0
    root = tmp_path / "d"
    left = ["heldout.blend.7.tmp", "manifest.json.7.tmp", "work/shards/train/text_00000.bin.7.tmp", "text/x.json.7.tmp"]
    left += ["work/shards/heldout/other_00000.idx", "work/shards/train/text_00099.bin"]  # shards without a record
    kept = ["notes.tmp", "train.blend.tmp"]  # not our names
    for name in left + kept:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    assert run("stage=prepare", *SMALL)[0] == 0
    assert [name for name in left if (root / name).exists()] == []
    assert all((root / name).exists() for name in kept)
