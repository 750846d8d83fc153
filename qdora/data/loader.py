"""Which rank sees which samples when: shuffling, packing, dealing, and where an epoch stands.

The order of an epoch is a function of the seed and the epoch alone. Every optimiser step takes the next
micro_batch_size * num_accumulation_steps * ranks rows of it and deals them to the ranks in turn, so the rows of a step
do not depend on how they are divided, and a position in rows is all that resuming needs, on any number of ranks.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qdora.data.dataset import IGNORED, TokenDataset
from qdora.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one rank; (rows, length) int64 each.

    `labels` are shifted already: the target of each position, `IGNORED` where there is none. `position_ids` restart
    where a sample begins inside a row: there transformers lets nothing look back. Padding comes last in a row and has
    no label; it is known by its place, because the pad token may be the end-of-turn token, which is learned.
    """

    input_ids: "Tensor"
    position_ids: "Tensor"
    labels: "Tensor"
    num_label_tokens: int
    num_tokens: int
    """Without padding."""
    samples: tuple[int, ...] = ()
    """Indices in the data set of the samples in it, row after row."""


def pack(lengths: np.ndarray, order: np.ndarray, max_length: int) -> list[list[int]]:
    """Rows of samples, `max_length` tokens at most: best fit, the longest samples first, ties in `order`.

    A sample goes into the row that it fills best; O(n log max_length) and within a few percent of the fewest rows.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}
    """Space left to the rows that have it."""
    spaces: list[int] = []
    """The keys of `open_rows`, sorted."""
    for index in order[np.argsort(-lengths[order], kind="stable")]:
        length = int(lengths[index])
        place = bisect_left(spaces, length)
        if place < len(spaces):
            space = spaces[place]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[place]
            rows[row].append(int(index))
        else:
            space, row = max_length, len(rows)
            rows.append([int(index)])
        left = space - length
        if left:
            if left not in open_rows:
                open_rows[left] = []
                insort(spaces, left)
            open_rows[left].append(row)
    return rows


def num_rows(lengths: np.ndarray, packing: bool, max_length: int) -> int:
    """Rows of an epoch, on all ranks."""
    return len(pack(lengths, np.arange(len(lengths)), max_length)) if packing else len(lengths)


class BatchLoader:
    """Micro-batches of one rank, epoch after epoch; every sample once an epoch over all ranks.

    Args:
        max_length: tokens a row with `packing`; otherwise a row is a sample, padded to the longest of its micro-batch.
        shuffle: a new order each epoch; else the data's own.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        micro_batch_size: int,
        num_accumulation_steps: int,
        max_length: int,
        packing: bool,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool = True,
        pad_token_id: int = 0,
    ) -> None:
        if not len(dataset):
            raise DataError("the data set has no sample")
        self.dataset = dataset
        self.micro_batch_size, self.num_accumulation_steps = micro_batch_size, num_accumulation_steps
        self.max_length, self.packing = max_length, packing
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle, self.pad_token_id = seed, shuffle, pad_token_id
        self._lengths = dataset.lengths
        self._epoch, self._position = 0, 0
        self._rows, self._rows_epoch = self._order(0), 0

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, over all ranks; the same in each."""
        return len(self._rows)

    @property
    def rows(self) -> list[list[int]]:
        """The samples of each row of the epoch that stands, the first one at first, in the order of training."""
        return self._rows

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimiser step, over all ranks; `num_accumulation_steps` may be set before the first one."""
        return self.micro_batch_size * self.num_accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch; the last may be short."""
        return -(-self.num_rows // self.rows_per_step)

    @property
    def packing_efficiency(self) -> float:
        """Share of a row's `max_length` that holds tokens."""
        return float(self._lengths.sum() / (self.num_rows * self.max_length))

    def __iter__(self) -> Iterator[list[Batch]]:
        """Steps without end, from where the state stands; each the micro-batches of this rank."""
        while True:
            yield from self.epoch()

    def epoch(self) -> Iterator[list[Batch]]:
        """The steps that are left of the current epoch."""
        if self._rows_epoch != self._epoch:
            self._rows, self._rows_epoch = self._order(self._epoch), self._epoch
        rows = self._rows
        while self._position < len(rows):
            some = rows[self._position : self._position + self.rows_per_step]
            self._position += len(some)
            yield self._step(some)
        self._epoch, self._position = self._epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where the next step begins: the epoch, and the rows of it that all ranks have seen together."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where `state_dict` was taken, on any number of ranks."""
        self._epoch, self._position = state["epoch"], state["position"]

    def _order(self, epoch: int) -> list[list[int]]:
        order = np.arange(len(self._lengths))
        generator = np.random.default_rng((self.seed, epoch))
        if self.shuffle:
            generator.shuffle(order)
        if not self.packing:
            return [[int(index)] for index in order]
        rows = pack(self._lengths, order, self.max_length)
        if self.shuffle:  # else the rows would come longest sample first
            rows = [rows[index] for index in generator.permutation(len(rows))]
        return rows

    def _step(self, rows: list[list[int]]) -> list[Batch]:
        """This rank's share; in a short last step a rank may get micro-batches without labels, for equal numbers."""
        share = -(-len(rows) // self.world_size)
        num_batches = -(-share // self.micro_batch_size)
        own = rows[self.rank :: self.world_size]
        starts = range(0, num_batches * self.micro_batch_size, self.micro_batch_size)
        return [self._collate(own[start : start + self.micro_batch_size]) for start in starts]

    def _collate(self, rows: list[list[int]]) -> Batch:
        import torch

        samples = [[self.dataset[index] for index in row] for row in rows]
        lengths = [sum(len(ids) for ids, _ in row) for row in samples]
        shape = (max(len(rows), 1), max([2, *lengths]))
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORED)
        position_ids = torch.arange(shape[1]).repeat(shape[0], 1)
        for place, row in enumerate(samples):
            start = 0
            for ids, targets in row:
                input_ids[place, start : start + len(ids)] = ids
                labels[place, start : start + len(ids)] = targets
                position_ids[place, start:] = torch.arange(shape[1] - start)
                start += len(ids)
        indices = tuple(index for row in rows for index in row)
        return Batch(input_ids, position_ids, labels, int((labels != IGNORED).sum()), sum(lengths), indices)
