"""Every format returns all its documents wherever a file is cut. Damage is reported with file and line."""

import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep import readers
from data_prep.corpus.planning import plan_shards
from data_prep.errors import InputError
from data_prep.readers import Piece, read_piece
from data_prep.sources.files import Part


@pytest.fixture(params=["orjson", "json"], autouse=True)
def parser(request, monkeypatch) -> str:
    """Every test runs with each of the two JSON parsers."""
    if request.param == "json":
        monkeypatch.setattr(readers, "orjson", None)
    elif readers.orjson is None:
        pytest.skip("orjson is not installed")
    return request.param


TEXTS = ["a", "zwei Wörter", "", "line\nbreak", "emoji 🙂 and 漢字", "x" * 5000, "last"]


def whole(path: Path, kind: str = "jsonl", column: str = "text") -> Piece:
    size = path.stat().st_size
    return Piece(str(path), kind, column, 0, size, size)


def texts_of(*pieces: Piece) -> list[str]:
    found = []
    for piece in pieces:
        for text, raw in read_piece(piece, lambda _: None):
            assert raw == text.encode()
            found.append(text)
    return found


def jsonl(path: Path, texts: list[str] = TEXTS, **extra: object) -> Path:
    path.write_bytes(b"".join(json.dumps({"text": t, **extra}).encode() + b"\n" for t in texts))
    return path


def message_of(piece: Piece) -> str:
    with pytest.raises(InputError) as caught:
        texts_of(piece)
    return str(caught.value)


@pytest.mark.parametrize("limit", [1, 7, 64, 100, 1000, 10_000])
def test_jsonl_cut_anywhere_gives_every_document_once(tmp_path, limit):
    path = jsonl(tmp_path / "x.jsonl")
    shards = plan_shards([Part("text", "jsonl", (str(path),))], limit / 1e6)
    assert texts_of(*(piece for shard in shards for piece in shard.pieces)) == TEXTS


def test_last_line_without_newline_and_blank_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\n{"text": "a"}\n  \n{"text": "b"}')
    assert texts_of(whole(path)) == ["a", "b"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a", "score": NaN}',  # only the standard library's parser accepts it
        b'{"text": "a", "score": -Infinity}',
        b'{"text": "a", "id": 123456789012345678901234567890}',
        b'{"text": "x", "text": "a"}',  # the last one counts
        b'\xef\xbb\xbf{"text": "a"}',  # a byte order mark
        b'\x0b {"text": "a"}\x0c \r',
        b'{"text": "\\u0061"}',
        '{"text": "a", "né": {"": [null, true, 1e999]}}'.encode(),
    ],
)
def test_unusual_lines_give_the_same_text_with_either_parser(tmp_path, line):
    (tmp_path / "x.jsonl").write_bytes(line + b"\n")
    assert texts_of(whole(tmp_path / "x.jsonl")) == ["a"]


