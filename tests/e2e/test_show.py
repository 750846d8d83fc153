"""`qdora show` as a user starts it: in a terminal, in a pipe, interrupted."""

import json
import os
import pty
import re
import shlex
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.processes import popen, qdora, run, start_command

QDORA = [sys.executable, "-m", "qdora", "show"]


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A model without its weights."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_it_needs_no_weights_and_loads_no_torch(model: Path, data: Path, tmp_path: Path) -> None:
    """Which would be most of the time; from parquet, too, that libraries read which load torch where they find it."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    options = [f"model.path={model}", f"data.train={tmp_path / 'data.parquet'}", f"data.eval={data}", "num=1"]
    done = run([sys.executable, "-X", "importtime", *QDORA[1:], *options], cold=True)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert {"transformers", "pyarrow.parquet", "qdora.show.run"} <= loaded
    assert not [name for name in loaded if name.partition(".")[0] in ("torch", "matplotlib", "bitsandbytes")]
    others = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert others == []
    first = rows[0]
    shown = f"{first['prompt']}\u27e6{first['completion']}</s>\u27e7"
    assert done.stdout.startswith(f"{tmp_path}/data.parquet row 1  sample 1 of {len(rows)}: ")
    assert done.stdout.count(shown) == 2
    assert f"{data}:1  sample 1 of {len(rows)}: " in done.stdout


def test_a_terminal_gets_colours(model: Path, data: Path) -> None:
    ours, theirs = pty.openpty()
    try:
        command = [*QDORA, f"model.path={model}", f"data.train={data}", "num=1"]
        process = popen(command, stdout=theirs, TERM="xterm-256color", NO_COLOR="", FORCE_COLOR="")
        os.close(theirs)
        written = b""
        with suppress(OSError):  # the other end is closed
            while piece := os.read(ours, 65536):
                written += piece
        assert process.wait(60) == 0
    finally:
        os.close(ours)
    first = json.loads(data.read_text().splitlines()[0])
    text = written.decode()
    assert f"\x1b[2m{first['prompt']}\x1b[0m\x1b[32m{first['completion']}\x1b[0m\x1b[1;32m</s>\x1b[0m" in text
    assert "\u27e6" not in text


def test_reader_that_has_read_enough_is_no_error(model: Path, data: Path) -> None:
    command = shlex.join([*QDORA, f"model.path={model}", f"data.train={data}", "num=99", "tokens=true"])
    done = run(["bash", "-c", f"set -o pipefail; {command} | head -n 1"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{data}:1  sample 1 of ")


def test_ctrl_c_ends_it_with_one_line(model: Path, tmp_path: Path) -> None:
    """While it tokenises, of which nothing is left."""
    file, cache = tmp_path / "long.jsonl", tmp_path / "cache"
    file.write_text(json.dumps({"prompt": "a" * 200, "completion": "b"}) + "\n")
    file.write_text(file.read_text() * 200_000)
    process = start_command([*QDORA, f"model.path={model}", f"data.train={file}", f"data.cache_dir={cache}"])
    deadline = time.monotonic() + 120
    while not [*cache.glob("*.partial/tokens.bin")] and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "qdora: interrupted at once; nothing new was saved\n")
    assert [*cache.iterdir()] == []


def test_help_has_its_options_and_example() -> None:
    done = qdora("show", "--help")
    assert done.returncode == 0
    assert "For example: qdora show model.path=models/my-model data.train=my.jsonl" in done.stdout
    for option in ("num=3", "pick=first", "at=null", "find=null", "tokens=false", "packed=false", "figure=null"):
        assert f"\n  {option}\n" in done.stdout
