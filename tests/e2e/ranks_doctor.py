"""qdora, whose rank 1 receives one wrong element in each larger collective, as from a board with broken copies."""

import os
from typing import Any

from qdora.__main__ import main
from qdora.doctor import ranks


def damaged(collective: Any) -> Any:
    """The collective, whose first argument is what this rank receives."""

    def call(received: Any, *arguments: Any) -> None:
        collective(received, *arguments)
        if os.environ["RANK"] == "1" and received.numel() > 2**16:
            received[12345] += 1

    return call


if __name__ == "__main__":
    ranks.all_gather, ranks.reduce_scatter = damaged(ranks.all_gather), damaged(ranks.reduce_scatter)
    ranks.dist.all_reduce, ranks.dist.broadcast = damaged(ranks.dist.all_reduce), damaged(ranks.dist.broadcast)
    main()
