"""The pool of ranks."""

from collections.abc import Iterator

import pytest

from tests.support.ranks import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Runs functions on ranks; the session's, or under xdist the worker's."""
    pool = RankPool()
    yield pool
    pool.close()
