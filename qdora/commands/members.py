"""One run among several, a process of its own: which leaves no memory behind, and whose failure is only its own.

Hydra's launcher (`hydra/launcher=`) calls `run_member` for each: here, in another process, or on another machine. All
that is told goes through the folder that the runs have in common:

    output_dir/
      rank-8+seed-1/              the folder of a run
      .members/NAME.json          how that run ended (`qdora.commands.sweep_results.Member`)
      .members/stop               a byte for each signal, which runs pass on to their processes
"""

import ctypes
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from qdora.changes import differing, with_one_epoch
from qdora.changes import shown as shown_changes
from qdora.commands import run_hydra, typed
from qdora.commands.spelling import replace_mappings
from qdora.commands.sweep_results import RECORDS, Member, bare, short
from qdora.config import RunConfig
from qdora.config.commands import written
from qdora.config.values import config_values, flatten
from qdora.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, ConfigError, QdoraError
from qdora.files import lock, read_json
from qdora.interrupt import heard_signals
from qdora.rank_files import PR_SET_PDEATHSIG
from qdora.run_folder import RunFolder
from qdora.waits import wait_s

TRAIN = "QDORA_TRAIN"
"""Environment variable: what starts a run, `launch/train.sh` when that was called; else NPROC ranks are started."""
CELL = "cell"
"""Group of choices, each of them a run of a study."""
POLL_S = 0.2
NAME_LENGTH = 120
STOP = f"{RECORDS}/stop"
_OWN = ("output_dir", "run_id", "resume", "allow_changes", "plan.on_exceed", "train.report")
"""Options that may differ between two starts of the same run."""


def run_members(
    folder: Path,
    arguments: Sequence[str],
    fixed: frozenset[str],
    cells: Mapping[str, Sequence[str]] | None = None,
    evaluation: list[str] | None = None,
) -> None:
    """Trains what Hydra's sweeper makes of the arguments, each run in a folder of its own in `folder`.

    Args:
        fixed: options that all runs have in common.
        cells: what `+cell=NAME` stands for, and where it is given the name of the run's folder; else runs are named
            after what they do not share.
        evaluation: options of `qdora evaluate` for every run that is finished.

    Raises:
        ConfigError: the arguments are not those of runs.
    """
    try:
        run_hydra(
            "train",
            ["--multirun", *arguments, f"hydra.sweep.dir={written(str(folder))}"],
            partial(run_member, fixed=fixed, cells=cells or {}, evaluation=evaluation),
        )
    finally:
        _end_workers()


def _end_workers() -> None:
    """Those of joblib, which outlive what they were started for by minutes."""
    if "joblib" in sys.modules:
        sys.modules["joblib"].externals.loky.get_reusable_executor().shutdown()


