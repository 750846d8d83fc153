"""What goes wrong around a run: killed processes and full disks."""

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest


def kill(process: "subprocess.Popen[str]", only_one: bool, choose: random.Random) -> None:
    """SIGKILL to every process of the run, or to one of its ranks (the launcher ends the others)."""
    parent = psutil.Process(process.pid)
    ranks = [child for child in parent.children(recursive=True) if "qdora" in " ".join(child.cmdline())]
    for one in [choose.choice(ranks)] if only_one and ranks else [parent, *parent.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # ended meanwhile
            one.kill()
    process.communicate(timeout=60)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own at `folder`."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leaves no room there, also where something went away since; the file to remove."""
    with suppress(OSError), (folder / "ballast").open("ab", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    return folder / "ballast"
