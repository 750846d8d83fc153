"""Ranks of tests: functions that run on several gloo ranks, forked from a process that has imported everything once.

A rank that starts as a new process spends some 4 s of a core on imports before it does anything. Here one process, the
*server*, itself a warm process (`tests.support.warm`), forks the ranks of each function, some 25 ms of a core each.
They join a process group as under torchrun (the same environment variables, a store that outlives them, a prefix a
start) and leave by `os._exit` (docs/design/0004). What lives on between functions is the server with its imports, never
a rank: process groups, patches, dtypes, random numbers and environment of one function are not there in the next, and
memory is measured per process. It forks while it has one thread, which it asserts.

Two differences from ranks under torchrun, which tests/e2e covers: all ranks share one seed of string hashes, so a set
has the same order on each; and variables that libraries read at import have the values of when the server started.
"""

import ctypes
import faulthandler
import gc
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from qdora.rank_files import PR_SET_PDEATHSIG
from tests.support.processes import popen

START_S = 180.0
"""Time for the server to start, on a machine that does other things too."""
GRACE_S = 3.0
"""Time for the other ranks to fail by themselves, once one has; then each writes where it is and is killed."""
DUMP_S = 1.0
"""Time for a rank to write where it is."""
SPARE_S = 30.0
"""Time for the server to answer beyond what its ranks may take, before it is taken for dead."""
SHOWN_OUTPUT = 6000
"""Characters of a rank's output in the message of a failure; the last ones."""
PR_SET_CHILD_SUBREAPER = 36


class RanksError(AssertionError):
    """A function did not return on every rank; the message has each rank's end, traceback and output."""


@dataclass(frozen=True, slots=True)
class Call:
    """A function to run, and where its ranks leave `rank-N.result`, `rank-N.traceback` and `rank-N.output`."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    environments: list[dict[str, str]]
    """The whole environment of each rank."""
    timeout_s: float
    folder: Path


class RankPool:
    """Runs functions on gloo ranks; starts its server at the first call, and again should it have died."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._store: Any = None
        self._starts = count()

    def run(
        self, function: Callable[..., Any], *arguments: Any, nproc: int, timeout_s: float = 180, **options: Any
    ) -> list[Any]:
        """Calls a module-level function on `nproc` ranks that have no process group yet; returns each rank's result.

        Function, arguments, further keyword arguments and results travel pickled. The ranks have this process's
        environment, and the repository as their working directory.

        Raises:
            RanksError: a rank raised, died, or had not returned after `timeout_s`. None of its processes is left.
        """
        name = f"{function.__module__}.{function.__qualname__}"
        with tempfile.TemporaryDirectory(prefix="qdora-pool-") as folder:
            try:
                self._start()
                assert self._connection is not None
                call = Call(function, arguments, options, self._environments(nproc), timeout_s, Path(folder))
                self._connection.send(call)
                statuses = self._receive(timeout_s + GRACE_S + 2 * DUMP_S + SPARE_S)
            except BaseException as error:  # also Ctrl-C and pytest's own time-out: the answer would come to the next
                self.close()
                if isinstance(error, EOFError):
                    raise RanksError(f"{name}: the server of ranks ended; its stderr is that of the test") from None
                raise
            outputs = [_read(call.folder / f"rank-{rank}.output")[-SHOWN_OUTPUT:] for rank in range(nproc)]
            results = [call.folder / f"rank-{rank}.result" for rank in range(nproc)]
            if not all(result.exists() for result in results) or any(status != 0 for status in statuses):
                raise RanksError(_failure(name, call, statuses, outputs))
            print("".join(f"--- rank {rank}\n{output}" for rank, output in enumerate(outputs) if output), end="")
            return [pickle.loads(result.read_bytes()) for result in results]

    def close(self) -> None:
        """Ends the server, and with it any rank. Another `run` starts a new one."""
        if self._server is not None:
            self._server.kill()  # its ranks get SIGKILL from the kernel
            self._server.wait()
        if self._connection is not None:
            self._connection.close()
        self._server = self._connection = self._store = None

    def _start(self) -> None:
        if self._server is not None and self._server.poll() is None:
            return
        self.close()
        self._connection, theirs = Pipe()
        self._server = popen(
            [sys.executable, "-c", "from tests.support import ranks; ranks.serve()"],
            stdin=theirs.fileno(),
            stdout=1,
            stderr=2,
            session=True,  # Ctrl-C is for pytest, which closes the pool
            PYTHONUNBUFFERED="1",
        )
        theirs.close()
        self._receive(START_S)

    def _receive(self, timeout_s: float) -> Any:
        assert self._connection is not None
        if not self._connection.poll(timeout_s):
            raise RanksError(f"the server of ranks did not answer within {timeout_s:.0f} s")
        return self._connection.recv()

    def _environments(self, nproc: int) -> list[dict[str, str]]:
        """What torchrun would set. A store that is here already takes a free port, which no one else can get."""
        if self._store is None:
            from torch.distributed import TCPStore

            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(next(self._starts)),  # makes the prefix of keys in the store
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
        }
        return [{**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)]


