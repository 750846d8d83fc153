"""`python -m qdora.commands.launch TORCHRUN-OPTIONS -m qdora ...`: torchrun that ends as its ranks did.

torchrun turns any failure into exit status 1 and a report longer than the message of the rank that failed. Here the
first failing rank's status is passed on (2 for a mistake of the user, 75 for interrupted and saved), and one message is
printed: the error that the others followed from, where each rank stood if nothing went on, or the signal that ended a
rank. After Ctrl-C or SIGTERM torchrun does not say how its ranks ended; they leave it in files (`qdora.rank_files`).

Over several machines it settles what torchrun guesses from host names, and guesses wrong where they do not resolve:
which machine hosts the rendezvous, and under which address the others reach this one.
"""

import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

import psutil
from torch.distributed import DistError
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from qdora import rank_files
from qdora.errors import EXIT_ERROR, EXIT_KEYBOARD, EXIT_PREEMPTED, EXIT_USER_ERROR, ConfigError
from qdora.waits import check_waits, wait_s

T = TypeVar("T")

SHUTDOWN_TIMEOUT_S = 300
"""Time that ranks get to finish their step and save after Ctrl-C or SIGTERM; torchrun's own 30 s would cut a save."""
PORT = 29400
"""Of the rendezvous, where none is given; torchrun's."""
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
    for name in set(handed_on) - {"SIGINT"}:  # torchrun listens only once it has started ranks
        signal.signal(getattr(signal, name), _end)
    mistakes: list[str] = []
    options = torchrun.parse_args(["--signals-to-handle", ",".join(handed_on), *arguments])
    try:
        check_waits()
        if options.rdzv_backend == "c10d" and options.rdzv_endpoint and not options.standalone:
            settle_addresses(options)
        with _no_restart_on_mistakes(folder, options.max_restarts, mistakes):
            torchrun.run(options)
    except ConfigError as error:
        print(f"qdora: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except ChildFailedError as error:
        killed = {
            rank: -failure.exitcode
            for rank, failure in error.failures.items()
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM  # with which torchrun ends the others
        }
        told = _tell(folder, killed)
        return int(error.get_first_failure()[1].exitcode) if told is None else told
    except SignalException as error:
        if mistakes:
            print(f"qdora: {mistakes[0]}", file=sys.stderr)
            return EXIT_USER_ERROR
        told = _tell(folder, {})
        if told is None:
            told = rank_files.first_status(folder)
        # Ranks that had not even begun to listen: nothing is lost, and the same command starts again.
        if told is None:
            print("qdora: interrupted; the same command starts again", file=sys.stderr)
            told = EXIT_KEYBOARD if error.sigval == signal.SIGINT else EXIT_PREEMPTED
        return told
    except KeyboardInterrupt:  # before torchrun listens for signals
        return EXIT_KEYBOARD
    except (RendezvousError, DistError):
        return _tell_lost(options, folder)
    return 0


def _end(number: int, _: FrameType | None) -> None:
    raise SignalException("while the machines were waiting for each other", signal.Signals(number))


def _tell_lost(options: Namespace, folder: Path) -> int:
    """Prints that the machines do not find each other, or why no longer; the status that goes with it."""
    error = rank_files.first_error(folder)
    if error is not None and error.status == EXIT_USER_ERROR:  # for which the other machines have ended
        print(f"qdora: {error.text}", file=sys.stderr)
        return EXIT_USER_ERROR
    if any(folder.iterdir()):
        here = "" if error is None else f" (rank {error.rank} here ended with: {error.text.splitlines()[-1]})"
        print(
            f"qdora: the other machines, which meet at {options.rdzv_endpoint}, were lost; the same command on each "
            f"goes on from the last checkpoint{here}",
            file=sys.stderr,
        )
        return EXIT_PREEMPTED
    print(
        f"qdora: {options.nnodes} machines were to meet at {options.rdzv_endpoint} and did not: is the same command "
        "running on each, with the same address, and no firewall between?",
        file=sys.stderr,
    )
    return EXIT_USER_ERROR


@contextmanager
def _no_restart_on_mistakes(folder: Path, max_restarts: int, told: list[str]) -> Iterator[None]:
    """Ends torchrun by a signal where it would start ranks again after a mistake of the user, which goes to `told`."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            last = max((int(attempt.name) for attempt in folder.iterdir()), default=max_restarts)
            error = rank_files.first_error(folder)
            # After its last start torchrun ends by itself.
            if error is not None and error.status == EXIT_USER_ERROR and last < max_restarts:
                told.append(error.text)
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def settle_addresses(options: Namespace) -> None:
    """Puts `is_host` and `local_addr` into torchrun's options, unless they are given, and names gloo's interface.

    Waits for the machine that hosts the rendezvous. Of several launchers on one machine, which meet at its loopback
    address, the first one hosts it: torchrun finds that out.

    Raises:
        ConfigError: its name or port does not answer, or it is an address by which no other machine reaches it.
    """
    host, port = parse_rendezvous_endpoint(options.rdzv_endpoint, default_port=PORT)
    given = dict(pair.split("=", 1) for pair in options.rdzv_conf.split(",") if "=" in pair)
    family, address = _wait(lambda: _resolve(host, port), f"the name {host} to resolve")
    own = _wait(lambda: _own_address(family, address), f"a network by which {address[0]} is reached")
    if ipaddress.ip_address(own).is_loopback and not _means_loopback(host) and _most(options.nnodes) > 1:
        raise ConfigError(
            f"{host} is {address[0]} on this machine, where no other can reach it: give the address that it has on the "
            "network of the machines"
        )
    is_host = given["is_host"].lower() in ("1", "true", "t", "yes") if "is_host" in given else own == address[0]
    if not _means_loopback(host):
        given["is_host"] = str(is_host)
    options.rdzv_conf = ",".join(f"{key}={value}" for key, value in given.items())
    options.local_addr = options.local_addr or own
    if not ipaddress.ip_address(own).is_loopback:
        for name, addresses in psutil.net_if_addrs().items():
            if own in [one.address.partition("%")[0] for one in addresses]:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # else that of the host name, often 127.0.1.1
    if not is_host:
        _wait(lambda: socket.create_connection((host, port), timeout=5).close(), f"{host}:{port} to answer")


def _wait(attempt: Callable[[], T], what: str) -> T:
    """What `attempt` returns once it does not fail, within the wait for the rendezvous."""
    patience_s = wait_s("QDORA_RENDEZVOUS_S")
    deadline, told = time.monotonic() + patience_s, False
    while True:
        try:
            return attempt()
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"waited {patience_s:g} s for {what} ({error}): is the run started there, and no firewall between?"
                ) from None
            if not told:
                print(f"qdora: waiting for {what}", file=sys.stderr, flush=True)
            told = True
        time.sleep(1)


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, (str(address[0]), int(address[1]))


def _own_address(family: socket.AddressFamily, to: tuple[str, int]) -> str:
    """This machine's address on the way to another's; a machine's own addresses are reached by themselves."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(to)  # sends nothing
        return str(probe.getsockname()[0])


def _means_loopback(host: str) -> bool:
    """Whether several "machines" on one are meant."""
    return host == "localhost" or host.startswith("127.") or host == "::1"


def _most(nnodes: str) -> int:
    return int(nnodes.rpartition(":")[2])


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
