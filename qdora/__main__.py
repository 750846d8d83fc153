"""`qdora COMMAND [overrides]`, the same as `python -m qdora COMMAND [overrides]`."""

import sys

from qdora.commands import run


def main() -> None:
    """Entry point of the `qdora` script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
