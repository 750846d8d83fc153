"""`python -m qdora.commands.launch TORCHRUN-OPTIONS -m qdora ...`: torchrun that ends as its ranks did.

torchrun turns any failure into exit status 1 and a report longer than the message of the rank that failed. Here the
first failing rank's status is passed on (2 for a mistake of the user, 75 for interrupted and saved), and its report is
printed only where the rank could not say anything itself: killed by a signal. After Ctrl-C or SIGTERM torchrun does not
say how its ranks ended, so the first rank of this machine leaves its status in a file.
"""

import logging
import os
import signal
import sys
import tempfile
from typing import IO

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from qdora.commands import EXIT_KEYBOARD, STATUS_FILE

SHUTDOWN_TIMEOUT_S = 300
"""Time that ranks get to finish their step and save after Ctrl-C or SIGTERM; torchrun's own 30 s would cut a save."""


def launch(arguments: list[str]) -> int:
    """Runs torchrun with `arguments` in this process and returns the exit status of the ranks."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_S))
    if "LOGLEVEL" not in os.environ:  # torchrun has read it when it was imported: its loggers are set one by one
        for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.NamedTemporaryFile("r", prefix="qdora-status-") as status:
        os.environ[STATUS_FILE] = status.name
        return _launch(arguments, status)


def _launch(arguments: list[str], status: IO[str]) -> int:
    try:
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            hint = " (out of host memory?)" if name == "SIGKILL" else ""
            print(f"qdora: rank {rank} was ended by {name}{hint}", file=sys.stderr)
            return 128 - failure.exitcode
        return int(failure.exitcode)
    except SignalException as error:
        left = status.read()
        return int(left) if left else 128 + error.sigval
    except KeyboardInterrupt:  # before torchrun listens for signals
        return EXIT_KEYBOARD
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