def _failure(name: str, call: Call, statuses: list[int | None], outputs: list[str]) -> str:
    """Describes how each rank ended, then their tracebacks, then their outputs."""
    tracebacks = [_read(call.folder / f"rank-{rank}.traceback") for rank in range(len(statuses))]
    one_failed = any(status not in (0, None) for status in statuses)
    late = f"{GRACE_S:g} s after another rank had failed" if one_failed else f"after {call.timeout_s:g} s"
    endings = []
    for rank, status in enumerate(statuses):
        if status is None:
            endings.append(f"had not returned {late} and was killed")
        elif status < 0:
            endings.append(f"was killed by {signal.Signals(-status).name}")
        elif tracebacks[rank]:
            endings.append("raised")
        else:
            returned = status == 0 and (call.folder / f"rank-{rank}.result").exists()
            endings.append("returned" if returned else f"left with exit status {status} before it returned")
    lines = [f"{name} failed on {len(endings) - endings.count('returned')} of {len(endings)} ranks"]
    lines += [f"rank {rank} {ending}" for rank, ending in enumerate(endings)]
    for kind, texts in (("traceback", tracebacks), ("output", outputs)):
        lines += [f"--- {kind} of rank {rank}\n{text.rstrip()}" for rank, text in enumerate(texts) if text]
    return "\n".join(lines)


def _read(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def serve() -> None:
    """Runs the calls that come through the connection at stdin until its other end is closed; what the server does.

    A call's module is imported, for it and all that follow, when the call is read.
    """
    _end_with(os.getppid())
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # what ranks start and leave behind can be found, and ended
    with Connection(os.dup(0)) as connection, Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
        connection.send("ready")
        while True:
            try:
                call = connection.recv()
            except EOFError:
                return
            connection.send(_run_ranks(call, connection))


def _run_ranks(call: Call, connection: "Connection[Any, Any]") -> list[int | None]:
    """Forks the ranks and waits for them; returns their exit statuses, None for a rank that had to be ended."""
    threads = [*Path("/proc/self/task").iterdir()]
    assert len(threads) == 1, f"{len(threads)} threads, of which a fork would copy one with the locks of all"
    gc.collect()
    gc.freeze()  # a collection in a rank does not write to, and so copy, the server's pages
    processes = [_fork(rank, call, connection) for rank in range(len(call.environments))]
    running = {os.pidfd_open(process): process for process in processes}
    statuses = _wait(running, call.timeout_s)
    for number in (signal.SIGABRT, signal.SIGKILL):  # at the first faulthandler writes where a rank is
        for process in running.values():
            os.kill(process, number)
        _wait(running, DUMP_S)
    _end_orphans()
    return [statuses.get(process) for process in processes]


def _wait(running: dict[int, int], timeout_s: float) -> dict[int, int]:
    """Waits for processes by their descriptors, which it removes; returns the exit statuses by process.

    Once one has failed the others have `GRACE_S` left.
    """
    statuses = {}
    deadline = time.monotonic() + timeout_s
    while running:
        ready = select.select([*running], [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            break
        for descriptor in ready:
            process = running.pop(descriptor)
            os.close(descriptor)
            statuses[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            if statuses[process] != 0:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return statuses


def _end_orphans() -> None:
    """Ends what the ranks have started, such as inductor's workers, and reaps it."""
    server = psutil.Process()
    while server.children():
        for process in server.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os.waitpid(-1, 0)


def _fork(rank: int, call: Call, connection: "Connection[Any, Any]") -> int:
    """Returns the id of a process that runs the call as one rank."""
    server = os.getpid()
    process = os.fork()
    if process:
        return process
    status = 1
    try:  # whatever happens, a rank must not go on as its server
        _end_with(server)
        connection.close()
        status = _be_rank(rank, call)
    finally:
        os._exit(status)


def _be_rank(rank: int, call: Call) -> int:
    """Runs the call in this process, leaves its result or traceback, and returns the exit status."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with (call.folder / f"rank-{rank}.output").open("wb", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    faulthandler.enable(2)
    os.environ.clear()
    os.environ.update(call.environments[rank])
    try:
        result = pickle.dumps(call.function(*call.arguments, **call.options))
    except BaseException:
        (call.folder / f"rank-{rank}.traceback").write_text(traceback.format_exc())
        return 1
    (call.folder / f"rank-{rank}.result").write_bytes(result)
    return 0


def _end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(1)
