"""Checkpoints are mirrored to an object store, complete or not at all, and come back intact from it."""

import json
import shutil
import threading

import pytest
import torch.distributed as dist

from ssa_pretrain.checkpoint.find import read
from ssa_pretrain.checkpoint.integrity import FACTS, Verdicts, find_damage
from ssa_pretrain.checkpoint.mirror import Mirror, leave_together, restore
from ssa_pretrain.checkpoint.object_store import ObjectStore, StoreError
from ssa_pretrain.checkpoint.publish import publish
from ssa_pretrain.errors import CheckpointError
from support.s3_server import s3_server

BUCKET, ADDRESS = "runs", "s3://runs/team/first"


@pytest.fixture(scope="module")
def server():
    with s3_server(BUCKET) as found:
        yield found


@pytest.fixture
def client(server, monkeypatch):
    """Returns a client of the store, which is empty."""
    variables, client = server
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", ()):
        client.delete_object(Bucket=BUCKET, Key=item["Key"])
    return client


@pytest.fixture(autouse=True)
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def keys(client) -> set[str]:
    return {item["Key"] for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", ())}


def save(run, step: int, verdicts: Verdicts | None = None, keep: int = 9):
    def write(folder) -> None:
        (folder / "weights").mkdir()
        (folder / "weights" / "a.bin").write_bytes(bytes([step]) * 1000)
        (folder / "empty").touch()

    return publish(run, step, {"seed": 1}, write, keep=keep, is_rank_0=True, verdicts=verdicts)


def mirrored(run, *steps: int, keep: int = 2) -> list[str]:
    """Mirrors checkpoints one by one; returns the lines for the user."""
    lines, verdicts = [], Verdicts()
    mirror = Mirror(ADDRESS, keep=keep, in_use=verdicts.in_use, report=lines.append)
    for step in steps:
        mirror.offer(save(run, step, verdicts))
        mirror.finish()
    assert verdicts.in_use == set()
    return [line for line in lines if not line.startswith("waiting")]


def test_mirrored_checkpoint_comes_back_into_an_empty_folder(client, tmp_path):
    lines = mirrored(tmp_path / "run", 5)
    assert lines[0].startswith("mirrored step 5 in ") and lines[0].endswith(f"{ADDRESS}/step_00000005")
    assert keys(client) == {f"team/first/step_00000005/{name}" for name in (FACTS, "weights/a.bin", "empty")}
    restore(ADDRESS, tmp_path / "new", is_rank_0=True, report=lines.append)
    (folder,) = (tmp_path / "new" / "checkpoints").iterdir()
    assert find_damage(folder) is None
    assert (read(folder).step, read(folder).facts) == (5, {"seed": 1})
    assert f"restored {folder} from {ADDRESS} in" in lines[-1]


def test_folder_with_a_checkpoint_is_left_alone_and_an_empty_store_begins_a_new_run(client, tmp_path):
    restore(ADDRESS, tmp_path / "new", is_rank_0=True, report=pytest.fail)
    assert not (tmp_path / "new").exists()
    mirrored(tmp_path / "run", 5, 10)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000010")
    restore(ADDRESS, tmp_path / "run", is_rank_0=True, report=pytest.fail)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000005"]


@pytest.mark.parametrize(("keep", "left"), [(1, (10, 15)), (2, (10, 15)), (3, (5, 10, 15))])
def test_mirror_keeps_at_least_two_complete_checkpoints(client, tmp_path, keep, left):
    mirrored(tmp_path, 5, 10, 15, keep=keep)
    assert {key.split("/")[2] for key in keys(client)} == {f"step_{step:08d}" for step in left}


def test_damaged_object_is_reported_and_an_older_checkpoint_restored(client, tmp_path):
    mirrored(tmp_path / "run", 5, 10)
    client.put_object(Bucket=BUCKET, Key="team/first/step_00000010/weights/a.bin", Body=bytes(1000))
    lines = []
    restore(ADDRESS, tmp_path / "new", is_rank_0=True, report=lines.append)
    assert [p.name for p in (tmp_path / "new" / "checkpoints").iterdir()] == ["step_00000005"]
    assert lines[0].endswith("is damaged (weights/a.bin has another sha256); looking for an older one")
    client.put_object(Bucket=BUCKET, Key="team/first/step_00000005/weights/a.bin", Body=bytes(7))
    with pytest.raises(CheckpointError, match="no checkpoint in it is intact"):
        restore(ADDRESS, tmp_path / "other", is_rank_0=True, report=lines.append)


def test_run_below_another_runs_prefix_is_another_run(client, tmp_path):
    mirrored(tmp_path / "first", 5)
    below = ObjectStore(f"{ADDRESS}/sweep")
    for step in (80, 90):
        below.upload(save(tmp_path / "sweep", step))
    mirrored(tmp_path / "first", 10)
    assert sorted(ObjectStore(ADDRESS).complete()) == ["step_00000005", "step_00000010"]
    restore(ADDRESS, tmp_path / "new", is_rank_0=True, report=lambda line: None)
    assert [p.name for p in (tmp_path / "new" / "checkpoints").iterdir()] == ["step_00000010"]


@pytest.mark.parametrize("broken", ["a file is missing", "the list cannot be read"])
def test_broken_checkpoint_is_reported_and_an_older_one_restored(client, tmp_path, broken):
    mirrored(tmp_path / "run", 5, 10)
    if broken == "a file is missing":
        client.delete_object(Bucket=BUCKET, Key="team/first/step_00000010/weights/a.bin")
    else:
        client.put_object(Bucket=BUCKET, Key=f"team/first/step_00000010/{FACTS}", Body=b"\xff{")
    lines = []
    restore(ADDRESS, tmp_path / "new", is_rank_0=True, report=lines.append)
    assert [p.name for p in (tmp_path / "new" / "checkpoints").iterdir()] == ["step_00000005"]
    assert f"checkpoint {ADDRESS}/step_00000010 is damaged (" in lines[0]


def test_mirror_outlives_an_unexpected_error(client, tmp_path, monkeypatch):
    upload, lines, verdicts = ObjectStore.upload, [], Verdicts()
    mirror = Mirror(ADDRESS, keep=2, in_use=verdicts.in_use, report=lines.append)
    monkeypatch.setattr(ObjectStore, "upload", lambda self, folder: {}["no such key"])
    mirror.offer(save(tmp_path, 5, verdicts))
    mirror.finish()
    monkeypatch.setattr(ObjectStore, "upload", upload)
    mirror.offer(save(tmp_path, 10, verdicts))
    mirror.finish()
    assert any("was not mirrored" in line for line in lines) and ObjectStore(ADDRESS).complete() == ["step_00000010"]


def test_checkpoint_without_its_list_is_not_complete_and_its_upload_continues(client, tmp_path):
    """As after a kill during the upload."""
    folder, store = save(tmp_path, 5), ObjectStore(ADDRESS)
    store.upload(folder)
    client.delete_object(Bucket=BUCKET, Key=f"team/first/step_00000005/{FACTS}")
    client.put_object(Bucket=BUCKET, Key="team/first/step_00000005/empty", Body=b"unfinished")
    assert store.complete() == []
    before = client.head_object(Bucket=BUCKET, Key="team/first/step_00000005/weights/a.bin")["LastModified"]
    store.upload(folder)
    assert store.complete() == ["step_00000005"]
    store.download("step_00000005", tmp_path / "back")
    assert find_damage(tmp_path / "back") is None
    after = client.head_object(Bucket=BUCKET, Key="team/first/step_00000005/weights/a.bin")["LastModified"]
    assert before == after, "it was there already"


def test_names_that_point_outside_the_folder_are_refused(client, tmp_path):
    folder, store = save(tmp_path, 5), ObjectStore(ADDRESS)
    store.upload(folder)
    record = json.loads((folder / FACTS).read_text())
    record["files"] = {"../../escaped": {"bytes": 0, "sha256": ""}}
    client.put_object(Bucket=BUCKET, Key=f"team/first/step_00000005/{FACTS}", Body=json.dumps(record).encode())
    client.put_object(Bucket=BUCKET, Key="team/first/escaped", Body=b"")
    (tmp_path / "back").mkdir()
    with pytest.raises(StoreError, match=r"step_00000005 lists \.\./\.\./escaped, which lies outside it"):
        store.download("step_00000005", tmp_path / "back")
    assert not list(tmp_path.rglob("escaped"))


def test_store_that_fails_is_reported_and_training_goes_on(client, tmp_path, monkeypatch):
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    (line,) = mirrored(tmp_path, 5)
    assert line.startswith(f"{tmp_path / 'checkpoints' / 'step_00000005'} was not mirrored to {ADDRESS} (")
    with pytest.raises(CheckpointError, match=r"checkpoint\.mirror=s3://runs/team/first cannot be restored from \(.*"):
        restore(ADDRESS, tmp_path / "new", is_rank_0=True, report=pytest.fail)


def test_checkpoint_is_not_removed_while_it_is_uploaded_and_only_the_newest_waits(client, tmp_path, monkeypatch):
    go, verdicts, lines = threading.Event(), Verdicts(), []
    upload = ObjectStore.upload
    monkeypatch.setattr(ObjectStore, "upload", lambda self, folder: go.wait() and upload(self, folder))
    mirror = Mirror(ADDRESS, keep=2, in_use=verdicts.in_use, report=lines.append)
    for step in (5, 10, 15, 20):
        mirror.offer(save(tmp_path, step, verdicts, keep=1))
        while not mirror._busy:
            pass
    steps = [int(p.name[5:]) for p in sorted((tmp_path / "checkpoints").iterdir())]
    assert steps == [5, 15, 20], "5 is being uploaded, and 15 waited when 20 was published; 10 was replaced by 15"
    go.set()
    mirror.finish()
    assert {key.split("/")[2] for key in keys(client)} == {"step_00000005", "step_00000020"}
    save(tmp_path, 25, verdicts, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000025"]


def test_ranks_leave_after_rank_0():
    leave_together(is_rank_0=True)
    leave_together(is_rank_0=False)
