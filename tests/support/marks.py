"""Which tests are run."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def soak(*cases: Any) -> list[Any]:
    """Cases of `parametrize` (several values of one are a tuple) that only `launch/test.sh -m soak` runs."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.soak) for case in cases]


def soak_but(kept: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """`cases`, of which only those in `kept` are run without `-m soak`."""
    return [case if case in kept else soak(case)[0] for case in cases]


def asked(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """The values of parameter `name` in the tests that are run, for a fixture that computes all of them at once."""
    items = [item for item in request.session.items if item.path == request.path]
    of_tests = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return list(dict.fromkeys(values[name] for values in of_tests if name in values))
