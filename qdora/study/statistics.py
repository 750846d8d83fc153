"""Differences of two arms that were trained with the same seeds and scored on the same samples.

Intervals are percentiles of a paired bootstrap (Efron and Tibshirani 1993, chapter 13): seeds are drawn with
replacement, samples within each task, and both arms are scored on the same draw. With three seeds the draw of seeds has
ten outcomes: such an interval knows the samples well and the seeds badly.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_DRAWS = 10_000
COVERAGE = 0.95
_DRAWS_AT_ONCE = 500

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scores:
    """What one arm scored; samples in the same order for all arms."""

    values: Array
    """(seeds, samples), such as the loss a token, or 1 where the answer is right."""
    weights: Array
    """(samples,), such as the number of tokens."""
    tasks: NDArray[np.int64]
    """(samples,) the number of the sample's task."""

    def each_seed(self) -> list[float]:
        """The mean over tasks of the weighted mean over their samples."""
        means = [
            (self.values[:, own] * self.weights[own]).sum(1) / self.weights[own].sum()
            for own in (self.tasks == task for task in np.unique(self.tasks))
        ]
        return [float(value) for value in np.mean(means, axis=0)]


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two arms, with its interval."""

    mean: float
    low: float
    high: float
    seeds: list[float]
    """For each seed alone."""


def difference(plus: list[Scores], minus: list[Scores], seed: int = 0) -> Difference:
    """The sum of `plus` less that of `minus`, all of the same samples and seeds; deterministic in `seed`."""
    first = plus[0]
    values = sum((one.values for one in plus), np.zeros_like(first.values)) - sum(one.values for one in minus)
    each = Scores(values, first.weights, first.tasks).each_seed()
    drawn = _bootstrap(values, first.weights, first.tasks, np.random.default_rng(seed))
    low, high = np.quantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Difference(float(np.mean(each)), float(low), float(high), each)


def _bootstrap(values: Array, weights: Array, tasks: NDArray[np.int64], random: np.random.Generator) -> Array:
    """(draws,) the mean over tasks of each draw."""
    num_seeds = values.shape[0]
    found = []
    for first in range(0, NUM_DRAWS, _DRAWS_AT_ONCE):
        count = min(_DRAWS_AT_ONCE, NUM_DRAWS - first)
        of_seeds = random.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=count) / num_seeds
        of_tasks = []
        for task in np.unique(tasks):
            own = tasks == task
            size = int(own.sum())
            draws = random.multinomial(size, np.full(size, 1 / size), size=count).astype(np.float64)
            sums = draws @ (values[:, own] * weights[own]).T  # (draws, seeds)
            of_tasks.append((sums * of_seeds).sum(1) / (draws @ weights[own]))
        found.append(np.mean(of_tasks, axis=0))
    return np.concatenate(found)
