"""Functions of ranks that do not return as they should, for test_ranks."""

import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

HANG_S = 600


def number() -> int:
    """Returns the rank."""
    return int(os.environ["RANK"])


def end_on_rank_0(how: str) -> int:
    """Does not return on rank 0; returns on the others."""
    if number() == 0:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "segmentation fault":
            ctypes.string_at(0)
        if how.startswith("exit"):
            os._exit(int(how.removeprefix("exit ")))
        time.sleep(HANG_S)
    return number()


def wait_for_rank_1() -> None:
    """Ends rank 1, while the others wait for it, deaf to the signal that asks where they are."""
    if number() == 1:
        os._exit(3)
    signal.signal(signal.SIGABRT, signal.SIG_IGN)
    time.sleep(HANG_S)


def leave_a_process() -> tuple[int, int]:
    """Starts a process that outlives its rank; returns the ids of both."""
    process = subprocess.Popen(["sleep", str(HANG_S)], start_new_session=True)
    return os.getpid(), process.pid


def hang(file: str) -> None:
    """Writes the ids of the server and of this rank to FILE-RANK, and hangs."""
    Path(f"{file}-{number()}").write_text(f"{os.getppid()} {os.getpid()}")
    time.sleep(HANG_S)


def end_server() -> None:
    """Kills the process that has forked this rank."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(HANG_S)
