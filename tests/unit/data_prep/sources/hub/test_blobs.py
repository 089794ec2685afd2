"""Text by blob id, against moto's S3 over HTTP, and against a small server for faults that moto cannot produce."""

import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from data_prep.errors import InputError
from data_prep.sources.hub import blobs
from data_prep.sources.hub.settings import BlobSettings

boto3 = pytest.importorskip("boto3")


def write_list(path: Path, ids: list[str]) -> Path:
    columns = {"blob_id": ids, "repo_name": [f"repo {i}" for i in ids], "score": [3.5] * len(ids)}
    parquet.write_table(pyarrow.table(columns), path)
    return path


def texts(paths: list[Path]) -> list[str]:
    return [text for path in paths for text in parquet.read_table(path)["text"].to_pylist()]


@pytest.fixture(scope="module")
def moto_endpoint():
    """Moto's S3 with the bucket of Software Heritage, publicly readable: blobs 00 to 29, without number 13."""
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
    client.create_bucket(Bucket="softwareheritage", ACL="public-read")
    for n in range(30):
        if n != 13:
            body = gzip.compress(f"print({n})\n".encode() + (b"\xff" if n == 5 else b""))
            client.put_object(Bucket="softwareheritage", Key=f"content/{n:02d}", Body=body, ACL="public-read")
    yield endpoint
    server.stop()


