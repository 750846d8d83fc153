"""A process that is forked from a warm one is what a new interpreter would be."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support import warm
from tests.support.processes import popen, run
from tests.support.warm_process import RELOAD, Program, can_retitle

TELL = """
import json, os, signal, sys, threading
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd(), "name": __name__,
    "environ": dict(os.environ), "session": os.getsid(0) == os.getpid(), "threads": threading.active_count(),
    "command": open("/proc/self/cmdline", "rb").read().decode().split("\\0")[:-1],
    "started_with": open("/proc/self/environ", "rb").read().decode().split("\\0")[:-1],
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "pipe": signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN,
    "files": sorted(os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if int(n) > 2),
    "imported": "torch" in sys.modules, "main": sys.modules["__main__"].__dict__ is globals(),
}))
"""


def told(*, cold: bool, cwd: Path, session: bool = False) -> dict[str, object]:
    """Returns what a process says of itself."""
    command = [sys.executable, "-c", TELL, "one", "zwei ü"]
    with popen(command, cwd=cwd, cold=cold, session=session, stderr=subprocess.PIPE, RANK="7") as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    found: dict[str, object] = json.loads(stdout)
    return found


@pytest.mark.skipif(not can_retitle(), reason="this kernel does not let a process change its command line")
@pytest.mark.parametrize("session", [False, True])
def test_warm_process_is_as_a_cold_one(tmp_path: Path, session: bool) -> None:
    one, other = (told(cold=cold, cwd=tmp_path, session=session) for cold in (False, True))
    assert one.pop("imported")
    assert not other.pop("imported")
    assert {file for file in one.pop("files") if not file.startswith("/proc/")} == {"/dev/null"}  # type: ignore[attr-defined]
    other.pop("files")
    assert sorted(one.pop("started_with")) == sorted(other.pop("started_with"))  # type: ignore[call-overload]
    assert one == other


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("", 0),
        ("raise SystemExit(7)", 7),
        ("raise SystemExit('why')", 1),
        ("1 / 0", 1),
        ("import os; os._exit(9)", 9),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("raise KeyboardInterrupt", -signal.SIGINT),
    ],
)
def test_exit_status_and_output_are_those_of_a_cold_one(code: str, status: int) -> None:
    whole = (
        f"import atexit, sys; atexit.register(print, 'at the end'); print('out'); print('err', file=sys.stderr)\n{code}"
    )
    one, other = (run([sys.executable, "-c", whole], cold=cold) for cold in (False, True))
    assert one.returncode == other.returncode == status
    assert one.stdout == other.stdout
    assert one.stderr.splitlines()[:1] == ["err"]
    assert one.stderr.splitlines()[-1] == other.stderr.splitlines()[-1]


def test_signals_reach_it_and_it_ends_as_it_wants() -> None:
    code = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('on', flush=True)\ntime.sleep(60)"
    )
    process = popen([sys.executable, "-c", code], session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    assert psutil.Process(process.pid).status() in (psutil.STATUS_RUNNING, psutil.STATUS_SLEEPING)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == 75
    assert not psutil.pid_exists(process.pid)


@pytest.mark.parametrize("options", [{"OMP_NUM_THREADS": "2"}, {"MALLOC_MMAP_THRESHOLD_": "65536"}, {"HF_HOME": "/x"}])
def test_what_is_read_at_load_makes_a_cold_start(options: dict[str, str]) -> None:
    done = run([sys.executable, "-c", "import sys; print('torch' in sys.modules)"], **options)
    assert done.stdout == "False\n"


def test_interpreter_options_and_other_programs_are_cold() -> None:
    read = Program.read
    assert read(["bash", "-c", "true"]) is None
    assert read([sys.executable, "-X", "dev", "script.py"]) is None
    assert read([sys.executable, "-u", "-m", "qdora", "train", "-m"]) == Program(
        [sys.executable, "-u", "-m", "qdora", "train", "-m"], "-m", "qdora", ["train", "-m"], True, False
    )


def test_ranks_are_the_launchers_children(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, torch\nfrom pathlib import Path\n"
        "Path(sys.argv[1], os.environ['RANK']).write_text(f'{os.getpid()} {os.getppid()} {__name__}')\n"
    )
    command = [sys.executable, "-m", "qdora.commands.launch", "--standalone", "--nproc-per-node", "2", str(script)]
    with popen([*command, str(tmp_path)]) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    ranks = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    assert len({rank[0] for rank in ranks}) == 2
    assert [rank[1:] for rank in ranks] == [[str(process.pid), "__main__"]] * 2


def test_what_loads_a_merge_is_forked_too() -> None:
    """What else this process starts is not."""
    with subprocess.Popen([sys.executable, "-P", str(RELOAD)], stderr=subprocess.PIPE, text=True) as process:
        _, stderr = process.communicate(timeout=60)
    assert isinstance(process, warm.PopenOfMerge)
    assert process._status is not None
    assert (process.returncode, stderr.splitlines()[-1]) == (1, "IndexError: list index out of range")
    with subprocess.Popen([sys.executable, "-c", ""]) as other:
        assert other.wait(60) == 0
    assert isinstance(other, warm.PopenOfMerge)
    assert other._status is None
