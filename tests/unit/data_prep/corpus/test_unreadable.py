"""Text that cannot be read: all files are reported together, or skipped and counted with on_error=skip."""

import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.corpus.planning import plan_shards
from data_prep.readers import Skipped, read_piece
from data_prep.sources.files import Part
from ssa_pretrain.data.manifest import load_manifest
from support.texts import sentences

SETTINGS = ("tokenizer.vocab_size=512", "split.heldout_fraction=0.1", "workers=2", "stage=prepare")
GOOD = [json.dumps({"text": text}).encode() for text in sentences(60, seed=1)]
BAD = (
    b'{"text": "\xff\xfe"}',
    b'{"text": "cut',
    b"[1]",
    b'{"body": "no text"}',
    b'{"text": null}',
    b'{"text": "\\ud83d"}',
)


def lines(path: Path, *every: bytes) -> Path:
    raw = b"".join(line + b"\n" for line in every)
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    elif path.suffix == ".zst":
        raw = pyarrow.compress(raw, codec="zstd", asbytes=True)
    path.write_bytes(raw)
    return path


def read(path: Path, kind: str, limit: float = 1.0) -> tuple[list[str], Skipped]:
    skipped = Skipped()
    shards = plan_shards([Part("text", kind, (str(path),), "text", "skip")], limit)
    pieces = [piece for shard in shards for piece in shard.pieces]
    return [text for piece in pieces for text, _ in read_piece(piece, lambda _: None, skipped)], skipped


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
@pytest.mark.parametrize("limit", [1.0, 0.0001])
def test_bad_lines_are_skipped_and_the_first_is_reported(tmp_path, name, limit):
    path = lines(tmp_path / name, GOOD[0], *BAD, GOOD[1], b"", GOOD[2])
    texts, skipped = read(path, "jsonl", limit)
    assert texts == [json.loads(line)["text"] for line in GOOD[:3]]
    assert skipped.counts == {"lines": 6}
    assert (
        skipped.problems[str(path)][0].startswith(f"{path}:2: the line is not UTF-8")
        and skipped.problems[str(path)][1] == 6
    )


