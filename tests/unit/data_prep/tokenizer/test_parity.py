"""A faster backend whose ids differ from hf's: it is not used if the corpus sample shows it, and no shard of it is committed."""

import json
import os
import signal

import numpy as np
import pytest

from data_prep.errors import InputError
from data_prep.tokenizer import backends
from data_prep.tokenizer.backends import GigatokenBackend, HuggingFaceBackend
from data_prep.tokenizer.parity import CORPUS_SAMPLE, MAX_SAMPLE_CHARACTERS, BackendMismatch, Parity, Sample

needs_gigatoken = pytest.mark.skipif(backends.find_spec("gigatoken") is None, reason="gigatoken is not installed")

SETTINGS = ("source=jsonl", "source.paths=[corpus.jsonl]", "tokenizer.vocab_size=512", "split.heldout_fraction=0.1")
SMALL = (*SETTINGS, "shard_mb=0.02", "workers=2", "out=d", "stage=prepare")


def wrong_for(letter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes gigatoken return another first id for texts that contain a letter, here and in forked workers."""
    honest = GigatokenBackend.encode

    def encode(self, texts):
        ids, lengths = honest(self, texts)
        ids = ids.copy()
        for number, text in enumerate(texts):
            if letter in text:
                ids[lengths[:number].sum()] ^= 1
        return ids, lengths

    monkeypatch.setattr(GigatokenBackend, "encode", encode)


def write(path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@needs_gigatoken
def test_mismatch_on_the_corpus_sample_switches_to_the_next_backend(run, corpus, tmp_path, monkeypatch):
    wrong_for("a", monkeypatch)
    monkeypatch.setattr(backends, "FASTEST_FIRST", ("gigatoken",))
    code, output = run(*SMALL)
    assert code == 0 and "backend gigatoken (its ids are compared with hf's)" in output, output
    assert "backend hf (gigatoken and hf give different ids for a document that begins '0: " in output
    code, output = run(*SMALL[:-2], "out=h", "stage=prepare", "backend=hf")
    assert code == 0 and "is up to date" not in output
    for name in ("train/text_00000.bin", "heldout/text_00003.idx", "manifest.json"):
        assert (tmp_path / "d" / name).read_bytes() == (tmp_path / "h" / name).read_bytes()
    code, output = run(*SMALL[:-2], "out=g", "stage=prepare", "backend=gigatoken")
    assert (
        code == 3 and "backend=gigatoken cannot be used: gigatoken and hf give different ids for a document" in output
    )
    assert not list((tmp_path / "g" / "work" / "shards").glob("*.json"))


@needs_gigatoken
def test_mismatch_in_a_batch_ends_the_run_before_its_shard_is_committed(run, tmp_path, monkeypatch):
    write(tmp_path / "corpus.jsonl", [f"{n} keys and blocks " * 20 for n in range(300)])
    wrong_for("🙂", monkeypatch)
    late = ["long " * MAX_SAMPLE_CHARACTERS, "🙂 once", "fine"]  # the first that is not too long is compared
    monkeypatch.setattr("data_prep.shards.tokenizing.SAMPLE_BYTES", 2_000)
    write(tmp_path / "a.jsonl", [*late, *["blocks and keys " * 10] * 20])
    settings = ("source.paths=[a.jsonl,corpus.jsonl]", "shard_mb=0.05", "backend=gigatoken")
    code, output = run(*SETTINGS[:1], *SETTINGS[2:], *settings, "workers=1", "out=d", "stage=prepare")
    assert code == 4, output
    assert (
        "gigatoken and hf give different ids for a document that begins '🙂 once'; run the same command again with"
        in output
    )
    records = sorted(path.stem for path in (tmp_path / "d" / "work" / "shards").glob("*.json"))
    wrong = [n for n in records if b"a.jsonl" in plan_of(tmp_path, n)]
    assert not wrong and not (tmp_path / "d" / "manifest.json").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, output = run(*SETTINGS[:1], *SETTINGS[2:], *settings[:2], "backend=hf", "out=d", "stage=prepare")
    assert code == 0 and run("stage=validate", "out=d")[0] == 0


def plan_of(folder, stem: str) -> bytes:
    plan = json.loads((folder / "d" / "work" / "plan.json").read_text())
    return json.dumps(next(shard["pieces"] for shard in plan["shards"] if shard["stem"] == stem)).encode()


@pytest.fixture
def parity(run, corpus, tmp_path):
    assert run(*SMALL, "backend=hf")[0] == 0
    one = Parity(str(tmp_path / "d" / "tokenizer.json"), True)
    yield one
    one.close()


def sample_of(folder, texts: list[str]) -> Sample:
    return Sample.of(texts, HuggingFaceBackend(str(folder / "d" / "tokenizer.json"), True).encode(texts))


def test_answers_match_their_samples(parity, tmp_path):
    for number in (CORPUS_SAMPLE, 3, 7):
        assert not parity.is_confirmed(number)
        parity.submit(number, sample_of(tmp_path, ["a key", "", f"block {number}"]), "x")
    parity.wait_for(7)
    assert all(parity.is_confirmed(number) for number in (CORPUS_SAMPLE, 3, 7)) and not parity.is_confirmed(4)
    parity.wait_for(4)  # never submitted


def test_sample_larger_than_a_pipe_is_answered(parity, tmp_path):
    parity.submit(0, sample_of(tmp_path, ["stream " * 100_000]), "x")
    parity.wait_for(0)


@pytest.mark.parametrize("change", ["other id", "one more", "one less"])
def test_mismatch_is_named_and_the_next_backend_starts_clean(parity, tmp_path, change):
    wrong = sample_of(tmp_path, ["fine", "the wrong one"])
    ids = wrong.ids[1]
    wrong.ids[1] = {"other id": ids ^ 1, "one more": np.append(ids, ids[0]), "one less": ids[:-1]}[change]
    parity.submit(CORPUS_SAMPLE, wrong, "fast")
    parity.submit(0, sample_of(tmp_path, ["x"]), "fast")
    with pytest.raises(
        BackendMismatch, match="fast and hf give different ids for a document that begins 'the wrong one'"
    ):
        parity.wait_for(0)
    parity.submit(CORPUS_SAMPLE, sample_of(tmp_path, ["fine"]), "other")
    parity.wait_for(CORPUS_SAMPLE)
    assert not parity.is_confirmed(0)


@pytest.mark.parametrize("idle", [True, False])
def test_killed_process_is_reported(parity, tmp_path, idle):
    if idle:
        parity.receive(30)
    os.kill(parity._process.pid, signal.SIGKILL)
    parity._process.join()
    with pytest.raises(
        InputError, match=r"compares ids with hf was killed \(signal 9\), most often because memory ran out"
    ):
        parity.submit(0, sample_of(tmp_path, ["x"]), "x")
        parity.wait_for(0)


def test_file_that_is_not_a_tokenizer_is_named(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    one = Parity(str(tmp_path / "t.json"), True)
    with pytest.raises(InputError, match=r"t.json is not a tokenizer.json"):
        one.receive(30)
    one.close()


def test_one_document_per_batch_is_sampled_with_its_ids():
    sample = Sample([], [])
    texts = ["y" * (MAX_SAMPLE_CHARACTERS + 1), "ab", "c"]
    sample.add_first(texts, (np.arange(12), np.array([7, 3, 2])))
    sample.add_first(texts[:1], (np.arange(7), np.array([7])))
    sample.add_first([], (np.arange(0), np.arange(0)))
    assert sample.texts == ["ab"] and [ids.tolist() for ids in sample.ids] == [[7, 8, 9]]
