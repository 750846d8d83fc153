"""The pool of ranks itself: what it returns, what it says of ranks that fail, and what it leaves."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from qdora import parallel
from qdora.config import ParallelConfig
from tests.distributed import misbehaviour
from tests.distributed.misbehaviour import HANG_S, number
from tests.support import ROOT, ranks
from tests.support.ranks import RankPool, RanksError

TIMEOUT_S = 5
"""Longer than a function that does nothing takes on a busy machine."""


@pytest.fixture(scope="module")
def own() -> Iterator[RankPool]:
    """A pool that these tests may end, beside the one that others use."""
    pool = RankPool()
    yield pool
    pool.close()


def gathered(offset: int) -> list[int]:
    """Returns what the ranks have sent to this one."""
    world = parallel.start(ParallelConfig())
    return parallel.gather(world, world.rank + offset)


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_results_come_in_rank_order_and_ranks_meet(pool: RankPool, nproc: int) -> None:
    assert pool.run(number, nproc=nproc) == [*range(nproc)]
    assert pool.run(gathered, 5, nproc=nproc) == [[*range(5, 5 + nproc)]] * nproc


def raise_on_rank_1() -> None:
    """Fails on one rank, while the other waits for it in a collective."""
    world = parallel.start(ParallelConfig())
    print(f"rank {world.rank} begins")
    if world.rank == 1:
        raise ValueError("a mistake of one rank")
    parallel.wait(world)


def test_rank_that_raises_is_named_with_its_traceback_and_output(pool: RankPool) -> None:
    with pytest.raises(RanksError) as failure:
        pool.run(raise_on_rank_1, nproc=2)
    message = str(failure.value)
    assert "raise_on_rank_1 failed on 2 of 2 ranks\n" in message
    assert "rank 1 raised\n" in message
    traceback = message.partition("--- traceback of rank 1\n")[2].partition("\n---")[0]
    assert "in raise_on_rank_1" in traceback
    assert traceback.endswith("ValueError: a mistake of one rank")
    for rank in range(2):
        assert f"--- output of rank {rank}\nrank {rank} begins" in message


@pytest.mark.parametrize(
    ("how", "ended"),
    [
        pytest.param("killed", "was killed by SIGKILL", id="killed"),
        pytest.param("segmentation fault", "was killed by SIGSEGV", id="segmentation fault"),
        pytest.param("exit 7", "left with exit status 7 before it returned", id="exit 7"),
        pytest.param("exit 0", "left with exit status 0 before it returned", id="exit 0"),
        pytest.param("hang", f"had not returned after {TIMEOUT_S} s and was killed", id="hang"),
    ],
)
def test_rank_that_does_not_return_is_named_and_the_next_function_works(own: RankPool, how: str, ended: str) -> None:
    assert own.run(number, nproc=2) == [0, 1]
    started = time.monotonic()
    with pytest.raises(RanksError) as failure:
        own.run(misbehaviour.end_on_rank_0, how, nproc=2, timeout_s=TIMEOUT_S)
    message = str(failure.value)
    assert "end_on_rank_0 failed on 1 of 2 ranks\n" in message
    assert f"rank 0 {ended}\n" in message
    assert "rank 1 returned" in message
    if how in ("segmentation fault", "hang"):
        assert "in end_on_rank_0" in message.partition("--- output of rank 0\n")[2], "where it was"
    assert time.monotonic() - started < HANG_S / 10
    assert own.run(number, nproc=2) == [0, 1]


def test_ranks_that_wait_for_a_dead_one_are_ended_soon(own: RankPool) -> None:
    with pytest.raises(RanksError) as failure:
        own.run(misbehaviour.wait_for_rank_1, nproc=3, timeout_s=HANG_S)
    message = str(failure.value)
    assert "rank 1 left with exit status 3 before it returned\n" in message
    for rank in (0, 2):
        assert f"rank {rank} had not returned {ranks.GRACE_S:g} s after another rank had failed" in message


def change_everything() -> None:
    """Leaves changes of every kind behind."""
    parallel.start(ParallelConfig())
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.manual_seed(1)
    random.seed(1)
    parallel.stop = None  # type: ignore[assignment]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["QDORA_LEFT"] = "1"
    os.chdir("/")


def state() -> dict[str, object]:
    """Returns what `change_everything` changes."""
    return {
        "group": dist.is_initialized(),
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "seed": torch.initial_seed(),
        "patch": parallel.stop is None,
        "handler": signal.getsignal(signal.SIGTERM) is signal.SIG_IGN,
        "variable": os.environ.get("QDORA_LEFT"),
        "folder": str(Path.cwd()),
        "threads": len([*Path("/proc/self/task").iterdir()]),
    }


def changed_state() -> dict[str, object]:
    """Returns the state after the changes."""
    change_everything()
    return state()


def test_nothing_that_a_function_changes_is_there_in_the_next(pool: RankPool) -> None:
    before = pool.run(state, nproc=2)
    for changed in pool.run(changed_state, nproc=2):
        assert [key for key, value in changed.items() if value == before[0][key]] == []
    assert pool.run(state, nproc=2) == before
    assert before[0]["folder"] == str(ROOT)
    assert before[0]["threads"] == 1


def test_ranks_have_the_environment_of_the_test(own: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("first", "second"):
        monkeypatch.setenv("QDORA_OF_THE_TEST", value)
        assert own.run(os.getenv, "QDORA_OF_THE_TEST", nproc=2) == [value, value]


def test_function_leaves_no_process(own: RankPool) -> None:
    for of_rank in own.run(misbehaviour.leave_a_process, nproc=2):
        assert not any(map(psutil.pid_exists, of_rank))


def _until(is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 180
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_so()


PYTEST = """
import sys
from tests.distributed import misbehaviour
from tests.support.ranks import RankPool
RankPool().run(misbehaviour.hang, sys.argv[1], nproc=2)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_no_process_is_left_by_a_pytest_that_is_ended(number: signal.Signals, tmp_path: Path) -> None:
    files = [tmp_path / f"processes-{rank}" for rank in range(2)]
    command = [sys.executable, "-c", PYTEST, str(tmp_path / "processes")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # where SIGKILL leaves files
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=environment) as process:
        assert _until(lambda: all(file.exists() and file.read_text() for file in files))
        process.send_signal(number)
    left = {int(word) for file in files for word in file.read_text().split()}
    assert len(left) == 3, "two ranks, and their server"
    assert _until(lambda: not any(map(psutil.pid_exists, left)))


def test_no_process_is_left_after_close_and_the_next_function_works(own: RankPool) -> None:
    (server,) = set(own.run(os.getppid, nproc=2))
    assert psutil.pid_exists(server)
    own.close()
    assert not psutil.pid_exists(server)
    assert own.run(number, nproc=1) == [0]


def test_server_that_dies_is_told_and_another_starts(own: RankPool) -> None:
    with pytest.raises(RanksError, match="the server of ranks ended"):
        own.run(misbehaviour.end_server, nproc=2)
    assert own.run(number, nproc=2) == [0, 1]
