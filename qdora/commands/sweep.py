"""`qdora train -m ...`: several runs, one for each combination of the values that options are given.

Hydra's sweeper makes the combinations, and its launcher (`hydra/launcher=`) calls `run_member` for each: here, in
another process, or on another machine. There the run is started as a process of its own, which leaves no memory behind
and whose failure is only its own. All that is told goes through the sweep's folder, which launchers have in common:

    output_dir/
      sweep.json, sweep.png       all members together
      multirun.yaml               Hydra's record of the sweep
      rank-8+seed-1/              the folder of a run, named after what it does not share with the others
      .members/NAME.json          how that run ended (`qdora.commands.sweep_results.Member`)
      .members/stop               a byte for each signal to the sweep, which runs pass on to their processes
"""

import ctypes
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from qdora.commands import run_hydra, typed
from qdora.commands.sweep_results import RECORDS, Member, bare, conclude, short
from qdora.config import RunConfig
from qdora.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, ConfigError, QdoraError
from qdora.files import lock
from qdora.interrupt import SIGNALS, TWICE_S
from qdora.rank_files import PR_SET_PDEATHSIG

TRAIN = "QDORA_TRAIN"
"""Environment variable: what starts a member, `launch/train.sh` when that was called; else one rank is started."""
POLL_S = 0.2
NAME_LENGTH = 120
STOP = f"{RECORDS}/stop"
_FOLDER = ("output_dir", "hydra.sweep.dir")
_OWN = ("output_dir", "run_id", "resume", "allow_changes")
"""Options that may differ between two starts of the same run."""


def sweep(arguments: list[str]) -> int:
    """Runs the sweep that the overrides say, or what is left of it; returns the exit status.

    0 where all runs are finished, 75 where the sweep was told to stop (the same command goes on), else that of the
    first run that is not.

    Raises:
        ConfigError: the overrides are not those of a sweep.
    """
    if "RANK" in os.environ:
        raise ConfigError("-m starts the ranks of each run itself: call launch/train.sh -m ... without torchrun")
    options = _parsed(arguments)
    swept = {_key(option) for option in options if option.is_sweep_override()}
    fixed = [option for option in options if _key(option) not in swept | set(_FOLDER)]
    folder = _folder(options)
    kept = [text for text in arguments if text not in {o.input_line for o in options if _key(o) in _FOLDER}]
    with _taken(folder) as began, _signals_told(folder / STOP):
        try:
            run_hydra(
                "train",
                ["--multirun", *kept, f"hydra.sweep.dir={_quoted(str(folder))}"],
                partial(run_member, fixed=frozenset(option.get_key_element() for option in fixed)),
            )
        finally:
            _end_workers()
            shared = [str(option.input_line) for option in fixed if not _key(option).startswith("hydra")]
            status = conclude(folder, shared, began)
        if (folder / STOP).stat().st_size == 0:
            return status
    print(f"interrupted; the same command goes on with what is left of the sweep in {folder}", flush=True)
    return EXIT_PREEMPTED


def _end_workers() -> None:
    """Those of joblib, which outlive what they were started for by minutes."""
    if "joblib" in sys.modules:
        sys.modules["joblib"].externals.loky.get_reusable_executor().shutdown()


def run_member(values: DictConfig, fixed: frozenset[str]) -> None:
    """One run of the sweep, unless it is finished already; called by Hydra's launcher, wherever that is.

    `fixed`: what all runs have in common, as far as it was given. Leaves its record, whatever happens.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a worker's: it hears of Ctrl-C by `stop`
        signal.signal(signal.SIGINT, lambda *_: None)
    hydra_config = HydraConfig.get()
    given = list(hydra_config.overrides.task)
    swept = {key: value for key, _, value in (text.partition("=") for text in given) if key not in fixed}
    folder = Path(hydra_config.runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    name = member_name(swept)
    record = folder / RECORDS / f"{name}.json"
    member = Member(number=hydra_config.job.num, overrides=swept, folder=str(folder / name))
    with suppress(OSError, ValueError, KeyError):
        member.seconds = json.loads(record.read_text(encoding="utf-8"))["seconds"]
    member.write(record)
    shown = f"== {member.number + 1}: {' '.join(f'{key}={value}' for key, value in swept.items()) or name}"
    try:
        config = typed(values, RunConfig)
        if _is_done(folder / name, config):
            print(f"{shown} is finished already", flush=True)
            member.exit_status = 0
        else:
            with _own_gpus(folder / RECORDS) as gpus:
                _start(member, given, config, gpus, shown)
    except QdoraError as error:
        member.exit_status, member.message = EXIT_USER_ERROR, str(error)
        print(f"{shown}\nqdora: {error}", file=sys.__stderr__, flush=True)
    if member.exit_status is not None:
        member.status = {0: "finished", EXIT_PREEMPTED: "preempted"}.get(member.exit_status, "failed")
    member.write(record)


def _start(member: Member, given: list[str], config: RunConfig, gpus: dict[str, str], shown: str) -> None:
    """Trains, unless the sweep is to end, and puts into `member` how that ended."""
    folder = Path(member.folder).parent
    if (folder / STOP).stat().st_size:
        member.status = "not started"
        return
    print(shown, flush=True)
    sweep_id = config.run_id or folder.name
    run_id = [] if "run_id" in member.overrides else [f"run_id={_quoted(f'{sweep_id}-{Path(member.folder).name}')}"]
    environment = {"WANDB_RUN_GROUP": sweep_id, **os.environ, **gpus}
    began = time.monotonic()
    arguments = [*given, *run_id, f"output_dir={_quoted(member.folder)}"]
    member.exit_status = _train(arguments, folder / STOP, environment)
    member.seconds += round(time.monotonic() - began, 1)


def member_name(swept: dict[str, str]) -> str:
    """The name of a run's folder: that of the command line, without what a shell or Hydra would want in quotes."""
    names = [short(key) for key in swept]
    said = "+".join(f"{key}-{value}" for key, value in zip(names, swept.values(), strict=True)) or "0"
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", said)[:NAME_LENGTH]
    unclear = name != said or len(set(names)) < len(names)
    return f"{name}-{_short_hash(*map(bare, swept), *swept.values())}" if unclear else name


