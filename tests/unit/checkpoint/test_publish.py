"""Checkpoints are published atomically, damaged ones are found and skipped, and a run does not resume another run's checkpoint."""

import errno
import hashlib
import json
import os
import shutil

import pytest
import torch
import torch.distributed as dist

from ssa_pretrain.checkpoint import integrity, storage
from ssa_pretrain.checkpoint import publish as publishing
from ssa_pretrain.checkpoint.facts import differences, refused_changes, run_facts
from ssa_pretrain.checkpoint.find import Checkpoint, newest, published, read, require_same_model
from ssa_pretrain.checkpoint.integrity import FACTS, Verdicts, find_damage, record_text
from ssa_pretrain.checkpoint.publish import publish
from ssa_pretrain.config import Config, OptimConfig, RopeScalingConfig, RowPacking, StageConfig
from ssa_pretrain.errors import CheckpointError, SaveError
from ssa_pretrain.parallel.agreement import Attempts


@pytest.fixture(autouse=True)
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write(folder):
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 10)
    (folder / "empty").touch()


def find(run, lines=None, verdicts=None):
    report = (lines if lines is not None else []).append
    return newest(run, is_rank_0=True, device=torch.device("cpu"), report=report, verdicts=verdicts)


def test_published_checkpoints_are_found_newest_first_and_old_ones_are_removed(tmp_path):
    for step in (5, 10, 15):
        publish(tmp_path, step, {"seed": 1}, write, keep=2, is_rank_0=True)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000010", "step_00000015"]
    found = find(tmp_path)
    assert (found.step, found.facts) == (15, {"seed": 1})


def test_checkpoint_folder_can_be_given_directly(tmp_path):
    older = publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)
    publish(tmp_path, 10, {}, write, keep=2, is_rank_0=True)
    assert find(older).step == 5


def test_folder_without_checkpoints_returns_none(tmp_path):
    assert find(tmp_path) is None


def test_killed_save_leaves_the_older_checkpoint(tmp_path):
    publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)

    def die(folder):
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 10, {}, die, keep=2, is_rank_0=True)
    assert find(tmp_path).step == 5
    publish(tmp_path, 10, {}, write, keep=2, is_rank_0=True)
    assert find(tmp_path).step == 10


def test_unremovable_old_checkpoint_does_not_fail_the_save(tmp_path, monkeypatch):
    output, remove = [], shutil.rmtree

    def busy(folder, *arguments, **options):
        if folder.name == ".step_00000005.old.tmp":
            raise OSError(39, "Directory not empty")
        remove(folder, *arguments, **options)

    publish(tmp_path, 5, {}, write, keep=1, is_rank_0=True)
    monkeypatch.setattr(shutil, "rmtree", busy)
    publish(tmp_path, 10, {}, write, keep=1, is_rank_0=True, report=output.append)
    assert output == [
        f"{tmp_path}/checkpoints/step_00000005 could not be removed (Directory not empty); the next checkpoint tries again"
    ]
    assert find(tmp_path).step == 10
    monkeypatch.setattr(shutil, "rmtree", remove)
    publish(tmp_path, 15, {}, write, keep=1, is_rank_0=True)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000015"]


def test_kill_during_the_removal_of_an_old_checkpoint_leaves_no_damaged_one(tmp_path, monkeypatch):
    remove = shutil.rmtree

    def killed(folder, *arguments, **options):
        if "step_00000005" in folder.name:
            (folder / "weights.bin").unlink()
            raise KeyboardInterrupt
        remove(folder, *arguments, **options)

    publish(tmp_path, 5, {}, write, keep=1, is_rank_0=True)
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 10, {}, write, keep=1, is_rank_0=True)
    monkeypatch.setattr(shutil, "rmtree", remove)
    assert [(p.name, find_damage(p)) for p in published(tmp_path)] == [("step_00000010", None)]
    publish(tmp_path, 15, {}, write, keep=1, is_rank_0=True)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000015"]


