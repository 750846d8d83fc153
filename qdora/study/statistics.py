"""Differences of two arms that were trained with the same seeds and scored on the same samples.

An interval has two parts, whose squares add up. Samples: percentiles of a paired bootstrap (Efron and Tibshirani 1993,
chapter 13) that draws samples within each task and scores both arms on the same draw. Seeds: Student's interval of the
differences of single seeds; with three seeds 4.3 standard errors, where a bootstrap of three would cover 75 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

NUM_DRAWS = 10_000
COVERAGE = 0.95
_DRAWS_AT_ONCE = 500
_STUDENT_DRAWS = 1_000_000
"""Give the quantile to 0.3 %; scipy, which has it exactly, costs the start of every command a quarter of a second."""

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


def differences(pairs: Sequence[tuple[list[Scores], list[Scores]]], seed: int = 0) -> list[Difference]:
    """Of each pair the sum of the first list less that of the second, all of the same samples, seeds and weights.

    Deterministic in `seed`; all pairs are scored on the same draws.
    """
    if not pairs:
        return []
    first = pairs[0][0][0]
    values = [
        np.sum([one.values for one in plus], 0) - np.sum([one.values for one in minus], 0) for plus, minus in pairs
    ]
    drawn = _bootstrap(np.stack([one.mean(0) for one in values]), first, np.random.default_rng(seed))
    low, high = np.quantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], axis=0)
    found = []
    for place, one in enumerate(values):
        seeds = Scores(one, first.weights, first.tasks).each_seed()
        mean, of_seeds = float(np.mean(seeds)), _of_seeds(seeds)
        below, above = (float(np.hypot(of_seeds, bound[place] - mean)) for bound in (low, high))
        found.append(Difference(mean, mean - below, mean + above, seeds))
    return found


def _of_seeds(seeds: list[float]) -> float:
    """Half of Student's interval of the mean over seeds; with one seed nothing is known of it, and it is 0."""
    if len(seeds) < 2:
        return 0.0
    return _student_quantile(len(seeds) - 1) * float(np.std(seeds, ddof=1) / np.sqrt(len(seeds)))


@cache
def _student_quantile(freedom: int) -> float:
    """How many standard errors hold `COVERAGE`."""
    return float(np.quantile(np.abs(np.random.default_rng(0).standard_t(freedom, _STUDENT_DRAWS)), COVERAGE))


def _bootstrap(values: Array, like: Scores, random: np.random.Generator) -> Array:
    """(draws, pairs) the mean over tasks of each draw of samples; `values` (pairs, samples) are means over seeds."""
    total = np.zeros((NUM_DRAWS, len(values)))
    tasks = np.unique(like.tasks)
    for task in tasks:
        own = like.tasks == task
        size, weights = int(own.sum()), like.weights[own]
        weighted = (values[:, own] * weights).T
        for first in range(0, NUM_DRAWS, _DRAWS_AT_ONCE):
            some = slice(first, min(first + _DRAWS_AT_ONCE, NUM_DRAWS))
            draws = random.multinomial(size, np.full(size, 1 / size), size=some.stop - some.start).astype(np.float64)
            total[some] += (draws @ weighted) / (draws @ weights)[:, None]
    return total / len(tasks)
