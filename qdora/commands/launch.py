"""`python -m qdora.commands.launch TORCHRUN-OPTIONS -m qdora ...`: torchrun that ends as its ranks did.

torchrun turns any failure into exit status 1 and a report longer than the message of the rank that failed. Here the
first failing rank's status is passed on (2 for a mistake of the user, 75 for interrupted and saved), and one message is
printed: the error that the others followed from, where each rank stood if nothing went on, or the signal that ended a
rank. After Ctrl-C or SIGTERM torchrun does not say how its ranks ended; they leave it in files (`qdora.rank_files`).
"""

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from qdora import rank_files
from qdora.errors import EXIT_ERROR, EXIT_KEYBOARD, EXIT_PREEMPTED, EXIT_USER_ERROR

SHUTDOWN_TIMEOUT_S = 300
"""Time that ranks get to finish their step and save after Ctrl-C or SIGTERM; torchrun's own 30 s would cut a save."""


HANDED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
"""Signals that torchrun hands on to its ranks: its own and SIGUSR1, with which Slurm warns of the end."""


def launch(arguments: list[str]) -> int:
    """Runs torchrun with `arguments` in this process and returns the exit status of the ranks."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_S))
    if "LOGLEVEL" not in os.environ:  # torchrun has read it when it was imported: its loggers are set one by one
        for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="qdora-ranks-") as folder:
        os.environ[rank_files.FOLDER] = folder
        return _launch(arguments, Path(folder))


def _launch(arguments: list[str], folder: Path) -> int:
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    handed_on = [name for name in HANDED_ON if not (nohup and name == "SIGHUP")]
    try:
        torchrun.run(torchrun.parse_args(["--signals-to-handle", ",".join(handed_on), *arguments]))
    except ChildFailedError as error:
        killed = {
            rank: -failure.exitcode
            for rank, failure in error.failures.items()
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM  # with which torchrun ends the others
        }
        told = _tell(folder, killed)
        return int(error.get_first_failure()[1].exitcode) if told is None else told
    except SignalException as error:
        told = _tell(folder, {})
        if told is None:
            told = rank_files.first_status(folder)
        # Ranks that had not even begun to listen: nothing is lost, and the same command starts again.
        unheard = EXIT_KEYBOARD if error.sigval == signal.SIGINT else EXIT_PREEMPTED
        return unheard if told is None else told
    except KeyboardInterrupt:  # before torchrun listens for signals
        return EXIT_KEYBOARD
    return 0


def _tell(folder: Path, killed: dict[int, int]) -> int | None:
    """Prints the one message that counts, if there is one; the status that goes with it. `killed`: rank to signal."""
    error, places = rank_files.first_error(folder), rank_files.standstill(folder)
    if error is not None and error.status == EXIT_USER_ERROR:
        message = error.text
    elif places is not None:
        message = f"nothing went on for parallel.timeout_s. Where each rank was:\n{places}"
    elif killed:  # the others failed because it was gone
        rank, number = min(killed.items())
        name = signal.Signals(number).name
        hint = " (out of host memory?)" if name == "SIGKILL" else ""
        then = "what was trained goes on from its last checkpoint with the same command"
        print(f"qdora: rank {rank} was ended by {name}{hint}; {then}", file=sys.stderr)
        return 128 + number
    elif error is not None:
        message = f"rank {error.rank} failed, which is a mistake in qdora:\n{error.text}"
    else:
        return None
    print(f"qdora: {message}", file=sys.stderr)
    return EXIT_ERROR if error is None else error.status


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
