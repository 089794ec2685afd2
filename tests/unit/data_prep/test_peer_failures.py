"""Nine ways in which writers and readers of Megatron's format lose data silently. Each is provoked here, found and named, and training never
reads wrong data. Each was reproduced with megatron-core 0.16.1, Megatron-LM's preprocess_data.py or datatrove 0.10.1.
"""

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError
from data_prep.shards import pool
from data_prep.tokenizer.backends import HuggingFaceBackend
from ssa_pretrain.data.indexed_format import check_pair
from ssa_pretrain.data.manifest import SPLITS, load_manifest, verify_hashes
from ssa_pretrain.data.rows import HeldOutRows, TrainingRows

SETTINGS = ("source=jsonl", "source.paths=[corpus.jsonl]", "tokenizer.vocab_size=512", "split.heldout_fraction=0.1")
SMALL = (*SETTINGS, "shard_mb=0.02", "workers=1", "backend=hf", "out=d", "stage=prepare")

Run = Callable[..., tuple[int, str]]


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for split in SPLITS for p in sorted((root / split).iterdir())}


def refused(root: Path) -> str:
    """Returns why training does not open a dataset."""
    with pytest.raises(ValueError) as caught:
        load_manifest(root)
    return str(caught.value)


def test_1_failing_worker_ends_the_run_and_names_shard_and_line(run, corpus, tmp_path, monkeypatch):
    assert run(*SMALL)[0] == 0
    tokenizer = f"tokenizer.path={tmp_path}/d/tokenizer.json"
    settings = (*SMALL[:2], "tokenizer=file", tokenizer, "tokenizer.eos_token='<|end_of_text|>'", *SMALL[4:], "out=e")
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*lines[:290], '{"text": ', *lines[290:]]) + "\n")
    code, output = run(*settings)
    assert code == 4 and "corpus.jsonl:291: the line is not JSON" in output and "(shard text_00008)" in output
    assert not (tmp_path / "e" / "manifest.json").exists()

    def stuck_but_one(out, shard, *arguments):
        if shard.index:
            time.sleep(400)
        raise InputError("no text here")

    monkeypatch.setattr(pool, "write_shard", stuck_but_one)
    started = time.monotonic()
    code, output = run(*settings[:-1], "out=f", "workers=3")
    assert code == 4 and "error: no text here (shard text_00000)" in output
    assert time.monotonic() - started < 300  # the run does not wait for the other workers

    def faulty(*arguments):
        raise MemoryError("as if a library had failed")

    monkeypatch.setattr(pool, "write_shard", faulty)
    with pytest.raises(RuntimeError, match=r"its worker ended with code 1; .* \(shard text_0000\d\)"):
        run(*settings[:-1], "out=g")


def test_2_truncated_bin_is_not_opened(run, corpus, tmp_path):
    assert run(*SMALL)[0] == 0
    path = tmp_path / "d" / "train" / "text_00002.bin"
    path.write_bytes(path.read_bytes()[:-20])
    assert "train/text_00002.bin has " in refused(tmp_path / "d")
    code, output = run("stage=validate", "out=d")
    assert code == 4 and "train/text_00002.bin has " in output and "manifest.json has" in output


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_3_damaged_shard_stops_the_merge(run, corpus, tmp_path, damage):
    merged = (*SMALL[:-1], "merge.files=1")
    assert run(*merged, "stage=prepare")[0] == 0
    expected = files_of(tmp_path / "d")
    assert run(*merged, "out=e", "stage=tokenize")[0] == 0
    path = tmp_path / "e" / "work" / "shards" / "train" / "text_00001.bin"
    raw = bytearray(path.read_bytes())
    raw[8] ^= 1
    path.write_bytes(raw if damage == "flipped" else raw[:-20])
    code, output = run(*merged, "out=e", "stage=merge")
    expected_message = {
        "truncated": "shards are missing in out=e; run stage=tokenize first",
        "flipped": "shard text_00001 cannot be merged: ",
    }
    assert code == 4 and expected_message[damage] in output
    assert "there is no finished dataset" in refused(tmp_path / "e")
    assert run(*merged, "out=e", "stage=prepare", "verify=full")[0] == 0
    assert files_of(tmp_path / "e") == expected