def test_unsigned_requests_get_the_texts_and_a_missing_blob_is_recorded(moto_endpoint, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    ids = [f"{n:02d}" for n in range(30)]
    settings = BlobSettings(endpoint=moto_endpoint, part_rows=10, connections=4)
    logged: list[str] = []
    paths, report = blobs.fetch_blobs(
        [write_list(tmp_path / "l.parquet", ids)], settings, tmp_path / "b", logged.append
    )
    assert texts(paths) == [f"print({n})\n" for n in range(30) if n != 13]  # the odd byte of blob 5 is ignored
    assert report == {"blobs": 30, "text": 29, "missing": 1}
    assert logged[-1] == "blobs: 29 of 30 have text (96.67%)"
    record = json.loads(Path(f"{paths[1]}.fetched.json").read_text())
    assert (record["counts"], record["dropped"]) == ({"text": 9, "missing": 1}, {"missing": ["13"]})
    assert parquet.read_table(paths[0]).column_names == ["blob_id", "repo_name", "score", "text"]


def test_wrong_bucket_is_named(moto_endpoint, tmp_path):
    settings = BlobSettings(endpoint=moto_endpoint, bucket="software-heritage", attempts=2)
    with pytest.raises(InputError, match=r"s3://software-heritage/content/00 at http://127.* could not be read"):
        blobs.fetch_blobs([write_list(tmp_path / "l.parquet", ["00"])], settings, tmp_path / "b", print)


class Store(ThreadingHTTPServer):
    """S3's GetObject for any id; `faults` maps an id to the faults of its next requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Objects)
        self.faults: dict[str, list] = {}
        self.requests: list[str] = []
        self.answered = math.inf  # requests; later ones wait for `go_on`
        self.go_on = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        """A client that hung up is what some tests are about."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Objects(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        blob_id = re.sub(r"\?.*", "", self.path).rpartition("/")[2]
        self.server.requests.append(blob_id)
        if len(self.server.requests) > self.server.answered:
            self.server.go_on.wait()
        faults = self.server.faults.get(blob_id, [])
        fault = faults.pop(0) if faults else None
        body = gzip.compress(f"text of {blob_id}\n".encode() * 20)
        if isinstance(fault, tuple):
            status, code = fault
            self._send(status, f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode())
        elif fault == "cut":
            self._send(200, body, len(body) // 2)
        elif fault == "truncated":
            self._send(200, body[: len(body) // 2])
        elif fault == "stall":
            threading.Event().wait(60)  # the tests make time.sleep return at once
            self.close_connection = True
        else:
            self._send(200, body)

    def _send(self, status: int, body: bytes, sent: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:sent])
        self.close_connection = self.close_connection or sent is not None


@pytest.fixture
def store():
    server = Store()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def quick(monkeypatch):
    """Removes the pauses between attempts; botocore has its own."""
    monkeypatch.setattr("data_prep.sources.hub.blobs.time.sleep", lambda _: None)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)


def fetch(store: Store, tmp_path: Path, ids: list[str], **settings):
    chosen = BlobSettings(**{"endpoint": store.endpoint, "part_rows": 4, "connections": 2, "attempts": 3, **settings})
    paths, report = blobs.fetch_blobs([write_list(tmp_path / "l.parquet", ids)], chosen, tmp_path / "b", lambda _: None)
    return texts(paths), report


@pytest.mark.parametrize(
    "faults",
    [[(500, "InternalError")], [(503, "SlowDown")] * 2, ["cut"], ["truncated"], ["cut", (500, "InternalError")]],
    ids=["500", "slow-down-twice", "cut", "truncated-gzip", "two-faults"],
)
def test_transient_faults_are_retried(store, tmp_path, quick, faults):
    store.faults["b"] = list(faults)
    assert fetch(store, tmp_path, ["a", "b", "c"]) == ([f"text of {i}\n" * 20 for i in "abc"], {"blobs": 3, "text": 3})
    assert store.requests.count("b") == len(faults) + 1


def test_slow_answer_is_requested_again(store, tmp_path, quick):
    store.faults["a"] = ["stall"]
    assert fetch(store, tmp_path, ["a"], timeout_s=0.3, attempts=20)[1] == {"blobs": 1, "text": 1}
    assert store.requests.count("a") >= 2


def test_missing_denied_and_damaged_blobs_are_dropped_and_counted_separately(store, tmp_path, quick):
    store.faults = {"b": [(404, "NoSuchKey")], "c": [(403, "AccessDenied")], "d": ["truncated"] * 3}
    found, report = fetch(store, tmp_path, list("abcde"), min_success=0.4)
    assert found == [f"text of {i}\n" * 20 for i in "ae"]
    assert report == {"blobs": 5, "text": 2, "damaged": 1, "denied": 1, "missing": 1}


def test_too_few_texts_end_the_run(store, tmp_path, quick):
    store.faults = {"b": [(404, "NoSuchKey")]}
    with pytest.raises(
        InputError, match=r"only 75.00% of 4 blobs have text \(1 missing\), less than source.blobs.min_success=0.95"
    ):
        fetch(store, tmp_path, list("abcd"))


def test_dead_server_does_not_mark_a_blob_as_missing(store, tmp_path, quick):
    store.faults = {"f": [(500, "InternalError")] * 100}
    with pytest.raises(
        InputError,
        match=r"s3://softwareheritage/content/f at http.* could not be read in 3 attempts .*run again to continue",
    ):
        fetch(store, tmp_path, list("abcdefgh"))
    store.faults.clear()
    store.requests.clear()
    assert len(fetch(store, tmp_path, list("abcdefgh"))[0]) == 8
    assert sorted(store.requests) == list("efgh")  # the first part was kept


def test_part_with_changed_bytes_or_another_list_is_fetched_again(store, tmp_path, quick):
    fetch(store, tmp_path, list("abcdefgh"))
    part = next((tmp_path / "b").rglob("blobs_00001.parquet"))
    part.write_bytes(part.read_bytes()[:-5])
    store.requests.clear()
    assert len(fetch(store, tmp_path, list("abcdefgh"))[0]) == 8
    assert sorted(store.requests) == list("efgh")
    store.requests.clear()
    assert fetch(store, tmp_path, list("xbcdefgh"))[0][0] == "text of x\n" * 20
    assert sorted(store.requests) == list("bcdx")


def test_limit_takes_the_first_blobs(store, tmp_path, quick):
    assert fetch(store, tmp_path, list("abcdefgh"), limit_rows=6)[1]["blobs"] == 6
    assert sorted(store.requests) == list("abcdef")


def test_list_without_ids_is_named(store, tmp_path):
    with pytest.raises(
        InputError,
        match=r"l.parquet has no column 'sha1', it has blob_id, repo_name, score; set source.blobs.id_column",
    ):
        fetch(store, tmp_path, ["a"], id_column="sha1")


def test_kill_9_loses_at_most_one_file(store, tmp_path):
    ids = [f"{n:03d}" for n in range(80)]
    listed = write_list(tmp_path / "l.parquet", ids)
    store.answered = 44
    program = (
        "import sys; from pathlib import Path; from data_prep.sources.hub.blobs import fetch_blobs\n"
        "from data_prep.sources.hub.settings import BlobSettings\n"
        "s = BlobSettings(endpoint=sys.argv[1], part_rows=10, connections=2)\n"
        "fetch_blobs([Path(sys.argv[2])], s, Path(sys.argv[3]), print)\n"
    )
    command = [sys.executable, "-c", program, store.endpoint, str(listed), str(tmp_path / "b")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len(store.requests) < 45 and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store.go_on.set()
    before = len(store.requests)
    assert 45 <= before < 80
    settings = BlobSettings(endpoint=store.endpoint, part_rows=10, connections=2)
    paths, report = blobs.fetch_blobs([listed], settings, tmp_path / "b", print)
    assert texts(paths) == [f"text of {i}\n" * 20 for i in ids]
    assert report == {"blobs": 80, "text": 80}
    assert len(store.requests) <= 80 + 10 + 2  # one part again, and what was under way


def test_settings_check_themselves():
    wrong = BlobSettings(connections=0, attempts=0, part_rows=0, limit_rows=-1, timeout_s=0, min_success=95)
    assert len(wrong.problems()) == 6
    assert BlobSettings().problems() == []
