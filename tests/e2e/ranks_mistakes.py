"""Two ranks for each of many command lines, forked from one process that has imported everything once.

ranks_mistakes.py OUTPUT CASES   (CASES: JSON of name to arguments)

OUTPUT/NAME.json gets each rank's exit status, stdout and stderr; a rank that does not end is killed, status -9.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import qdora.training.run  # noqa: F401  # what takes seconds in each process otherwise
from qdora.__main__ import main

RANKS, TIMEOUT_S = 2, 60.0


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def fork_rank(rank: int, port: int, arguments: list[str], streams: list[Path]) -> int:
    """The id of a process that is `qdora ARGUMENTS` as torchrun would start it."""
    process = os.fork()
    if process:
        return process
    for number, file in zip((1, 2), streams, strict=True):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), number)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv[1:] = arguments
    try:
        main()
    except BaseException:  # a child must not go on as its parent
        import traceback

        traceback.print_exc()
    os._exit(1)


def run_case(name: str, arguments: list[str], output: Path) -> None:
    """Starts the ranks, waits for them, writes what came of them."""
    port = free_port()
    streams = [[output / f"{name}-{rank}.{kind}" for kind in ("stdout", "stderr")] for rank in range(RANKS)]
    left = {fork_rank(rank, port, arguments, streams[rank]): rank for rank in range(RANKS)}
    statuses, deadline = [-1] * RANKS, time.monotonic() + TIMEOUT_S
    while left:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            statuses[left.pop(process)] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline:
            for hanging in left:
                os.kill(hanging, signal.SIGKILL)
        time.sleep(0.02)
    found: list[dict[str, Any]] = [
        {"status": statuses[rank], "stdout": streams[rank][0].read_text(), "stderr": streams[rank][1].read_text()}
        for rank in range(RANKS)
    ]
    (output / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    for case, words in json.loads(sys.argv[2]).items():
        run_case(case, words, Path(sys.argv[1]))
