"""A fake W&B server on this machine: it stores a run's history, and the real client resumes from it."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}


class Server(ThreadingHTTPServer):
    """Histories by run id: lists of rows, as the client uploads them by offset."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.histories: dict[str, list[str]] = {}

    def handle_error(self, *_: object) -> None:
        """Prints nothing: a killed client drops its connection."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def rows(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.histories.get(run, [])]


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Prints nothing."""

    def answer(self, content: object) -> None:
        raw = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def body(self) -> bytes:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw

    def do_GET(self) -> None:
        self.answer({})

    def do_PUT(self) -> None:
        self.body()
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        if self.path.endswith("/file_stream"):
            if rows := json.loads(body).get("files", {}).get("wandb-history.jsonl"):
                history = self.server.histories.setdefault(self.path.split("/")[-2], [])
                history[rows["offset"] :] = rows["content"]
            self.answer({"exitcode": None, "limits": {}})
        elif self.path.endswith("/graphql"):
            self.answer({"data": self.graphql(json.loads(body))})
        else:
            self.answer({})

    def graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        given, text = request.get("variables", {}), request.get("query", "")
        operation = request.get("operationName") or (re.findall(r"(?:query|mutation)\s+(\w+)", text) or ["?"])[0]
        name = given.get("name") or given.get("bucket") or given.get("run") or "?"
        history = self.server.histories.get(name, [])
        run = {"id": name, "name": name, "displayName": "x", "config": "{}", "historyLineCount": len(history)}
        if operation == "RunResumeStatus":
            known = {"summaryMetrics": "{}", "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "tags": []}
            known |= {"historyTail": json.dumps(history[-1:]), "wandbConfig": '{"t": 1}'}
            return {"model": PROJECT | {"bucket": run | known if name in self.server.histories else None}}
        if operation == "UpsertBucket":
            self.server.histories.setdefault(name, [])
            bucket = run | {"description": "", "sweepName": None, "project": PROJECT}
            return {"upsertBucket": {"bucket": bucket, "inserted": not history}}
        if operation == "Viewer":
            return {"viewer": {"id": "v", "entity": "e", "username": "e", "flags": "{}", "teams": {"edges": []}}}
        if operation == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.server.url}/file"} for file in given.get("files", [])]
            return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": files}}
        return {}
