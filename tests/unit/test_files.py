"""Files and the rights on them."""

import os
from pathlib import Path

import pytest

from qdora.files import let_others_read, lock, write_durably


def test_half_a_character_is_written_as_its_escape(tmp_path: Path) -> None:
    write_durably(tmp_path / "page.html", "whole \N{SNOWMAN}, half \ud83d")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "whole \N{SNOWMAN}, half \\ud83d"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_file_gets_the_rights_that_the_umask_leaves(umask: int, mode: int, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.touch(mode=0o600)
    before = os.umask(umask)
    try:
        let_others_read(file)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == mode


def test_lock_is_had_by_one_until_it_is_closed(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    try:
        assert lock(first)
        assert not lock(second)
        os.close(first)
        assert lock(second)
    finally:
        os.close(second)
