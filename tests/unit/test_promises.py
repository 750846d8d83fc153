"""docs/promises.md: its tests exist and are in the tier it says, no fault of README is left out, no row is there twice.

Read as text and as syntax trees: no test module is imported.
"""

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "docs"
PROMISES = FOLDER / "promises.md"
FAULTS = "What survives what"
NOT_HELD = "Not held by a test"
COLUMNS = {True: ["promise", "reason"], False: ["promise", "test", "tier"]}
"""By whether the table is that of `NOT_HELD`."""
NODE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


class Row(NamedTuple):
    """A row of a table, the heading above it, and the columns of the table."""

    section: str
    columns: list[str]
    cells: list[str]


def rows_of(text: str) -> Iterator[Row]:
    """Yields the rows of all Markdown tables outside of fenced blocks."""
    section, columns, fenced = "", [""], False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if fenced:
            continue
        if line.startswith("#"):
            section = line.lstrip("# ")
        if not line.startswith("|"):
            columns = []
            continue
        cells = [" ".join(cell.split()) for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        if not columns:
            columns = cells
        elif set("".join(cells)) - set("-: "):
            yield Row(section, columns, cells)


def is_nightly(mark: ast.expr, assigned: dict[str, ast.expr]) -> bool:
    """Returns whether a mark, or one of several, is `pytest.mark.nightly`; names are those of the module."""
    match mark:
        case ast.Name(id=name) if name in assigned:
            return is_nightly(assigned[name], assigned)
        case ast.List(elts=marks) | ast.Tuple(elts=marks):
            return any(is_nightly(one, assigned) for one in marks)
        case ast.Call(func=called):
            return is_nightly(called, assigned)
    return isinstance(mark, ast.Attribute) and mark.attr == "nightly"


def are_all_nightly(cases: ast.expr, assigned: dict[str, ast.expr]) -> bool:
    """Returns whether the second argument of `parametrize` has cases of the nightly tier only."""
    match cases:
        case ast.Name(id=name) if name in assigned:
            return are_all_nightly(assigned[name], assigned)
        case ast.Call(func=ast.Name(id="nightly")):
            return True
        case ast.List(elts=each) | ast.Tuple(elts=each):
            return bool(each) and all(is_case_nightly(one, assigned) for one in each)
    return False


def is_case_nightly(case: ast.expr, assigned: dict[str, ast.expr]) -> bool:
    """Returns whether one element of a list of cases is nightly: `*nightly(...)`, or `pytest.param(..., marks=...)`."""
    match case:
        case ast.Starred(value=cases):
            return are_all_nightly(cases, assigned)
        case ast.Call(func=ast.Attribute(attr="param"), keywords=keywords):
            return any(one.arg == "marks" and is_nightly(one.value, assigned) for one in keywords)
    return False


def tiers_in(source: str) -> dict[str, str]:
    """Returns the tier of each test function of a module, as tests/support/tiers.py understands its marks."""
    body = ast.parse(source).body
    assigned = {
        target.id: item.value
        for item in body
        if isinstance(item, ast.Assign)
        for target in item.targets
        if isinstance(target, ast.Name)
    }
    whole = "pytestmark" in assigned and is_nightly(assigned["pytestmark"], assigned)
    tiers = {}
    for item in body:
        if not (isinstance(item, ast.FunctionDef) and item.name.startswith("test_")):
            continue
        nightly = whole
        for decorator in item.decorator_list:
            nightly |= is_nightly(decorator, assigned)
            match decorator:
                case ast.Call(func=ast.Attribute(attr="parametrize"), args=args, keywords=keywords):
                    cases = [*args[1:2], *(one.value for one in keywords if one.arg == "argvalues")]
                    nightly |= any(are_all_nightly(one, assigned) for one in cases)
        tiers[item.name] = "nightly" if nightly else "default"
    return tiers


@cache
def tiers_of(file: str) -> dict[str, str]:
    """Returns the tier of each test function of a file; none where there is no such file."""
    path = ROOT / file
    return tiers_in(path.read_text(encoding="utf-8")) if path.is_file() else {}


def missing_tests(text: str) -> list[str]:
    """Returns the tests that do not exist, rows that name none, and tables whose columns are others."""
    wrong = [f"no test: {file}::{name}" for file, name in NODE.findall(text) if name not in tiers_of(file)]
    for row in rows_of(text):
        not_held = row.section == NOT_HELD
        if row.columns != COLUMNS[not_held] or len(row.cells) != len(row.columns):
            wrong.append(f"not {COLUMNS[not_held]}: {row.cells}")
        elif not not_held and NODE.sub("", row.cells[1]).strip(" ,"):
            wrong.append(f"not a test: {row.cells[1]}")
        elif not all(row.cells):
            wrong.append(f"empty: {row.cells}")
    return wrong


def wrong_tiers(text: str) -> list[str]:
    """Returns the rows whose tier is not that of their tests; `default, nightly` where they are of both."""
    wrong = []
    for row in rows_of(text):
        if row.columns != COLUMNS[False]:
            continue
        tiers = {tiers_of(file).get(name, "") for file, name in NODE.findall(row.cells[1])}
        if row.cells[2] != ", ".join(sorted(tiers)):
            wrong.append(f"{row.cells[2]}, not {', '.join(sorted(tiers))}: {row.cells[0]}")
    return wrong


@cache
def faults() -> tuple[str, ...]:
    """Returns the first cells of README's table of faults, wherever in README or docs/ its section is."""
    others = sorted(path for path in FOLDER.rglob("*.md") if path != PROMISES)
    for path in (ROOT / "README.md", *others):
        cells = tuple(row.cells[0] for row in rows_of(path.read_text(encoding="utf-8")) if row.section == FAULTS)
        if cells:
            return cells
    raise AssertionError(f"no document has a table below the heading {FAULTS!r}")


def missing_faults(text: str) -> list[str]:
    """Returns the rows of README's table of faults with which no promise begins, and promises of none of its rows."""
    promised = [row.cells[0] for row in rows_of(text)]
    missing = [f"no row: {fault}" for fault in faults() if not any(one.startswith(f"{fault}: ") for one in promised)]
    present = [row.cells[0] for row in rows_of(text) if row.section == FAULTS]
    return missing + [f"no such row in README: {one}" for one in present if not one.startswith(faults())]


def duplicates(text: str) -> list[str]:
    """Returns the promises that are there more than once, whatever document they are linked to."""
    promises = Counter(re.sub(r" \(\[.*\)$", "", row.cells[0]).casefold() for row in rows_of(text))
    return [promise for promise, count in promises.items() if count > 1]


def broken_links(text: str) -> list[str]:
    """Returns the linked files that are not there, and rows of promises without the link to their document."""
    addresses = [one for one in LINK.findall(text) if "://" not in one]
    wrong = [address for address in addresses if not (FOLDER / address).exists()]
    return wrong + [f"no document: {row.cells[0]}" for row in rows_of(text) if not LINK.search(row.cells[0])]


@pytest.mark.parametrize("check", [missing_tests, wrong_tiers, missing_faults, duplicates, broken_links])
def test_promises_are_in_order(check: Callable[[str], list[str]]) -> None:
    text = PROMISES.read_text(encoding="utf-8")
    assert len(list(rows_of(text))) > 100
    assert check(text) == []


def test_list_of_modules_is_in_the_order_of_their_layers() -> None:
    """README's, under "Where things are": every module of qdora, files that exist, and no layer above a higher one."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where things are")[2].split("```")[1]
    listed = dict(re.findall(r"^  (\w[\w.]*)/? +(.*)$", block.partition("\nconf/")[0], re.MULTILINE))
    assert {*listed} == {path.name for path in (ROOT / "qdora").iterdir() if not path.name.startswith("__")} - {"conf"}
    named = [(name, file) for name, words in listed.items() for file in re.findall(r"\w+\.py", words)]
    assert named
    assert [pair for pair in named if not (ROOT / "qdora").joinpath(*pair).is_file()] == []
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [one["layers"] for one in contracts if one["type"] == "layers"]
    level = {name: place for place, layer in enumerate(layers) for name in re.findall(r"qdora\.(\w+)", layer)}
    levels = [level[name.removesuffix(".py")] for name in listed]
    assert levels == sorted(levels)
    folders = re.findall(r"^(\w+)/ ", block, re.MULTILINE)
    assert len(folders) > 5
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


HERE = "`tests/unit/test_promises.py::test_tier_is_that_of_the_marks`"
BOTH = f"{HERE}, `tests/launch/test_slurm.py::test_mistake_ends_the_job_and_is_not_queued_again`"
TABLE = """
## Start

| promise | test | tier |
| --- | --- | --- |
{rows}
"""
HELD = f"| It is held ([README](../README.md)) | {HERE} | default |"


@pytest.mark.parametrize(
    ("check", "row", "words"),
    [
        (missing_tests, HELD.replace("marks`", "markz`"), "no test: .*test_tier_is_that_of_the_markz"),
        (missing_tests, HELD.replace("promises.py", "premises.py"), r"no test: tests/unit/test_premises\.py"),
        (missing_tests, HELD.replace("marks`", "marks[1]`"), "not a test: "),
        (missing_tests, HELD.replace(HERE, ""), "empty: "),
        (missing_tests, f"{HELD} more |", "not .'promise', 'test', 'tier'"),
        (wrong_tiers, HELD.replace("default", "nightly"), "nightly, not default: It is held"),
        (wrong_tiers, HELD.replace(HERE, BOTH), "default, not default, nightly: It is held"),
        (missing_faults, HELD, "no row: a full disk"),
        (duplicates, f"{HELD}\n{HELD.replace('README', 'DESIGN')}", "it is held"),
        (broken_links, HELD.replace("README.md", "NOWHERE.md"), r"\.\./NOWHERE\.md"),
        (broken_links, HELD.replace(" ([README](../README.md))", ""), "no document: It is held"),
    ],
)
def test_broken_row_is_reported(check: Callable[[str], list[str]], row: str, words: str) -> None:
    assert re.search(words, "\n".join(check(TABLE.format(rows=row))))


def test_row_in_order_is_not_reported() -> None:
    both = HELD.replace("held", "held by two").replace(HERE, BOTH).replace("default", "default, nightly")
    text = TABLE.format(rows=f"{HELD}\n{both}")
    assert [row.section for row in rows_of(text)] == ["Start"] * 2
    assert [check(text) for check in (missing_tests, wrong_tiers, duplicates, broken_links)] == [[]] * 4


def test_fault_that_readme_has_not_is_reported() -> None:
    text = TABLE.replace("Start", FAULTS).format(rows=HELD)
    assert "no such row in README: It is held ([README](../README.md))" in missing_faults(text)


MODULE = """
IN_A_BROWSER = pytest.mark.nightly(paths=["a"], packages=["b"])
LONG = (pytest.mark.nightly, pytest.mark.timeout(3600))
NAMES = ["a", *nightly("b")]
LATE = nightly("a", "b")
def test_default(): pass
@pytest.mark.parametrize("a", [1, *nightly(2)])
def test_default_by_one_case(): pass
@pytest.mark.parametrize("a", NAMES)
@pytest.mark.timeout(9)
def test_default_by_name(): pass
@pytest.mark.parametrize("a", nightly_but(NAMES, [1, 2]))
def test_default_by_those_kept(): pass
@pytest.mark.parametrize("a", [12, pytest.param(800, marks=LONG)])
def test_default_by_param(): pass
@pytest.mark.nightly
def test_nightly(): pass
@IN_A_BROWSER
@pytest.mark.parametrize("a", [1, 2])
def test_nightly_by_name(): pass
@pytest.mark.nightly(paths=["a"])
def test_nightly_with_paths(): pass
@pytest.mark.parametrize("a", nightly(1, 2))
@pytest.mark.parametrize("b", [1, 2])
def test_nightly_by_all_cases(): pass
@pytest.mark.parametrize("a", argvalues=LATE)
def test_nightly_by_name_of_cases(): pass
@pytest.mark.parametrize("a", [*nightly(1), pytest.param(2, marks=LONG), pytest.param(3, marks=[IN_A_BROWSER])])
def test_nightly_by_each_case(): pass
"""


def test_tier_is_that_of_the_marks() -> None:
    tiers = tiers_in(MODULE)
    assert len(tiers) == 11
    assert all(name.split("_")[1] == tier for name, tier in tiers.items()), tiers


@pytest.mark.parametrize("mark", ["pytest.mark.nightly(paths=[])", "[pytest.mark.timeout(9), pytest.mark.nightly]"])
def test_tier_is_that_of_the_module(mark: str) -> None:
    assert {*tiers_in(f"{MODULE}\npytestmark = {mark}").values()} == {"nightly"}
    assert {*tiers_in(f"{MODULE}\npytestmark = pytest.mark.timeout(9)").values()} == {"default", "nightly"}