def test_names_in_every_folder_are_flushed_before_the_checkpoint_is_published(tmp_path, monkeypatch):
    def write_below(folder):
        (folder / "weights" / "parts").mkdir(parents=True)
        (folder / "weights" / "parts" / "a.bin").write_bytes(b"a")

    calls, sync = [], publishing.sync
    monkeypatch.setattr(publishing, "sync", lambda path: calls.append(path) or sync(path))
    folder = publish(tmp_path, 5, {}, write_below, keep=1, is_rank_0=True)
    hidden = folder.with_name(".step_00000005.tmp")
    flushed = [hidden / "weights/parts/a.bin", hidden / "weights/parts", hidden / "weights", hidden, hidden / FACTS]
    assert set(flushed) <= set(calls[:-1]) and calls[-1] == folder.parent


def test_folders_with_other_names_are_ignored(tmp_path):
    intact = publish(tmp_path, 2, {}, write, keep=1, is_rank_0=True)
    copies = [intact.with_name(name) for name in ("step_00000002_good", "step_00000003_best", "step_3")]
    for copy in copies:
        shutil.copytree(intact, copy)
    assert find(tmp_path).folder == intact
    publish(tmp_path, 4, {}, write, keep=1, is_rank_0=True)
    assert find(tmp_path).step == 4
    assert not intact.exists()
    assert all(find_damage(copy) is None for copy in copies)


def test_checkpoints_sort_by_step_beyond_eight_digits(tmp_path):
    for step in (99_999_999, 100_000_000):
        publish(tmp_path, step, {}, write, keep=2, is_rank_0=True)
    assert find(tmp_path).step == 100_000_000


def flip_bit(folder):
    path = folder / "weights.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "weights.bin has another sha256": flip_bit,
    "weights.bin has 100 bytes instead of 2560": lambda folder: (folder / "weights.bin").write_bytes(bytes(100)),
    "weights.bin is missing": lambda folder: (folder / "weights.bin").unlink(),
    f"{FACTS} cannot be read": lambda folder: (folder / FACTS).write_text("{"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_reported_and_skipped(tmp_path, message):
    publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)
    damaged = publish(tmp_path, 10, {}, write, keep=2, is_rank_0=True)
    DAMAGE[message](damaged)
    lines = []
    assert find(tmp_path, lines).step == 5
    assert lines == [f"checkpoint {damaged} is damaged ({message}); looking for an older one"]


def intact_by_step(run):
    """Returns the checkpoints of a run by step, and whether each is intact."""
    folders = (run / "checkpoints").iterdir()
    return {int(folder.name[5:]): find_damage(folder) is None for folder in sorted(folders)}


def hashed_folders(monkeypatch):
    """Returns a list that receives the folders whose files are hashed, in order, without repeats in a row."""
    found, plain = [], integrity.file_sha256

    def counted(path):
        if found[-1:] != [path.parent.name]:
            found.append(path.parent.name)
        return plain(path)

    monkeypatch.setattr(integrity, "file_sha256", counted)
    return found


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_damaged_checkpoints_do_not_count_for_keep_and_are_removed_with_old_ones(tmp_path, keep, monkeypatch):
    """A run fell back past two damaged checkpoints. An intact one may be removed only when `keep` newer ones are intact."""
    for step in (1, 2, 3, 4, 5):
        publish(tmp_path, step, {}, write, keep=9, is_rank_0=True)
    flip_bit(tmp_path / "checkpoints" / "step_00000004")
    (tmp_path / "checkpoints" / "step_00000005" / FACTS).write_text("{")
    verdicts, lines = Verdicts(), []
    assert find(tmp_path, verdicts=verdicts).step == 3
    hashed = hashed_folders(monkeypatch)
    publish(tmp_path, 6, {}, write, keep=keep, is_rank_0=True, verdicts=verdicts, report=lines.append)
    assert hashed == ["step_00000002"] * (keep == 3), "what was judged at the start or written here is not hashed again"
    assert lines == [], "the start has named them"
    damaged = {} if keep == 1 else {4: False, 5: False}
    assert intact_by_step(tmp_path) == dict.fromkeys((6, 3, 2)[:keep], True) | damaged
    for step in (7, 8):
        publish(tmp_path, step, {}, write, keep=keep, is_rank_0=True, verdicts=verdicts)
    assert intact_by_step(tmp_path) == dict.fromkeys((8, 7, 6)[:keep], True)


