"""A hub id gives the rows of the right subset and split: `datasets` itself, against a hub on this machine."""

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import run

CARD = """---
configs:
- config_name: plain
  default: true
  data_files:
  - {split: train, path: plain/train.jsonl}
  - {split: test, path: plain/test.jsonl}
- config_name: other
  data_files:
  - {split: train, path: other/train.jsonl}
---
"""
SPLITS = ("plain/train", "plain/test", "other/train")
READ = """
import json, sys
from qdora.data.sources import fingerprint, load_rows
from qdora.errors import DataError
for source in sys.argv[1:]:
    try:
        found = [fingerprint(source), *((row.where, row.values) for row in load_rows(source))]
    except DataError as error:
        found = [str(error)]
    print("found", json.dumps(found))
"""


class Hub(ThreadingHTTPServer):
    """The part of the Hugging Face hub that `datasets` asks, with one data set, org/name; its rows name their file."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.commit(revision=0)

    def commit(self, revision: int) -> None:
        """Other rows, under another commit."""
        self.revision = f"{revision:040d}"
        rows = {f"{name}.jsonl": json.dumps({"text": f"{name} {revision}"}) + "\n" for name in SPLITS}
        self.files = {"README.md": CARD, **rows}


class Answer(BaseHTTPRequestHandler):
    """One request to the hub."""

    server: Hub

    def do_GET(self) -> None:
        api, _, rest = self.path.partition("?")[0].partition("/org/name")
        if api == "/datasets":  # /resolve/REVISION/FILE
            text = self.server.files.get(rest.split("/", 3)[3])
        elif api == "/api/datasets" and rest.startswith("/tree/"):  # /tree/REVISION/FOLDER
            text = json.dumps(
                [
                    {"type": "file", "path": name, "size": len(text), "oid": hashlib.sha1(text.encode()).hexdigest()}
                    for name, text in self.server.files.items()
                    if name.startswith("/".join(rest.split("/")[3:]))
                ]
            )
        elif api == "/api/datasets":
            text = json.dumps({"id": "org/name", "sha": self.server.revision, "siblings": []})
        else:
            text = None
        content = (text or "").encode()
        self.send_response(404 if text is None else 200)
        if text is None:
            self.send_header("X-Error-Code", "EntryNotFound" if rest else "RepoNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.revision)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub that answers until the end of the test."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def read(hub: Hub, home: Path, *sources: str, offline: bool = False) -> list[Any]:
    """For each source its fingerprint and rows, or what it was refused with, in a process of its own."""
    variables = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home)}
    done = run([sys.executable, "-c", READ, *sources], HF_HUB_OFFLINE=str(int(offline)), **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line.removeprefix("found ")) for line in done.stdout.splitlines() if line.startswith("found ")]


def test_hub_id_names_subset_and_split(hub: Hub, tmp_path: Path) -> None:
    expected = {
        "org/name": "plain/train",
        "org/name#test": "plain/test",
        "org/name:other": "other/train",
        "org/name:other#train": "other/train",
        "org/name:plain#test": "plain/test",
    }
    found = read(hub, tmp_path, *expected)
    rows = [[[f"{source} row 1", {"text": f"{name} 0"}]] for source, name in expected.items()]
    assert [each[1:] for each in found] == rows
    assert len({each[0] for each in found}) == len(SPLITS)
    offline = [source for source in expected if ":" in source]
    assert read(hub, tmp_path, *offline, offline=True) == [found[[*expected].index(source)] for source in offline]


def test_fingerprint_follows_the_hub(hub: Hub, tmp_path: Path) -> None:
    ((before, *_),) = read(hub, tmp_path, "org/name")
    hub.commit(revision=1)
    ((after, (_, values)),) = read(hub, tmp_path, "org/name")
    assert values == {"text": "plain/train 1"}
    assert after != before


def test_unknown_split_and_subset_are_told(hub: Hub, tmp_path: Path) -> None:
    split, subset, name = read(hub, tmp_path, "org/name#dev", "org/name:mine", "org/other")
    assert "org/name#dev is neither a file" in split[0]
    assert "dev" in split[0].partition("it failed:")[2]
    assert "mine" in subset[0].partition("it failed:")[2]
    assert "'org/other' doesn't exist on the Hub" in name[0].partition("it failed:")[2]
