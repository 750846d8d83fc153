"""A Slurm of two nodes on this machine, with munge of its own, for as long as a block."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
PATIENCE_S = 90
CONFIG = """
ClusterName=qdora
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""
"""`linuxproc` and `none` instead of cgroups, which a container may not make. KillWait: time to save on loaded cores."""


def missing() -> str | None:
    """Why there can be no Slurm here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{absent[0]} is not installed (apt-get install slurm-wlm munge)"
    return "Slurm's daemons want to be root" if os.geteuid() else None


@contextmanager
def cluster() -> Iterator[Path]:
    """Its slurm.conf, once both nodes are idle; the environment points to it. Skips the test where that cannot be."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="qdora-slurm-"))  # short: a path of a socket has 107 characters at most
    folder.chmod(0o755)
    with ExitStack() as at_exit:
        at_exit.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        (folder / "state").mkdir()
        config = folder / "slurm.conf"
        config.write_text(
            CONFIG.format(host=socket.gethostname().partition(".")[0], ports=free_ports(3), folder=folder)
        )
        environment = {**os.environ, "SLURM_CONF": str(config)}
        names = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        files = [f"--{option}={folder / name}" for option, name in names.items()]
        for daemon in (
            ["munged", "--foreground", "--force", f"--log-file={folder}/munge.log", *files],
            ["slurmctld", "-D", "-f", str(config)],
            ["slurmd", "-D", "-f", str(config), "-N", "n1"],
            ["slurmd", "-D", "-f", str(config), "-N", "n2"],
        ):
            log = at_exit.enter_context((folder / f"{daemon[0]}.out").open("ab"))
            # Of a session of its own: Ctrl-C must not end it before what it runs has been cancelled.
            process = subprocess.Popen(daemon, env=environment, stdout=log, stderr=log, start_new_session=True)
            at_exit.callback(_end, process)
        at_exit.callback(_cancel_all, environment)
        deadline = time.monotonic() + PATIENCE_S
        while _output(["sinfo", "-h", "-o", "%T"], environment).split() != ["idle"]:
            if time.monotonic() > deadline:
                logs = "".join(file.read_text()[-1500:] for file in folder.glob("*.log"))
                raise AssertionError(f"Slurm's nodes did not become idle in {PATIENCE_S} s\n{logs}")
            time.sleep(0.5)
        yield config


def _output(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _cancel_all(environment: dict[str, str]) -> None:
    """A step would outlive slurmd."""
    with suppress(subprocess.TimeoutExpired):
        _output(["scancel", "--signal=KILL", "--full", "--user=root"], environment)
        _output(["scancel", "--user=root"], environment)
        deadline = time.monotonic() + 20
        while _output(["squeue", "-h"], environment).strip() and time.monotonic() < deadline:
            time.sleep(0.5)


def free_ports(number: int) -> list[int]:
    """Of this machine, as nobody listens at them now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
