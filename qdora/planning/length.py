"""How long a run is: the rows of a step and the passes over the data, by the size of the data where they are not given.

A run that leaves them open makes at least 20 updates. A step takes 8 micro-batches a rank, or else 4, 2 or 1, and then
the data is passed over once, or else twice, and so on. Fewer rows a step come first, as they cost nothing: an epoch
computes the same samples in more updates, which is what learns at a fixed learning rate; more passes compute more, and
they stop where the updates suffice, at 20 passes at most. Warm-up is a share of the steps and follows. What is given is
not changed, `train.num_steps` gives the whole length, and a run that goes on keeps what it had.
"""

import math
from dataclasses import replace
from typing import Any

from qdora.config import TrainConfig
from qdora.config.groups import ACCUMULATION_STEPS

FEW_STEPS = 20
"""Updates with which a run begins to learn."""


def steps_of(train: TrainConfig, num_rows: int, num_ranks: int) -> int:
    """Optimiser updates of a run over data of so many rows an epoch, on all ranks.

    Args:
        train: one whose micro-batches a step are given; without epochs it has one.
    """
    if train.num_steps is not None:
        return train.num_steps
    epochs = 1.0 if train.num_epochs is None else train.num_epochs
    return max(1, math.ceil(epochs * _an_epoch(train, num_rows, num_ranks)))


def _an_epoch(train: TrainConfig, num_rows: int, num_ranks: int) -> int:
    batches = train.num_accumulation_steps or ACCUMULATION_STEPS
    return math.ceil(num_rows / (num_ranks * train.micro_batch_size * batches))


def fitted(train: TrainConfig, num_rows: int, num_ranks: int) -> TrainConfig:
    """`train` with what it leaves open of the rows of a step and the passes over the data."""
    made = replace(train, num_accumulation_steps=train.num_accumulation_steps or ACCUMULATION_STEPS)
    if train.num_steps is not None:
        return made
    if train.num_epochs is None:
        made = replace(made, num_epochs=1.0)
    if train.num_accumulation_steps is None:
        batches = ACCUMULATION_STEPS
        while batches > 1 and steps_of(made, num_rows, num_ranks) < FEW_STEPS:
            batches //= 2
            made = replace(made, num_accumulation_steps=batches)
    if train.num_epochs is None:
        made = replace(made, num_epochs=float(math.ceil(FEW_STEPS / _an_epoch(made, num_rows, num_ranks))))
    return made


def resumed(train: TrainConfig, then: dict[str, Any], rows_per_step: int, num_ranks: int) -> TrainConfig:
    """`train` with what it leaves open as the run had it, which goes on.

    Args:
        then: the run's options of training, with the rows of a step that it made of them.
        num_ranks: that it goes on with.
    """
    if train.num_accumulation_steps is None:
        a_rank = train.micro_batch_size * num_ranks
        same = then["micro_batch_size"] == train.micro_batch_size
        batches = then["num_accumulation_steps"] if same else max(1, rows_per_step // a_rank)
        train = replace(train, num_accumulation_steps=batches)
    if train.num_epochs is None and train.num_steps is None and then["num_steps"] is None:
        train = replace(train, num_epochs=then["num_epochs"] or 1.0)
    return train


def describe(given: TrainConfig, made: TrainConfig, num_rows: int, num_ranks: int) -> str | None:
    """The line that says what was chosen; None where all was given."""
    names = [name for name in ("num_accumulation_steps", "num_epochs") if getattr(given, name) != getattr(made, name)]
    if not names or given.num_steps is not None:  # then the size of the data decides nothing
        return None
    chosen = " ".join(f"train.{name}={_number(getattr(made, name))}" for name in names)
    rows = f"{num_rows:,} row{'s' if num_rows > 1 else ''}"
    return f"length: {steps_of(made, num_rows, num_ranks):,} steps; {chosen} by the size of the data, {rows}"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(value)


def few_steps(given: TrainConfig, num_rows: int, num_ranks: int) -> str | None:
    """Says so where a run has too few updates to learn much or sees only a part of its data, with what gives it more.

    Args:
        given: what it leaves open is chosen by the size of the data.
        num_rows: of an epoch, on all ranks.
    """
    made = fitted(given, num_rows, num_ranks)
    now, an_epoch = steps_of(made, num_rows, num_ranks), _an_epoch(made, num_rows, num_ranks)
    epochs = now / an_epoch if made.num_epochs is None else made.num_epochs
    if now >= FEW_STEPS and epochs >= 1:
        return None
    if given.num_steps is not None:
        longer = replace(given, num_steps=max(FEW_STEPS, an_epoch))
    else:
        longer = _longer(replace(given, num_epochs=max(1.0, epochs)), num_rows, num_ranks)
    options = [
        f"train.{name}={_number(value)}"
        for name in ("num_steps", "num_accumulation_steps", "num_epochs")
        if (value := getattr(longer, name)) != getattr(given, name)
    ]
    why = "few to learn from" if epochs >= 1 else "part of the data is not seen"
    return (
        f"{now:,} step{'s' if now > 1 else ''} for {epochs:.3g} pass{'es' if epochs > 1 else ''} over the data: {why}; "
        f"{' '.join(options)} gives {steps_of(fitted(longer, num_rows, num_ranks), num_rows, num_ranks):,}"
    )


def _longer(given: TrainConfig, num_rows: int, num_ranks: int) -> TrainConfig:
    """`given` with fewer rows a step, if it gives them, and then more epochs, until it has enough updates."""
    made = fitted(given, num_rows, num_ranks)
    if steps_of(made, num_rows, num_ranks) < FEW_STEPS and given.num_accumulation_steps is not None:
        made = fitted(replace(given, num_accumulation_steps=None), num_rows, num_ranks)
        given = replace(given, num_accumulation_steps=made.num_accumulation_steps)
    if steps_of(made, num_rows, num_ranks) < FEW_STEPS:
        enough = fitted(replace(made, num_epochs=None), num_rows, num_ranks)
        given = replace(given, num_epochs=enough.num_epochs)
    return given
