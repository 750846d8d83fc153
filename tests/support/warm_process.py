"""What a warm process is made of: the server that forks, and what a fork does to be as a new interpreter.

`python -m tests.support.warm_process FD` is the server of `tests.support.warm`, which has the whole story.
"""

import atexit
import ctypes
import faulthandler
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
import warnings
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.support import ROOT

LATER_PREFIXES = (
    *("QDORA_", "WANDB_", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_ELASTIC_", "TORCH_NCCL_"),
    *("NCCL_", "GLOO_", "HYDRA_", "PYTEST_", "COVERAGE_", "SLURM_"),
)
READ_LATER = {
    *("RANK", "WORLD_SIZE", "NPROC", "RUN_ID", "PATH", "TMPDIR", "PWD", "OLDPWD", "SHLVL", "_"),
    *("COLUMNS", "LINES", "TERM", "PYTHONUNBUFFERED", "TORCHINDUCTOR_CACHE_DIR"),
    *("HF_XET_HIGH_PERFORMANCE", "ORT_LIB_PATH", "KINETO_LOG_LEVEL"),
}
"""Variables, with `LATER_PREFIXES`, that are read when they are used, or that libraries set and no test looks at. A
difference in any other is for a new interpreter."""
STARTERS = ("qdora.commands.launch", "torch.distributed.run")
"""Modules whose processes start others and compute nothing; sweeps and studies do, too."""
MODULES = (
    *("torch.distributed.run", "torch._dynamo", "transformers.generation", "hydra.main", "psutil"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "accelerate", "gguf", "safetensors.torch"),
    *(
        f"transformers.models.{name}.modeling_{name}"
        for name in ("llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3")
    ),
)
"""What the server imports beside all of qdora."""
RELOAD = ROOT / "qdora" / "merging" / "reload.py"
STATUS = struct.Struct("i")
_LOADED_WITH: dict[str, str] = {}
_NEVER_FREED: list[Any] = []


@dataclass(frozen=True, slots=True)
class Program:
    """What a new interpreter would run: `python [-u] [-P] (-m MODULE | -c CODE | SCRIPT) ARGUMENTS...`."""

    command: list[str]
    kind: str
    """"-m", "-c" or "script"."""
    name: str
    """The module, the code or the script's path."""
    arguments: list[str]
    unbuffered: bool
    safe_path: bool

    @staticmethod
    def read(command: list[str]) -> "Program | None":
        """Returns the program of a command line, or None where it is not this interpreter's or has other options."""
        if not command or command[0] != sys.executable:
            return None
        unbuffered = safe_path = False
        for index, word in enumerate(command[1:], start=1):
            if word == "-u":
                unbuffered = True
            elif word == "-P":
                safe_path = True
            elif word in ("-m", "-c") and len(command) > index + 1:
                return Program(command, word, command[index + 1], command[index + 2 :], unbuffered, safe_path)
            elif word.startswith("-"):
                return None
            else:
                return Program(command, "script", word, command[index + 1 :], unbuffered, safe_path)
        return None

    @property
    def reads_a_merge(self) -> bool:
        """Whether its process is a merge's second one, in which nothing of qdora may compute."""
        return self.kind == "script" and Path(self.name) == RELOAD

    @property
    def starts_one_later(self) -> bool:
        """Whether its process starts another one that computes, after it has computed itself."""
        return self.kind == "-m" and self.name == "qdora" and self.arguments[:1] == ["merge"]

    @property
    def starts_others(self) -> bool:
        """Whether its process starts warm ones itself."""
        sweeps = self.arguments[:1] == ["study"] or not {"-m", "--multirun"}.isdisjoint(self.arguments)
        return self.kind == "-m" and (self.name in STARTERS or (self.name == "qdora" and sweeps))


def needs_new_interpreter(environment: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Tells whether two environments differ in a variable that a library may have read while it was loaded."""
    different = {name for name in environment.keys() | other.keys() if environment.get(name) != other.get(name)}
    if "PYTHONPATH" not in environment:  # a folder of it could have a sitecustomize.py
        different -= {"PYTHONPATH"}
    return not all(name in READ_LATER or name.startswith(LATER_PREFIXES) for name in different)


@dataclass(frozen=True, slots=True)
class Start:
    """What `subprocess.Popen._execute_child` is asked for, where a fork can do it."""

    program: Program
    environment: dict[str, str]
    cwd: str
    session: bool
    preexec: Any
    streams: list[int]
    """Descriptors of stdin, stdout and stderr."""
    to_close: tuple[int, ...]

    @staticmethod
    def read(args: Any, others: tuple[Any, ...]) -> "Start | None":
        """Returns what is asked for, or None where it is another program's, or has what only `execve` does."""
        executable, preexec, close_fds, pass_fds, cwd, environment, _, _, shell, *rest = others
        *streams, _, group, groups, user, umask, session, process_group = rest
        program = None if isinstance(args, (str, bytes)) else Program.read(list(map(os.fspath, args)))
        rights = (group, groups, user) != (None, None, None) or umask != -1 or process_group != -1
        other = executable not in (None, sys.executable) or not close_fds
        if program is None or other or pass_fds or shell or rights:
            return None
        wanted = (streams[0], streams[3], streams[5])
        return Start(
            program,
            dict(os.environ if environment is None else environment),
            os.fspath(cwd or Path.cwd()),
            bool(session),
            preexec,
            [stream if stream != -1 else number for number, stream in enumerate(wanted)],
            tuple(streams),
        )


def serve(descriptor: int) -> None:
    """Imports everything, then forks a process for each request that comes by the socket, until it is closed."""
    _LOADED_WITH.update(os.environ)
    _import_all()
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=descriptor) as channel:
        _fork_for(channel)


def _fork_for(channel: socket.socket) -> None:
    assert threading.active_count() == 1, threading.enumerate()
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a library has started a thread"
    read, write = os.pipe()
    os.set_blocking(write, False)
    os.set_blocking(read, False)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for pytest, which closes the socket
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    statuses: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([channel, read], [], [])
        if read in ready:
            os.read(read, 4096)
            _reap(statuses)
        if channel in ready:
            message, descriptors, _, _ = socket.recv_fds(channel, 2**20, 4)
            if not message:
                return
            *streams, status = descriptors
            process = os.fork()
            if process == 0:
                signal.set_wakeup_fd(-1)
                request = json.loads(message)
                os.close(status)
                become(Program(**request.pop("program")), streams=streams, forked_from_server=True, **request)
            statuses[process] = status
            with suppress(BrokenPipeError):
                os.write(status, STATUS.pack(process))
            for stream in streams:
                os.close(stream)
            _reap(statuses)


def _reap(statuses: dict[int, int]) -> None:
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if process == 0:
            return
        descriptor = statuses.pop(process, None)
        if descriptor is None:
            continue
        with suppress(BrokenPipeError):  # nobody waits for it
            os.write(descriptor, STATUS.pack(status))
        os.close(descriptor)


def _import_all() -> None:
    import qdora

    for name in MODULES:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(qdora.__path__, "qdora."):
        if module.name.rpartition(".")[2] not in ("__main__", "harness", "reload", "triton_kernels"):
            importlib.import_module(module.name)
    qdora.cpu_products.install()  # scripts of tests, too, which start no world


def become(
    program: Program,
    *,
    environment: dict[str, str],
    cwd: str,
    session: bool,
    streams: list[int],
    forked_from_server: bool,
) -> NoReturn:
    """Makes this forked process what a new interpreter with this program would be, runs it and ends."""
    status = 1
    try:
        if session:
            os.setsid()
        os.chdir(cwd)
        _take_streams(streams, program.unbuffered or bool(environment.get("PYTHONUNBUFFERED")))
        _reset_signals()
        os.environ.clear()
        os.environ.update(environment)
        _retitle(program.command, environment)
        sys.orig_argv[:] = program.command
        tempfile.tempdir = None
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        if not forked_from_server:
            _forget_parent()
        gc.enable()
        if program.starts_others:
            # Python 3.12 warns of a fork beside threads, of which torchrun's agent has some; they hold nothing of ours.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            subprocess.Popen._execute_child = _fork_or_execute  # type: ignore[attr-defined]
        elif program.starts_one_later:
            _start_server()
        if program.reads_a_merge:
            sys.modules["qdora.cpu_products"]._library()._destroy()
        status = _run(program)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                status = status or 120  # as the interpreter does
        os._exit(status)


def _start_server() -> None:
    """Lets this process start others by a server of its own, which is forked before anything is computed."""
    from tests.support import warm

    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        here.close()
        _fork_for(there)
        os._exit(0)
    there.close()
    warm.Server.take(here, _LOADED_WITH)
    subprocess.Popen = warm.PopenOfMerge  # type: ignore[misc]


def _take_streams(streams: list[int], unbuffered: bool) -> None:
    """Makes the descriptors 0, 1 and 2, and closes what a new interpreter would not have got."""
    high = [os.dup(stream) for stream in streams]
    while min(high) <= 2:
        high = [os.dup(descriptor) for descriptor in high]
    for number, descriptor in enumerate(high):
        os.dup2(descriptor, number, inheritable=True)
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if name > 2 and name != nothing and Path(f"/proc/self/fd/{name}").is_symlink():
            # Not closed: an object of the parent may close its number later, which could be another file's by then.
            os.dup2(nothing, name, inheritable=False)
    _NEVER_FREED.extend([sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
        buffer: Any = io.BufferedReader(raw) if number == 0 else raw if unbuffered else io.BufferedWriter(raw)
        errors = "backslashreplace" if name == "stderr" else "strict"
        by_line = name == "stderr" or (number == 1 and os.isatty(number))
        text = io.TextIOWrapper(
            buffer, "utf-8", errors, line_buffering=by_line, write_through=unbuffered and number > 0
        )
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)


def _reset_signals() -> None:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN, None):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    faulthandler.disable()
    faulthandler.cancel_dump_traceback_later()


def _forget_parent() -> None:
    """Drops what the process that forked this one had begun."""
    gc.freeze()
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


def _fork_or_execute(self: Any, args: Any, *others: Any) -> None:
    """Replaces `Popen._execute_child` in a process that starts others: forks them, if that makes no difference."""
    start = Start.read(args, others)
    if start is None or needs_new_interpreter(start.environment, _LOADED_WITH):
        _EXECUTE(self, args, *others)
        return
    self.pid = os.fork()
    if self.pid == 0:
        try:
            if start.preexec:
                start.preexec()
        except BaseException:
            os._exit(255)
        become(
            start.program,
            environment=start.environment,
            cwd=start.cwd,
            session=start.session,
            streams=start.streams,
            forked_from_server=False,
        )
    self._child_created = True
    self._close_pipe_fds(*start.to_close)


_EXECUTE = subprocess.Popen._execute_child  # type: ignore[attr-defined]


def _run(program: Program) -> int:
    """Runs a program as `__main__` and does what an interpreter does at its end; returns its exit status."""
    status, interrupted = 0, False
    try:
        _run_main(program)
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            status = left.code or 0
        else:
            print(left.code, file=sys.stderr)
            status = 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        interrupted = True
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return status & 0xFF


def _run_main(program: Program) -> None:
    first = {"-m": str(Path.cwd()), "-c": "", "script": str(Path(program.name).resolve().parent)}[program.kind]
    from_environment = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    path = [entry for entry in _PATH if entry not in from_environment]
    sys.path[:] = [*([] if program.safe_path else [first]), *from_environment, *path]
    importlib.invalidate_caches()
    if program.kind == "-m":
        sys.argv[:] = ["-m", *program.arguments]
        if not hasattr(sys.modules.get(program.name), "__path__"):
            sys.modules.pop(program.name, None)  # runpy warns of a module that is there
        runpy.run_module(program.name, run_name="__main__", alter_sys=True)
    elif program.kind == "-c":
        sys.argv[:] = ["-c", *program.arguments]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program.name, "<string>", "exec"), main.__dict__)
    else:
        sys.argv[:] = [program.name, *program.arguments]
        runpy.run_path(program.name, run_name="__main__")


