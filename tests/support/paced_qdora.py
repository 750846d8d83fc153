"""`python -m tests.support.paced_qdora SECONDS ...`: qdora, which rests so long before each training step.

For tests that do something to a run in some of its steps: also on a busy machine it is not through before.
"""

import sys
import time
from typing import Any

from qdora.__main__ import main
from qdora.training.trainer import Trainer


def rest_before_each_step(seconds: float) -> None:
    """Replaces `Trainer.train_step`."""
    train_step = Trainer.train_step

    def rested(*arguments: Any) -> Any:
        time.sleep(seconds)
        return train_step(*arguments)

    Trainer.train_step = rested  # type: ignore[method-assign]


if __name__ == "__main__":
    rest_before_each_step(float(sys.argv.pop(1)))
    main()
