"""A change runs the tests of every change, and the nightly ones whose files it touches; the end says which."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiers
from tests.support.processes import run

TESTS = """
import pytest

def test_of_every_change(): pass

@pytest.mark.nightly
def test_variant(): pass

@pytest.mark.nightly(paths=["nowhere/*.sh"], packages=["munge"])
def test_of_a_script(): pass

@pytest.mark.nightly(paths=["nowhere/*.sh"])
@pytest.mark.nightly
def test_variant_of_a_script(): pass
"""


def git(folder: Path, *arguments: str) -> str:
    """Runs git as somebody, whatever the developer has configured; returns what it prints."""
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits, two days apart, and a file that is not committed."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # of a hook that runs the tests
        monkeypatch.delenv(name)
    git(tmp_path, "init", "-q")
    for number, name in ((1, "old.py"), (3, "new.py")):
        (tmp_path / name).write_text(name)
        git(tmp_path, "add", ".")
        monkeypatch.setenv("GIT_COMMITTER_DATE", f"2026-01-0{number}T00:00:00Z")
        git(tmp_path, "commit", "-q", "-m", name)
    (tmp_path / "added.py").write_text("")
    return tmp_path


def test_changed_files_are_those_since_yesterday_or_a_commit(repository: Path) -> None:
    assert tiers.changed_files(repository, None) == ["added.py", "new.py"]
    assert tiers.changed_files(repository, "HEAD") == ["added.py"]
    (repository / "old.py").write_text("other")
    assert tiers.changed_files(repository, "HEAD~1") == ["added.py", "new.py", "old.py"]
    with pytest.raises(pytest.UsageError, match="--changed-since=nothing is no commit"):
        tiers.changed_files(repository, "nothing")


def test_nothing_is_known_without_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiers.changed_files(tmp_path, None) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tiers.changed_files(tmp_path, "HEAD") is None


def test_everything_has_changed_where_all_is_of_today(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(repository, "checkout", "-q", "--orphan", "fresh")
    git(repository, "commit", "-q", "-m", "all")
    assert tiers.changed_files(repository, None) == ["added.py", "new.py", "old.py"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--changed-since", "HEAD"], {"test_of_every_change"}),
        (["--tier", "nightly"], {"test_variant", "test_of_a_script", "test_variant_of_a_script"}),
        (
            ["--tier", "all", "-n", "1"],
            {"test_of_every_change", "test_variant", "test_of_a_script", "test_variant_of_a_script"},
        ),
    ],
)
def test_tier_has_its_tests_and_says_what_it_left_out(options: list[str], expected: set[str], tmp_path: Path) -> None:
    done = run_pytest(tmp_path, *options)
    assert {line.rpartition("::")[2].split()[0] for line in done.splitlines() if "PASSED" in line} == expected
    left_out = 3 if "HEAD" in options else 0
    assert (f"left out {left_out} nightly" in done) == bool(left_out), done
    assert ("`launch/test.sh all` runs everything" in done) == bool(left_out)


def test_changed_file_brings_back_the_tests_that_name_it(tmp_path: Path) -> None:
    def mark(**options: object) -> pytest.Mark:
        return pytest.mark.nightly(**options).mark

    script = mark(paths=["launch/*.sh"])

    def reason(marks: list[pytest.Mark], *changed: str) -> str | None:
        return tiers.reason_to_run("tests/test_a.py", marks, changed)

    assert reason([script], "qdora/a.py", "launch/test.sh") == "launch/test.sh"
    assert reason([script], "qdora/a.py", "tests/test_a.py") == "tests/test_a.py"
    assert reason([script], "constraints.txt") == "constraints.txt"
    assert reason([script], "qdora/a.py") is None
    assert reason([script, mark()], "launch/test.sh") is None
    assert reason([mark()], "launch/test.sh", "tests/test_a.py") is None


def test_packages_are_those_of_the_chosen_tests(tmp_path: Path) -> None:
    run_pytest(tmp_path, "--tier", "all", "--packages", str(tmp_path / "packages"))
    assert (tmp_path / "packages").read_text() == "munge\n"
    run_pytest(tmp_path, "--changed-since", "HEAD", "--packages", str(tmp_path / "packages"))
    assert (tmp_path / "packages").read_text() == ""


def test_worker_gets_a_whole_file_and_all_that_share_a_run(tmp_path: Path) -> None:
    """Each test of this file ran in one worker; so do those of files that use the same run."""
    (tmp_path / "test_other.py").write_text("".join(f"def test_{n}(): pass\n" for n in range(8)))
    done = run_pytest(tmp_path, "--tier", "all", "-n", "2", "--dist", "loadfile", str(tmp_path / "test_other.py"))
    for file in ("test_some", "test_other"):
        workers = {line.partition("]")[0] for line in done.splitlines() if "PASSED" in line and file in line}
        assert len(workers) == 1, done
    groups = {tiers.group_of(f"tests/e2e/{name}.py") for name in ("test_run", "test_faults", "test_traps")}
    assert groups == {"uninterrupted"}
    assert tiers.group_of("tests/e2e/test_methods.py") == "tests/e2e/test_methods.py"


def run_pytest(folder: Path, *options: str) -> str:
    """Runs the tests above with this plugin alone; returns what it prints."""
    (folder / "test_some.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = nightly: see tests/support/tiers.py\n")
    if not (folder / ".git").exists():
        git(folder, "init", "-q")
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", "all")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "tests.support.tiers", f"--rootdir={folder}", *options]
    done = run([*command, str(folder / "test_some.py")], cwd=folder)
    assert done.returncode in (0, 5), done.stdout + done.stderr
    return done.stdout
