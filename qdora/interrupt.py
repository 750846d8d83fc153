"""What ends a run early: Ctrl-C, SIGTERM, SIGHUP (a terminal that closes) and SIGUSR1 (Slurm's warning).

The step is finished and saved. A second signal ends the run at once, and so does one while the model is loaded, when
nothing can be lost. Commands that keep what they have and need no end of a step stop where they are.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from qdora.errors import EXIT_KEYBOARD, EXIT_PREEMPTED
from qdora.rank_files import leave_status, others_end
from qdora.waits import wait_s

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Interrupt:
    """Whether this process was told to stop, while `listening`.

    Signals come through a pipe to a thread, because the main thread may be inside a collective that never returns.
    """

    training = False
    """Whether a first signal is waited for by the training loop, which looks at `received`."""
    _at: float | None = None

    @property
    def received(self) -> bool:
        """A first signal came: the step under way is the last one, or one more if its gradients were done."""
        return self._at is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the block (in a main thread; nothing elsewhere)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.training, self._at = False, None
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        waked = signal.set_wakeup_fd(writing)
        previous = {number: signal.signal(number, lambda *_: None) for number in heard_signals()}
        watcher = threading.Thread(target=self._watch, args=(reading,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(waked)
            os.close(writing)
            watcher.join()
            os.close(reading)

    def _watch(self, reading: int) -> None:
        while number := os.read(reading, 1):
            if number[0] not in SIGNALS:
                continue
            if not self.training:
                _leave("interrupted before training went on; the same command starts again", EXIT_PREEMPTED)
            if self._at is None:
                self._at = time.monotonic()
                _say("finishing the step and saving; another signal ends at once")
            elif time.monotonic() - self._at > wait_s("QDORA_TWICE_S"):
                _leave("interrupted at once; nothing new was saved", EXIT_KEYBOARD)


def _say(message: str) -> None:
    """Prints it on rank 0, unless the signal only follows from another rank's error, which the launcher prints."""
    if int(os.environ.get("RANK", 0)) == 0 and not others_end():
        print(f"qdora: {message}", file=sys.stderr, flush=True)


def _leave(message: str, status: int) -> None:
    _say(message)
    leave_status(status)
    os._exit(status)


def heard_signals() -> list[signal.Signals]:
    """`SIGNALS`, without SIGHUP under nohup."""
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if not (nohup and number is signal.SIGHUP)]


class Terminated(KeyboardInterrupt):
    """Another of the signals came instead of Ctrl-C."""


@contextmanager
def terminated() -> Iterator[None]:
    """Raises `Terminated` in the block when a signal comes to a process alone; the launcher tells of several."""
    if "RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise Terminated

    previous = {number: signal.signal(number, end) for number in heard_signals() if number is not signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


interrupt = Interrupt()
"""This process's; listening from before the libraries are imported, which takes seconds."""
