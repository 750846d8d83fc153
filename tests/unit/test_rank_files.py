"""What the launcher makes of the files that ranks leave."""

import faulthandler
from pathlib import Path

import pytest

from qdora import rank_files


def fails_in_a_collective() -> None:
    raise RuntimeError("Connection closed by peer")


def test_place_of_a_rank_that_failed_because_the_other_was_gone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(rank_files.FOLDER, str(tmp_path))
    for rank in (0, 1, 2):
        monkeypatch.setenv("RANK", str(rank))
        stack = rank_files.open_stack()
        assert stack is not None
        with stack:
            if rank == 1:
                faulthandler.dump_traceback(stack)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError) as failed:
        fails_in_a_collective()
    assert rank_files.leave_error(failed.value)
    told = str(rank_files.standstill(tmp_path)).splitlines()
    assert told[0].startswith("  rank 0: fails_in_a_collective (test_rank_files.py:")
    assert told[1].startswith("  rank 1: test_place_of_a_rank_that_failed")
    assert told[2] == "  rank 2: did not answer"