def test_text_with_every_kind_of_character(tmp_path):
    text = "".join(map(chr, range(0x300))) + "\u2028\u2029\ufeff\uffff🙂\U0010ffff" + "\\u0041\\"
    path = tmp_path / "x.jsonl"
    for ascii_only in (True, False):
        path.write_text(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
        assert texts_of(whole(path)) == [text]


def test_gzip_and_zstd_equal_the_plain_file(tmp_path):
    plain = jsonl(tmp_path / "x.jsonl").read_bytes()
    packed = tmp_path / "x.jsonl.gz"
    packed.write_bytes(gzip.compress(plain))
    assert texts_of(whole(packed)) == TEXTS
    zstd = tmp_path / "x.jsonl.zst"
    # Two frames, as parallel compressors write them.
    frames = [pyarrow.compress(half, codec="zstd", asbytes=True) for half in (plain[:100], plain[100:])]
    zstd.write_bytes(b"".join(frames))
    assert texts_of(whole(zstd)) == TEXTS


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_progress_adds_up_to_the_size_on_disk(tmp_path, suffix):
    plain = jsonl(tmp_path / "x.jsonl", ["text " * 1000] * 50)
    path = plain
    if suffix:
        path = tmp_path / "x.jsonl.gz"
        path.write_bytes(gzip.compress(plain.read_bytes()))
    done = []
    list(read_piece(whole(path), done.append))
    assert sum(done) == path.stat().st_size


@pytest.mark.parametrize(
    "line,message",
    [
        (b'{"text": "a"', r"the line is not JSON \(Expecting ',' delimiter, column 13\); fix or remove it"),
        (b'{"text": "\xff"}', r"the line is not UTF-8 \(byte 10\); convert the file, e.g. with iconv -t utf-8"),
        (b'["a"]', r"the line is a JSON list, not an object; write \{\"text\": …\} instead"),
        (b'{"body": "a", "id": 1}', r"no key 'text', the object has 'body', 'id'; set source.text_column"),
        (
            b'{"text": "a", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
            r"the line is nested too deeply for a JSON parser; fix",
        ),
        (b'{"text": 3}', r"'text' holds int, not a string; fix the line or set source.text_column"),
        (b'{"text": null}', r"'text' holds NoneType, not a string"),
        (
            b'{"text": "\\ud83d"}',
            r"'text' holds half a surrogate pair \(\\ud800 to \\udfff\), which is not a character; repair it",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_bad_line_is_named_with_its_number(tmp_path, line, message, suffix):
    raw = b'{"text": "one"}\n\n{"text": "three"}\n' + line + b'\n{"text": "five"}\n'
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    found = message_of(whole(path))
    assert re.search(message, found), found
    assert found.startswith(f"{path}:4: ")


def test_bad_line_after_a_cut_has_its_number_in_the_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one"}\n' * 1000 + b"{\n")
    size = path.stat().st_size
    assert f"{path}:1001: " in message_of(Piece(str(path), "jsonl", "text", size // 2, size, size // 2))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_truncated_archive_is_named(tmp_path, suffix):
    plain = jsonl(tmp_path / "x.jsonl", [f"{n} " * 50 for n in range(2000)]).read_bytes()
    packed = gzip.compress(plain) if suffix == "gz" else pyarrow.compress(plain, codec="zstd", asbytes=True)
    path = tmp_path / f"x.jsonl.{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    assert re.search(
        rf"x.jsonl.{suffix} is damaged or cut short after line \d+ \(.+\); fetch it again", message_of(whole(path))
    )


def test_file_that_is_not_an_archive_is_named(tmp_path):
    path = jsonl(tmp_path / "x.jsonl.gz")
    assert "is damaged or cut short after line 0 (Not a gzipped file" in message_of(whole(path))


def parquet(path: Path, texts: list[str | None] = TEXTS, rows: int = 2) -> Path:
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    return path


def of_type(path: Path, kind: pyarrow.DataType) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(TEXTS, pyarrow.string()).cast(kind)}), path)
    return path


@pytest.mark.parametrize(
    "kind",
    [pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())],
    ids=str,
)
def test_parquet_strings_of_every_kind(tmp_path, kind):
    path = of_type(tmp_path / "x.parquet", kind)
    shards = plan_shards([Part("text", "parquet", (str(path),))], 1)
    assert texts_of(*shards[0].pieces) == TEXTS


def test_flipped_bit_of_a_page_with_a_checksum_is_found(tmp_path):
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": ["abcdefgh" * 100]})
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pyarrow.parquet.write_table(table, path, write_page_checksum=True, **options)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"abcdefgh")] ^= 1
    path.write_bytes(raw)
    assert "x.parquet: row group 0 is damaged (" in message_of(Piece(str(path), "parquet", "text", 0, 1, 1))


@pytest.mark.parametrize("limit", [1, 300, 1_000_000])
def test_parquet_cut_at_row_groups_gives_every_document_once(tmp_path, limit):
    path = parquet(tmp_path / "x.parquet")
    shards = plan_shards([Part("text", "parquet", (str(path),))], limit / 1e6)
    assert (len(shards) > 1) == (limit < 1000)
    assert texts_of(*(piece for shard in shards for piece in shard.pieces)) == TEXTS


@pytest.mark.parametrize(
    "make,column,message",
    [
        (
            lambda p: p.write_bytes(b"not parquet"),
            "text",
            "is not a readable Parquet file (Parquet magic bytes not found",
        ),
        (parquet, "body", "has no column 'body', it has 'id', 'text'; set source.text_column"),
        (parquet, "id", "column 'id' holds int64, not strings; set source.text_column"),
        (
            lambda p: of_type(p, pyarrow.binary()),
            "text",
            "column 'text' holds binary, not strings; cast it to string and write the file again",
        ),
        (
            lambda p: pyarrow.parquet.write_table(
                pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["text"] * 2), p
            ),
            "text",
            "x.parquet has 2 columns 'text'; write it again with one of that name",
        ),
    ],
)
def test_bad_parquet_is_named_when_planned(tmp_path, make, column, message):
    path = tmp_path / "x.parquet"
    make(path)
    with pytest.raises(InputError, match=re.escape(message)):
        plan_shards([Part("text", "parquet", (str(path),), column)], 1.0)


def test_missing_text_in_parquet_is_named_with_its_row(tmp_path):
    path = parquet(tmp_path / "x.parquet", ["a", "b", "c", None])
    piece = Piece(str(path), "parquet", "text", 0, 2, 100)
    assert f"{path}: row 1 of row group 1 has no text in column 'text'; drop such rows first" in message_of(piece)


def test_damaged_row_group_is_named(tmp_path):
    path = parquet(tmp_path / "x.parquet", [f"{n} " * 300 for n in range(400)], rows=400)
    raw = bytearray(path.read_bytes())
    raw[2000:6000] = b"\xa5" * 4000
    path.write_bytes(raw)
    assert re.search(
        r"x.parquet: row group 0 is damaged \(.+\); fetch it again",
        message_of(Piece(str(path), "parquet", "text", 0, 1, 1)),
    )


def test_text_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("Größe".encode("latin-1"))
    assert "x.txt is not UTF-8 (byte 2); convert it with iconv -t utf-8, or leave it out" in message_of(
        whole(path, "text")
    )


def test_file_that_disappears_is_named(tmp_path):
    path = jsonl(tmp_path / "x.jsonl")
    piece = whole(path)
    path.unlink()
    assert "x.jsonl no longer exists; restore it" in message_of(piece)
