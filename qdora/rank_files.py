"""What each rank leaves for `qdora.commands.launch`, which started it: its status, its error, where it stood still.

torchrun ends all ranks as soon as one has failed, and the others fail because of the first: whoever prints at once adds
to the noise. So ranks write, and the launcher prints the one message that counts. Ranks that were started otherwise
(torchrun itself, `accelerate launch`) have no folder to write to and print as any program does.
"""

import ctypes
import json
import os
import re
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from qdora.errors import EXIT_ERROR, EXIT_USER_ERROR, QdoraError

FOLDER = "QDORA_LAUNCH_FOLDER"
"""Environment variable. Below it each start of the ranks (torchrun may restart them) has a folder."""
PR_SET_PDEATHSIG = 1
_FRAME = re.compile(r'  File "(.+)", line (\d+),? in (.+)')
_SHOWN_FRAMES = 3


@dataclass(frozen=True, slots=True)
class RankFailure:
    """Why a rank ended."""

    rank: int
    status: int
    time: float
    text: str
    """The message to the user, or the traceback of what nobody foresaw."""


def _own_file(kind: str) -> Path | None:
    folder = os.environ.get(FOLDER)
    if not folder or "RANK" not in os.environ:
        return None
    attempt = Path(folder) / os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    attempt.mkdir(exist_ok=True)
    return attempt / f"{os.environ['RANK']}.{kind}"


def end_with_launcher() -> None:
    """Should the launcher be killed, this rank gets SIGTERM: it saves and ends, and does not train on unseen."""
    if os.environ.get(FOLDER) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def leave_status(status: int) -> None:
    """Notes what this rank is about to exit with."""
    file = _own_file("status")
    if file is not None:
        file.write_text(str(status), encoding="utf-8")


def leave_error(error: Exception) -> bool:
    """Notes the error that ends this rank, unless one is; whether there is a launcher to read it."""
    file = _own_file("error")
    if file is None or file.exists():
        return file is not None
    foreseen = isinstance(error, QdoraError)
    text = str(error) if foreseen else "".join(traceback.format_exception(error)).rstrip()
    status = EXIT_USER_ERROR if foreseen else EXIT_ERROR
    left = RankFailure(int(os.environ["RANK"]), status, time.time(), text)
    partial = file.with_suffix(".partial")  # the launcher reads at any time
    partial.write_text(json.dumps(asdict(left)), encoding="utf-8")
    partial.replace(file)
    return True


def others_end() -> bool:
    """Returns whether a rank of this machine has left an error, for which the launcher ends the others."""
    file = _own_file("error")
    return file is not None and any(file.parent.glob("*.error"))


def open_stack() -> IO[str] | None:
    """An open file for the stack of this rank, should it stand still."""
    file = _own_file("stack")
    return None if file is None else file.open("w", encoding="utf-8")


def first_status(folder: Path) -> int | None:
    """The exit status of the lowest rank of this machine that left one."""
    statuses = _read(folder, "status")
    return int(statuses[min(statuses)]) if statuses else None


def first_error(folder: Path) -> RankFailure | None:
    """The first of the messages to the user, or else of the other errors: those after it followed from it."""
    found = [RankFailure(**json.loads(text)) for text in _read(folder, "error").values()]
    return min(found, key=lambda error: (error.status != EXIT_USER_ERROR, error.time), default=None)


def standstill(folder: Path) -> str | None:
    """A line a rank of where it stood, if they ended because nothing went on."""
    stacks = _read(folder, "stack")
    if not any(stacks.values()):
        return None
    # A rank that was waiting for one that is gone already fails before its own time is over.
    tracebacks = {rank: json.loads(text)["text"] for rank, text in _read(folder, "error").items()}
    frames = {
        rank: _FRAME.findall(stack.rpartition("(most recent call first):")[2])
        or _FRAME.findall(tracebacks.get(rank, ""))[::-1]
        for rank, stack in stacks.items()
    }
    return "\n".join(f"  rank {rank}: {_place(frames[rank])}" for rank in sorted(frames))


def _read(folder: Path, kind: str) -> dict[int, str]:
    """What the ranks of the last start left of a kind."""
    last = max(folder.iterdir(), key=lambda attempt: int(attempt.name), default=folder)
    return {int(file.stem): file.read_text(encoding="utf-8") for file in last.glob(f"*.{kind}")}


def _place(frames: list[tuple[str, str, str]]) -> str:
    """The innermost frame and qdora's innermost ones, of (file, line, function) from the innermost out."""
    if not frames:
        return "did not answer"
    package = str(Path(__file__).parent)
    shown = [frame for index, frame in enumerate(frames) if index == 0 or frame[0].startswith(package)]
    return " < ".join(f"{name} ({Path(file).name}:{line})" for file, line, name in shown[: _SHOWN_FRAMES + 1])
