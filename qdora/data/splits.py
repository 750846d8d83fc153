"""Splits of a folder's files, by their names: what is named `test` or `valid` is not to be trained on.

The words are those by which `datasets` tells the splits of a folder on the hub.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from qdora.errors import DataError

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
ALL = "all"
"""Stands for every file, whatever its name."""
_NO_LETTER = r"[-._ 0-9/]"
_NAMED = {
    split: re.compile(rf"(?:^|{_NO_LETTER})(?:{'|'.join(words)})(?:{_NO_LETTER}|$)", re.IGNORECASE)
    for split, words in _WORDS.items()
}


def split_of(file: Path) -> str:
    """Returns the split that a file's name says, or else its folders', the nearest first; `train` where none does."""
    for part in reversed(file.parts):
        for split, named in _NAMED.items():
            if named.search(part):
                return split
    return "train"


def of_split(folder: Path, files: Sequence[Path], wanted: str) -> list[Path]:
    """Returns the files of a folder that are of one split.

    Args:
        wanted: the split; empty where the user named none.

    Raises:
        DataError: no split is named and there are several, or there is none of that name.
    """
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_of(file.relative_to(folder)), []).append(file)
    if wanted == ALL or (not wanted and len(by_split) == 1):
        return list(files)
    if wanted in by_split:
        return by_split[wanted]
    what = ", ".join(f"{split}: {named[0].relative_to(folder)}" for split, named in by_split.items())
    ways = ", ".join(f"{folder}#{split}" for split in [*by_split, ALL])
    if wanted:
        raise DataError(f"{folder}#{wanted}: the folder has no file of that split ({what}): give one of {ways}")
    raise DataError(
        f"{folder} holds files of several splits by their names ({what}): name one of them ({ways}), or hold the "
        "others out with data.eval"
    )
