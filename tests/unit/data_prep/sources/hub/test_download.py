"""Datasets on the hub, against a server with its protocol: pinned, complete, resumed, and every fault reported."""

import hashlib
import json
from pathlib import Path

import huggingface_hub.constants
import pytest

from data_prep.corpus.planning import plan_shards
from data_prep.errors import InputError
from data_prep.readers import read_piece
from data_prep.sources.hub import download as hub_module
from data_prep.sources.hub.parts import fetch_hub
from data_prep.sources.hub.settings import HubMode, HubPart, HubSource
from support.hub_server import COMMIT, Fault, Hub, start_hub, table

REPO = "owner/corpus"


@pytest.fixture
def hub(monkeypatch):
    """A hub with two files of a train split, one of a test split, and no pauses between attempts."""
    files = {
        "data/train-00000.parquet": table(40, "first"),
        "data/train-00001.parquet": table(10, "second"),
        "data/test-00000.parquet": table(5, "test"),
        "README.md": b"# corpus",
    }
    running, stop = start_hub(files)
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download", "data_prep.sources.hub.download"):
        monkeypatch.setattr(f"{module}.time.sleep", lambda _: None)
    yield running
    stop()


def source(hub: Hub, mode: HubMode = HubMode.download, attempts: int = 3, **subset) -> HubSource:
    chosen = HubPart(**{"files": "*train*.parquet", **subset})
    return HubSource(repo=REPO, endpoint=hub.url, mode=mode, subsets={"web": chosen}, attempts=attempts, part_mb=0.02)


def texts_of(subsets) -> list[str]:
    shards = plan_shards(subsets, 100)
    return [text for shard in shards for piece in shard.pieces for text, _ in read_piece(piece, lambda _: None)]


def expected(*files: tuple[str, int]) -> list[str]:
    return [f"{name} {n} " + "word " * 400 for name, rows in files for n in range(rows)]


@pytest.mark.parametrize("mode", HubMode)
def test_texts_arrive_in_the_order_of_the_dataset(hub, tmp_path, mode):
    subsets, described = fetch_hub(source(hub, mode), tmp_path, print)
    assert [s.name for s in subsets] == ["web"]
    assert texts_of(subsets) == expected(("first", 40), ("second", 10))
    assert described[0] | {"repo": REPO, "commit": COMMIT, "licence": "odc-by", "files": 2} == described[0]


@pytest.mark.parametrize("mode", HubMode)
def test_second_run_needs_no_network_even_if_the_branch_has_moved(hub, tmp_path, mode):
    first = fetch_hub(source(hub, mode), tmp_path, print)
    hub.commit = "d" * 40
    hub.requests.clear()
    assert fetch_hub(source(hub, mode), tmp_path, print) == first
    assert hub.requests == []


def test_download_leaves_a_record_of_revision_size_and_sha256(hub, tmp_path):
    path = Path(fetch_hub(source(hub), tmp_path, print)[0][0].files[0])
    record = json.loads(path.with_name(path.name + ".fetched.json").read_text())
    raw = hub.files["data/train-00000.parquet"]
    assert record == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest(), "repo": REPO, "commit": COMMIT}


def test_stream_leaves_a_record_of_its_files(hub, tmp_path):
    path = Path(fetch_hub(source(hub, HubMode.stream), tmp_path, print)[0][0].files[0])
    record = json.loads((path.parent / "fetched.json").read_text())
    assert (record["commit"], record["whole"]) == (COMMIT, True)
    assert sum(part["rows"] for part in record["parts"]) == 40
    assert record["parts"][0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_the_text_column_is_transferred(hub, tmp_path):
    fetch_hub(source(hub, HubMode.stream), tmp_path, print)
    ranges = [r.removeprefix("bytes=").split("-") for m, path, r in hub.requests if m == "GET" and "other-host" in path]
    requested = sum(int(stop) - int(start) + 1 for start, stop in ranges)
    whole = sum(len(raw) for name, raw in hub.files.items() if "train" in name)
    assert requested < 0.4 * whole  # prompts are nine tenths of each file


@pytest.mark.parametrize("mode", HubMode)
@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", "other-host/data/train-00000", status=500),
        Fault("GET", "other-host/data/train-00000", status=503, times=2),
        Fault("HEAD", "resolve/.*/data/train-00000", status=502),
        Fault("GET", "other-host/data/train-00000", cut=700),
        Fault("GET", f"api/datasets/{REPO}", status=500),
    ],
    ids=["500", "503-twice", "502-on-head", "cut", "500-on-listing"],
)
def test_transient_faults_are_retried(hub, tmp_path, mode, fault):
    fault = Fault(**{name: getattr(fault, name) for name in ("method", "pattern", "status", "cut", "stall", "times")})
    hub.faults.append(fault)
    assert texts_of(fetch_hub(source(hub, mode), tmp_path, print)[0]) == expected(("first", 40), ("second", 10))
    assert fault.times == 0