def test_damaged_checkpoint_after_the_resumed_step_is_not_counted_and_is_replaced(tmp_path):
    for step in (2, 4, 6):
        publish(tmp_path, step, {}, write, keep=9, is_rank_0=True)
    for step in (4, 6):
        flip_bit(tmp_path / "checkpoints" / f"step_{step:08d}")
    verdicts = Verdicts()
    assert find(tmp_path, verdicts=verdicts).step == 2
    for step, wanted in ((3, {2: True, 3: True}), (4, {3: True, 4: True}), (6, {4: True, 6: True})):
        publish(tmp_path, step, {}, write, keep=2, is_rank_0=True, verdicts=verdicts)
        assert {k: v for k, v in intact_by_step(tmp_path).items() if k <= step} == wanted


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_during_a_run_is_named_and_not_counted(tmp_path, message):
    verdicts, lines = Verdicts(), []
    for step in (2, 4):
        publish(tmp_path, step, {}, write, keep=2, is_rank_0=True, verdicts=verdicts)
    damaged = tmp_path / "checkpoints" / "step_00000004"
    DAMAGE[message](damaged)
    for step in (6, 7):
        publish(tmp_path, step, {}, write, keep=3, is_rank_0=True, verdicts=verdicts, report=lines.append)
    assert intact_by_step(tmp_path) == {2: True, 4: False, 6: True, 7: True}
    assert lines == [f"checkpoint {damaged} is damaged ({message}); it does not count towards checkpoint.keep=3"]


def test_checkpoint_of_another_schema_is_neither_counted_nor_removed(tmp_path):
    for step in (1, 2, 3):
        publish(tmp_path, step, {}, write, keep=9, is_rank_0=True)
    facts = tmp_path / "checkpoints" / "step_00000002" / FACTS
    facts.write_text(record_text(json.loads(facts.read_text()) | {"schema": 0}))
    publish(tmp_path, 4, {}, write, keep=2, is_rank_0=True)
    assert set(intact_by_step(tmp_path)) == {4, 3, 2}
    publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)
    assert set(intact_by_step(tmp_path)) == {5, 4, 2}


def test_every_flipped_bit_of_the_record_is_damage(tmp_path):
    """Also in the step, the schema and the facts, none of which a file's sha256 covers. Records of older versions have no checksum."""
    facts = publish(tmp_path, 5, {"seed": 7, "optim.lr": 1e-05}, write, keep=2, is_rank_0=True) / FACTS
    data = facts.read_bytes()
    for place in range(len(data)):
        for bit in (1, 4, 32):
            facts.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            assert find_damage(facts.parent), (place, bit)
            assert not integrity.is_of_another_schema(facts.parent)
    record = json.loads(data)
    del record["checksum"]
    facts.write_text(json.dumps(record))
    assert find_damage(facts.parent) is None


@pytest.mark.parametrize("files", [[], {"weights.bin": 7}, {"weights.bin": {"bytes": 1}}])
def test_malformed_file_list_is_damage(tmp_path, files):
    facts = publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True) / FACTS
    facts.write_text(record_text(json.loads(facts.read_text()) | {"files": files}))
    assert find_damage(facts.parent) == f"{FACTS} cannot be read"


def test_unreadable_file_is_damage(tmp_path, monkeypatch):
    """A patched read simulates the failing disk."""

    def fail(_):
        raise OSError(5, "Input/output error")

    folder = publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)
    monkeypatch.setattr(integrity, "file_sha256", fail)
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    assert find_damage(folder) == "empty cannot be read: Input/output error"


def test_no_intact_checkpoint_is_an_error(tmp_path):
    flip_bit(publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True))
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* is intact; restore one, or start again in another output_dir"
    ):
        find(tmp_path)


def test_intact_checkpoint_has_no_damage(tmp_path):
    assert find_damage(publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)) is None


def test_folder_that_is_not_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"is not a checkpoint .*name a folder such as RUN/checkpoints/step_00000100"
    ):
        read(tmp_path)


def test_file_list_is_complete(tmp_path):
    folder = publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)
    files = json.loads((folder / FACTS).read_text())["files"]
    assert set(files) == {"weights.bin", "empty"}


@pytest.mark.parametrize("world_size", [1, 3, 16])
def test_each_file_is_hashed_by_one_rank_with_balanced_bytes(world_size):
    sizes = {f"file_{i}": 10 * i for i in range(12)}
    shares = [publishing._share(sizes, rank, world_size) for rank in range(world_size)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values())


