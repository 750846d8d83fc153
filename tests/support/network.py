"""Two machines as the kernel can make them: network namespaces with a cable between, names that resolve nowhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.processes import ROOT

PATIENCE_S = 180


class Machine:
    """One of the two."""

    def __init__(self, namespace: str, link: str, address: str) -> None:
        self.namespace, self.link, self.address = namespace, link, address

    def ip(self, *arguments: str) -> None:
        """Runs `ip` in this machine."""
        subprocess.run(["ip", "-n", self.namespace, *arguments], check=True, capture_output=True)

    def know(self, name: str, address: str) -> None:
        """Lets a name resolve here, as a line in /etc/hosts does."""
        self.hosts.parent.mkdir(parents=True, exist_ok=True)
        known = self.hosts if self.hosts.exists() else Path("/etc/hosts")
        self.hosts.write_text(f"{known.read_text()}\n{address} {name}\n")

    @property
    def hosts(self) -> Path:
        """What `ip netns exec` puts in the place of /etc/hosts."""
        return Path("/etc/netns") / self.namespace / "hosts"

    def plug(self) -> None:
        """Joins the link."""
        self.ip("link", "set", self.link, "up")

    def unplug(self) -> None:
        """Cuts the link: what is sent gets lost, and nobody is told."""
        self.ip("link", "set", self.link, "down")

    def slow_down(self, rate: str) -> None:
        """Lets no more than `rate` out."""
        shaping = ["tbf", "rate", rate, "burst", "16kbit", "latency", "400ms"]
        subprocess.run(["tc", "-n", self.namespace, "qdisc", "add", "dev", self.link, "root", *shaping], check=True)

    def kill(self) -> None:
        """Ends all that runs here, as a loss of power does."""
        found = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False)
        for process in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def start(
        self, head: str, run_id: str, overrides: list[str], cwd: Path, own: Path | None = None, **environment: str
    ) -> "Run":
        """`launch/multinode.sh` with one rank; on this machine `own` is another folder than elsewhere."""
        mounted = f"mount -t tmpfs tmpfs {own} && " if own is not None else ""
        named = ["unshare", "--uts", "sh", "-c", f'{mounted}hostname {self.namespace} && exec "$@"', "sh"]
        command = ["ip", "netns", "exec", self.namespace, *named, str(ROOT / "launch" / "multinode.sh"), *overrides]
        variables = {
            **os.environ,
            "PYTHON": sys.executable,
            "NPROC": "1",
            "HEAD": head,
            "RUN_ID": run_id,
            **environment,
        }
        log = cwd / f"{self.namespace}-{time.monotonic_ns()}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=cwd, env=variables, stdout=file, stderr=file, start_new_session=True
            )
        return Run(process, log)


class Run:
    """A command that was started, and what it has printed."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process, self.log = process, log

    @property
    def told(self) -> str:
        return self.log.read_text()

    def end(self, status: int = 0) -> str:
        """What it has printed when it has ended, with that status."""
        ended = self.process.wait(PATIENCE_S)
        assert ended == status, self.told[-3000:]
        return self.told

    def reach(self, folder: Path, steps: int) -> None:
        """Waits for so many steps of the run in `folder`."""
        self._wait(lambda: steps_of(folder) >= steps, f"{steps} steps")

    def say(self, words: str) -> None:
        """Waits until it has printed them."""
        self._wait(lambda: words in self.told, words)

    def _wait(self, come: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not come():
            ended = self.process.poll() is not None or time.monotonic() > deadline
            assert not ended, f"no {what}: {self.told[-3000:]}"
            time.sleep(0.05)


def steps_of(folder: Path) -> int:
    """The last step that metrics.jsonl has."""
    with suppress(FileNotFoundError, ValueError):  # a line under way
        return max((json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()), default=0)
    return 0


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """They and all that runs on them are gone afterwards. Skips the test where they cannot be."""
    name = f"qdora-{uuid.uuid4().hex[:6]}"
    machines = [Machine(f"{name}-{letter}", f"link-{letter}", f"10.77.0.{n}") for letter, n in (("a", 1), ("b", 2))]
    try:
        for machine in machines:
            _or_skip(["ip", "netns", "add", machine.namespace])
        one, two = machines
        cable = ["type", "veth", "peer", "name", two.link, "netns", two.namespace]
        _or_skip(["ip", "link", "add", one.link, "netns", one.namespace, *cable])
        for machine in machines:
            machine.ip("address", "add", f"{machine.address}/24", "dev", machine.link)
            machine.ip("link", "set", "lo", "up")
            machine.plug()
        yield one, two
    finally:
        for machine in machines:
            machine.kill()
            subprocess.run(["ip", "netns", "delete", machine.namespace], capture_output=True, check=False)
            shutil.rmtree(machine.hosts.parent, ignore_errors=True)


def _or_skip(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"{command[0]} is not installed (apt-get install iproute2)")
    if done.returncode:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")
