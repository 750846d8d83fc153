"""Applies each deliberate fault to a copy of the tree and sees whether a test fails: `python -m tests.mutations`.

The copy is made once. Its tests must pass before a fault is in it (the control run). Then each fault is written into
its file, its tests run in pytest until one fails, and the file is restored. A fault that all its tests pass with has
survived: a test is missing.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import psutil

from tests.mutations.faults import ROOT, DoesNotApplyError, Fault, Result, load_faults, read_results, select_tests

WARM = Path(__file__).with_name("warm.py")
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
}
"""As tests/conftest.py sets it, which is too late where the libraries are imported before."""
MARKER = "QDORA_MUTATIONS"
"""Environment variable by which the processes of a test that outlive it are known."""
SPARE_S = 120.0
"""Seconds beyond a test's own limit after which the whole of pytest is killed."""
TEST_FAILED, NO_TESTS = 1, 5
"""Exit statuses of pytest; others say that it did not come to its end."""


def main() -> int:
    """Runs the faults; returns the exit status: 0 if each was caught."""
    options = _arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("stopped; --resume goes on with what was written"))
    faults = [fault for fault in load_faults() if not options.names or fault.name in options.names]
    if unknown := set(options.names) - {fault.name for fault in faults}:
        print(f"no such fault: {', '.join(sorted(unknown))}; --list names them all", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{fault.name:40} {fault.file:36} {fault.what}" for fault in faults))
        return 0
    tests = {fault.name: select_tests(fault.file) if options.selected else [*fault.caught_by] for fault in faults}
    file = options.resume or options.results
    if options.resume is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("", encoding="utf-8")
    results = {result.name: result for result in read_results(file)}
    digests = {fault.name: fault.digest(tests[fault.name]) for fault in faults}
    caught = [result for result in results.values() if result.outcome == "caught"]
    done = {result.name for result in caught if result.digest == digests.get(result.name)}
    left = [fault for fault in faults if fault.name not in done]
    with tempfile.TemporaryDirectory(prefix="qdora-mutations-") as folder:
        tree = Path(folder) / "tree"
        copy_tree(options.tree, tree)
        runner = Runner(tree, options.timeout_s)
        control = list(dict.fromkeys(test for fault in left for test in tests[fault.name]))
        if control and not options.no_control and not runner.control(control):
            return 1
        for index, fault in enumerate(left, 1):
            outcome, detail, seconds = runner.try_fault(fault, tests[fault.name])
            result = Result(fault.name, digests[fault.name], outcome, detail, round(seconds, 1))
            results[fault.name] = result
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(result)) + "\n")
            print(f"{index}/{len(left)} {outcome:8} {seconds:5.0f} s  {fault.name}: {detail}", flush=True)
    if options.table is not None:
        write_table(options.table, faults, results)
    bad = [fault.name for fault in faults if results[fault.name].outcome != "caught"]
    print(f"{len(faults) - len(bad)} of {len(faults)} faults are caught" + (f"; not: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to try; all by default")
    parser.add_argument("--list", action="store_true", help="print the faults and try none")
    parser.add_argument("--selected", action="store_true", help="run all that tests_of.toml names for the faulty file")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the results as a Markdown table")
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout to copy; the one of this file by default")
    parser.add_argument("--no-control", action="store_true", help="do not run the tests on the copy without a fault")
    parser.add_argument("--timeout-s", type=float, default=240.0, help="limit of each test")
    parser.add_argument("--results", type=Path, default=ROOT / "outputs" / "mutations.jsonl", help="replaced")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="results to go on with; new ones are appended")
    return parser.parse_args()


