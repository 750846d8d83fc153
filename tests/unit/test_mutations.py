"""The deliberate faults of tests/mutations apply to the product as it is, and name tests that exist."""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

from tests.mutations.faults import ROOT, DoesNotApplyError, Fault, load_faults, load_map, select_tests

LEAST = 60


@cache
def functions_of(file: Path) -> set[str]:
    """Returns the names of a file's functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def is_a_test(test: str) -> bool:
    """Returns whether a test file, or the function of a node id, exists."""
    file, _, rest = test.partition("::")
    path = ROOT / file
    return (
        path.is_file() and path.name.startswith("test_") and (not rest or rest.partition("[")[0] in functions_of(path))
    )


def problem_of(fault: Fault) -> str | None:
    """Returns why a fault cannot be tried."""
    try:
        text = fault.apply(ROOT)
        ast.parse(text)
    except (DoesNotApplyError, SyntaxError) as error:
        return str(error)
    if text == (ROOT / fault.file).read_text(encoding="utf-8"):
        return "it changes nothing"
    if not fault.caught_by:
        return "it names no test"
    return next((f"there is no {test}" for test in fault.caught_by if not is_a_test(test)), None)


def test_faults_are_many_and_have_names_of_their_own() -> None:
    names = Counter(fault.name for fault in load_faults())
    assert len(names) >= LEAST
    assert [name for name, count in names.items() if count > 1] == []


def test_table_has_the_faults_that_there_are() -> None:
    table = (ROOT / "docs" / "mutations.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table if line.startswith("| ")][2:]
    assert rows == [fault.name for fault in load_faults()]
    assert not [line for line in table if "SURVIVED" in line or " error: " in line]


def test_every_fault_applies_and_its_tests_exist() -> None:
    problems = {fault.name: problem for fault in load_faults() if (problem := problem_of(fault)) is not None}
    assert problems == {}


def test_map_has_tests_of_every_module() -> None:
    files = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "qdora").rglob("*.py")) if file.stat().st_size]
    assert [file for file in files if not select_tests(file)] == []
    assert [test for tests in load_map().values() for test in tests if not is_a_test(test)] == []
