"""Two launchers that meet: what tests/launch/test_multinode.py does on two machines, as far as one of them shows it."""

import sys
import time
from pathlib import Path

from tests.support.processes import start_command
from tests.support.runs import assert_same, long_run
from tests.support.slurm import free_ports


def command(endpoint: str, *options: str) -> list[str]:
    """Of one of two "machines" of one rank each; training options follow `-m MODULE train`."""
    machines = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    return [sys.executable, "-m", "qdora.commands.launch", *machines, "--rdzv-id", "a", *options]


def test_ranks_of_two_launchers_train_as_those_of_one(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path
) -> None:
    one = command(f"localhost:{free_ports(1)[0]}", "-m", "qdora", "train", *long_run(tiny, data))
    both = [start_command([*one, f"output_dir={tmp_path}/run"]) for _ in range(2)]
    while all(process.poll() is None for process in both):  # the other of one that has failed waits for long
        time.sleep(0.1)
    for process in sorted(both, key=lambda one: one.poll() is None):
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    assert_same(tmp_path / "run", uninterrupted[2])


def test_launcher_whose_other_does_not_come_says_what_to_look_at(tmp_path: Path) -> None:
    endpoint = f"localhost:{free_ports(1)[0]}"
    process = start_command(command(endpoint, "--rdzv-conf", "join_timeout=2", "-m", "qdora", "train"))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2, output
    assert f"qdora: 2 machines were to meet at {endpoint} and did not: is the same command running on each" in output
    assert "Traceback" not in output
