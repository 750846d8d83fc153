"""The faults of `faults/*.toml`, their results, and the map of `tests_of.toml` from the product's files to tests."""

import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class DoesNotApplyError(Exception):
    """A fault whose text is not, or more than once, in its file, or whose tests cannot run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One mistake that a programmer could make."""

    name: str
    what: str
    """What is wrong in the product then, one sentence."""
    file: str
    find: str
    """Text that occurs once in `file`."""
    replace: str
    caught_by: tuple[str, ...]
    """Test files, functions or cases of the default tier, the cheapest first."""

    def digest(self, tests: Sequence[str]) -> str:
        """Returns what changes with the fault and the names of `tests`; for another tree, results are begun anew."""
        parts = (self.file, self.find, self.replace, *tests)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def apply(self, tree: Path) -> str:
        """Returns the text of the file with the fault.

        Raises:
            DoesNotApplyError: `find` does not occur exactly once.
        """
        path = tree / self.file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if (count := text.count(self.find)) != 1:
            raise DoesNotApplyError(f"its text occurs {count} times in {self.file}")
        return text.replace(self.find, self.replace)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a fault."""

    name: str
    digest: str
    outcome: str
    """`caught`, `SURVIVED`, or `error` where the fault or its tests could not be applied."""
    detail: str
    """The test that failed, or the reason of the error."""
    seconds: float


def load_faults() -> list[Fault]:
    """Returns every fault, in the order of the files and of their entries."""
    faults = []
    for file in sorted((HERE / "faults").glob("*.toml")):
        for entry in tomllib.loads(file.read_text(encoding="utf-8"))["fault"]:
            faults.append(Fault(**{**entry, "caught_by": tuple(entry["caught_by"])}))
    return faults


def load_map() -> dict[str, list[str]]:
    """Returns the tests by the pattern of the product's files."""
    tests: dict[str, list[str]] = tomllib.loads((HERE / "tests_of.toml").read_text(encoding="utf-8"))["tests"]
    return tests


def select_tests(file: str) -> list[str]:
    """Returns the test files that exercise a file of the product, in the order of the map, each once."""
    matching = [tests for pattern, tests in load_map().items() if fnmatch(file, pattern)]
    return list(dict.fromkeys(test for tests in matching for test in tests))


def read_results(file: Path) -> list[Result]:
    """Returns the results of an earlier run, the later of the same fault last."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [Result(**json.loads(line)) for line in lines]