def test_file_incomplete_on_every_rank_is_hashed_at_the_end(tmp_path, monkeypatch):
    """On shared storage a rank may list another node's files late or with an old size."""
    monkeypatch.setattr(publishing, "_share", lambda *_: ["empty"])
    folder = publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)
    files = json.loads((folder / FACTS).read_text())["files"]
    assert set(files) == {"weights.bin", "empty"}
    assert find_damage(folder) is None


def test_differences_name_both_sides():
    assert differences({"seed": 1, "a": 2}, {"seed": 3, "a": 2}) == ["seed: checkpoint 1, run 3"]
    assert differences({"a": 2}, {"a": 2}) == []


def test_newer_key_is_compared_with_its_default():
    wanted = {"optim.eps": OptimConfig().eps, "model.rope_scaling": {"enabled": False, "factor": 8.0}, "seed": 1234}
    assert differences({"model.rope_scaling": {"enabled": False}, "seed": 1234}, wanted) == [
        f"model.rope_scaling: checkpoint {{'enabled': False, 'factor': {RopeScalingConfig().factor!r}}}, "
        f"run {{'enabled': False, 'factor': 8.0}}"
    ]
    wanted["model.rope_scaling"]["factor"] = RopeScalingConfig().factor
    assert differences({"model.rope_scaling": {"enabled": False}}, wanted) == []
    assert differences({"optim.eps": None}, {"optim.eps": 1.0}) == ["optim.eps: checkpoint None, run 1.0"]
    assert differences({}, {"optim.eps": 1.0}) == [f"optim.eps: checkpoint {OptimConfig().eps!r}, run 1.0"]
    assert differences({}, {"data.fingerprint": "a"}) == ["data.fingerprint: checkpoint None, run 'a'"]
    assert differences({"data.weights": {"a": 1.0}}, {"data.weights": {"b": 1.0}}) == [
        "data.weights: checkpoint {'a': 1.0}, run {'b': 1.0}"
    ]


def test_stages_that_have_not_begun_may_change():
    """A stage is a fact of checkpoints after its first step; one that begins at the checkpoint is not."""

    def facts(step: int, *stages: StageConfig, packing: RowPacking = RowPacking.flow) -> dict:
        config = Config()
        config.data.stages, config.data.packing, config.training.global_batch_tokens = list(stages), packing, 100
        return run_facts(config, fingerprint="", padded_vocab_size=8, tokenizer_sha256="", step=step)

    web, late = StageConfig(from_tokens=901, weights={"web": 1.0}), StageConfig(from_step=21)
    for step in (9, 10):
        saved = facts(step, web)
        assert refused_changes(saved, facts(step), None) == refused_changes(saved, facts(step, late), None) == []
        assert refused_changes(facts(step), facts(step, web), None) == []
    saved = facts(11, web)
    assert saved["data.stages"] == [{"from_step": 11, "weights": {"web": 1.0}}]
    assert refused_changes(saved, facts(11, web, late), None) == []
    (line,) = refused_changes(saved, facts(11, late), None)
    assert line == (
        "data.stages: checkpoint [{'from_step': 11, 'weights': {'web': 1.0}}], run [] (stages that began before the checkpoint must stay, and "
        "later ones begin after it)"
    )
    older = {key: value for key, value in facts(11).items() if key not in ("data.stages", "data.packing")}
    assert refused_changes(older, facts(11), None) == []
    assert len(refused_changes(older, facts(11, web), None)) == 1
    (line,) = refused_changes(older, facts(11, packing=RowPacking.best_fit), None)
    assert line == "data.packing: checkpoint 'flow', run 'best_fit, version 1'"


