"""What the launcher makes of the files that ranks leave."""

import faulthandler
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from qdora import rank_files
from qdora.commands import run
from qdora.commands.launch import HANDED_ON, launch
from qdora.errors import EXIT_KEYBOARD, EXIT_PREEMPTED, EXIT_USER_ERROR, ConfigError
from qdora.interrupt import interrupt
from qdora.parallel import failing_together, start_alone
from tests.support.processes import ROOT
from tests.support.processes import run as run_process


def fails_in_a_collective() -> None:
    raise RuntimeError("Connection closed by peer")


def test_place_of_a_rank_that_failed_because_the_other_was_gone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(rank_files.FOLDER, str(tmp_path))
    for rank in (0, 1, 2):
        monkeypatch.setenv("RANK", str(rank))
        stack = rank_files.open_stack()
        assert stack is not None
        with stack:
            if rank == 1:
                faulthandler.dump_traceback(stack)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError) as failed:
        fails_in_a_collective()
    assert rank_files.leave_error(failed.value)
    told = str(rank_files.standstill(tmp_path)).splitlines()
    assert told[0].startswith("  rank 0: fails_in_a_collective (test_rank_files.py:")
    assert told[1].startswith("  rank 1: test_place_of_a_rank_that_failed")
    assert told[2] == "  rank 2: did not answer"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ConfigError("model.path=/nowhere: no such folder"), EXIT_USER_ERROR, "model.path=/nowhere: no such folder"),
        (
            RuntimeError("Connection reset by peer"),
            EXIT_PREEMPTED,
            "the other machines, which meet at head:29400, were lost",
        ),
    ],
)
def test_machine_whose_mistake_ended_the_others_first_tells_the_mistake(
    error: Exception, status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others have told it and are gone before the launcher of this one has looked for errors."""

    def run_torchrun(_: Namespace) -> None:
        monkeypatch.setenv("RANK", "1")
        assert rank_files.leave_error(error)
        raise RendezvousConnectionError("the store is gone")

    for name in (rank_files.FOLDER, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, "300")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(torchrun, "run", run_torchrun)
    options = ["--nnodes", "2", "--rdzv-backend", "static", "--rdzv-endpoint", "head:29400", "--max-restarts", "0"]
    assert launch([*options, "-m", "qdora"]) == status
    told = capsys.readouterr().err
    assert told.startswith(f"qdora: {words}")
    assert told.count("\n") == 1


@pytest.fixture
def launched_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Afterwards signals and variables are as before a launcher ran in this process."""
    for name in (rank_files.FOLDER, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, "300")
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in HANDED_ON)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("launched_here")
def test_mistake_is_not_started_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """torchrun would start the ranks anew; no start mends a mistake."""

    def run_torchrun(_: Namespace) -> None:
        monkeypatch.setenv("RANK", "1")
        assert rank_files.leave_error(ConfigError("model.path=/nowhere: no such folder"))
        time.sleep(60)
        raise AssertionError("nobody ended it")

    monkeypatch.setattr(torchrun, "run", run_torchrun)
    assert launch(["--standalone", "--max-restarts", "2", "-m", "qdora"]) == EXIT_USER_ERROR
    assert capsys.readouterr().err == "qdora: model.path=/nowhere: no such folder\n"


def test_mistake_counts_before_a_traceback_that_was_left_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the collectives of the other ranks fail before the rank that ran out of memory has written why."""
    monkeypatch.setenv(rank_files.FOLDER, str(tmp_path))
    for rank, error in ((1, RuntimeError("Connection closed by peer")), (0, ConfigError("lower data.max_length"))):
        monkeypatch.setenv("RANK", str(rank))
        assert rank_files.leave_error(error)
        time.sleep(0.01)  # the next one is later by the clock
    first = rank_files.first_error(tmp_path)
    assert first is not None
    assert (first.rank, first.status, first.text) == (0, EXIT_USER_ERROR, "lower data.max_length")


@pytest.mark.usefixtures("launched_here")
def test_launcher_under_nohup_outlives_a_terminal_that_closes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a rank that sends SIGHUP to its launcher, which is this process."""
    script = tmp_path / "rank.py"
    script.write_text("import os, signal, time\nos.kill(os.getppid(), signal.SIGHUP)\ntime.sleep(1)\n")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    status = launch(["--standalone", "--nproc-per-node", "1", str(script)])
    assert status == 0, capsys.readouterr().err