def copy_tree(source: Path, target: Path) -> None:
    """Copies the tracked and the new files of a checkout; what git ignores and tests need is linked."""
    command = ["git", "-C", str(source), "ls-files", "-z", "-co", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if os.path.lexists(source / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name, follow_symlinks=False)
    for name in (".venv", "models"):
        if not os.path.lexists(target / name):
            (target / name).symlink_to((source / name).resolve())


class Runner:
    """Runs pytest in the copy, one process at a time."""

    def __init__(self, tree: Path, timeout_s: float) -> None:
        self.tree, self.timeout_s = tree, timeout_s
        self._stamp = int(time.time())
        # -P: else the folder of the script, with other modules, comes first on the path.
        self._server = subprocess.Popen(
            [tree / ".venv/bin/python", "-P", WARM],
            cwd=tree,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the runner, which ends it
        )

    def control(self, tests: Sequence[str]) -> bool:
        """Returns whether the tests pass without a fault, and none is skipped; prints which do not."""
        status, failed, seconds = self._pytest(tests, limit_s=None)
        print(f"without a fault: pytest ended with {status} after {seconds:.0f} s {', '.join(failed)}", flush=True)
        return status == 0 and not failed

    def try_fault(self, fault: Fault, tests: Sequence[str]) -> tuple[str, str, float]:
        """Returns a result's outcome, detail and seconds; the copy is as before afterwards."""
        path = self.tree / fault.file
        try:
            before, after = path.read_text(encoding="utf-8"), fault.apply(self.tree)
        except (DoesNotApplyError, FileNotFoundError) as error:
            return "error", str(error), 0.0
        self._write(path, after)
        try:
            status, failed, seconds = self._first_failure(tests)
        finally:
            self._write(path, before)
        if status == 0:
            return "SURVIVED", "all of its tests pass", seconds
        if status == TEST_FAILED:
            return "caught", ", ".join(failed) or "a test failed that pytest did not name", seconds
        return "error", f"pytest ended with {status}", seconds

    def _first_failure(self, tests: Sequence[str]) -> tuple[int, list[str], float]:
        """Returns the same as `_pytest`, of the tests one after the other: tests/support/tiers.py would order them."""
        total = 0.0
        for test in tests:
            status, failed, seconds = self._pytest([test, "-x"], self.timeout_s + SPARE_S)
            total += seconds
            if status and not (status == NO_TESTS and "::" not in test):  # a file may have no test of the default tier
                return status, failed, total
        return 0, [], total

    def _write(self, path: Path, text: str) -> None:
        # Python takes compiled code for that of a file of the same size and second: each version has its own second.
        path.write_text(text, encoding="utf-8")
        self._stamp += 1
        os.utime(path, (self._stamp, self._stamp))

    def _pytest(self, arguments: Sequence[str], limit_s: float | None) -> tuple[int, list[str], float]:
        """Returns exit status, the tests that failed or were skipped, and seconds; nothing of it is left running."""
        started, mark = time.monotonic(), uuid.uuid4().hex
        options = ["-q", "-p", "no:cacheprovider", "--tb=no", "-rfEs", "-o", f"timeout={self.timeout_s:g}"]
        with tempfile.TemporaryDirectory(prefix="qdora-mutation-") as temporary:
            output = Path(temporary, "output")
            request = {"arguments": [*options, f"--basetemp={temporary}/pytest", *arguments], "output": str(output)}
            environment = {MARKER: mark, "TMPDIR": temporary}
            pid = int(self._ask(json.dumps(request | {"environment": environment})))
            killer = threading.Timer(limit_s or 1e6, _kill_group, [pid])
            killer.start()
            try:
                status = int(self._ask(None))
            finally:
                killer.cancel()
                _kill_group(pid)
                _kill_marked(mark)
            text = output.read_text(encoding="utf-8", errors="replace")
        return status, re.findall(r"^(?:FAILED|ERROR|SKIPPED) (.+?)(?: - .*)?$", text, re.M), time.monotonic() - started

    def _ask(self, request: str | None) -> str:
        """Sends a request, or nothing, and returns the next line of the answer."""
        server = self._server
        assert server.stdin is not None
        assert server.stdout is not None
        if request is not None:
            server.stdin.write(request + "\n")
            server.stdin.flush()
        answer = server.stdout.readline()
        if not answer:
            raise RuntimeError("the process that forks pytest has ended: see its traceback")
        return answer


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _kill_marked(mark: str) -> None:
    """Ends what a test has started in a session of its own."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARKER) == mark:
                process.kill()


def write_table(file: Path, faults: Sequence[Fault], results: dict[str, Result]) -> None:
    """Writes name, fault, file, test and seconds of each as Markdown."""
    caught = sum(results[fault.name].outcome == "caught" for fault in faults)
    lines = [
        "# Deliberate faults",
        "",
        f"{caught} of {len(faults)} are caught by tests of the default tier. Each is applied by itself to a copy of",
        "the tree, and its test fails then. `python -m tests.mutations --table docs/mutations.md` makes it anew.",
        "",
        "| fault | what is wrong then | file | caught by | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for fault in faults:
        result = results[fault.name]
        test = f"`{result.detail}`" if result.outcome == "caught" else f"{result.outcome}: {result.detail}"
        cells = (fault.name, fault.what, f"`{fault.file}`", test, f"{result.seconds:.0f}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
