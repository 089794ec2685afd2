"""A small dataset hub on the loopback: the API, resolve with HEAD, ETag, X-Repo-Commit and Range, and faults on demand.

As on the hub, large files are redirected to another host, whose answers carry nothing but bytes; 127.0.0.1 plays the hub and
localhost the other host.
"""

import hashlib
import io
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet as parquet

COMMIT = "c0ffee" * 6 + "c0ff"
REPO = "owner/corpus"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match: `status`, or after `cut` bytes, or no answer for `stall` seconds."""

    method: str
    pattern: str
    status: int = 0
    cut: int = -1
    stall: float = 0.0
    times: int = 1


@dataclass
class Hub:
    """A running server; change `files`, `content` or `faults` to change its answers."""

    url: str
    files: dict[str, bytes]
    content: dict[str, bytes] = field(default_factory=dict)  # bytes that are served instead of the listed ones
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    commit: str = COMMIT
    served_commit: str = COMMIT

    def count(self, method: str, pattern: str) -> int:
        return sum(1 for m, path, _ in self.requests if m == method and re.search(pattern, path))


def start_hub(files: dict[str, bytes]) -> tuple[Hub, Callable[[], None]]:
    """Returns a running hub and the function that stops it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_port}", files)
    server.hub = hub
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return hub, stop


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def _answer(self, method: str) -> None:
        hub: Hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        if length := int(self.headers.get("Content-Length") or 0):
            self.rfile.read(length)
        hub.requests.append((method, path, self.headers.get("Range", "")))
        fault = next((f for f in hub.faults if f.method == method and re.search(f.pattern, path) and f.times > 0), None)
        if fault:
            fault.times -= 1
            if fault.stall:
                threading.Event().wait(fault.stall)  # the tests make time.sleep return at once
                self.close_connection = True
                return
            if fault.status:
                self._json({"error": "injected"}, fault.status)
                return
        if path == f"/api/datasets/{REPO}" or re.fullmatch(rf"/api/datasets/{REPO}/revision/(main|{COMMIT})", path):
            self._json(self._info(hub))
        elif path.startswith(f"/api/datasets/{REPO}/revision/"):
            self._json({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/datasets/gated/"):
            self._json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        elif found := re.fullmatch(rf"/api/datasets/{REPO}/tree/{COMMIT}/?(.*)", path):
            self._json(self._tree(hub, found[1]))
        elif found := re.fullmatch(rf"/datasets/{REPO}/resolve/{COMMIT}/(.+)", path):
            self._resolve(hub, found[1])
        elif found := re.fullmatch(r"/other-host/(.+)", path):
            self._bytes(hub.content.get(found[1], hub.files[found[1]]), fault)
        else:
            self._json({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _resolve(self, hub: Hub, name: str) -> None:
        if name not in hub.files:
            self._json({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = hub.files[name]
        self.send_response(302)
        self.send_header("Location", f"{hub.url.replace('127.0.0.1', 'localhost')}/other-host/{name}")
        self.send_header("X-Repo-Commit", hub.served_commit)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _bytes(self, content: bytes, fault: Fault | None) -> None:
        start, stop = 0, len(content)
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(found[1]), min(len(content), int(found[2]) + 1 if found[2] else len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return
        part = content[start:stop]
        if fault and fault.cut >= 0:
            self.wfile.write(part[: fault.cut])
            self.close_connection = True
            return
        self.wfile.write(part)

    def _info(self, hub: Hub) -> dict:
        return {
            "id": REPO,
            "sha": hub.commit,
            "private": False,
            "cardData": {"license": "odc-by"},
            "siblings": [
                {"rfilename": name, "size": len(raw), "blobId": "b" * 40, "lfs": _lfs(raw)}
                for name, raw in hub.files.items()
            ],
        }

    def _tree(self, hub: Hub, folder: str) -> list[dict]:
        inside = {name: raw for name, raw in hub.files.items() if name.rpartition("/")[0] == folder}
        return [
            {
                "type": "file",
                "path": name,
                "size": len(raw),
                "oid": "b" * 40,
                "lfs": {**_lfs(raw), "oid": _lfs(raw)["sha256"]},
            }
            for name, raw in inside.items()
        ]

    def _json(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            **(headers or {}),
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _lfs(raw: bytes) -> dict:
    return {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 134}


def table(rows: int, name: str) -> bytes:
    """A Parquet file like fineweb-edu's: text between other columns, one of them nested, five rows a row group."""
    buffer = io.BytesIO()
    columns = {
        "prompt": [f"prompt {n} " + "?" * 20_000 for n in range(rows)],
        "metadata": [{"url": f"u{n}", "score": n} for n in range(rows)],
        "text": [f"{name} {n} " + "word " * 400 for n in range(rows)],
    }
    parquet.write_table(pyarrow.table(columns), buffer, row_group_size=5, compression="none", use_dictionary=False)
    return buffer.getvalue()
