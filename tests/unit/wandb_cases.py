"""For tests of Weights & Biases: a service on loopback that can be broken, and a reader of its files on disk."""

import gzip
import json
import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2 as protocol

KEY = "a" * 40


def quiet(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Weights & Biases without its look around the machine, and with nothing outside the test's folder."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    for name in ("DISABLE_GIT", "DISABLE_CODE", "SILENT", "X_DISABLE_STATS", "X_DISABLE_META"):
        monkeypatch.setenv(f"WANDB_{name}", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(folder / name))


class Service:
    """What the client of wandb 0.31 needs to log a run. `runs`: history rows that have arrived, by run id."""

    def __init__(self) -> None:
        self.runs: dict[str, list[dict[str, Any]]] = {}
        self.alerts: list[str] = []
        self.num_requests: Counter = Counter()
        self.status, self.delay_seconds = 200, 0.0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def cut(self) -> None:
        """Gone: connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()

    def steps(self, run_id: str) -> list[int]:
        return [row["_step"] for row in self.runs.get(run_id, [])]

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/graphql":
            request = json.loads(body)
            return {"data": self._graphql(request["query"], request.get("variables") or {})}
        if path.endswith("/file_stream"):
            run_id = path.split("/")[-2]
            content = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if content:
                rows = self.runs.setdefault(run_id, [])
                rows[content["offset"] :] = [json.loads(line) for line in content["content"]]
        return {}

    def _graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        entity = {"id": "RW50", "name": "tester"}
        if "upsertBucket" in query:
            project = {"id": "UHJv", "name": variables.get("project") or "p", "entity": entity}
            bucket = {"id": "QnVj", "name": variables.get("name"), "displayName": "a run", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": variables.get("name") not in self.runs}}
        if "RunResumeStatus" in query:
            rows = self.runs.get(variables.get("name", ""))
            bucket = None
            if rows is not None:
                bucket = {
                    "id": "QnVj", "name": variables["name"], "displayName": "a run", "summaryMetrics": "{}",
                    "logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0, "config": "{}",
                    "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsTail": "[]",
                    "tags": [], "notes": None, "wandbConfig": '{"t": 1}',
                }  # fmt: skip
            return {"model": {"id": "UHJv", "name": "p", "entity": entity, "bucket": bucket}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "QnVj", "uploadHeaders": [], "files": files}}
        if "notifyScriptableRunAlert" in query:
            self.alerts.append(variables["title"])
            return {"notifyScriptableRunAlert": {"success": True}}
        return {}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _reply(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                service.num_requests[self.path.rpartition("/")[2]] += 1
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                time.sleep(service.delay_seconds)
                data = json.dumps(service.answer(self.path, body) if service.status == 200 else {}).encode()
                self.send_response(service.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = _reply  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


@contextmanager
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A healthy service, which runs that are started here take for Weights & Biases."""
    server = Service()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    try:
        yield server
    finally:
        server.cut()


def stored_records(path: Path) -> list[Any]:
    """The records of a .wandb file that are whole: LevelDB's log format behind 7 bytes of header."""
    content, at, parts, found = path.read_bytes(), 7, [], []
    assert content[:6] == b":W&B\xe1\xbe"
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        piece = content[at + 7 : at + 7 + size]
        if kind == 0 or len(piece) < size or zlib.crc32(bytes([kind]) + piece) != int.from_bytes(
            content[at : at + 4], "little"
        ):
            break
        parts.append(piece)
        at += 7 + size
        if kind in (1, 4):
            record = protocol.Record()
            record.ParseFromString(b"".join(parts))
            found.append(record)
            parts = []
    return found


class StoredRun:
    """What one .wandb file says."""

    def __init__(self, path: Path) -> None:
        self.path, self.history, self.config, self.alerts, self.artifacts = path, [], {}, [], []
        self.metrics: dict[str, Any] = {}
        for record in stored_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
            if kind in ("run", "config"):
                updates = record.run.config.update if kind == "run" else record.config.update
                self.config |= {each.key: json.loads(each.value_json) for each in updates}
            elif kind == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                nested = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                self.history.append(row | nested | {"_step": record.history.step.num})
            elif kind == "alert":
                self.alerts.append((record.alert.title, record.alert.text, record.alert.level))
            elif kind == "metric":
                self.metrics[record.metric.name or record.metric.glob_name] = record.metric
            elif kind == "artifact":
                self.artifacts.append(record.artifact)

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.history]


def stored_runs(folder: Path) -> list[StoredRun]:
    """All files of a run's folder, in the order in which their processes began."""
    paths = (folder / "wandb").glob("*run-*/run-*.wandb")
    return [StoredRun(path) for path in sorted(paths, key=lambda path: path.parent.name.split("run-")[1])]