def test_slow_server_is_retried(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1.0)
    hub.faults.append(Fault("GET", "other-host/data/train-00001", stall=60.0))
    assert texts_of(fetch_hub(source(hub, attempts=20), tmp_path, print)[0]) == expected(("first", 40), ("second", 10))
    assert hub.count("GET", "other-host/data/train-00001") >= 2


@pytest.mark.parametrize("mode", HubMode)
def test_dead_server_is_named_and_finished_files_are_kept(hub, tmp_path, mode):
    hub.faults.append(Fault("GET", "other-host/data/train-00001", status=500, times=10_000))
    with pytest.raises(
        InputError, match=r"owner/corpus/data/train-00001.parquet.* could not be fetched in 2 attempts .*500"
    ):
        fetch_hub(source(hub, mode, attempts=2), tmp_path, print)
    hub.faults.clear()
    hub.requests.clear()
    assert texts_of(fetch_hub(source(hub, mode), tmp_path, print)[0]) == expected(("first", 40), ("second", 10))
    assert hub.count("GET", "other-host/data/train-00000") == 0


def test_stream_continues_after_the_last_file(hub, tmp_path):
    whole = fetch_hub(source(hub, HubMode.stream), tmp_path / "whole", print)[0]
    hub.faults.append(Fault("GET", "other-host/data/train-00000", status=500, times=0))
    parts = [Path(path) for path in whole[0].files if "train-00000" in path]
    assert len(parts) >= 4
    # As after kill -9 in the third file: no record yet, two finished files, one unfinished.
    (parts[0].parent / "fetched.json").unlink()
    for part in parts[2:]:
        part.unlink()
    (parts[0].parent / f"{parts[2].name}.77.tmp").write_bytes(b"PAR1 cut")
    before = [part.stat().st_mtime_ns for part in parts[:2]]
    assert texts_of(fetch_hub(source(hub, HubMode.stream), tmp_path / "whole", print)[0]) == texts_of(whole)
    assert [part.stat().st_mtime_ns for part in parts[:2]] == before


def test_content_with_another_sha256_is_rejected(hub, tmp_path):
    name = "data/train-00000.parquet"
    hub.content[name] = hub.files[name][:-1] + b"x"
    with pytest.raises(
        InputError, match=r"train-00000.parquet could not be fetched in 2 attempts \(its sha256 is \w+…, but"
    ):
        fetch_hub(source(hub, attempts=2), tmp_path, print)


@pytest.mark.parametrize("mode", HubMode)
def test_content_with_another_size_is_rejected(hub, tmp_path, mode):
    name = "data/train-00000.parquet"
    fetch_listing = source(hub, mode, attempts=2)
    hub_module.list_dataset(fetch_listing, tmp_path / "hub" / "owner--corpus")
    hub.files[name] = hub.files[name] + b"more"
    with pytest.raises(
        InputError, match=r"train-00000.parquet could not be fetched in 2 attempts \(.*(bytes|size|ETag)"
    ):
        fetch_hub(fetch_listing, tmp_path, print)


def test_stream_rejects_another_commit(hub, tmp_path):
    hub.served_commit = "d" * 40
    with pytest.raises(InputError, match=r"the server returns commit dddd.* but its listing has c0ffee"):
        fetch_hub(source(hub, HubMode.stream, attempts=1), tmp_path, print)


def test_file_damaged_on_this_disk_is_fetched_again(hub, tmp_path):
    path = Path(fetch_hub(source(hub), tmp_path, print)[0][0].files[1])
    path.write_bytes(path.read_bytes()[:100])
    hub.requests.clear()
    assert texts_of(fetch_hub(source(hub), tmp_path, print)[0]) == expected(("first", 40), ("second", 10))
    assert hub.count("GET", "other-host/data/train-00000") == 0