def _is_done(path: Path, config: RunConfig) -> bool:
    """Whether the run in the folder `path` is finished, under these options.

    Raises:
        ConfigError: it is, under others.
    """
    if not (path / "summary.json").exists():
        return False
    # Here: these take seconds and memory that what only waits for its run can spare.
    from qdora.run_folder import RunFolder, config_values, flatten

    folder = RunFolder(path)
    if not folder.is_finished():
        return False
    ours, theirs = (flatten(config_values(values)) for values in (config, folder.read_config()))
    different = [name for name in ours if name not in _OWN and ours[name] != theirs.get(name)]
    if different and not config.allow_changes:
        pairs = ", ".join(f"{name}={theirs.get(name)} (now {ours[name]})" for name in different)
        raise ConfigError(
            f"{path} is finished and has {pairs}: use those values, another output_dir, or allow_changes=true to let "
            "it go on"
        )
    return not different


def _train(arguments: list[str], stop: Path, environment: dict[str, str]) -> int:
    """Trains in a process of its own, to which the signals in `stop` are passed on; returns its exit status."""
    launcher = os.environ.get(TRAIN)
    command = [launcher] if launcher else [sys.executable, "-m", "qdora", "train"]
    told = 0
    # A session of its own: what a terminal sends to all that runs in it comes here once, through `stop`.
    with subprocess.Popen(
        [*command, *arguments], env=environment, preexec_fn=_as_member, start_new_session=True
    ) as process:
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
    machine = _short_hash(socket.gethostname(), os.environ.get("SLURM_JOB_ID", ""))
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
def _taken(folder: Path) -> Iterator[float]:
    """Makes the folder and locks it; gives the time by the clock of its file system.

    Raises:
        ConfigError: it is a run's, another sweep is going on in it, or it cannot be made.
    """
    if (folder / "config.yaml").exists():
        raise ConfigError(f"output_dir={folder} is the folder of a run: give the sweep another")
    try:
        (folder / RECORDS).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / RECORDS, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"output_dir={folder} cannot be made: {error}") from None
    try:
        if not lock(descriptor):
            raise ConfigError(f"a sweep is going on in {folder}: wait for its end, stop it, or give another output_dir")
        (folder / STOP).write_bytes(b"")
        yield (folder / STOP).stat().st_mtime
    finally:
        os.close(descriptor)


@contextmanager
def _signals_told(stop: Path) -> Iterator[None]:
    """Writes a byte to `stop` for each signal.

    They are blocked, and what a launcher starts inherits that: Ctrl-C in a terminal goes to all of it, which would end
    and take its runs with it. Libraries have threads that do not block them, or unblock them: hence the handlers.
    """
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = [number for number in SIGNALS if not (nohup and number is signal.SIGHUP)]
    times: list[float] = []

    def tell(*_: object) -> None:
        if times and time.monotonic() - times[-1] < TWICE_S:
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


def _parsed(arguments: list[str]) -> list[Override]:
    """The overrides among the arguments; what is wrong with the others Hydra says itself."""
    parser, options = OverridesParser.create(), []
    for argument in arguments:
        with suppress(HydraException):
            options.append(parser.parse_override(argument))
    return options


def _key(option: Override) -> str:
    return str(option.key_or_group)


def _folder(options: list[Override]) -> Path:
    """The sweep's folder: what `output_dir` says, else one whose name the same options always get.

    Raises:
        ConfigError: `output_dir` is empty, or several.
    """
    given = [option for option in options if _key(option) in _FOLDER]
    if not given:
        texts = sorted(str(option.input_line) for option in options if not _key(option).startswith("hydra"))
        return Path("outputs", f"sweep-{_short_hash(*texts)}")
    if given[-1].is_sweep_override() or not given[-1].value():
        raise ConfigError(f"{given[-1].input_line}: give one folder, in which each run of the sweep gets its own")
    return Path(str(given[-1].value()))


def _quoted(value: str) -> str:
    """As Hydra takes any text."""
    return "'" + value.replace("'", "\\'") + "'"


def _short_hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]
