"""What is to be known of one GPU, in twelve minutes: the parts in turn, each within its limit, and one JSON of all.

    python benchmarks/session.py OUTPUT [--only NAME ...] [--seconds 720] [--tiny]

OUTPUT/session.json is written after each part, with how long it took, how it ended, the names of tests that failed and
what it measured (of steps also `bound_share`, the share of the machine's own bound); OUTPUT/session.log has all that
was printed. Steps with Liger's kernels and with axolotl's are taken last, where these packages are installed. A part
that fails keeps none from being tried. `--tiny` takes a toy model, on any device: it shows that the parts run, its
figures mean nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

from provenance import NEEDS, provenance
from random_model import write_random_model

ROOT = Path(__file__).parents[1]
ABSENT = "left out"
"""Begins the status of a part whose package is not there, which is no failure."""
OUTCOMES = ("PASSED", "FAILED", "ERROR")
"""As pytest's workers print them, each before the name of a test."""
EAGER = ("peft-qlora", "peft-qdora", "qlora", "qdora")


@dataclass(frozen=True, slots=True)
class Part:
    """A command, to which an option for the file of its results is added, and the seconds that it may take."""

    command: tuple[str, ...]
    limit_s: int
    needs: str | None = None
    """A package without which the part is left out."""

    @property
    def is_of_tests(self) -> bool:
        """Whether its results are pytest's."""
        return "pytest" in self.command


def tests(file: str, workers: int, limit_s: int, tiny: bool) -> Part:
    """A file of tests; pytest ends a while before the limit, so that it reports what it has seen."""
    limits: tuple[str, ...] = () if tiny else ("--timeout", "100", "--session-timeout", str(limit_s - 15))
    workers = 2 if tiny else workers
    command = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "--tier", "all", "-o", "junit_family=xunit2", *limits)
    return Part((*command, "-n", str(workers), file), limit_s)


def steps(
    shape: str, tokens: int, length: int, recomputation: str, number: int, arms: tuple[str, ...]
) -> tuple[str, ...]:
    """Steps of a shape of random_model.py, the arms in turn, and one under the profiler."""
    sizes = ("--tokens", str(tokens), "--length", str(length), "--recomputation", recomputation, "--steps", str(number))
    return ("benchmarks/step.py", "--model", f"models/random-{shape}", *sizes, "--profile", "--arms", *arms)


