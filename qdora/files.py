"""Files that outlast a loss of power, whole under their names or not there; locks; output that is read no more."""

import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qdora.errors import ConfigError


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Of an OSError: a disk or a quota is full."""


def write_durably(path: Path, text: str) -> None:
    """Replaces a file by one that outlasts a loss of power; never half of it under its name.

    Half a character, which data and models may hold, is written as its escape.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, or none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def let_others_read(path: Path) -> None:
    """Gives a file the rights that the user's umask leaves; safetensors makes it readable by its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(place for place in [path.absolute(), *path.absolute().parents] if place.exists())


def lock(descriptor: int) -> bool:
    """Locks an open file for this process without waiting; False where another has it.

    True, and no lock, on a file system that has none.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def output_may_close() -> Iterator[None]:
    """A reader such as `head`, which has read enough, is no error; Python would complain again at the last flush."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def naming_option(option: str, path: str) -> Iterator[None]:
    """Raises `ConfigError` with the option that names `path` where writing that file fails."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option}={path} cannot be written: {error.strerror}") from None


def check_writable(option: str, path: str) -> None:
    """Makes the folder of a file that is written at the end of a command.

    Raises:
        ConfigError: it could not be written.
    """
    with naming_option(option, path):
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        probe = file.with_name(f".{file.name}.partial")
        probe.touch()
        probe.unlink()


def forget_cached(descriptor: int, first: int, last: int) -> None:
    """Takes bytes of a file out of the page cache; what is not on the disk yet begins to be written, and stays.

    What streams through more than the memory holds would push everything else out of it, and on a virtual machine the
    first use of each page costs more than the copying: merging 8.4 GB took 39 s instead of 25.
    """
    os.posix_fadvise(descriptor, first, last - first, os.POSIX_FADV_DONTNEED)


def is_hub_id(given: str) -> bool:
    """Whether it reads as org/name and no such folder or file is here."""
    return given.count("/") == 1 and not given.startswith(("/", ".", "~")) and not Path(given).exists()
