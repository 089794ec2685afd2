"""Rows about files that change after they were written: checkpoints, the dataset's binaries, index files and manifest."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from faults.rows import Row
from faults.stage import Stage, flip, pick
from faults.tally import Tally
from ssa_pretrain.checkpoint.integrity import find_damage
from ssa_pretrain.data.indexed_format import DatasetError
from ssa_pretrain.data.manifest import load_manifest, verify_hashes
from support.training import records

LAST = 4  # steps of a run that resumes


def trained(stage: Stage, *, weights: bool = False) -> Path:
    """Returns a run that has stopped after step 3, with checkpoints of steps 1 to 3."""
    folder = stage.new_folder()
    config = stage.config(
        folder, checkpoint__interval=1, checkpoint__keep=3, training__stop_at_step=3, checkpoint__weights=weights
    )
    assert stage.train(config).wait() == 0
    return folder


def whole_run(stage: Stage) -> list[dict]:
    """Returns the training records of a run without a fault."""
    folder = stage.new_folder()
    assert stage.train(stage.config(folder, training__stop_at_step=LAST)).wait() == 0
    return records(folder, "train")


def rerun(stage: Stage, folder: Path, whole: list[dict], resumes_after: int, tally: Tally) -> str | None:
    """Runs the same command; returns what is wrong unless it falls back to a checkpoint, reports it, and ends as a run without a fault."""
    child = stage.train(stage.config(folder, training__stop_at_step=LAST))
    code, text = child.wait(), child.text()
    tally.codes[code] += 1
    if code != 0 or f"resuming after step {resumes_after} " not in text or "is damaged (" not in text:
        return f"exit code {code}: {text[-500:]}"
    return None if records(folder, "train") == whole else "the curve differs"


def flipped_checkpoint(stage: Stage, *, record_only: bool) -> Tally:
    """Flips one bit at a time; a share of the tries goes through a whole resume."""
    tally, original, whole = Tally(), trained(stage, weights=not record_only), whole_run(stage)
    newest = original / "checkpoints/step_00000003"
    files = [newest / "checkpoint.json"] if record_only else sorted(p for p in newest.rglob("*") if p.is_file())
    tries = stage.tries(500 if record_only else 1000, 20)
    num_resumed = 0
    for number in range(tries):
        path = pick(files, stage.random)
        before = path.read_bytes()
        flip(path, stage.random)
        damage = find_damage(newest)
        problem, lost = None if damage else f"a bit of {path.name} was not noticed", None
        if number % (tries // max(1, round(20 * stage.scale))) == 0:
            num_resumed += 1
            copy = stage.new_folder()
            shutil.copytree(original, copy)
            problem = problem or rerun(stage, copy, whole, 2, tally)
            lost = 3 - 2  # `rerun` requires that it resumes after step 2
            shutil.rmtree(copy)
        path.write_bytes(before)
        tally.add(problem, lost=lost)
    tally.figures["resumed after the step before, bit-identical"] = num_resumed
    return tally


def _cut(path: Path, share: float) -> None:
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))


def _zero(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(len(data[middle : middle + 4096]))
    path.write_bytes(data)


def _swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def broken_checkpoints(stage: Stage) -> Tally:
    """Damages the newest checkpoint in many ways, then all of them."""
    tally, original, whole = Tally(), trained(stage), whole_run(stage)
    shards = sorted(p.name for p in (original / "checkpoints/step_00000003").glob("*.distcp"))
    ways: dict[str, Callable[[Path], object]] = {
        "truncated shard": lambda c: _cut(c / shards[0], 0.5),
        "empty shard": lambda c: _cut(c / shards[-1], 0.0),
        "zero hole": lambda c: _zero(c / shards[0]),
        "swapped shards": lambda c: _swap(c / shards[0], c / shards[1]),
        "missing shard": lambda c: (c / shards[1]).unlink(),
        "missing .metadata": lambda c: (c / ".metadata").unlink(),
        "missing common.pt": lambda c: (c / "common.pt").unlink(),
        "empty checkpoint.json": lambda c: (c / "checkpoint.json").write_text(""),
        "missing checkpoint.json": lambda c: (c / "checkpoint.json").unlink(),
        "checkpoint.json of another step": lambda c: shutil.copy(c.with_name("step_00000002") / "checkpoint.json", c),
        "empty folder": lambda c: [shutil.rmtree(c), c.mkdir()],
        "shard of the step before": lambda c: shutil.copy(c.with_name("step_00000002") / shards[0], c),
        "unlisted pickle": lambda c: (c / "extra.pt").write_bytes(b"x"),
    }
    for name, damage in ways.items():
        folder = stage.new_folder()
        shutil.copytree(original, folder)
        damage(folder / "checkpoints/step_00000003")
        problem = rerun(stage, folder, whole, 2, tally)
        tally.add(problem and f"{name}: {problem}", lost=1)
    for name, damage in list(ways.items())[:5]:
        folder = stage.new_folder()
        shutil.copytree(original, folder)
        for step in (1, 2, 3):
            damage(folder / f"checkpoints/step_{step:08d}")
        child = stage.train(stage.config(folder, training__stop_at_step=LAST))
        code = child.wait()
        wrong = code != 5 or "no checkpoint in" not in child.text() or "Traceback" in child.text()
        tally.add(f"all with {name}: exit code {code}, {child.text()[-300:]}" if wrong else None, code=code)
    return tally


def flipped_data(stage: Stage, *, names: str, full: int) -> Tally:
    """Flips one bit at a time in files of the dataset; a share of the tries starts a run."""
    tally, folder = Tally(), stage.write_corpus(stage.new_folder())
    files = sorted(folder.rglob(names))
    expected, tries = load_manifest(folder), stage.tries(full, 20)
    started = 0
    for number in range(tries):
        path = pick(files, stage.random)
        before = path.read_bytes()
        flip(path, stage.random)
        problem = f"a bit of {path.name} was not noticed"
        try:
            found = load_manifest(folder)
            if names == "*.bin":
                verify_hashes(found)
            if found == expected and names == "manifest.json" and json.loads(path.read_bytes()) == json.loads(before):
                problem = ""  # the same value in other words
        except (DatasetError, ValueError):
            problem = ""
        if number % (tries // max(1, round(10 * stage.scale))) == 0 and names != "*.bin":
            started += 1
            child = stage.train(stage.config(stage.new_folder(), data__path=str(folder), training__stop_at_step=1))
            code = child.wait()
            tally.codes[code] += 1
            if code != 4 or "Traceback" in child.text():
                problem = f"{path.name}: a run with it ended with {code}, {child.text()[-300:]}"
        path.write_bytes(before)
        tally.add(problem or None)
    tally.figures["of these, runs that were refused"] = started
    return tally


def broken_data(stage: Stage) -> Tally:
    """Truncates, removes and swaps files of the dataset, and puts ids into it that the vocabulary does not have."""
    tally = Tally()
    ways: dict[str, Callable[[Path], object]] = {
        ".bin without its last token": lambda d: _cut_bytes(d / "part0_0.bin", 2),
        ".bin cut in half": lambda d: _cut(d / "part0_0.bin", 0.5),
        ".bin longer by a token": lambda d: (d / "part0_0.bin").write_bytes((d / "part0_0.bin").read_bytes() + b"\1\0"),
        ".idx cut in half": lambda d: _cut(d / "part0_0.idx", 0.5),
        "empty .idx": lambda d: _cut(d / "part0_0.idx", 0.0),
        "missing .bin": lambda d: (d / "part0_0.bin").unlink(),
        "missing .idx": lambda d: (d / "part0_0.idx").unlink(),
        "swapped .idx files": lambda d: _swap(d / "part0_0.idx", d / "part1_0.idx"),
        "swapped .bin files": lambda d: _swap(d / "part0_0.bin", d / "part1_0.bin"),
        "changed tokenizer": lambda d: (d / "tokenizer.json").write_text('{"version": 2}'),
        "missing manifest": lambda d: (d / "manifest.json").unlink(),
        "manifest cut in half": lambda d: _cut(d / "manifest.json", 0.5),
        "ids outside the vocabulary": lambda d: (d / "part0_0.bin").write_bytes(
            b"\xff" * (d / "part0_0.bin").stat().st_size
        ),
    }
    for name, damage in ways.items():
        folder = stage.write_corpus(stage.new_folder(), parts=2)
        damage(folder)
        out = stage.new_folder()
        child = stage.train(stage.config(out, data__path=str(folder), training__stop_at_step=2))
        code, text = child.wait(), child.text()
        wrong = code != 4 or "Traceback" in text or (out / "checkpoints").exists()
        tally.add(f"{name}: exit code {code}, {text[-300:]}" if wrong else None, code=code)
    return tally


def _cut_bytes(path: Path, count: int) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - count)


def changed_data(stage: Stage) -> Tally:
    """Resumes with other data: another shard order, one part more, other documents, another tokenizer."""
    tally, folder = Tally(), trained(stage)
    other = {
        "other documents": stage.write_corpus(stage.new_folder(), seed=5),
        "one part more": stage.write_corpus(stage.new_folder(), parts=2),
    }
    for name, data in other.items():
        manifest = json.loads((data / "manifest.json").read_text())
        del manifest[
            "checksum"
        ]  # data_prep derives the fingerprint from the content; the test's dataset has a constant
        (data / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": name}))
        child = stage.train(stage.config(folder, data__path=str(data), training__stop_at_step=LAST))
        code, text = child.wait(), child.text()
        wrong = code != 5 or "data.fingerprint: checkpoint" not in text or "Traceback" in text
        tally.add(f"{name}: exit code {code}, {text[-300:]}" if wrong else None, code=code)
    return tally


ROWS = [
    Row(
        "flipped_checkpoint",
        "one bit of the newest checkpoint flips: weights, moments, lists, common weights, records",
        "noticed before anything is unpickled; the run falls back to the checkpoint before, reports it, and its curve is bit-identical",
        partial(flipped_checkpoint, record_only=False),
    ),
    Row(
        "flipped_record",
        "one bit of a checkpoint's checkpoint.json flips",
        "the same",
        partial(flipped_checkpoint, record_only=True),
    ),
    Row(
        "broken_checkpoints",
        "newest checkpoint with a truncated, empty, swapped, missing or older shard, a zero hole, an empty or missing list, an unlisted pickle; then all checkpoints",
        "falls back; with none left the run ends with 5, and never starts over silently",
        broken_checkpoints,
    ),
    Row(
        "flipped_idx",
        "one bit of an .idx file flips",
        "refused at the start (4)",
        partial(flipped_data, names="*.idx", full=1000),
        must_fail=True,
    ),
    Row(
        "flipped_manifest",
        "one bit of the dataset's manifest.json flips",
        "refused at the start (4)",
        partial(flipped_data, names="manifest.json", full=1000),
        must_fail=True,
    ),
    Row(
        "flipped_bin",
        "one bit of a .bin file flips",
        "noticed by a full check of the dataset (`data_prep verify=full`); a start does not read all tokens",
        partial(flipped_data, names="*.bin", full=300),
    ),
    Row(
        "broken_data",
        "files of the dataset truncated, missing, swapped; another tokenizer; no manifest; ids outside the vocabulary",
        "refused with 4 before a wrong token is trained on",
        broken_data,
        must_fail=True,
    ),
    Row(
        "changed_data",
        "a run resumes with other documents or one part more",
        "refused (5) with the difference",
        changed_data,
        must_fail=True,
    ),
]
