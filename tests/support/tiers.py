"""Which tests run: those of every change, or all.

A test marked `nightly` is left out, but with `--tier nightly` or `all`, or if a file changed that its mark names:

    @pytest.mark.nightly(paths=["launch/slurm.sbatch", "qdora/commands/launch.py"], packages=["slurm-wlm", "munge"])

A changed file is one that differs from `--changed-since`, a commit; without it from the last commit that is older than
a day, as last night's run has seen that one. At the end the run says which nightly tests it ran and left out, and why.
"""

import fnmatch
import subprocess
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TIERS = ("default", "nightly", "all")
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
        changed = changed_files(config.getoption("changed_since")) if config.getoption("tier") == "default" else []
    config.stash[_REPORT] = {"changed": changed, "ran": {}, "left_out": {}}


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
        session.config.workeroutput["tiers"] = {"ran": report["ran"], "left_out": report["left_out"]}


def changed_files(since: str | None) -> list[str]:
    """Returns the files that differ from a commit, or from the last one that is a day older than the newest.

    Raises:
        pytest.UsageError: there is no such commit.
    """
    if since is None:
        newest = int(_git("log", "-1", "--format=%ct") or 0)
        since = _git("rev-list", "-1", f"--before={newest - 24 * 3600}", "HEAD").strip()
    elif not _git("rev-parse", "--verify", "--quiet", f"{since}^{{commit}}"):
        raise pytest.UsageError(f"--changed-since={since} is no commit of {ROOT}")
    changed = _git("diff", "--name-only", since) if since else _git("ls-files")
    return sorted({*changed.splitlines(), *_git("ls-files", "--others", "--exclude-standard").splitlines()})


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout


def reason_to_run(marks: Sequence[pytest.Mark], changed: Sequence[str]) -> str | None:
    """Returns a changed file for which a test with these nightly marks runs; None where a mark names none of them."""
    reason = None
    for mark in marks:
        patterns = mark.kwargs.get("paths", ())
        reason = next((file for file in changed if any(fnmatch.fnmatch(file, one) for one in patterns)), None)
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
        reason = tier if tier != "default" else reason_to_run(marks, report["changed"])
        if (marks and reason is None) or (not marks and tier == "nightly"):
            left_out.append(item)
            if marks:
                report["left_out"][file] = report["left_out"].get(file, 0) + 1
            continue
        chosen.append(item)
        if marks:
            packages.update(package for mark in marks for package in mark.kwargs.get("packages", ()))
            ran = report["ran"].setdefault(file, {})
            ran[reason] = ran.get(reason, 0) + 1
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
    return next((name for name in SHARED if name in text), file)


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
    """Says which nightly tests ran, which did not, and why."""
    report = config.stash[_REPORT]
    if not report["ran"] and not report["left_out"]:
        return
    terminalreporter.section(f"tier: {config.getoption('tier')}")
    ran = Counter({(file, reason): n for file, reasons in report["ran"].items() for reason, n in reasons.items()})
    for (file, reason), count in sorted(ran.items()):
        why = "" if reason in TIERS else f", as {reason} has changed"
        terminalreporter.write_line(f"ran {count} nightly of {file}{why}")
    if report["left_out"]:
        files = ", ".join(f"{file} {count}" for file, count in sorted(report["left_out"].items()))
        number = sum(report["left_out"].values())
        terminalreporter.write_line(f"left out {number} nightly (they name no file that has changed): {files}")
        terminalreporter.write_line("`launch/test.sh all` runs everything")
