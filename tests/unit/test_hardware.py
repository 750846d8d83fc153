"""Hardware as people write it, and this machine, which is measured."""

import pytest

from qdora.errors import ConfigError
from qdora.planning.hardware import GIB, SHARE_OF_LISTED, find_hardware


@pytest.mark.parametrize(
    ("given", "nodes", "ranks", "gib"),
    [
        ("2x24gb", 1, 2, 24),
        ("8x80GB", 1, 8, 80),
        ("4xrtx4090", 1, 4, 24),
        ("2x8xH100", 2, 8, 80),
        ("1x11.5gib", 1, 1, 11.5),
        ("1 x a100-40gb", 1, 1, 40),
    ],
)
def test_hardware_is_read(given: str, nodes: int, ranks: int, gib: float) -> None:
    found = find_hardware(given)
    assert (found.num_nodes, found.ranks_per_node, found.memory_bytes) == (
        nodes,
        ranks,
        int(gib * SHARE_OF_LISTED["memory"] * GIB),
    )
    assert not found.measured


@pytest.mark.parametrize(
    "given", ["24gb", "2x", "0x24gb", "0x2x24gb", "2x0gb", "2xvoodoo2", "2x24", "two", "-1x24gb", "99999x24gb"]
)
def test_other_hardware_is_refused_with_what_there_is(given: str) -> None:
    with pytest.raises(ConfigError, match=r"write cards x memory \(2x24gb\), cards x name .*h100"):
        find_hardware(given)


def test_this_machine_is_measured() -> None:
    found = find_hardware("auto")
    assert found.measured
    assert min(found.memory_bytes, found.matrix, found.copy, found.link, found.host_link) > 0
    assert found.host_bytes is not None
    assert found.num_ranks * found.memory_bytes < 1.5 * found.host_bytes, "ranks share it; it changes while measuring"