def test_another_schema_is_an_error_without_fallback_to_older_checkpoints(tmp_path):
    publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)
    newer = publish(tmp_path, 10, {}, write, keep=2, is_rank_0=True)
    record = json.loads((newer / FACTS).read_text())
    (newer / FACTS).write_text(record_text(record | {"schema": 2, "files": ["another form"]}))
    with pytest.raises(CheckpointError, match=r"step_00000010 has schema 2, and this version of ssa_pretrain reads 1"):
        find(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", '{"schema": 1, "step": 5, "facts": 7, "files": {}}', '{"step": 5}'])
def test_malformed_facts_are_refused(tmp_path, text):
    (tmp_path / FACTS).write_text(text)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        read(tmp_path)


def test_weights_of_another_shape_are_refused_and_every_key_is_named(tmp_path):
    saved = {"model.num_layers": 4, "attention.gate": True, "model.rope_theta": 1.0, "attention.top_k": 4, "seed": 1}
    found = Checkpoint(tmp_path, 5, saved)
    with pytest.raises(CheckpointError) as caught:
        require_same_model(found, saved | {"model.num_layers": 2, "attention.gate": False}, shapes_only=True)
    assert str(caught.value) == (
        f"{tmp_path} holds another model (attention.gate: checkpoint True, run False; model.num_layers: checkpoint 4, run 2); "
        "set the model as it was trained, or name another checkpoint"
    )
    # This checkpoint is older than both settings, so it has their defaults.
    with pytest.raises(
        CheckpointError, match=r"key_convolution: checkpoint 0, run 3; model\.qk_norm: checkpoint False, run"
    ):
        require_same_model(found, saved | {"model.qk_norm": True, "attention.key_convolution": 3}, shapes_only=True)


def test_only_nsa_has_other_weights_than_the_other_methods(tmp_path):
    found = Checkpoint(tmp_path, 5, {"attention.method": "ssa", "attention.top_k": 4})
    require_same_model(found, {"attention.method": "moba", "attention.top_k": 4}, shapes_only=True)
    with pytest.raises(CheckpointError, match=r"\(attention\.method: checkpoint 'ssa', run 'nsa'\)"):
        require_same_model(found, {"attention.method": "nsa", "attention.top_k": 4}, shapes_only=True)


def test_a_scorer_may_be_begun_but_not_left_out(tmp_path):
    def facts(score: str, heads: int = 1) -> dict:
        return {"attention.score": score, "attention.indexer": {"heads": heads, "warmup_steps": heads}}

    require_same_model(Checkpoint(tmp_path, 5, facts("softmax_sum")), facts("indexer", 2), shapes_only=True)
    found = Checkpoint(tmp_path, 5, facts("indexer"))
    with pytest.raises(CheckpointError, match=r"\(attention\.score: checkpoint 'indexer', run 'softmax_sum'\)"):
        require_same_model(found, facts("softmax_sum"), shapes_only=True)
    with pytest.raises(CheckpointError, match=r"\(attention\.indexer\.heads: checkpoint 1, run 2\)"):
        require_same_model(found, facts("indexer", 2), shapes_only=True)


def test_new_run_may_change_settings_that_keep_the_shapes(tmp_path):
    found = Checkpoint(tmp_path, 5, {"model.rope_theta": 1.0, "model.vocab_size": 0, "attention.top_k": 4, "seed": 1})
    wanted = {"model.rope_theta": 2.0, "model.vocab_size": 4096, "attention.top_k": 2, "seed": 7}
    require_same_model(found, wanted, shapes_only=True)
    with pytest.raises(CheckpointError, match=r"model\.rope_theta: checkpoint 1\.0, run 2\.0"):
        require_same_model(found, wanted)
    found.facts["model.vocab_size"] = 512
    with pytest.raises(CheckpointError, match=r"\(model\.vocab_size: checkpoint 512, run 4096\)"):
        require_same_model(found, wanted, shapes_only=True)


def test_weights_of_another_vocabulary_are_refused_if_the_checkpoint_names_it(tmp_path):
    saved = {"model.vocab_size": 0, "vocabulary.padded_size": 4096, "vocabulary.tokenizer_sha256": "a"}
    wanted = {"model.vocab_size": 0, "vocabulary.padded_size": 1024, "vocabulary.tokenizer_sha256": "b"}
    for shapes_only in (True, False):
        with pytest.raises(CheckpointError, match=r"\(vocabulary\.padded_size: checkpoint 4096, run 1024\)"):
            require_same_model(Checkpoint(tmp_path, 5, saved), wanted, shapes_only=shapes_only)
        require_same_model(
            Checkpoint(tmp_path, 5, saved | {"vocabulary.padded_size": 1024}), wanted, shapes_only=shapes_only
        )
        older = {"model.vocab_size": 0}
        require_same_model(Checkpoint(tmp_path, 5, older), wanted, shapes_only=shapes_only)
    assert differences(older, wanted) == [], "a checkpoint from before these facts goes on"


def rewrite(folder, change):
    """Rewrites the list of a published checkpoint, as whoever has made it could."""
    record = json.loads((folder / FACTS).read_text())
    change(record["files"])
    (folder / FACTS).write_text(record_text(record))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "link", "inner/file", ""])
