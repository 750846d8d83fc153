"""Micro-batches of packed rows, of many shapes."""

import torch

from qdora.data import Batch
from qdora.model.loss import IGNORED

ROWS, LENGTH = 2, 48
"""At most."""


def a_batch(samples: list[list[int]], labelled: float, seed: int) -> Batch:
    """Returns rows of samples of so many tokens, of which a share has labels."""
    generator = torch.Generator().manual_seed(seed)
    length = max(sum(row) for row in samples)
    tokens = torch.randint(4, 200, (len(samples), length), generator=generator)
    labels = torch.full_like(tokens, IGNORED)
    positions = torch.arange(length).repeat(len(samples), 1)
    for place, row in enumerate(samples):
        start = 0
        for number in row:
            positions[place, start : start + number] = torch.arange(number)
            some = torch.rand(number, generator=generator) < labelled
            labels[place, start : start + number][some] = tokens[place, start : start + number][some]
            start += number
        positions[place, start:] = torch.arange(length - start)
    return Batch(tokens, positions, labels, int((labels != IGNORED).sum()), sum(map(sum, samples)))


BATCHES = {
    "full": a_batch([[20, 28], [48]], 1.0, 0),
    "short rows": a_batch([[7, 9], [5]], 0.5, 1),
    "one row": a_batch([[11]], 0.3, 2),
    "many samples": a_batch([[2] * 20, [3] * 16], 0.8, 3),
    "no label": a_batch([[12], [13]], 0.0, 4),
}
