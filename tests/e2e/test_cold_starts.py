"""A new interpreter trains what a warm process trains, however it is started.

Other cold starts: accelerate and train.sh (test_run.py), multinode.sh and Slurm (tests/launch), quickstart (.ci/run).
"""

import sys
from pathlib import Path

import pytest

from tests.support.processes import launcher, run
from tests.support.runs import assert_same, long_run

SCRIPTS = Path(sys.executable).parent
TORCHRUN = [str(SCRIPTS / "torchrun"), "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    ("command", "nproc"),
    [([str(SCRIPTS / "qdora")], 1), ([*launcher(2), "-m", "qdora"], 2), ([*TORCHRUN, "-m", "qdora"], 2)],
    ids=["qdora", "launcher", "torchrun"],
)
def test_cold_start_trains_what_a_warm_one_does(
    command: list[str], nproc: int, uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path
) -> None:
    done = run([*command, "train", *long_run(tiny, data), f"output_dir={tmp_path}/run"], cold=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path / "run", uninterrupted[nproc])
