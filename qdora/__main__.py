"""`qdora COMMAND [overrides]`, the same as `python -m qdora COMMAND [overrides]`."""

import gc
import os
import sys

from qdora.commands import run
from qdora.errors import EXIT_ERROR
from qdora.rank_files import end_with_launcher, leave_error, leave_status


def main() -> None:
    """Entry point of the `qdora` script."""
    # Before torch is loaded: threads that spin for each other's work cost many times that work where cores are shared.
    # Those that wait a tenth of a millisecond make a step a tenth shorter than those that sleep at once.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    end_with_launcher()
    gc.disable()  # until the command is loaded: see `qdora.commands.load`
    try:
        status = run(sys.argv[1:])
    except Exception as error:
        if not leave_error(error):
            raise
        status = EXIT_ERROR
    leave_status(status)
    # Everything is closed by now: leave without teardown. torch 2.13: a rank that leaves while threads of its process
    # groups still end can abort with SIGABRT (seen in 3 of 10 exits over gloo), which would hide the status. And W&B
    # would wait for a process of its own that hangs.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