@pytest.mark.parametrize(
    "suffix,damage",
    [(suffix, damage) for suffix in ("gz", "zst") for damage in ("truncated", "not an archive", "empty")]
    + [("gz", "flipped")],
)
def test_damaged_archive_gives_the_text_before_the_damage(tmp_path, suffix, damage):
    documents = [json.dumps({"text": f"{n} {n * 7919 % 1000003} " * 20}).encode() for n in range(20_000)]
    path = lines(tmp_path / f"x.jsonl.{suffix}", *documents)
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[len(raw) // 2] ^= 0x10
    path.write_bytes({"truncated": raw[: len(raw) // 2], "not an archive": b"x" * 100, "empty": b""}.get(damage, raw))
    texts, skipped = read(path, "jsonl")
    assert texts == [json.loads(line)["text"] for line in documents[: len(texts)]]
    assert (len(texts) > 0) == (damage in ("truncated", "flipped")) and len(texts) < 20_000
    assert skipped.counts["files"] == 1
    assert re.search(
        "damaged or cut short after line|is empty, but a compressed file never is", skipped.problems[str(path)][0]
    )


def test_bad_rows_of_parquet_are_skipped(tmp_path):
    raw = pyarrow.array([b"one", None, b"\xff\xfe", b"four"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "x.parquet", row_group_size=2)
    texts, skipped = read(tmp_path / "x.parquet", "parquet")
    assert texts == ["one", "four"] and skipped.counts == {"rows": 2}
    assert "row 1 of row group 0 has no text in column 'text'" in skipped.problems[str(tmp_path / "x.parquet")][0]


def test_damaged_row_group_counts_as_its_rows(tmp_path):
    path = tmp_path / "x.parquet"
    texts = [f"{n} " * 300 for n in range(400)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=100)
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    raw = bytearray(path.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    raw[start : start + group.total_compressed_size] = b"\xa5" * group.total_compressed_size
    path.write_bytes(raw)
    found, skipped = read(path, "parquet")
    assert found == texts[:100] + texts[200:] and skipped.counts == {"rows": 100}


def test_files_that_are_not_parquet_or_not_utf8_are_skipped_entirely(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    (tmp_path / "x.txt").write_bytes("Größe".encode("latin-1"))
    for path, kind in ((tmp_path / "x.parquet", "parquet"), (tmp_path / "x.txt", "text")):
        texts, skipped = read(path, kind)
        assert texts == [] and skipped.counts == {"files": 1}


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Settings of a corpus in three formats, of which several files have text that cannot be read."""
    for folder in ("own", "rows", "plain"):
        (tmp_path / folder).mkdir()
    lines(tmp_path / "own" / "a.jsonl", *GOOD[:20], BAD[0], BAD[1])
    lines(tmp_path / "own" / "b.jsonl.gz", *GOOD[20:40], BAD[3])
    lines(tmp_path / "own" / "c.jsonl", *GOOD[40:])
    table = pyarrow.table({"text": [*sentences(20, seed=2), None]})
    pyarrow.parquet.write_table(table, tmp_path / "rows" / "d.parquet")
    for number, text in enumerate(sentences(20, seed=3)):
        (tmp_path / "plain" / f"{number:02d}.txt").write_text(text)
    (tmp_path / "plain" / "latin.txt").write_bytes("Größe".encode("latin-1"))
    parts = {"own": "jsonl", "rows": "parquet", "plain": "text"}
    return [
        "source=mixed", *SETTINGS,
        *(f"source.parts.{name}.kind={kind}" for name, kind in parts.items()),
        *(f"source.parts.{name}.paths=[{name}]" for name in parts),
    ]  # fmt: skip


@pytest.mark.parametrize("tokenizer", ["trained", "ready"])
def test_all_unreadable_files_are_reported_together(run, corpus, tmp_path, tokenizer):
    if tokenizer == "ready":  # the text is first read by the workers, and not to train a tokenizer
        assert run("source=jsonl", "source.paths=[own/c.jsonl]", *SETTINGS, "out=t")[0] == 0
        corpus += ["tokenizer=file", "tokenizer.path=t/tokenizer.json", "tokenizer.eos_token='<|end_of_text|>'"]
        corpus.remove(SETTINGS[0])
    code, output = run(*corpus, "out=d")
    assert code == 4 and "Traceback" not in output
    assert "4 files have text that cannot be read:\n" in output
    assert f"\n  {tmp_path}/own/a.jsonl:21: the line is not UTF-8 (byte 10); convert the file" in output
    assert "(and 1 more in this file)" in output
    assert f"\n  {tmp_path}/own/b.jsonl.gz:21: no key 'text', the object has 'body'" in output
    assert f"\n  {tmp_path}/rows/d.parquet: row 20 of row group 0 has no text" in output
    assert f"\n  {tmp_path}/plain/latin.txt is not UTF-8 (byte 2)" in output
    assert output.splitlines()[-1] == "source.parts.NAME.on_error=skip leaves such text out and counts it"
    assert not (tmp_path / "d" / "manifest.json").exists()


def test_files_that_cannot_be_opened_are_reported_together_by_the_plan(run, tmp_path):
    for name in ("a.parquet", "b.parquet"):
        (tmp_path / name).write_bytes(b"x" * 40)
    code, output = run("source=parquet", "source.paths=['*.parquet']", "out=d", *SETTINGS)
    assert code == 4 and "2 files have text that cannot be read:" in output
    assert all(f"{tmp_path}/{name} is not a readable Parquet file" in output for name in ("a.parquet", "b.parquet"))


def test_skipped_text_is_counted_in_console_manifest_and_statistics(run, corpus, tmp_path, capsys):
    skip = [f"source.parts.{name}.on_error=skip" for name in ("own", "rows", "plain")]
    code, output = run(*corpus, *skip, "out=d", "shard_mb=0.01")
    assert code == 0, output
    assert "left out by on_error=skip: 1 file, 3 lines, 1 row" in output
    assert f"  {tmp_path}/own/a.jsonl:21: the line is not UTF-8" in output
    assert load_manifest(tmp_path / "d").details["skipped"] == {"lines": 3, "rows": 1, "files": 1}
    assert load_manifest(tmp_path / "d").details["source_documents"] == 100
    assert run("stage=stats", "out=d")[0] == 0
    assert json.loads((tmp_path / "d" / "stats.json").read_text())["skipped"] == {"lines": 3, "rows": 1, "files": 1}
    assert "left out by on_error=skip: 1 file, 3 lines, 1 row" in (tmp_path / "d" / "stats.html").read_text()
    assert "is up to date" in run("out=d", "stage=prepare")[1]  # by its recipe
    code, output = run(*corpus, "out=d", "shard_mb=0.01")
    assert (
        code == 4 and "was made with on_error=skip and lacks 1 file, 3 lines, 1 row; add source.on_error=skip" in output
    )
    (tmp_path / "d" / "manifest.json").unlink()
    code, output = run(*corpus, "out=d", "shard_mb=0.01")
    assert code == 4 and "4 files have text that cannot be read" in output  # shards that lack text are not reused


def test_readable_text_gives_the_same_dataset_with_and_without_skipping(run, tmp_path):
    lines(tmp_path / "x.jsonl", *GOOD)
    settings = ("source=jsonl", "source.paths=[x.jsonl]", *SETTINGS)
    assert run(*settings, "out=a")[0] == run(*settings, "out=b", "source.on_error=skip")[0] == 0
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()
    assert "is up to date" in run(*settings, "out=a", "source.on_error=skip")[1]


def test_corpus_without_readable_text_is_rejected(run, tmp_path):
    lines(tmp_path / "x.jsonl", *BAD)
    code, output = run("source=jsonl", "source.paths=[x.jsonl]", *SETTINGS, "out=a", "source.on_error=skip")
    assert code == 4 and "no document has any text (6 lines were left out by on_error=skip)" in output
