"""Seeded damage of every kind is found; an undamaged dataset is valid."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import main
from data_prep.dataset.validate import validate_dataset
from data_prep.errors import InputError
from ssa_pretrain.data.manifest import load_manifest
from ssa_pretrain.settings.files import file_sha256
from support.texts import edit_manifest


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate")
    draw = random.Random(0)
    documents = [
        f"{n} " + " ".join(draw.choices(["keys", "of", "sparse", "blocks"], k=draw.randint(5, 60))) for n in range(400)
    ]
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    arguments = [
        f"out={folder}/dataset",
        "source=jsonl",
        f"source.paths=[{folder}/x.jsonl]",
        "tokenizer.vocab_size=512",
    ]
    assert main([*arguments, "split.heldout_fraction=0.2", "shard_mb=0.02", "workers=1"]) == 0
    return folder / "dataset"


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    shutil.copytree(dataset, tmp_path / "copy")
    return tmp_path / "copy"


def findings(root: Path) -> str:
    try:
        return "; ".join(validate_dataset(root).problems)
    except InputError as error:
        return str(error)


def flip(path: Path, draw: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def truncate(path: Path, draw: random.Random) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: draw.randrange(len(raw))])


def extend(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 9)))


def swap(path: Path, draw: random.Random) -> str:
    other = draw.choice([p for p in path.parent.glob(f"*{path.suffix}") if p != path])
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)
    return other.stem


def stale(path: Path, draw: random.Random) -> None:
    other = draw.choice([p for p in path.parent.glob(f"*{path.suffix}") if p != path])
    path.write_bytes(other.read_bytes())


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def zeros(path: Path, draw: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    start = next(i for i in range(draw.randrange(len(raw) // 2), len(raw)) if raw[i])
    raw[start : start + 64] = bytes(len(raw[start : start + 64]))
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [flip, truncate, extend, swap, stale, remove, zeros])
def test_damage_is_found_and_an_undamaged_copy_is_valid(dataset, damage, tmp_path):
    files = sorted(p for split in ("train", "heldout") for p in (dataset / split).iterdir() if p.suffix != ".sums")
    assert len(files) >= 12
    for case in range(30):
        draw = random.Random(f"{damage.__name__} {case}")
        root = tmp_path / str(case)
        shutil.copytree(dataset, root)
        assert findings(root) == ""
        path = root / draw.choice(files).relative_to(dataset)
        touched = {path.stem, damage(path, draw)} - {None}
        assert any(name in findings(root) for name in touched), (damage.__name__, case)


def rewrite(root: Path, shard: int, change, split: str = "train") -> str:
    """Changes the ids of a shard and updates the manifest's checksums, as a faulty tool would; returns the prefix."""
    prefix = ""

    def change_shard(content):
        nonlocal prefix
        info = content["splits"][split][shard]
        prefix, path = info["prefix"], root / f"{info['prefix']}.bin"
        ids = np.fromfile(path, dtype=np.uint16)
        change(ids)
        ids.tofile(path)
        info["bin_sha256"] = file_sha256(path)

    edit_manifest(root, change_shard)
    return prefix


def test_id_outside_the_vocabulary_is_found(copy):
    prefix = rewrite(copy, 1, lambda ids: ids.__setitem__(7, 60_000))
    size = load_manifest(copy).tokenizer.vocab_size
    assert (
        f"{prefix}.bin: token 7 (byte 14, document 0) is id 60000, but the vocabulary ends at {size - 1}"
        in findings(copy)
    )


def test_document_without_eos_is_found(copy):
    eos = load_manifest(copy).tokenizer.eos_id
    prefix = rewrite(copy, 0, lambda ids: ids.__setitem__(np.flatnonzero(ids == eos)[3], 99))
    assert f"{prefix}: document 3 does not end in EOS (id {eos})" in findings(copy)


def test_eos_inside_a_document_is_found(copy):
    eos = load_manifest(copy).tokenizer.eos_id
    prefix = rewrite(copy, 0, lambda ids: ids.__setitem__(1, eos))
    assert f"{prefix}: " in findings(
        copy
    ) and "documents instead of one per document; token 1 (byte 2, document 0) is one too many" in findings(copy)


def test_missing_bos_is_found(copy):
    edit_manifest(copy, lambda content: content["policy"].update(add_bos=True))
    assert "document 0 does not begin with BOS (id 0)" in findings(copy)


def test_counts_that_differ_from_the_manifest_are_found(copy):
    rewrite(copy, 0, lambda ids: ids.__setitem__(slice(0, 5), 99), split="heldout")
    assert "heldout: unigram entropy is" in findings(copy)


def test_other_tokenizer_file_is_found(copy):
    (copy / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: its content does not match the manifest's sha256" in findings(copy)


def test_command_reports_damage_and_exits_with_code_4(copy, capsys):
    assert main(["stage=validate", f"out={copy}"]) == 0
    assert "valid: every file, id and document matches the manifest" in capsys.readouterr().out
    flip(copy / "train" / "text_00001.bin", random.Random(0))
    assert main(["stage=validate", f"out={copy}"]) == 4
    output = capsys.readouterr().err
    assert "damaged: train/text_00001.bin: its content does not match the manifest's sha256" in output
    assert f"{copy} has 2 problems; repair it with `python -m data_prep out={copy} verify=full`" in output


def test_command_without_a_dataset_exits_with_code_4(tmp_path, capsys):
    assert main(["stage=validate", f"out={tmp_path}"]) == 4
    assert "there is no finished dataset" in capsys.readouterr().err