def run_member(
    values: DictConfig,
    fixed: frozenset[str],
    cells: Mapping[str, Sequence[str]],
    evaluation: list[str] | None,
) -> None:
    """One run of several, unless it is finished already; called by Hydra's launcher, wherever that is.

    The arguments are those of `run_members`. Leaves its record, whatever happens.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a worker's: it hears of Ctrl-C by `stop`
        signal.signal(signal.SIGINT, lambda *_: None)
    hydra_config = HydraConfig.get()
    given = list(hydra_config.overrides.task)
    swept = _split(text for text in given if text.partition("=")[0] not in fixed)
    cell = swept.get(f"+{CELL}")
    if cell is not None:
        swept = _split(cells[cell])
        given = [text for text in given if not text.startswith(f"+{CELL}=")] + [*cells[cell]]
    folder = Path(hydra_config.runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    name = cell or member_name(swept)
    record = folder / RECORDS / f"{name}.json"
    member = Member(number=hydra_config.job.num, overrides=swept, folder=str(folder / name))
    member.seconds = read_json(record).get("seconds", 0.0)
    member.write(record)
    shown = f"== {member.number + 1}: {' '.join(f'{key}={value}' for key, value in swept.items()) or name}"
    try:
        replace_mappings(values, given, RunConfig)
        config = typed(values, RunConfig)
        if _is_done(folder / name, config):
            changes = "; ".join(shown_changes(RunFolder(folder / name).read_changes()))
            print(f"{shown} is finished already" + (f" ({changes})" if changes else ""), flush=True)
            member.exit_status = 0
        else:
            with _own_gpus(folder / RECORDS) as gpus:
                _start(member, given, config, gpus, shown)
        if evaluation is not None and member.exit_status == 0:
            with _own_gpus(folder / RECORDS) as gpus:
                _evaluate(member, evaluation, gpus)
    except QdoraError as error:
        member.exit_status, member.message = EXIT_USER_ERROR, str(error)
        print(f"{shown}\nqdora: {error}", file=sys.__stderr__, flush=True)
    if member.exit_status is not None:
        member.status = {0: "finished", EXIT_PREEMPTED: "preempted"}.get(member.exit_status, "failed")
    member.write(record)


def _split(overrides: Iterable[str]) -> dict[str, str]:
    return {key: value for key, _, value in (text.partition("=") for text in overrides)}


def _start(member: Member, given: list[str], config: RunConfig, gpus: dict[str, str], shown: str) -> None:
    """Trains, unless the sweep is to end, and puts into `member` how that ended."""
    folder = Path(member.folder).parent
    if (folder / STOP).stat().st_size:
        member.status = "not started"
        return
    print(shown, flush=True)
    sweep_id = config.run_id or folder.name
    run_id = [] if "run_id" in member.overrides else [f"run_id={written(f'{sweep_id}-{Path(member.folder).name}')}"]
    environment = {"WANDB_RUN_GROUP": sweep_id, **os.environ, **gpus}
    began = time.monotonic()
    arguments = [*given, *run_id, f"output_dir={written(member.folder)}"]
    launcher = os.environ.get(TRAIN)
    command = [launcher] if launcher else [*_ranks(), "train"]
    member.exit_status = run_process([*command, *arguments], folder / STOP, environment)
    member.seconds += round(time.monotonic() - began, 1)


def _evaluate(member: Member, options: list[str], gpus: dict[str, str]) -> None:
    """Scores a finished run, unless it is to end."""
    folder = Path(member.folder)
    stop = folder.parent / STOP
    if stop.stat().st_size:
        member.status, member.exit_status = "not started", None
        return
    arguments = [f"run={written(str(folder))}", *options, f"output_dir={written(str(folder / 'evaluation'))}"]
    began = time.monotonic()
    member.exit_status = evaluate(arguments, stop, {**os.environ, **gpus})
    member.seconds += round(time.monotonic() - began, 1)


def evaluate(arguments: Sequence[str], stop: Path, environment: dict[str, str]) -> int:
    """`qdora evaluate` in a process of its own; returns its exit status."""
    status = run_process([*_ranks(), "evaluate", *arguments], stop, environment)
    return EXIT_PREEMPTED if stop.stat().st_size and status else status


def _ranks() -> list[str]:
    """What starts `qdora` on as many ranks as NPROC says."""
    nproc = os.environ.get("NPROC", "1")
    launcher = [] if nproc == "1" else ["qdora.commands.launch", "--standalone", "--nproc-per-node", nproc, "-m"]
    return [sys.executable, "-m", *launcher, "qdora"]


def member_name(swept: dict[str, str]) -> str:
    """The name of a run's folder: that of the command line, without what a shell or Hydra would want in quotes."""
    names = [short(key) for key in swept]
    said = "+".join(f"{key}-{value}" for key, value in zip(names, swept.values(), strict=True)) or "0"
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", said)[:NAME_LENGTH]
    unclear = name != said or len(set(names)) < len(names)
    return f"{name}-{short_hash(*map(bare, swept), *swept.values())}" if unclear else name


def _is_done(path: Path, config: RunConfig) -> bool:
    """Whether the run in the folder `path` is finished, under these options.

    Raises:
        ConfigError: it is, under others.
    """
    if not (path / "summary.json").exists():
        return False
    # Here: these take seconds and memory that what only waits for its run can spare.
    from qdora.planning.length import resumed
    from qdora.run_inputs import replaced

    folder = RunFolder(path)
    if not folder.is_finished():
        return False
    stored = folder.read_config()
    # What was left open is as the size of the data has made it.
    then, rows = asdict(stored.train), stored.train.micro_batch_size * (stored.train.num_accumulation_steps or 1)
    made = replace(config, train=resumed(config.train, then, rows, num_ranks=1))
    ours, theirs = flatten(config_values(made)), with_one_epoch(flatten(config_values(stored)))
    different = differing(ours, theirs, _OWN)
    others = [] if different else replaced(folder, config)
    if others and not config.allow_changes:
        raise ConfigError(
            f"{path} is finished, and what {' and '.join(others)} names is not what it was trained with: restore it, "
            "or give another output_dir"
        )
    if different and not config.allow_changes:
        pairs = ", ".join(f"{name}={theirs.get(name)} (now {ours[name]})" for name in different)
        raise ConfigError(
            f"{path} is finished and has {pairs}: use those values or another output_dir (qdora train -m goes on with "
            "it under allow_changes=true)"
        )
    return not different and not others


