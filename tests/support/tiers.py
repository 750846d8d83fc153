"""Which tests run: those of every change, or all.

A test marked `nightly` runs only with `--tier nightly` or `all`, or when a file that its mark names has changed:

    @pytest.mark.nightly(paths=["launch/slurm.sbatch", "qdora/commands/launch.py"], packages=["slurm-wlm", "munge"])

With `paths` it also runs if its own file or one of `COMMON` changed. A changed file is one that differs from
`--changed-since`, a commit; without it from the last commit of this branch that is a day older than the newest, as
last night's run has seen that one. At the end the run says which nightly tests it chose and left out, and why.
"""

import fnmatch
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

TIERS = ("default", "nightly", "all")
COMMON = ("constraints.txt", "tests/conftest.py", "tests/support/processes.py", "tests/support/warm*.py")
"""Files that every nightly test with `paths` depends on."""
_REPORT = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of tiers."""
    group = parser.getgroup("tiers")
    group.addoption(
        "--tier", choices=TIERS, default="default", help="tests of every change, those of the night, or all"
    )
    group.addoption("--changed-since", metavar="COMMIT", help="run nightly tests whose files differ from this commit's")
    group.addoption("--packages", metavar="FILE", help="write the Debian packages that the chosen tests need, and end")


def pytest_configure(config: pytest.Config) -> None:
    """Finds the changed files once; workers of pytest-xdist get them from the process that starts them."""
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        changed = worker["changed_files"]
    else:
        changed = (
            changed_files(config.rootpath, config.getoption("changed_since"))
            if config.getoption("tier") == "default"
            else []
        )
    config.stash[_REPORT] = {"changed": changed, "chosen": {}, "left_out": {}}


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Hands the changed files to a worker of pytest-xdist."""
    node.workerinput["changed_files"] = node.config.stash[_REPORT]["changed"]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Takes a worker's report."""
    node.config.stash[_REPORT].update(getattr(node, "workeroutput", {}).get("tiers", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands the report to the process that started this worker."""
    if hasattr(session.config, "workeroutput"):
        report = session.config.stash[_REPORT]
        session.config.workeroutput["tiers"] = {"chosen": report["chosen"], "left_out": report["left_out"]}


def changed_files(folder: Path, since: str | None) -> list[str] | None:
    """Returns the files of a repository that differ from a commit, or from the last one that is a day older.

    None where that cannot be known: no git, no repository, or one whose history does not go back a day.

    Raises:
        pytest.UsageError: there is no such commit.
    """
    newest = _git(folder, "log", "-1", "--format=%ct")
    if newest is None:
        return None
    if since is None:
        shallow = _git(folder, "rev-parse", "--is-shallow-repository") == "true\n"
        before = f"--before={int(newest) - 24 * 3600}"
        since = (_git(folder, "rev-list", "-1", "--first-parent", before, "HEAD") or "").strip()
        if shallow and not since:
            return None
    elif _git(folder, "rev-parse", "--verify", "--quiet", f"{since}^{{commit}}") is None:
        raise pytest.UsageError(f"--changed-since={since} is no commit of {folder}")
    changed = _git(folder, "diff", "--name-only", since) if since else _git(folder, "ls-files")
    new = _git(folder, "ls-files", "--others", "--exclude-standard")
    return None if changed is None or new is None else sorted({*changed.splitlines(), *new.splitlines()})


def _git(folder: Path, *arguments: str) -> str | None:
    """Returns what git prints, or None where it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return None if done.returncode else done.stdout


def reason_to_run(file: str, marks: Sequence[pytest.Mark], changed: Sequence[str]) -> str | None:
    """Returns a changed file for which a test of `file` with these nightly marks runs; None where a mark names none."""
    reason = None
    for mark in marks:
        paths = mark.kwargs.get("paths", ())
        patterns = (*paths, file, *COMMON) if paths else ()
        reason = next((one for one in changed if any(fnmatch.fnmatch(one, pattern) for pattern in patterns)), None)
        if reason is None:
            return None
    return reason


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what the tier has not, and orders the rest."""
    report, tier = config.stash[_REPORT], config.getoption("tier")
    chosen: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    packages: set[str] = set()
    for item in items:
        marks = [*item.iter_markers("nightly")]
        file = item.nodeid.partition("::")[0]
        reason = tier if tier != "default" else reason_to_run(file, marks, report["changed"] or ())
        if (marks and reason is None) or (not marks and tier == "nightly"):
            left_out.append(item)
            if marks:
                report["left_out"][file] = report["left_out"].get(file, 0) + 1
            continue
        chosen.append(item)
        if marks:
            packages.update(package for mark in marks for package in mark.kwargs.get("packages", ()))
            chosen_for = report["chosen"].setdefault(file, {})
            chosen_for[reason] = chosen_for.get(reason, 0) + 1
    if config.getoption("packages"):
        Path(config.getoption("packages")).write_text("".join(f"{package}\n" for package in sorted(packages)))
        left_out, chosen = items[:], []
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    items[:] = sorted(chosen, key=_order)  # stable


SHARED = ("uninterrupted", "one_machine")
"""Session fixtures that train: the files that use one run in one worker, one after the other."""
FOLDERS = ("e2e", "launch", "distributed", "parity", "unit")
"""The order in which files are given to workers: those with long tests first, so that no worker waits at the end."""


@cache
def group_of(file: str) -> str:
    """Returns the name of the tests that run in one worker with those of a file, given relative to the repository."""
    path = ROOT / file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return next((name for name in SHARED if f"{name}: " in text), file)  # a test's parameter


def _order(item: pytest.Item) -> tuple[bool, int]:
    folder = item.path.parent.name
    shared = group_of(item.nodeid.partition("::")[0]) in SHARED
    return not shared, FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives a worker of pytest-xdist whole groups.

    `--dist loadgroup` does not: pytest-xdist 3.8 writes the group into a node's id, which pytest 9.2 does not read.
    """
    from xdist.scheduler import LoadFileScheduling

    class GroupScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(super()._split_scope(nodeid))

    return GroupScheduling(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Says which nightly tests were chosen, which not, and why."""
    report = config.stash[_REPORT]
    if not report["chosen"] and not report["left_out"]:
        return
    terminalreporter.section(f"tier: {config.getoption('tier')}")
    chosen = {(file, reason): count for file, some in report["chosen"].items() for reason, count in some.items()}
    for (file, reason), count in sorted(chosen.items()):
        why = "" if reason in TIERS else f", as {reason} has changed"
        terminalreporter.write_line(f"chose {count} nightly of {file}{why}")
    if report["left_out"]:
        files = ", ".join(f"{file} {count}" for file, count in sorted(report["left_out"].items()))
        number = sum(report["left_out"].values())
        why = "git cannot tell what changed" if report["changed"] is None else "they name no file that has changed"
        terminalreporter.write_line(f"left out {number} nightly ({why}): {files}")
        terminalreporter.write_line("`launch/test.sh all` runs everything")
