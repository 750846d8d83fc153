"""`qdora COMMAND [overrides]`, the same as `python -m qdora COMMAND [overrides]`."""

import os
import sys

from qdora.commands import run


def main() -> None:
    """Entry point of the `qdora` script."""
    status = run(sys.argv[1:])
    if "RANK" in os.environ:
        # torch 2.13: a rank that leaves while threads of its process groups still end can abort with SIGABRT (seen in
        # 3 of 10 exits over gloo), which would hide the status. Everything is closed by now: leave without teardown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
