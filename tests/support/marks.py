"""Which tests are run."""

from collections.abc import Collection, Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def nightly(*cases: Any) -> list[Any]:
    """Returns cases of `parametrize` (several values of one are a tuple) that only the nightly tier has."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.nightly) for case in cases]


def nightly_but(kept: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Returns `cases`, of which those in `kept` are for every change and the others nightly."""
    return [case if case in kept else nightly(case)[0] for case in cases]


def asked(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """The values of parameter `name` in the tests that are run, for a fixture that computes all of them at once."""
    items = [item for item in request.session.items if item.path == request.path]
    of_tests = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return list(dict.fromkeys(values[name] for values in of_tests if name in values))


def pairwise(*dimensions: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cases in which every two values of two dimensions occur together at least once, a few more than have to be.

    Greedy: the case with the most pairs that are missing yet, the first one of several.
    """
    cases = list(product(*dimensions))
    pairs = {case: {*combinations(enumerate(case), 2)} for case in cases}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs[case] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen
