"""What goes wrong around a run: killed processes, full disks, and files that a loss of power would take."""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from tests.support.processes import end


def kill(process: "subprocess.Popen[str]", only_one: bool, choose: random.Random) -> None:
    """Sends SIGKILL to every process of the run, or to one of its ranks (the launcher ends the others)."""
    ranks = ranks_of(process) if only_one else []
    if ranks:
        with suppress(psutil.NoSuchProcess):  # ended meanwhile
            choose.choice(ranks).kill()
        process.communicate(timeout=240)
    else:
        end(process)


def ranks_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """Returns the ranks that a launcher has started, in their order."""
    ranks = {}
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            with suppress(psutil.NoSuchProcess, KeyError):
                ranks[int(child.environ()["RANK"])] = child
    return [ranks[rank] for rank in sorted(ranks)]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mounts a file system of this size at `folder` for the block; skips the test where that is not allowed."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leaves no room there, also where something went away since; returns the file to remove."""
    with suppress(OSError), (folder / "ballast").open("ab", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    return folder / "ballast"


@contextmanager
def record_files() -> Iterator[list[tuple[str, str]]]:
    """Notes what this process does to files by their last names: `fsync`, `name` (renamed to it) and `remove`.

    A file that was on the disk before it was renamed is noted as `fsync` under its new name, too.
    """
    events: list[tuple[str, str]] = []
    fsync, remove = os.fsync, os.unlink

    def record_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))

    def recording_name(rename: Callable[..., None]) -> Callable[[Any, Any], None]:
        def record_name(source: Any, target: Any) -> None:
            events.append(("name", Path(target).name))
            events.extend([("fsync", Path(target).name)] * (("fsync", Path(source).name) in events))
            rename(source, target)

        return record_name

    def record_remove(path: Any, **options: Any) -> None:
        remove(path, **options)
        events.append(("remove", Path(path).name))

    with (
        mock.patch.object(os, "fsync", record_fsync),
        mock.patch.object(os, "rename", recording_name(os.rename)),
        mock.patch.object(os, "replace", recording_name(os.replace)),
        mock.patch.object(os, "unlink", record_remove),
    ):
        yield events