def run_process(command: Sequence[str], stop: Path, environment: dict[str, str]) -> int:
    """Runs a process to which the signals in `stop` are passed on; returns its exit status."""
    told = 0
    # A session of its own: what a terminal sends to all that runs in it comes here once, through `stop`.
    with subprocess.Popen(command, env=environment, preexec_fn=_as_member, start_new_session=True) as process:
        while (status := _wait(process)) is None:
            if (signals := stop.stat().st_size) > told:
                told = signals
                process.terminate()
    if told and status == -signal.SIGTERM:  # before it began to listen, when nothing can be lost
        return EXIT_PREEMPTED
    return 128 - status if status < 0 else status


def _wait(process: "subprocess.Popen[bytes]") -> int | None:
    try:
        return process.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return None


def _as_member() -> None:
    """In the new process: it hears signals again, and the end of the one that started it is one."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _own_gpus(folder: Path) -> Iterator[dict[str, str]]:
    """Gives CUDA_VISIBLE_DEVICES: of the machine's GPUs as many as NPROC says, which no other run of the sweep has.

    Waits until there are some. Without NPROC, or where all GPUs are just enough, nothing: each run has all.
    """
    ranks, known = os.environ.get("NPROC", ""), os.environ.get("CUDA_VISIBLE_DEVICES")
    if ranks and known is None:
        import torch  # here, as in _is_done

        known = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = (known or "").split(",")
    places = len(gpus) // int(ranks) if ranks.isdecimal() and int(ranks) else 0
    machine = short_hash(socket.gethostname(), os.environ.get("SLURM_JOB_ID", ""))
    while places > 1:
        for place in range(places):
            descriptor = os.open(folder / f"gpus-{machine}-{place}", os.O_CREAT | os.O_RDWR)
            try:
                if lock(descriptor):
                    yield {"CUDA_VISIBLE_DEVICES": ",".join(gpus[place * int(ranks) :][: int(ranks)])}
                    return
            finally:
                os.close(descriptor)
        time.sleep(POLL_S)
    yield {}


@contextmanager
def taken(folder: Path) -> Iterator[float]:
    """Makes the folder of several runs and locks it; gives the time by the clock of its file system.

    Raises:
        ConfigError: it is a run's, another sweep or study is going on in it, or it cannot be made.
    """
    if (folder / "config.yaml").exists():
        raise ConfigError(f"output_dir={folder} is the folder of a run: give another")
    try:
        (folder / RECORDS).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / RECORDS, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"output_dir={folder} cannot be made: {error}") from None
    try:
        if not lock(descriptor):
            raise ConfigError(f"runs are started in {folder} by another: wait, stop it, or give another output_dir")
        (folder / STOP).write_bytes(b"")
        yield (folder / STOP).stat().st_mtime
    finally:
        os.close(descriptor)


@contextmanager
def signals_told(stop: Path) -> Iterator[None]:
    """Writes a byte to `stop` for each signal.

    They are blocked, and what a launcher starts inherits that: Ctrl-C in a terminal goes to all of it, which would end
    and take its runs with it. Libraries have threads that do not block them, or unblock them: hence the handlers.
    """
    heard = heard_signals()
    times: list[float] = []

    def tell(*_: object) -> None:
        if times and time.monotonic() - times[-1] < wait_s("QDORA_TWICE_S"):
            return
        times.append(time.monotonic())
        with stop.open("ab") as file:
            file.write(b".")
        if len(times) == 1:
            message = "qdora: what runs saves and ends, and nothing else starts; another signal ends it at once"
            print(message, file=sys.__stderr__, flush=True)

    def listen() -> None:
        while not over.is_set():
            if signal.sigtimedwait(heard, POLL_S):
                tell()

    over = threading.Event()
    listener = threading.Thread(target=listen, daemon=True)
    handlers = {number: signal.signal(number, tell) for number in heard}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    listener.start()
    try:
        yield
    finally:
        over.set()
        listener.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def short_hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]