def parts(tiny: bool) -> dict[str, Part]:
    """All parts, what is most wanted first."""
    small = ("tiny", 64, 32) if tiny else ("llama-3.2-1b", 1024, 1024)
    large = ("tiny", 128, 64) if tiny else ("llama-3-8b", 4096, 2048)
    times = 1 if tiny else 10
    capped = ("benchmarks/capped.py", "models/random-tiny" if tiny else "benchmarks/shapes/llama3_1_8b", "--gib", "24")
    capped += (f"data.max_length={large[2]}", "train.num_accumulation_steps=2", "parallel=none")
    return {
        "tests": tests("tests/gpu/test_cuda.py", 8, 150, tiny),
        "steps of 1B": Part(steps(*small, "none", times, (*EAGER, "qdora-graph")), 100),
        "steps of 8B": Part(steps(*large, "full", max(1, times // 2), EAGER), 160),
        "ranks": tests("tests/gpu/test_ranks.py", 3, 90, tiny),
        "memory against the plan": tests("tests/gpu/test_planning.py", 3, 90, tiny),
        "8B under 24 GiB": Part(capped, 50),
        "compiled steps of 1B": Part(steps(*small, "none", times, ("peft-qlora", "qdora", "qdora-compiled")), 80),
        **{  # a process each: Liger changes transformers for all arms
            f"steps of 1B, {arm}": Part(steps(*small, "none", times, (arm,)), 40, needs) for arm, needs in NEEDS.items()
        },
    }


def run(part: Part, limit_s: float, log: IO[str]) -> dict[str, Any]:
    """Runs a part within `limit_s`; what came of it."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        option = "--junitxml" if part.is_of_tests else "--output"
        process = subprocess.Popen(
            [sys.executable, *part.command, option, str(results)],
            cwd=ROOT,
            env=os.environ | {"WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit_s)
            status = "passed" if process.returncode == 0 else f"status {process.returncode}"
        except subprocess.TimeoutExpired:
            end(process)
            output, _ = process.communicate(timeout=30)
            status = f"not ended after {limit_s:.0f} s"
        finally:
            end(process)  # also where this one is ended: nothing is to stay on the GPU
        log.write(f"== {' '.join(part.command)}\n{output}\n")
        log.flush()
        found: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - started, 1)}
        try:
            if part.is_of_tests:
                found |= outcomes(results, output)
            elif results.exists():
                found["results"] = json.loads(results.read_text(encoding="utf-8"))
        except (ValueError, ElementTree.ParseError) as error:
            found["results"] = f"cannot be read: {error}"
        if status != "passed":
            found["last_lines"] = output.splitlines()[-30:]
    return found


def end(process: "subprocess.Popen[str]") -> None:
    """Kills a process and all that it has started, if there is any."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def outcomes(report: Path, output: str) -> dict[str, Any]:
    """Tests by outcome; without a report, as pytest was ended, by the lines that it had printed."""
    if not report.exists():
        lines = output.splitlines()
        ended = {word: [line.partition(f" {word} ")[2] for line in lines if f" {word} " in line] for word in OUTCOMES}
        return {"num_passed": len(ended["PASSED"]), "failed": dict.fromkeys(ended["FAILED"] + ended["ERROR"], "")}
    found: dict[str, Any] = {"num_passed": 0, "failed": {}, "skipped": {}, "properties": {}}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "")
        properties = {one.get("name"): one.get("value") for one in case.iter("property")}
        if properties:
            found["properties"][name] = properties
        for kind, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            for fault in case.iter(kind):
                found[outcome][name] = fault.get("message", "")[:500]
        found["num_passed"] += not any(name in found[outcome] for outcome in ("failed", "skipped"))
    return found


def main() -> None:
    """Runs, prints a line a part, and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts, in the order in which they are given")
    parser.add_argument("--seconds", type=float, help="for all parts; 720, or without an end with --tiny")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    every = parts(options.tiny)
    names = options.only or list(every)
    if unknown := [name for name in names if name not in every]:
        parser.error(f"no part is called {unknown[0]!r}; there are: {', '.join(map(repr, every))}")
    options.output.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        write_random_model(ROOT / "models" / "random-tiny", "tiny")
    record: dict[str, Any] = provenance() | {"tiny": options.tiny, "parts": {}}
    seconds = options.seconds or (float("inf") if options.tiny else 720)
    patience = 10 if options.tiny else 1  # a CPU, and other work on it
    last = time.monotonic() + seconds
    with (options.output / "session.log").open("w", encoding="utf-8") as log:
        for name in names:
            left = last - time.monotonic()
            limit = min(patience * every[name].limit_s, left)
            needs = every[name].needs
            if needs and find_spec(needs) is None:
                found = {"status": f"{ABSENT}: {needs} is not installed"}
            else:
                found = run(every[name], limit, log) if left > 10 else {"status": "no time left"}
            record["parts"][name] = found
            text = json.dumps(record, indent=2)
            (options.output / "session.json").write_text(text + "\n", encoding="utf-8")
            print(
                f"{name}: {found['status']}, {found.get('seconds', 0):.0f} s",
                *found.get("failed", ()),
                sep="\n  ",
                flush=True,
            )
    statuses = [found["status"] for found in record["parts"].values()]
    sys.exit(any(status != "passed" and not status.startswith(ABSENT) for status in statuses))


if __name__ == "__main__":
    main()
