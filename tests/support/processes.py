"""Processes: `qdora`, ranks and commands, started as a user starts them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.support import ROOT, warm

COLD = subprocess.Popen
"""What starts a new interpreter, also where tests put `warm.Popen` in its place."""
started: list["subprocess.Popen[str]"] = []
"""What the test has started and need not have waited for."""


def run(
    arguments: list[str], *, timeout_s: float = 180, cwd: Path = ROOT, cold: bool = False, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Runs a process to its end; returns it with stdout and stderr as text.

    `cold`: by a new interpreter, not by `tests.support.warm`.
    """
    with popen(arguments, stderr=subprocess.PIPE, cwd=cwd, cold=cold, **environment) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as late:
            stdout, stderr = end(process)
            raise AssertionError(f"not ended after {timeout_s} s:\n{stdout[-2000:]}\n{stderr[-4000:]}") from late
        except BaseException:  # pytest's own limit, Ctrl-C: `with` would wait for the end
            end(process)
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def end(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """Sends SIGKILL to a process and all that it has started; returns what it had written that was not read yet."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    stdout, stderr = process.communicate(timeout=60)
    return stdout or "", stderr or ""


def popen(
    command: list[str],
    *,
    cwd: Path = ROOT,
    cold: bool = False,
    session: bool = False,
    stdin: int | None = None,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.STDOUT,
    **environment: str,
) -> "subprocess.Popen[str]":
    """Starts a process that has this checkout on its path, before what is on it anyhow."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    kind = COLD if cold else warm.Popen
    return kind(
        command,
        cwd=cwd,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        text=True,
        env=variables,
        start_new_session=session,
    )


def launcher(nproc: int) -> list[str]:
    """Returns what starts a script, or `-m qdora`: python alone; the launcher where there are several ranks."""
    given = ["-m", "qdora.commands.launch", "--standalone", "--nproc-per-node", str(nproc)]
    return [sys.executable, *(given if nproc > 1 else [])]


def qdora(*arguments: str, nproc: int = 1, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Runs `qdora ...` as a user does, several ranks by the launcher; `options` are those of `run`."""
    return run([*launcher(nproc), "-m", "qdora", *arguments], **options)


def start(arguments: list[str], nproc: int, rest_s: float = 0.1) -> "subprocess.Popen[str]":
    """Starts a training run in a process group of its own; it rests so long before each step."""
    paced = ["-m", "tests.support.paced_qdora", str(rest_s)]
    return start_command([*launcher(nproc), *paced, "train", *arguments])


def start_command(command: list[str], cwd: Path = ROOT) -> "subprocess.Popen[str]":
    """Starts a command in a process group of its own, its stdout and stderr in one pipe.

    tests/conftest.py ends it with the test.
    """
    process = popen(command, cwd=cwd, session=True)
    started.append(process)
    return process


def wait_for_steps(folder: Path, steps: int, process: "subprocess.Popen[str]") -> None:
    """Waits until metrics.jsonl has `steps` training steps."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        file = folder / "metrics.jsonl"
        if file.exists() and sum('"loss"' in line for line in file.read_text().splitlines()) >= steps:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {steps} steps: {end(process)[0][-3000:]}")


def read_until(process: "subprocess.Popen[str]", words: str) -> str:
    """Returns the output up to the line with `words`."""
    output = ""
    assert process.stdout is not None
    for line in process.stdout:
        output += line
        if words in line:
            break
    return output


def wait_for_run(outputs: Path, process: "subprocess.Popen[str]") -> Path:
    """Returns the only run's folder, once it is there."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if outputs.exists() and (found := list(outputs.iterdir())):
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"no run: {end(process)[0]}")


def interrupt_when(is_time: Callable[[], bool], arguments: list[str], number: int) -> int:
    """Starts `qdora ...` in its own process and sends it a signal as soon as it is time; returns the exit status."""
    command = [*launcher(1), "-m", "qdora", *arguments]
    with popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        try:
            while not is_time():
                assert process.poll() is None, "it ended before"
                assert time.monotonic() < deadline, "the time did not come"
                time.sleep(0.002)
            process.send_signal(number)
            return process.wait(240)
        except BaseException:
            end(process)
            raise


def status_bytes(field: str) -> int:
    """A field of /proc/self/status that counts memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