def test_listed_file_outside_the_folder_is_damage(tmp_path, name):
    folder = publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)
    (tmp_path / "checkpoints" / "outside").write_bytes(b"secret")
    (folder / "link").symlink_to("../outside")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"secret")
    (folder / "inner").symlink_to(tmp_path / "elsewhere")
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    rewrite(folder, lambda files: files.update({name: entry}))
    assert find_damage(folder) == f"{FACTS} lists {name}, which is outside the folder"


def test_link_inside_the_folder_is_followed(tmp_path):
    folder = publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)
    (folder / "weights.bin").rename(folder / "moved.bin")
    (folder / "weights.bin").symlink_to("moved.bin")
    assert find_damage(folder) is None


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "deepspeed/mp_rank_00_model_states.pt"])
def test_unlisted_file_with_pickles_is_damage(tmp_path, name):
    folder = publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)
    (folder / "notes.txt").write_text("the user's own")
    assert find_damage(folder) is None
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    assert find_damage(folder) == f"{name} is not listed in {FACTS}"


def test_failure_that_the_ranks_agree_on_is_told_from_one_in_the_engines_part(tmp_path, monkeypatch):
    def unwritable(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fails_by_itself(folder):
        unwritable(folder)

    def fails_together(folder):
        parts = Attempts()
        parts.run(lambda: unwritable(folder))
        parts.run(lambda: write(folder))  # not run
        assert list(folder.iterdir()) == []
        parts.agree()

    with pytest.raises(CheckpointError, match=r"rank 0: OSError.*run the same command again") as caught:
        publish(tmp_path, 5, {}, fails_by_itself, keep=2, is_rank_0=True)
    assert not isinstance(caught.value, SaveError)
    with pytest.raises(SaveError, match=r"rank 0: OSError.*run the same command again") as caught:
        publish(tmp_path, 5, {}, fails_together, keep=2, is_rank_0=True)
    assert caught.value.reason.endswith("earlier checkpoints are unchanged")
    monkeypatch.setattr(publishing, "file_sha256", unwritable)
    monkeypatch.setattr(storage, "PAUSES", ())
    with pytest.raises(SaveError, match="Input/output error"):
        publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_failure_is_reported_although_the_storage_does_not_tell_its_free_space(tmp_path, monkeypatch):
    def stale(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(publishing.shutil, "disk_usage", stale)
    monkeypatch.setattr(publishing, "sync", stale)
    with pytest.raises(SaveError, match="which has an unknown amount of free space: Stale file handle"):
        publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)


def test_next_save_removes_what_a_failed_one_has_left(tmp_path, monkeypatch):
    plain = publishing.shutil.rmtree
    publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True)
    monkeypatch.setattr(publishing, "sync", lambda path: os.stat(tmp_path / "nothing"))
    monkeypatch.setattr(publishing.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(SaveError):
        publish(tmp_path, 10, {}, write, keep=2, is_rank_0=True)
    assert (tmp_path / "checkpoints/.step_00000010.tmp/weights.bin").exists()
    monkeypatch.undo()
    assert publishing.shutil.rmtree is plain
    publish(tmp_path, 15, {}, write, keep=2, is_rank_0=True)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000005", "step_00000015"]


def test_storage_that_fails_after_the_publication_does_not_fail_the_save(tmp_path, monkeypatch):
    def stale(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    lines: list[str] = []
    monkeypatch.setattr(publishing, "_half_removed", stale)
    folder = publish(tmp_path, 5, {}, write, keep=2, is_rank_0=True, report=lines.append)
    assert find_damage(folder) is None
    assert lines == ["old checkpoints could not be looked up (Stale file handle); the next checkpoint tries again"]