def test_4_run_killed_before_its_index_leaves_the_old_dataset_intact(run, corpus, tmp_path, monkeypatch):
    assert run(*SMALL)[0] == 0
    before = files_of(tmp_path / "d")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_prep.shards.binaries.write_index_file", full)
    code, output = run(*SMALL, "split.seed=1", "overwrite=true")
    assert code == 4 and "No space left on device (shard text_0000" in output
    verify_hashes(load_manifest(tmp_path / "d"))
    assert files_of(tmp_path / "d") == before
    for idx in (tmp_path / "d" / "work" / "shards").rglob("*.idx"):
        check_pair(idx.with_suffix(""))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run(*SMALL, "split.seed=1", "overwrite=true")[0] == 0 and files_of(tmp_path / "d") != before


def test_5_flipped_bit_ends_training_and_names_file_byte_and_document(run, corpus, tmp_path):
    assert run(*SMALL)[0] == 0
    manifest = load_manifest(tmp_path / "d")
    path = Path(f"{manifest.prefix_path(manifest.splits['train'][0])}.bin")
    raw = bytearray(path.read_bytes())
    raw[41] |= 0x80
    path.write_bytes(raw)
    rows = TrainingRows(load_manifest(tmp_path / "d"), sequence_length=64, seed=0, weights={})
    with pytest.raises(
        ValueError, match=r"text_00000.bin holds the id \d+ at byte 40, document 0, but the vocabulary ends"
    ):
        for n in range(10_000):
            rows.row(n)
    code, output = run("stage=validate", "out=d")
    assert code == 4 and "text_00000.bin: token 20 (byte 40, document 0) is id " in output


def test_6_id_too_large_for_the_dtype_is_never_stored(run, corpus, tmp_path, monkeypatch):
    honest = HuggingFaceBackend.encode

    def encode(self, texts):
        ids, lengths = honest(self, texts)
        ids = ids.copy()
        ids[-1:] = 128_000  # as uint16 it would be 62,464
        return ids, lengths

    monkeypatch.setattr(HuggingFaceBackend, "encode", encode)
    with pytest.raises(RuntimeError, match=r"its worker ended with code 1; .* \(shard text_0000\d\)"):
        run(*SMALL)
    assert not list((tmp_path / "d" / "work" / "shards").glob("*.json"))
    assert "there is no finished dataset" in refused(tmp_path / "d")


def test_7_no_file_is_empty(run, corpus, tmp_path):
    code, output = run(*SMALL, "split.heldout_fraction=0.01")
    assert code == 0, output
    manifest = load_manifest(tmp_path / "d")
    assert len(manifest.splits["heldout"]) < len(manifest.splits["train"])  # some shards have no held-out document
    assert all(path.stat().st_size for path in (tmp_path / "d").rglob("*.bin"))
    (tmp_path / "corpus.jsonl").write_text('{"text": " "}\n' * 40)
    code, output = run(*SMALL, "out=e")
    assert code == 4 and "the corpus is empty: no document has any text" in output
    assert "there is no finished dataset" in refused(tmp_path / "e")


def test_8_rows_outlive_the_files_that_they_were_read_from(run, corpus, tmp_path):
    assert run(*SMALL)[0] == 0
    manifest = load_manifest(tmp_path / "d")
    rows = HeldOutRows(manifest, sequence_length=64, rows=1)
    row = rows.row(0)
    del rows
    gc.collect()
    first = np.fromfile(f"{manifest.prefix_path(manifest.splits['heldout'][0])}.bin", dtype=np.uint16)
    assert row.tokens.flags.owndata and row.tokens.tolist() == first[:65].tolist()


def test_9_work_is_skipped_only_if_outputs_exist_and_inputs_are_unchanged(run, corpus, tmp_path):
    assert run(*SMALL)[0] == 0
    before = files_of(tmp_path / "d")
    for folder in ("train", "work/shards/train"):
        (tmp_path / "d" / folder / "text_00001.bin").unlink()
    assert "train/text_00001.bin is missing" in refused(tmp_path / "d")
    code, output = run(*SMALL)
    assert code == 0 and "repairing: " in output and "tokenizing 1 shards" in output
    assert files_of(tmp_path / "d") == before
    entries = [json.loads(line) for line in corpus.read_text().splitlines()]
    corpus.write_text("".join(json.dumps(entry | {"text": entry["text"].upper()}) + "\n" for entry in entries))
    code, output = run(*SMALL)
    assert code == 4 and "out=d holds a dataset made from other text or settings" in output
    assert run(*SMALL, "overwrite=true")[0] == 0
    assert files_of(tmp_path / "d") != before