def test_error_is_left_while_signals_are_still_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher ends a rank as soon as another has failed, which one that listens outlives."""
    left = []

    @contextmanager
    def listening() -> Iterator[None]:
        try:
            yield
        finally:
            left.append(rank_files.first_error(tmp_path))

    monkeypatch.setenv(rank_files.FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(interrupt, "listening", listening)
    assert run(["train", "model.path=/nowhere", "data.train=/nowhere", f"output_dir={tmp_path}/run"]) == 2
    assert left[0] is not None
    assert left[0].text.startswith("model.path=/nowhere: no such folder")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_each_signal_makes_the_step_under_way_the_last(number: signal.Signals) -> None:
    before = signal.signal(number, lambda *_: None)  # one that is not heard does not end the tests
    try:
        with interrupt.listening():
            interrupt.training = True
            os.kill(os.getpid(), number)
            deadline = time.monotonic() + 60
            while not interrupt.received and time.monotonic() < deadline:
                time.sleep(0.01)
            assert interrupt.received
    finally:
        signal.signal(number, before)


TWICE = """
import os, signal, time
from qdora.interrupt import interrupt

with interrupt.listening():
    interrupt.training = True
    os.kill(os.getpid(), signal.SIGTERM)
    while not interrupt.received:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(("twice_s", "status"), [("600", 0), ("0", EXIT_KEYBOARD)])
def test_signal_that_comes_twice_at_once_counts_once(twice_s: str, status: int) -> None:
    """Slurm tells a rank and its launcher, which hands it on; what comes later than QDORA_TWICE_S ends at once."""
    done = run_process([sys.executable, "-c", TWICE], cold=True, QDORA_TWICE_S=twice_s)
    assert done.returncode == status, done.stderr
    told = done.stderr.splitlines()
    assert told[0] == "qdora: finishing the step and saving; another signal ends at once"
    assert told[1:] == (["qdora: interrupted at once; nothing new was saved"] if status else [])


ENDED_BY_THE_LAUNCHER = """
import os, signal, time
from qdora.interrupt import interrupt

with interrupt.listening():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


@pytest.mark.parametrize("other_failed", [True, False])
def test_rank_that_ends_for_the_error_of_another_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_failed: bool
) -> None:
    """torchrun ends it by a signal, which without that error would be somebody's wish."""
    monkeypatch.setenv(rank_files.FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    if other_failed:
        assert rank_files.leave_error(ConfigError("that run has adapter.rank=4"))
    done = run_process([sys.executable, "-c", ENDED_BY_THE_LAUNCHER], cold=True, RANK="0")
    assert done.returncode == EXIT_PREEMPTED
    told = "qdora: interrupted before training went on; the same command starts again\n"
    assert done.stderr == ("" if other_failed else told)


RANK = """
import os, time
from qdora import __main__ as entry

def command(arguments):
    print(os.getpid(), flush=True)
    time.sleep(600)

entry.run = command
entry.main()
"""
"""qdora's own entry point, with a command that hangs."""


def test_rank_hears_that_its_launcher_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    launcher = f"import subprocess, time; subprocess.Popen({command!r}); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), rank_files.FOLDER: str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        started = psutil.Process(int(process.stdout.readline()))
        process.kill()
    try:
        deadline = time.monotonic() + 30
        while started.is_running() and started.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not started.is_running() or started.status() == psutil.STATUS_ZOMBIE
    finally:
        with suppress(psutil.NoSuchProcess):
            started.kill()


def test_mistake_of_another_rank_is_raised_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(found: list[object], own: object, group: object = None) -> None:
        found[:] = [own, ConfigError("rank 1 saw it")]

    monkeypatch.setattr("qdora.parallel.dist.all_gather_object", gather)
    with pytest.raises(ConfigError, match="rank 1 saw it"), failing_together(replace(start_alone("test"), size=2)):
        pass
