"""Which cases of a matrix are run."""

from itertools import combinations

import pytest

from tests.support.marks import pairwise


@pytest.mark.parametrize(("sizes", "most"), [((6, 4, 2, 2), 30), ((4, 2, 2), 10), ((3, 3, 3), 12)])
def test_pairwise_has_every_pair_in_few_cases(sizes: tuple[int, ...], most: int) -> None:
    dimensions = [[f"{name}{value}" for value in range(size)] for name, size in zip("abcd", sizes, strict=False)]
    cases = pairwise(*dimensions)
    assert len(cases) == len({*cases}) <= most
    assert all(value in dimension for case in cases for value, dimension in zip(case, dimensions, strict=True))
    for first, second in combinations(range(len(sizes)), 2):
        wanted = {(one, other) for one in dimensions[first] for other in dimensions[second]}
        assert {(case[first], case[second]) for case in cases} == wanted
    assert pairwise(*dimensions) == cases
