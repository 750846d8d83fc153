"""`qdora COMMAND [overrides]`, the same as `python -m qdora COMMAND [overrides]`."""

import os
import sys
from pathlib import Path

from qdora.commands import STATUS_FILE, run


def main() -> None:
    """Entry point of the `qdora` script."""
    status = run(sys.argv[1:])
    if "RANK" in os.environ:
        if STATUS_FILE in os.environ and os.environ.get("LOCAL_RANK") == "0":
            Path(os.environ[STATUS_FILE]).write_text(str(status), encoding="utf-8")
        # torch 2.13: a rank that leaves while threads of its process groups still end can abort with SIGABRT (seen in
        # 3 of 10 exits over gloo), which would hide the status. Everything is closed by now: leave without teardown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
