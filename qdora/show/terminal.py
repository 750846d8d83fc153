"""Samples as text for a person: what is learned in green, or in brackets where there are no colours.

What would not be seen is written: `↵` before each new line, `␉` for a tab and the like for other control characters,
`<U+00A0>` for blanks and marks that look like nothing or change what stands beside them, `<0xE2>` for a byte that
belongs to no character. So nothing in the data reaches the terminal but characters that it prints.
"""

import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence

from qdora.show.spelling import Run, Spelling

OPEN, CLOSE = "\u27e6", "\u27e7"
"""Around what is learned, without colours; in the text itself they are written by their numbers."""
NEW_LINE = "\u21b5"
_RESET = "\x1b[0m"
_STYLES = {(False, False): "\x1b[2m", (False, True): "\x1b[36m", (True, False): "\x1b[32m", (True, True): "\x1b[1;32m"}
"""By whether it is learned and whether it is an added token: dim, cyan, green, bold green."""
_JOINERS = "\u200c\u200d"
"""Without ink of their own, but parts of how Persian and emoji are written."""


def wants_colours() -> bool:
    """Whether stdout is a terminal with colours; FORCE_COLOR says that it is, NO_COLOR that it is not."""
    if os.environ.get("NO_COLOR"):
        return False
    forced = os.environ.get("FORCE_COLOR")
    if forced:
        return forced not in ("0", "false")
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def bold(text: str, colours: bool) -> str:
    """A heading."""
    return f"\x1b[1m{text}{_RESET}" if colours else text


def visible(text: str) -> str:
    """A line of words that come from the data, such as names of keys and files, as it may reach the terminal."""
    return "".join(shown(character) for character in text)


def painted(runs: Sequence[Run], colours: bool) -> str:
    """Returns the text of a sample with what is learned set apart; ends with a new line."""
    pieces: list[str] = []
    is_open = False
    for run in runs:
        text = "".join(_shown(run, not colours))
        if colours:
            style = _STYLES[run.learned, run.is_added]
            # Each line has its own colour, so that a pager may begin with any of them.
            pieces.append("\n".join(f"{style}{line}{_RESET}" if line else "" for line in text.split("\n")))
            continue
        if run.learned != is_open:
            pieces.append(OPEN if run.learned else CLOSE)
            is_open = run.learned
        pieces.append(text)
    whole = "".join(pieces) + CLOSE * is_open
    return whole if whole.endswith("\n") else f"{whole}\n"


def token_lines(
    spelling: Spelling, ids: Sequence[int], learned: Sequence[bool], first: int | None, colours: bool
) -> Iterator[str]:
    """A line a token: its position, id, whether it is learned, and its text; of a part of a character the bytes.

    Args:
        first: where in a packed row the sample begins, which has a column of its own then.
    """
    yield f"{'in row':>7}" * (first is not None) + f"{'position':>9}{'id':>9}  {'':8} text"
    for place, (number, is_learned) in enumerate(zip(ids, learned, strict=True)):
        is_added = spelling.is_added(int(number))
        (*runs,) = spelling.runs([number], [is_learned])
        text = "".join("".join(_shown(run, marks=False)) for run in runs).replace("\n", "")
        mark = "learned" if is_learned else "-"
        in_row = "" if first is None else f"{first + place:7}"
        line = f"{in_row}{place:9}{int(number):9}  {mark:8} \u2502{text}\u2502"
        yield f"{_STYLES[is_learned, is_added]}{line}{_RESET}" if colours else line


def _shown(run: Run, marks: bool) -> Iterator[str]:
    if run.is_broken:
        yield from (f"<0x{run.text[start : start + 2]}>" for start in range(0, len(run.text), 2))
        return
    for character in run.text:
        yield shown(character, marks)


def shown(character: str, marks: bool = False) -> str:
    """A character as it is, or what stands for one that would not be seen; with `marks`, for OPEN and CLOSE too."""
    if " " <= character <= "~":
        return character
    if character == "\n":
        return f"{NEW_LINE}\n"
    number = ord(character)
    if number < 0x20 or number == 0x7F:
        return chr(0x2421 if number == 0x7F else 0x2400 + number)  # Unicode's pictures of control characters
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and character not in _JOINERS
    hidden |= unicodedata.category(character) == "Zs" and character != "\u3000"
    return f"<U+{number:04X}>" if hidden or (marks and character in OPEN + CLOSE) else character