def test_limits_take_the_first_files(hub, tmp_path):
    taken = texts_of(fetch_hub(source(hub, limit_gb=1e-6), tmp_path / "a", print)[0])
    assert taken == expected(("first", 40))
    streamed = texts_of(fetch_hub(source(hub, HubMode.stream, limit_gb=2e-5), tmp_path / "b", print)[0])
    assert streamed == expected(("first", 40))[: len(streamed)]
    assert 0 < len(streamed) < 40


def test_limit_raised_later_fetches_the_rest(hub, tmp_path):
    fetch_hub(source(hub, HubMode.stream, limit_gb=2e-5), tmp_path, print)
    assert texts_of(fetch_hub(source(hub, HubMode.stream), tmp_path, print)[0]) == expected(
        ("first", 40), ("second", 10)
    )


def test_jsonl_on_the_hub_is_downloaded_and_not_streamed(hub, tmp_path):
    hub.files = {"all.jsonl": b'{"text": "one"}\n{"text": "two"}\n'}
    assert texts_of(fetch_hub(source(hub, files="*.jsonl"), tmp_path / "a", print)[0]) == ["one", "two"]
    with pytest.raises(
        InputError, match=r"source.mode=stream reads Parquet and all.jsonl is not; use source.mode=download"
    ):
        fetch_hub(source(hub, HubMode.stream, files="*.jsonl"), tmp_path / "b", print)


def test_wrong_names_are_reported(hub, tmp_path):
    with pytest.raises(
        InputError, match=r"owner/corpus has no file \*.arrow; it has /\*.md, data/\*.parquet; set source.subsets"
    ):
        fetch_hub(source(hub, files="*.arrow"), tmp_path, print)
    with pytest.raises(InputError, match=r"README.md, which is neither Parquet nor JSON lines"):
        fetch_hub(source(hub, files="*"), tmp_path, print)
    with pytest.raises(
        InputError, match=r"no column 'body', it has 'prompt', 'metadata', 'text'; set source.text_column"
    ):
        fetch_hub(source(hub, HubMode.stream, text_column="body"), tmp_path, print)
    wrong = source(hub)
    wrong.revision = "v9"
    with pytest.raises(InputError, match=r"dataset owner/corpus has no such revision; correct source.revision"):
        fetch_hub(wrong, tmp_path, print)
    wrong = source(hub)
    wrong.repo = "gated/corpus"
    with pytest.raises(InputError, match=r"dataset gated/corpus is gated; accept its terms .* HF_TOKEN"):
        fetch_hub(wrong, tmp_path, print)
    wrong.repo = "no/where"
    with pytest.raises(InputError, match=r"dataset no/where does not exist there, or is private; correct source.repo"):
        fetch_hub(wrong, tmp_path, print)


def test_settings_report_their_problems():
    wrong = HubSource(
        repo="corpus", endpoint="ftp://x", connections=0, part_mb=0, subsets={"a/b": HubPart(files="", limit_gb=-1)}
    )
    found = "\n".join(map(str, wrong.problems()))
    for text in (
        "source.repo=corpus must be owner/name",
        "source.endpoint=ftp://x",
        "source.connections=0",
        "source.part_mb=0",
    ):
        assert text in found
    for text in ("the name 'a/b', which must be", "files='' must not be empty", "limit_gb=-1 must be at least 0"):
        assert text in found
    assert HubSource(repo="a/b", subsets={"text": HubPart()}).problems() == []


def test_presets_are_valid_and_name_the_documented_parts():
    from data_prep.cli import read_config

    parts = {}
    for preset in ("smollm_corpus", "smollm2_135m_100b"):
        composed = read_config([f"source={preset}", "out=x"])
        parts[preset] = {name: subset.blobs for name, subset in composed.source.subsets.items()}
    assert parts["smollm_corpus"] == {"fineweb-edu-dedup": False, "cosmopedia-v2": False, "python-edu": True}
    assert list(parts["smollm2_135m_100b"]) == ["smollm2"]
    assert read_config(["source=hub", "source.repo=a/b", "out=x"]).source.repo == "a/b"


@pytest.mark.parametrize("name", ["/outside.parquet", "data/../../outside.parquet"])
def test_listing_with_a_file_outside_its_folder_is_refused(hub, tmp_path, name):
    hub.files[name] = table(5, "outside")
    with pytest.raises(
        InputError, match=r"^owner/corpus lists .*outside.parquet', which is outside its folder; use another"
    ):
        fetch_hub(source(hub), tmp_path / "cache", print)
    assert not list(tmp_path.rglob("*outside*"))
