"""The byte layout against a sum by hand and megatron-core's reader, and every way in which a manifest can contradict its files."""

import io
import json
import os
import re
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest

from ssa_pretrain.data.indexed_format import check_pair, dtype_code, read_header, read_lengths, token_dtype, write_index
from ssa_pretrain.data.manifest import Manifest, ShardInfo, TokenizerInfo, load_manifest, verify_hashes
from ssa_pretrain.data.repair import DatasetError, content_checksum, out_argument
from ssa_pretrain.settings.files import file_sha256
from support.texts import edit_manifest


def write_pair(folder: Path, prefix: str, documents: list[list[int]], vocab_size: int = 512) -> ShardInfo:
    dtype = token_dtype(vocab_size)
    bin_, idx = folder / f"{prefix}.bin", folder / f"{prefix}.idx"
    bin_.parent.mkdir(parents=True, exist_ok=True)
    bin_.write_bytes(b"".join(np.array(ids, dtype).tobytes() for ids in documents))
    with open(idx, "wb") as file:
        write_index(file, np.array(list(map(len, documents))), dtype)
    return ShardInfo(
        part="text",
        prefix=prefix,
        documents=len(documents),
        tokens=sum(map(len, documents)),
        bin_bytes=bin_.stat().st_size,
        idx_bytes=idx.stat().st_size,
        bin_sha256=file_sha256(bin_),
        idx_sha256=file_sha256(idx),
    )


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder with a correct manifest: one train and one held-out shard."""
    root = tmp_path / "dataset"
    splits = {
        "train": (write_pair(root, "train/text_00000", [[5, 6, 7, 1], [8, 1]]),),
        "heldout": (write_pair(root, "heldout/text_00000", [[9, 1]]),),
    }
    (root / "tokenizer.json").write_text("{}")
    tokenizer = TokenizerInfo(
        file="tokenizer.json",
        sha256=file_sha256(root / "tokenizer.json"),
        vocab_size=512,
        eos_id=1,
        bos_id=None,
        name="t",
    )
    manifest = Manifest(
        root=root,
        tokenizer=tokenizer,
        policy={"add_bos": False, "append_eos": True, "specials": "text"},
        splits=splits,
        sources=({"kind": "jsonl", "name": "text"},),
        unigram_entropy_nats={"train": 1.5, "heldout": 0.5},
        bytes_per_token=3.5,
        fingerprint="f" * 64,
    )
    (root / "manifest.json").write_text(manifest.to_json())
    return root


def test_index_bytes_are_the_documented_layout():
    file = io.BytesIO()
    write_index(file, np.array([3, 0, 2]), np.dtype("<u2"))
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    expected += struct.pack("<3i", 3, 0, 2) + struct.pack("<3q", 0, 6, 6) + struct.pack("<4q", 0, 1, 2, 3)
    assert file.getvalue() == expected
    assert len(expected) == 42 + 20 * 3


def test_index_of_a_thousand_documents_has_the_size_of_core_index(tmp_path):
    shard = write_pair(tmp_path, "x", [[1]] * 1000)
    assert shard.idx_bytes == 20_042


def test_empty_index_round_trips(tmp_path):
    shard = write_pair(tmp_path, "x", [])
    assert shard.idx_bytes == 42
    assert check_pair(tmp_path / "x").num_documents == 0


@pytest.mark.parametrize("vocab_size,code", [(8192, 8), (65_499, 8), (65_500, 4), (128_256, 4)])
def test_dtype_follows_the_vocabulary(vocab_size, code):
    assert dtype_code(token_dtype(vocab_size)) == code


def test_dtype_without_a_code_is_rejected():
    with pytest.raises(ValueError, match=r"dtype=complex64 has no code in the .idx format; try uint16 or int32"):
        dtype_code(np.dtype("complex64"))


def test_document_beyond_int32_is_rejected():
    with pytest.raises(ValueError, match=r"document of 2147483648 tokens: the .idx format allows at most"):
        write_index(io.BytesIO(), np.array([2**31]), np.dtype("<u2"))


def test_offsets_do_not_overflow_beyond_four_gigabytes(tmp_path):
    with open(tmp_path / "x.idx", "wb") as file:
        write_index(file, np.full(5, 2**31 - 1), np.dtype("<i4"))
    offsets = np.fromfile(tmp_path / "x.idx", dtype="<i8", count=5, offset=34 + 20)
    assert offsets.tolist() == [i * 4 * (2**31 - 1) for i in range(5)]


def test_core_reads_what_we_write(tmp_path):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = [[5, 6, 7, 1], [1], [300, 400, 1]]
    for vocab_size in (512, 128_256):
        write_pair(tmp_path, f"v{vocab_size}", documents, vocab_size)
        dataset = indexed_dataset.IndexedDataset(str(tmp_path / f"v{vocab_size}"))
        assert [dataset[i].tolist() for i in range(len(dataset))] == documents
        assert dataset.document_indices.tolist() == [0, 1, 2, 3]
        assert read_lengths(tmp_path / f"v{vocab_size}.idx").tolist() == [4, 1, 3]


def test_our_bytes_equal_core_bytes(tmp_path):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    documents = [[5, 6, 7, 1], [1], [300, 400, 1]]
    write_pair(tmp_path, "ours", documents)
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "core.bin"), dtype=np.uint16)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "core.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"core{suffix}").read_bytes()


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda raw: raw[:20], "is cut short: 20 bytes, its header has 34"),
        (lambda raw: b"X" + raw[1:], "is not an .idx file: it does not begin with"),
        (lambda raw: raw[:9] + b"\x02" + raw[10:], "has version 2 of the format, this code reads 1"),
        (lambda raw: raw[:17] + b"\x63" + raw[18:], "has the unknown dtype code 99"),
        (lambda raw: raw[:26] + b"\x00" + raw[27:], "lists no document indices"),
        (lambda raw: raw[:-1], r"has 81 bytes, its header describes 82"),
        (lambda raw: raw + b"\x00", r"has 83 bytes, its header describes 82"),
    ],
)
def test_damaged_header_is_named(dataset, damage, message):
    path = dataset / "train/text_00000.idx"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_header(path)


def patched(raw: bytes, position: int, value: bytes) -> bytes:
    return raw[:position] + value + raw[position + len(value) :]


@pytest.mark.parametrize(
    "position,value,message",
    [
        (34, struct.pack("<i", 5), "has 12 bytes, text_00000.idx describes 14"),
        (34 + 8 + 8, struct.pack("<q", 6), "points sequence 1 at byte 6, not 8"),
        (34 + 24 + 16, struct.pack("<q", 1), "document indices that do not run from 0 to 2"),
    ],
)
def test_index_that_contradicts_its_bin_is_named(dataset, position, value, message):
    path = dataset / "train/text_00000.idx"
    path.write_bytes(patched(path.read_bytes(), position, value))
    with pytest.raises(ValueError, match=message):
        check_pair(dataset / "train/text_00000")


def test_manifest_round_trips(dataset):
    manifest = load_manifest(dataset)
    assert manifest == load_manifest(dataset / "manifest.json")
    assert manifest.to_json() == (dataset / "manifest.json").read_text()
    assert manifest.tokens("train") == 6
    assert manifest.prefix_path(manifest.splits["heldout"][0]) == dataset / "heldout/text_00000"
    verify_hashes(manifest)


def test_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"manifest.json does not exist: there is no finished dataset; run"):
        load_manifest(tmp_path)


def test_manifest_that_is_not_json_is_refused(dataset):
    (dataset / "manifest.json").write_text('{"schema": 1')
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        load_manifest(dataset)


@pytest.mark.parametrize("prefix", ["../outside/text_00000", "/etc/text_00000"])
def test_prefix_outside_the_folder_is_refused(dataset, prefix):
    edit_manifest(dataset, lambda c: c["splits"]["train"][0].update(prefix=prefix))
    with pytest.raises(ValueError, match="which is outside its folder"):
        load_manifest(dataset)


@pytest.mark.parametrize("prefix", ["a/../../text_00000", "", ".."])
def test_names_outside_the_folder_are_refused(dataset, prefix):
    edit_manifest(dataset, lambda c: c["splits"]["train"][0].update(prefix=prefix))
    with pytest.raises(ValueError, match="which is outside its folder"):
        load_manifest(dataset)


def linked(dataset: Path, names: list[str]) -> Path:
    """Moves files of a dataset into a store next to it and replaces them by links, as git-annex and DVC do."""
    store = dataset.parent / "store"
    store.mkdir()
    for number, name in enumerate(names):
        (dataset / name).rename(store / str(number))
        (dataset / name).symlink_to(os.path.relpath(store / str(number), (dataset / name).parent))
    return store


FILES = [
    "manifest.json",
    "tokenizer.json",
    *(f"{s}/text_00000.{e}" for s in ("train", "heldout") for e in ("bin", "idx")),
]


@pytest.mark.parametrize("names", [FILES, ["train/text_00000.bin"], ["manifest.json"], ["train"]])
def test_dataset_of_links_opens_and_is_checked(dataset, names):
    expected = load_manifest(dataset).to_json()
    store = linked(dataset, names)
    (dataset.parent / "by_a_link").symlink_to(dataset)
    for path in (dataset, dataset.parent / "by_a_link", dataset / "manifest.json"):
        manifest = load_manifest(path)
        assert manifest.to_json() == expected and manifest.root == dataset
        verify_hashes(manifest)
    for blob in (blob for blob in store.rglob("*") if blob.is_file()):
        blob.write_bytes(blob.read_bytes() + b"x")
    with pytest.raises(DatasetError, match=r"bytes, manifest.json has|cannot be read as JSON"):
        load_manifest(dataset)


def test_link_to_another_file_of_the_same_size_is_refused(dataset):
    """A dataset from elsewhere may not turn a file of its user into tokens."""
    path = dataset / "train/text_00000.bin"
    secret = dataset.parent / "secret"
    secret.write_bytes(b"s" * path.stat().st_size)
    path.unlink()
    path.symlink_to(secret)
    with pytest.raises(DatasetError, match=r"text_00000.bin has sha256 .* its content changed after it was written"):
        load_manifest(dataset)


@pytest.mark.parametrize("name", [*FILES, "train", "."])
def test_broken_link_is_named(dataset, name):
    path = dataset if name == "." else dataset / name
    path.rename(dataset.parent / "gone")
    path.symlink_to("elsewhere")
    message = f"{path} is a dangling link: elsewhere does not exist; fetch the file that it points to"
    with pytest.raises(DatasetError, match=f"^{re.escape(message)}$"):
        load_manifest(dataset)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c: c.update(schema=2), "schema=2 is not the 1 that this version reads"),
        (lambda c: c.pop("splits"), "lacks a field or has an unknown one"),
        (lambda c: c["tokenizer"].pop("eos_id"), "lacks a field or has an unknown one"),
        (lambda c: c["splits"]["train"][0].update(bin_bytes=14), "has 12 bytes, manifest.json has 14"),
        (
            lambda c: c["splits"]["train"][0].update(documents=3),
            "2 documents of uint16 in .idx, but manifest.json has 3",
        ),
        (lambda c: c["splits"]["train"][0].update(tokens=7), "manifest.json has 2 documents, 7 tokens"),
        (
            lambda c: c["tokenizer"].update(vocab_size=128_256),
            "holds uint16, but a vocabulary of 128256 is stored as int32",
        ),
        (lambda c: c["tokenizer"].update(file="other.json"), "other.json is missing though manifest.json lists it"),
    ],
)
def test_manifest_that_contradicts_its_files_is_named(dataset, change, message):
    edit_manifest(dataset, change)
    with pytest.raises(ValueError, match=message):
        load_manifest(dataset)


@pytest.mark.parametrize(
    "name", ["train/text_00000.bin", "train/text_00000.idx", "heldout/text_00000.bin", "tokenizer.json"]
)
def test_missing_file_is_named(dataset, name):
    (dataset / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing though manifest.json lists it"):
        load_manifest(dataset)


def flip(path: Path, byte: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["train/text_00000.idx", "heldout/text_00000.idx", "tokenizer.json", "manifest.json"])
def test_any_flipped_bit_of_a_small_file_is_found_on_open(dataset, name):
    path = dataset / name
    whole = path.read_bytes()
    for byte in range(0, len(whole), 1 if len(whole) < 100 else 7):
        flip(path, byte, byte % 8)
        with pytest.raises(DatasetError) as caught:
            load_manifest(dataset)
        assert path.name in str(caught.value) or "manifest.json" in str(caught.value)
        path.write_bytes(whole)
    load_manifest(dataset)


def test_changed_index_is_named_with_the_repair_command(dataset):
    flip(dataset / "train/text_00000.idx", -1, 2)
    what = (
        r"/train/text_00000.idx (has sha256 \w+…, the manifest has \w+…: its content changed after it was written|.*); "
    )
    older = "copy the file again, or repeat the data_prep command that made the dataset, with verify=full$"
    with pytest.raises(DatasetError, match=what + older):
        load_manifest(dataset)
    assert load_manifest(dataset, hashes=False).tokens("train") == 6
    recipe = {"settings": {}}
    (dataset / "recipe.json").write_text(json.dumps(recipe | {"checksum": content_checksum(recipe)}))
    with pytest.raises(DatasetError, match=f"{what}repair it with `python -m data_prep out={dataset} verify=full`$"):
        load_manifest(dataset)


def test_flipped_bit_in_tokens_is_found_by_the_hashes(dataset):
    flip(dataset / "train/text_00000.bin", -1, 2)
    manifest = load_manifest(dataset)
    with pytest.raises(
        DatasetError, match=r"text_00000.bin has sha256 \w+…, the manifest has \w+…: its content changed"
    ):
        verify_hashes(manifest)


def test_older_manifest_without_checksum_opens(dataset):
    content = json.loads((dataset / "manifest.json").read_text())
    checksum = content.pop("checksum")
    (dataset / "manifest.json").write_text(json.dumps(content))
    assert load_manifest(dataset).tokens("train") == 6
    (dataset / "manifest.json").write_text(json.dumps(content | {"chdcksum": checksum}))
    with pytest.raises(DatasetError, match="has the unknown field 'chdcksum' and no checksum: it is damaged"):
        load_manifest(dataset)
    edit_manifest(dataset, lambda c: c.pop("chdcksum") and c.update(of_a_newer_version=1))
    assert load_manifest(dataset).tokens("train") == 6


@pytest.mark.parametrize(
    "name",
    ["plain/a.b-c", "with space", "größe", "it's", "a'b\\", "dollar$x", 'double"quote', "a=b,c(d)", "back\\slash"],
)
def test_folder_argument_round_trips_through_the_command_line(tmp_path, name):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (argument,) = shlex.split(out_argument(tmp_path / name))
    assert OverridesParser.create().parse_override(argument).value() == str(tmp_path / name)
