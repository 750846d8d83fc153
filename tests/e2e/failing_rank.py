"""`python failing_rank.py raise|hang|memory train ...`: qdora, whose last rank goes wrong in step 3.

`python failing_rank.py memory evaluate ...` has no memory to score with.
"""

import os
import resource
import sys
import time
from typing import Any

import psutil
from torch import Tensor

from qdora.__main__ import main
from qdora.evaluation import ranks
from qdora.evaluation import run as evaluation
from qdora.training import trainer

KIND = sys.argv.pop(1)
clip_gradients = trainer.clip_gradients
calls = 0


def limit_memory() -> None:
    """To hardly more than there is now."""
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**27,) * 2)


def score_all(*arguments: Any) -> Any:
    """In place of the one of the same name."""
    if KIND == "memory":
        limit_memory()
    return ranks.score_all(*arguments)


def go_wrong(*arguments: Any) -> Tensor:
    """In place of `clip_gradients`."""
    global calls
    calls += 1
    if calls == 3 and os.environ.get("RANK", "1") == "1":
        if KIND == "hang":
            print("hangs in step 3", flush=True)
            time.sleep(3600)
        if KIND == "memory":
            limit_memory()
            return clip_gradients(*arguments)
        raise ZeroDivisionError("a mistake that nobody foresaw")
    return clip_gradients(*arguments)


if __name__ == "__main__":
    trainer.clip_gradients = go_wrong
    evaluation.score_all = score_all
    main()
