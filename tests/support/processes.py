"""Processes: `qdora`, ranks and commands, started as a user starts them."""

import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from qdora import commands

ROOT = Path(__file__).resolve().parent.parent.parent


def run(arguments: list[str], *, timeout_s: float = 180, cwd: Path = ROOT, **environment: str) -> Any:
    """A finished subprocess with stdout and stderr as text."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=timeout_s, cwd=cwd, env=variables, check=False
    )


def launcher(nproc: int, torchrun: bool = False) -> list[str]:
    """What starts a script, or `-m qdora`: alone, or under torchrun where there are several ranks or it is wanted."""
    given = ["-m", "qdora.commands.launch", "--standalone", "--nproc-per-node", str(nproc)]
    return [sys.executable, *(given if nproc > 1 or torchrun else [])]


def qdora(*arguments: str, nproc: int = 1, own_process: bool = False, **options: Any) -> Any:
    """`qdora ...`: several ranks under torchrun, as a user starts them, with `options` of `run`; one in this process.

    That has everything imported, which costs a new one seconds of a core. What libraries write to file descriptors
    and Python's warnings are not in its stderr. `own_process` is for that, for W&B, whose process would stay, and for
    what makes a process group on one rank (full fine-tuning, `cpu_offload`), which can abort as a process ends.
    """
    if nproc == 1 and not own_process:
        assert not options, "of a process"
        return _here([*arguments])
    return run([*launcher(nproc), "-m", "qdora", *arguments], **options)


def _here(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    stdout, stderr = io.StringIO(), io.StringIO()
    told = logging.StreamHandler(stderr)  # for logging.lastResort, which is silent beside pytest's handlers
    told.setLevel(logging.WARNING)
    logging.root.addHandler(told)
    try:
        # W&B names its process in the environment, for the processes that this one starts.
        with redirect_stdout(stdout), redirect_stderr(stderr), mock.patch.dict(os.environ):
            status = commands.run(arguments)
    finally:
        logging.root.removeHandler(told)
    return subprocess.CompletedProcess(arguments, status, stdout.getvalue(), stderr.getvalue())


def start(arguments: list[str], nproc: int) -> "subprocess.Popen[str]":
    """A run that is not waited for, in a process group of its own."""
    return start_command([*launcher(nproc), "-m", "qdora", "train", *arguments])


def start_command(command: list[str], cwd: Path = ROOT) -> "subprocess.Popen[str]":
    """The same of any command."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=variables,
        start_new_session=True,
    )


def wait_for_steps(folder: Path, steps: int, process: "subprocess.Popen[str]") -> None:
    """Until metrics.jsonl has so many steps."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        file = folder / "metrics.jsonl"
        if file.exists() and sum('"loss"' in line for line in file.read_text().splitlines()) >= steps:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {steps} steps: {process.communicate(timeout=20)[0][-3000:]}")


def read_until(process: "subprocess.Popen[str]", words: str) -> str:
    """What it printed up to the line that has these words."""
    told = ""
    assert process.stdout is not None
    for line in process.stdout:
        told += line
        if words in line:
            break
    return told


def wait_for_run(outputs: Path, process: "subprocess.Popen[str]") -> Path:
    """The only run's folder, once it is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if outputs.exists() and (found := list(outputs.iterdir())):
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"no run: {process.communicate(timeout=20)[0]}")


def interrupt_when(is_time: Callable[[], bool], arguments: list[str], number: int) -> int:
    """Starts `qdora ...` in its own process and sends it a signal as soon as it is time; returns the exit status."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*launcher(1), "-m", "qdora", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while not is_time():
            assert process.poll() is None, "it ended before"
            assert time.monotonic() < deadline, "the time did not come"
            time.sleep(0.002)
        process.send_signal(number)
    return process.returncode


def run_ranks(script: Path, nproc: int, output: Path, *arguments: str, timeout_s: float = 180) -> list[Any]:
    """Runs `script OUTPUT-FOLDER ARGUMENTS...` on `nproc` ranks; returns what each wrote to OUTPUT/rank-N.json.

    Fails with the ranks' output if one of them fails.
    """
    output.mkdir(parents=True, exist_ok=True)
    done = run([*launcher(nproc, torchrun=True), str(script), str(output), *arguments], timeout_s=timeout_s)
    assert done.returncode == 0, f"ranks ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return [json.loads((output / f"rank-{rank}.json").read_text()) for rank in range(nproc)]


def status_bytes(field: str) -> int:
    """A field of /proc/self/status that counts memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
