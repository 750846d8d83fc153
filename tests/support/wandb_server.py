"""As much of W&B's server as its real client needs for a run with an artifact, and what may go wrong there."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

KEY = "a" * 40


class WandbServer:
    """Keeps what it was sent. Set `behaviour` at any time; `refusing` closes the port for a while."""

    def __init__(self) -> None:
        self.behaviour = "normal"
        """`normal`, `slow` (answers after `slow_s`), `failing` (status 500), or `gone` (hangs up)."""
        self.slow_s = 30.0
        self.history: dict[int, str] = {}
        """Lines by their offset."""
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.preempting = False
        self.run_names: list[str] = []
        """Of each run that was started or resumed."""
        self.uploads: dict[str, bytes] = {}
        self.artifacts: list[str] = []
        """Names of those that were committed."""
        self.operations: list[str] = []
        self._artifact_names: dict[str, str] = {}
        self._released = Event()
        self._http: _Http | None = None
        self.port = 0
        self.listen()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def steps(self) -> list[int]:
        """Of the history, in the order of the lines."""
        return [json.loads(self.history[offset])["_step"] for offset in sorted(self.history)]

    def listen(self) -> None:
        """Opens the port, the same one again after `refuse`."""
        self._http = _Http(("127.0.0.1", self.port), _Handler)
        self._http.state = self
        self.port = self._http.server_port
        Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def refuse(self) -> None:
        """Closes the port."""
        assert self._http is not None
        self._http.shutdown()
        self._http.server_close()

    def close(self) -> None:
        """Lets slow answers go and stops."""
        self._released.set()
        self.refuse()

    def wait(self) -> None:
        """For as long as an answer takes now."""
        if self.behaviour == "slow":
            self._released.wait(self.slow_s)

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = found[1] if found else ""
        self.operations.append(operation)
        answer = getattr(self, f"_answer_{operation}", None)
        return answer(variables) if answer else {}

    def _run(self, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": "qdora", "entity": {"id": "e", "name": "someone"}}
        return {"id": "r", "name": variables.get("name"), "displayName": "d", "project": project}

    def _answer_Viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "v", "entity": "someone", "username": "someone", "email": None, "flags": "{}", "admin": False}
        return {"viewer": viewer | {"teams": {"edges": []}, "apiKeys": {"edges": []}}}

    def _answer_ArtifactType(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}  # there is none of that name yet

    def _answer_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        lines = [self.history[offset] for offset in sorted(self.history)]
        run = self._run(variables)
        counts = {"historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps(lines[-1:]), "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}"}
        bucket = {**run, **counts, **tails, "tags": [], "wandbConfig": '{"t": 1}'} if lines else None
        return {"model": {**run["project"], "bucket": bucket}}

    def _answer_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        if variables.get("config"):
            self.config |= json.loads(variables["config"])
        self.run_names.append(variables["name"])
        return {"upsertBucket": {"bucket": self._run(variables), "inserted": not self.history}}

    def _answer_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def _answer_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        values = variables.get("input", variables)
        (names,) = [values["artifactCollectionName"]]
        self._artifact_names["a"] = names
        sequence = {"id": "s", "name": names, "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": "a", "state": "PENDING", "artifactSequence": sequence}}}

    def _answer_CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        file = {
            "id": "f",
            "name": "wandb_manifest.json",
            "displayName": "m",
            "uploadUrl": f"{self.url}/storage/manifest",
        }
        manifest = {"id": "m", "file": file | {"uploadHeaders": []}}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    _answer_UpdateArtifactManifest = _answer_CreateArtifactManifest

    def _answer_CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        given = variables.get("input", variables)
        files = given.get("artifactFiles") or given.get("storageLayout") or []
        edges = [
            {
                "node": {
                    "id": f"f{index}",
                    "name": file["name"],
                    "displayName": file["name"],
                    "uploadUrl": f"{self.url}/storage/artifact/{file['name']}",
                    "uploadHeaders": [],
                    "storagePath": f"artifact/{file['name']}",
                    "uploadMultipartUrls": None,
                    "artifact": {"id": "a"},
                }
            }
            for index, file in enumerate(files)
        ]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _answer_CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(self._artifact_names["a"])
        return {"commitArtifact": {"artifact": {"id": "a", "digest": "d"}}}

    def stream(self, request: dict[str, Any]) -> None:
        """What the file stream of a run sends."""
        files = request.get("files", {})
        history = files.get("wandb-history.jsonl", {})
        for index, line in enumerate(history.get("content", []), history.get("offset", 0)):
            self.history[index] = line
        for line in files.get("wandb-summary.json", {}).get("content", []):
            self.summary |= json.loads(line)
        self.preempting = self.preempting or bool(request.get("preempting"))
        if request.get("complete"):
            self.exit_code = request.get("exitcode")


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    state: WandbServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def _handle(self) -> None:
        state = self.server.state
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if state.behaviour == "gone":
            self.close_connection = True
            return
        state.wait()
        answer: dict[str, Any] = {}
        failing = state.behaviour == "failing"
        if failing:
            pass
        elif self.path.endswith("/graphql"):
            request = json.loads(body)
            answer = {"data": state.graphql(request["query"], request.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            state.stream(json.loads(body))
        elif self.command == "PUT":
            state.uploads[self.path.removeprefix("/storage/")] = body
        told = json.dumps(answer).encode()
        try:
            self.send_response(500 if failing else 200)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)
        except OSError:  # the client has given up
            self.close_connection = True

    do_GET = do_POST = do_PUT = _handle

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[WandbServer]:
    """A server that is closed at the end."""
    server = WandbServer()
    try:
        yield server
    finally:
        server.close()
