"""Starts Python processes that have imported torch, transformers, bitsandbytes and qdora already.

A cold `qdora train` of a tiny model takes some six seconds of a core, most of them imports. The server
(`tests.support.warm_process`) imports once; for each process it forks one, which becomes what a new interpreter would
be: its own command line and environment (in /proc, too), working folder, session, standard streams, signals,
`sys.argv`, `sys.path`, `__main__`, exit status. Kills, signals, limits and full disks are real. The server has one
thread, which it asserts, and has computed nothing.

`Popen` starts what it can this way and everything else cold: other programs, interpreter options that only a new
interpreter can take, and environments that differ from the server's in what libraries may read while they are loaded
(all but `READ_LATER`). Its processes are children of the server, which hands on how they ended; they are reaped when
they end, not when they are waited for. A launcher's ranks and the runs of a sweep are forked by the launcher or the
sweep, so that they are its children. These two compute nothing, but torchrun's agent has threads by then, as it has
when it forks ranks by itself (`start_method="fork"`).

What it cannot show: mistakes in imports themselves, and what depends on the seed of `hash`, which warm processes share.
Some tests start cold for that (`cold=True`).
"""

import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from tests.support import ROOT
from tests.support.warm_process import STATUS, Start, can_retitle, needs_new_interpreter


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen` whose process is forked by the server, if that makes no difference."""

    _status: int | None = None
    """Descriptor on which the server tells the status; None where the process is a child of this one."""

    def _execute_child(self, args: Any, *others: Any) -> None:
        start = Start.read(args, others)
        if start is None or start.preexec or not Server.fits(start.environment):
            super()._execute_child(args, *others)  # type: ignore[misc]
            return
        self._status, self.pid = Server.start().fork(start)
        self._child_created = True
        self._close_pipe_fds(*start.to_close)  # type: ignore[attr-defined]

    def _internal_poll(self, *arguments: Any, **options: Any) -> int | None:
        if self._status is None:
            return super()._internal_poll(*arguments, **options)  # type: ignore[misc,no-any-return]
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = os.waitstatus_to_exitcode(self._take_status())
        return self.returncode

    def _try_wait(self, flags: int) -> tuple[int, int]:
        if self._status is None:
            return super()._try_wait(flags)  # type: ignore[misc,no-any-return]
        if not flags & os.WNOHANG or select.select([self._status], [], [], 0)[0]:
            return self.pid, self._take_status()
        return 0, 0

    def _take_status(self) -> int:
        assert self._status is not None
        told = os.read(self._status, STATUS.size)
        if not told:
            raise RuntimeError("the server of warm processes has ended")
        (status,) = STATUS.unpack(told)
        os.close(self._status)
        self._status = os.open(os.devnull, os.O_RDONLY)
        return int(status)

    def __del__(self, *arguments: Any, **options: Any) -> None:
        super().__del__(*arguments, **options)
        if self._status is not None and self.returncode is not None:
            os.close(self._status)
            self._status = None


class PopenOfMerge(Popen):
    """`subprocess.Popen` of a process that merges: what loads its result is forked, others start cold."""

    def _execute_child(self, args: Any, *others: Any) -> None:
        start = Start.read(args, others)
        if start is not None and start.program.reads_a_merge:
            super()._execute_child(args, *others)
        else:
            super(Popen, self)._execute_child(args, *others)  # type: ignore[misc]


class Server:
    """The server of this process, as its client sees it."""

    _only: "Server | None" = None
    environment: dict[str, str] = {}
    """What the server starts with; tests/conftest.py sets it before the first test changes something."""

    def __init__(self, channel: socket.socket, process: "subprocess.Popen[bytes] | None") -> None:
        self._socket, self._process, self._lock = channel, process, threading.Lock()

    @classmethod
    def new(cls) -> "Server":
        """Starts one."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
        command = [sys.executable, "-m", "tests.support.warm_process", str(there.fileno())]
        process = subprocess.Popen(
            command, cwd=ROOT, env=cls.environment, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL
        )
        there.close()
        return cls(here, process)

    @classmethod
    def take(cls, channel: socket.socket, environment: dict[str, str]) -> None:
        """Makes the server at the other end of `channel`, which this process has forked, the one of this process."""
        cls._only, cls.environment = cls(channel, None), environment

    @classmethod
    def fits(cls, environment: Mapping[str, str]) -> bool:
        """Tells whether a process with this environment can be forked: not one that may see a GPU.

        bitsandbytes asks the driver at import, and what the driver began is of no use after a fork.
        """
        without_gpu = cls.environment.get("CUDA_VISIBLE_DEVICES") == ""
        return without_gpu and can_retitle() and not needs_new_interpreter(environment, cls.environment)

    @classmethod
    def start(cls) -> "Server":
        """Returns the server, which is started at the first call; a forked pytest worker gets its own."""
        if cls._only is None or (cls._only._process is not None and cls._only._process.poll() is not None):
            cls._only = cls.new()
        return cls._only

    @classmethod
    def stop(cls) -> None:
        """Ends the server; its processes go on."""
        if cls._only is not None:
            cls._only._socket.close()
            if cls._only._process is not None:
                with suppress(subprocess.TimeoutExpired):
                    cls._only._process.wait(60)
                cls._only._process.kill()
            cls._only = None

    def fork(self, start: Start) -> tuple[int, int]:
        """Forks a process; returns the descriptor that tells its status, and its id."""
        request = {
            "program": asdict(start.program),
            "environment": start.environment,
            "cwd": start.cwd,
            "session": start.session,
        }
        read, write = os.pipe()
        try:
            with self._lock:
                socket.send_fds(self._socket, [json.dumps(request).encode()], [*start.streams, write])
        finally:
            os.close(write)
        told = os.read(read, STATUS.size)
        if not told:
            raise RuntimeError("the server of warm processes has ended: see its traceback in the output")
        return read, int(STATUS.unpack(told)[0])