_PATH = [entry for entry in sys.path[1:] if entry and Path(entry).resolve() != ROOT]


def _retitle(command: list[str], environment: Mapping[str, str]) -> None:
    """Makes /proc/self/cmdline and /proc/self/environ those of a new process (prctl(2), PR_SET_MM_MAP)."""
    words = b"".join(os.fsencode(word) + b"\0" for word in command)
    variables = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
    text = ctypes.create_string_buffer(words + variables)
    _NEVER_FREED.append(text)
    start = ctypes.addressof(text)
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start_code, end_code, start_stack = map(int, fields[23:26])
    start_data, end_data, start_brk = map(int, fields[42:45])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sbrk.restype = ctypes.c_void_p
    ends = (start, start + len(words), start + len(words), start + len(words) + len(variables))
    packed = struct.pack(
        "=12QIi", start_code, end_code, start_data, end_data, start_brk, libc.sbrk(0), start_stack, *ends, 0, 0, -1
    )
    if libc.prctl(35, 14, packed, ctypes.c_ulong(len(packed)), 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_MM, PR_SET_MM_MAP)")


def can_retitle() -> bool:
    """Tells whether the kernel lets a process change what it was started with; else every start is cold."""
    size = ctypes.c_uint(0)
    return sys.platform == "linux" and ctypes.CDLL(None).prctl(35, 15, ctypes.byref(size), 0, 0) == 0


if __name__ == "__main__":
    sys.modules["tests.support.warm_process"] = sys.modules["__main__"]
    serve(int(sys.argv[1]))
