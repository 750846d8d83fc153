"""A real Slurm runs launch/slurm.sbatch, takes the job off its machines, and the run ends as if it had not."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.network import steps_of
from tests.support.processes import ROOT
from tests.support.runs import assert_same
from tests.support.slurm import cluster, free_ports

pytestmark = pytest.mark.nightly(
    paths=[
        *("qdora/commands/launch.py", "qdora/interrupt.py", "launch/slurm.sbatch", "launch/environment.sh"),
        *("tests/launch/*", "tests/support/slurm.py"),
    ],
    packages=["slurm-wlm", "munge", "iproute2"],
)
PATIENCE_S = 180


class Job:
    """A batch job on two nodes with one rank each, and its log."""

    def __init__(self, overrides: list[str], log: Path, config: Path) -> None:
        self.log = log
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(config),
            "PYTHON": sys.executable,
            "NPROC": "1",
            "HEAD": f"127.0.0.1:{free_ports(1)[0]}",  # both nodes are this machine
        }
        script = str(ROOT / "launch" / "slurm.sbatch")
        self.number = self.call("sbatch", "--parsable", "--nodes=2", f"--output={log}", script, *overrides).strip()

    def call(self, *command: str) -> str:
        """A command of Slurm's; what it prints."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    @property
    def told(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def field(self, name: str) -> str:
        """One of `scontrol show job`."""
        return str(re.findall(rf"\b{name}=(\S+)", self.call("scontrol", "show", "job", self.number))[0])

    def reach(self, folder: Path, steps: int) -> None:
        """Waits for so many steps of the run in `folder`."""
        deadline = time.monotonic() + PATIENCE_S
        while steps_of(folder) < steps:
            assert time.monotonic() < deadline, self.told[-3000:]
            time.sleep(0.05)

    def start_again(self, restarts: int) -> None:
        """Waits until it is queued for the so-manieth time, and has Slurm not wait the two minutes that it would."""
        deadline = time.monotonic() + PATIENCE_S
        while not (self.field("Restarts") == str(restarts) and self.field("JobState") != "COMPLETING"):
            assert time.monotonic() < deadline, self.told[-3000:]
            time.sleep(0.2)
        time.sleep(2)  # within the second in which a node ended it, that node would refuse it
        with suppress(AssertionError):  # it runs already
            self.call("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def end(self) -> str:
        """Its state when it is over."""
        deadline = time.monotonic() + PATIENCE_S
        while (state := self.field("JobState")) in ("PENDING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, self.told[-3000:]
            time.sleep(0.2)
        return state


@pytest.fixture
def config() -> Iterator[Path]:
    """Of a Slurm that runs."""
    with cluster() as found:
        yield found


def test_job_that_is_warned_and_preempted_ends_as_one_that_was_not(
    config: Path, overrides: list[str], one_machine: Path, tmp_path: Path
) -> None:
    """First the warning of its time, at which it has itself queued again, then a preemption by Slurm."""
    folder = tmp_path / "run"
    job = Job([*overrides, f"output_dir={folder}"], tmp_path / "job.log", config)
    job.reach(folder, 6)
    job.call("scancel", "--batch", "--signal=USR1", job.number)  # as --signal=B:USR1@120 has it
    job.start_again(1)
    assert job.told.count("interrupted and saved; go on with the same command") == 1, job.told
    stopped_at = steps_of(folder)
    job.reach(folder, stopped_at + 6)
    job.call("scontrol", "requeue", job.number)
    job.start_again(2)
    assert job.end() == "COMPLETED", job.told
    assert job.told.count(f"going on from step {stopped_at} of 30") == 1
    assert job.told.count("going on from step") == 2
    assert f"run slurm-{job.number}: finished" in job.told
    assert_same(folder, one_machine)


def test_mistake_ends_the_job_and_is_not_queued_again(config: Path, overrides: list[str], tmp_path: Path) -> None:
    job = Job([*overrides, "adapter.rnak=4"], tmp_path / "job.log", config)
    assert job.end() == "FAILED"
    assert job.field("ExitCode") == "2:0"
    assert job.field("Restarts") == "0"
    assert "there is no option adapter.rnak, did you mean 'adapter.rank'?" in job.told
