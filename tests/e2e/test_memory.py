"""Recomputation follows from the memory that a container leaves the run, and the run stays within it."""

import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import make_model
from tests.support.processes import ROOT, qdora, run
from tests.support.runs import QUICK, summary_of

GIB = 2**30
GROUPS = {Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes", Path("/sys/fs/cgroup"): "memory.max"}
"""Where memory groups are made (cgroup v1, v2), and the file of the limit."""
TOLD = re.compile(
    r"activations: recomputation (\w+); a step needs GiB none (.*), selective (.*), full (.*) and (.*) are"
)


@pytest.fixture
def limited() -> Iterator[Callable[[int], Path]]:
    """Makes a memory group with a limit in bytes; skips where that is not allowed."""
    made: list[Path] = []

    def make(limit: int) -> Path:
        for root, limit_name in GROUPS.items():
            group = root / f"qdora-test-{uuid.uuid4().hex}"
            try:
                group.mkdir()
            except OSError:
                continue
            made.append(group)
            if (group / limit_name).exists():
                (group / limit_name).write_text(str(limit))
                return group
        pytest.skip("memory groups cannot be made here")

    yield make
    for group in made:
        for _ in range(100):  # busy until the kernel has seen off its last process
            with suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.05)
        assert not group.exists()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A step of 64 rows of 256 tokens on 12 narrow blocks: its activations outweigh everything else."""
    folder = tmp_path_factory.mktemp("memory")
    model = make_model(folder / "model", "llama", num_hidden_layers=12)
    rows = [{"text": "ab" * 150} for _ in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *(f"model.path={model}", f"data.train={folder}/rows.jsonl", f"data.cache_dir={folder}/cache"),
        *("adapter.rank=4", "train.num_steps=1", "train.micro_batch_size=64", "train.num_accumulation_steps=1"),
        *("data.max_length=256", "data.overlong=truncate", "tracker=none", *QUICK),
    ]


def told_of(done: Any, output: Path) -> tuple[str, dict[str, float], Any]:
    """The kind that a run chose, the GiB it told of, and its summary."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = TOLD.search(done.stdout)
    assert found, done.stdout
    sizes = dict(zip(("none", "selective", "full", "free"), map(float, found.groups()[1:]), strict=True))
    return found.group(1), sizes, summary_of(output)


@pytest.mark.nightly(paths=["qdora/training/memory.py", "qdora/device_memory.py", "qdora/model/activations.py"])
def test_recomputation_is_what_the_container_has_room_for(
    arguments: list[str], tmp_path: Path, limited: Callable[[int], Path]
) -> None:
    """Each run stays within its limit (else the kernel would end it) and needs about what it told of.

    Without the holes that glibc leaves in its heap, of another size in each run.
    """
    losses, peaks = [], {}
    for limit, kind in ((None, "none"), (1.4, "selective"), (0.85, "full")):
        enter = f"echo $$ > {limited(int(limit * GIB))}/cgroup.procs; " if limit else ""
        command = f'{enter}exec "$0" -m qdora train "$@"'
        started = ["bash", "-c", command, sys.executable, *arguments, f"output_dir={tmp_path}/{kind}"]
        done = run(started, MALLOC_MMAP_THRESHOLD_="65536")
        chosen, sizes, summary = told_of(done, tmp_path / kind)
        assert chosen == kind, sizes
        assert limit is None or 0.3 * limit < sizes["free"] < limit
        losses.append(summary["last_loss"])
        peaks[kind] = summary["peak_memory_gib"][0]
    assert losses == [losses[0]] * 3, "recomputation changes no number"
    for kind in ("none", "selective"):
        more = sizes[kind] - sizes["full"]
        assert 0.9 * more < peaks[kind] - peaks["full"] < more, (peaks, sizes)


@pytest.mark.nightly(paths=["qdora/training/memory.py", "qdora/device_memory.py", "qdora/model/activations.py"])
def test_rank_with_the_least_memory_decides(
    arguments: list[str], tmp_path: Path, limited: Callable[[int], Path]
) -> None:
    group = limited(int(1.7 * GIB))
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        f"    open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    arguments = [*arguments, "train.micro_batch_size=32", f"output_dir={tmp_path}/run"]
    done = qdora("train", *arguments, nproc=2, PYTHONPATH=path)
    chosen, sizes, _ = told_of(done, tmp_path / "run")
    assert chosen == "selective"
    assert sizes["free"] < 0.8, "of rank 1; the group is for one of two ranks of this machine"
