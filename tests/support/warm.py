"""Starts Python processes that have imported torch, transformers, bitsandbytes and qdora already.

A cold `qdora train` of a tiny model takes some six seconds of a core, most of them imports. `python -m
tests.support.warm FD`, the server, imports once; for each process it forks one, which becomes what a new interpreter
would be: its own command line and environment (in /proc, too), working folder, session, standard streams, signals,
`sys.argv`, `sys.path`, `__main__`, exit status. Kills, signals, limits and full disks are real. The server has one
thread and has computed nothing, which it asserts.

`Popen` starts what it can this way and everything else cold: other programs, interpreter options that only a new
interpreter can take, and environments that differ from the server's in what libraries read while they are loaded
(`READ_AT_LOAD`). Its processes are children of the server, which hands on how they ended. A launcher's ranks and the
runs of a sweep are forked by the launcher, so that they are its children, and by nothing else that computes.

What it cannot show: mistakes in imports themselves, and what depends on the seed of `hash`, which warm processes share.
Some tests start cold for that (`cold=True`).
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
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent
READ_AT_LOAD = (
    *("LD_", "MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_", "CUDA_", "PYTHON", "LANG", "LC_", "TZ", "HOME", "XDG_"),
    *("HF_", "MPL", "TORCHDYNAMO_", "TORCHINDUCTOR_", "TORCH_LOGS", "TORCH_COMPILE", "TRITON_", "ATEN_", "BNB_"),
)
"""Beginnings of names of variables that are read by libraries as they are loaded, and not again."""
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
READ_LATER = {"PYTHONUNBUFFERED", "TORCHINDUCTOR_CACHE_DIR", "HF_XET_HIGH_PERFORMANCE"}
"""Variables with such a name that `become` takes, that torch reads anew (and sets), or that lm-eval sets for hubs."""
_INT = struct.Struct("i")
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
    def starts_others(self) -> bool:
        """Whether its process starts warm ones itself."""
        sweeps = {"study", "-m", "--multirun"}.intersection(self.arguments[:1] + self.arguments[1:])
        return self.kind == "-m" and (self.name in STARTERS or (self.name == "qdora" and bool(sweeps)))


def differs_at_load(environment: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Tells whether two environments differ in a variable that only a new interpreter would read."""
    names = {name for name in environment.keys() | other.keys() if name.startswith(READ_AT_LOAD)}
    return any(environment.get(name) != other.get(name) for name in names - READ_LATER)


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen` whose process is forked by the server, if that makes no difference."""

    _status: int | None = None
    """Descriptor on which the server tells the status; None where the process is a child of this one."""

    def _execute_child(self, args: Any, *others: Any) -> None:
        (_, preexec, _, pass_fds, cwd, environment, _, _, shell, *streams, _, _, _, _, umask, session, group) = others
        program = Program.read(list(map(os.fspath, args))) if not isinstance(args, (str, bytes)) else None
        variables = dict(os.environ if environment is None else environment)
        special = preexec or pass_fds or shell or umask != -1 or group != -1
        if program is None or special or "QDORA_TESTS_COLD" in variables or not Server.fits(variables):
            super()._execute_child(args, *others)  # type: ignore[misc]
            return
        to_close = streams[:6]
        wanted = (streams[0], streams[3], streams[5])
        request = {
            "program": asdict(program),
            "environment": variables,
            "cwd": os.fspath(cwd or Path.cwd()),
            "session": bool(session),
        }
        own = [stream if stream != -1 else number for number, stream in enumerate(wanted)]
        self._status, self.pid = Server.start().fork(request, own)
        self._child_created = True
        self._close_pipe_fds(*to_close)  # type: ignore[attr-defined]

    def _internal_poll(self, *arguments: Any, **options: Any) -> int | None:
        if self._status is None:
            return super()._internal_poll(*arguments, **options)  # type: ignore[misc,no-any-return]
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self._read_status()
        return self.returncode

    def _try_wait(self, flags: int) -> tuple[int, int]:
        if self._status is None:
            return super()._try_wait(flags)  # type: ignore[misc,no-any-return]
        if not flags & os.WNOHANG or select.select([self._status], [], [], 0)[0]:
            return self.pid, self._take_status()
        return 0, 0

    def _read_status(self) -> None:
        self.returncode = os.waitstatus_to_exitcode(self._take_status())

    def _take_status(self) -> int:
        assert self._status is not None
        told = os.read(self._status, _INT.size)
        if not told:
            raise RuntimeError("the server of warm processes has ended")
        (status,) = _INT.unpack(told)
        os.close(self._status)
        self._status = os.open(os.devnull, os.O_RDONLY)
        return int(status)

    def __del__(self, *arguments: Any, **options: Any) -> None:
        super().__del__(*arguments, **options)
        if self._status is not None and self.returncode is not None:
            os.close(self._status)
            self._status = None


def run(*arguments: Any, **options: Any) -> Any:
    """Does what `subprocess.run` does, with warm processes."""
    with mock.patch.object(subprocess, "Popen", Popen):
        return subprocess.run(*arguments, **options)


SUBPROCESS = types.SimpleNamespace(run=run, CompletedProcess=subprocess.CompletedProcess)
"""Stands for the module in those of the product that start a Python process from within a test's own."""


class Server:
    """The server of this process, as its client sees it."""

    _only: "Server | None" = None
    environment: dict[str, str] = {}
    """What the server starts with; tests/conftest.py sets it before the first test changes something."""

    def __init__(self) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
        command = [sys.executable, "-m", "tests.support.warm", str(there.fileno())]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL
        )
        there.close()
        self._socket, self._lock = here, threading.Lock()

    @classmethod
    def fits(cls, environment: Mapping[str, str]) -> bool:
        """Tells whether a process with this environment can be forked: not one that may see a GPU.

        bitsandbytes asks the driver at import, and what the driver began is of no use after a fork.
        """
        without_gpu = cls.environment.get("CUDA_VISIBLE_DEVICES") == ""
        return without_gpu and _can_retitle() and not differs_at_load(environment, cls.environment)

    @classmethod
    def start(cls) -> "Server":
        """Returns the server, which is started at the first call; a forked pytest worker gets its own."""
        if cls._only is None or cls._only._process.poll() is not None:
            cls._only = cls()
        return cls._only

    @classmethod
    def stop(cls) -> None:
        """Ends the server; its processes go on."""
        if cls._only is not None:
            cls._only._socket.close()
            cls._only._process.wait(30)
            cls._only = None

    def fork(self, request: dict[str, Any], streams: list[int]) -> tuple[int, int]:
        """Forks a process; returns the descriptor that tells its status, and its id."""
        read, write = os.pipe()
        try:
            with self._lock:
                socket.send_fds(self._socket, [json.dumps(request).encode()], [*streams, write])
        finally:
            os.close(write)
        told = os.read(read, _INT.size)
        if not told:
            raise RuntimeError("the server of warm processes has ended: see its traceback in the output")
        return read, int(_INT.unpack(told)[0])


def serve(descriptor: int) -> None:
    """Forks a process for each request that comes by the socket, until it is closed."""
    _LOADED_WITH.update(os.environ)
    _import_all()
    assert threading.active_count() == 1, threading.enumerate()
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a library has started a thread"
    gc.collect()
    gc.freeze()
    read, write = os.pipe()
    os.set_blocking(write, False)
    os.set_blocking(read, False)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    statuses: dict[int, int] = {}
    with socket.socket(fileno=descriptor) as channel:
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
                os.write(status, _INT.pack(process))
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
        descriptor = statuses.pop(process)
        with suppress(BrokenPipeError):  # nobody waits for it
            os.write(descriptor, _INT.pack(status))
        os.close(descriptor)


def _import_all() -> None:
    import qdora

    for name in MODULES:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(qdora.__path__, "qdora."):
        if module.name.rpartition(".")[2] not in ("__main__", "harness", "reload"):
            importlib.import_module(module.name)


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
        tempfile.tempdir = None
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        if not forked_from_server:
            _forget_parent()
        gc.enable()
        if program.starts_others:
            subprocess.Popen._execute_child = _fork_or_execute  # type: ignore[attr-defined]
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
    (_, preexec, _, pass_fds, cwd, environment, _, _, shell, *streams, _, _, _, _, umask, session, group) = others
    program = Program.read(list(map(os.fspath, args))) if not isinstance(args, (str, bytes)) else None
    variables = dict(os.environ if environment is None else environment)
    special = pass_fds or shell or umask != -1 or group != -1
    if program is None or special or differs_at_load(variables, _LOADED_WITH):
        _EXECUTE(self, args, *others)
        return
    wanted = (streams[0], streams[3], streams[5])
    own = [stream if stream != -1 else number for number, stream in enumerate(wanted)]
    self.pid = os.fork()
    if self.pid == 0:
        try:
            if preexec:
                preexec()
        except BaseException:
            os._exit(255)
        become(
            program,
            environment=variables,
            cwd=os.fspath(cwd or Path.cwd()),
            session=session,
            streams=own,
            forked_from_server=False,
        )
    self._child_created = True
    self._close_pipe_fds(*streams[:6])


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
    path = [entry for entry in _PATH if entry not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    from_environment = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [*([] if program.safe_path else [first]), *from_environment, *path]
    importlib.invalidate_caches()
    if program.kind == "-m":
        sys.argv[:] = ["-m", *program.arguments]
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


def _can_retitle() -> bool:
    """Tells whether the kernel lets a process change what it was started with; else every start is cold."""
    size = ctypes.c_uint(0)
    return sys.platform == "linux" and ctypes.CDLL(None).prctl(35, 15, ctypes.byref(size), 0, 0) == 0


if __name__ == "__main__":
    sys.modules["tests.support.warm"] = sys.modules["__main__"]
    serve(int(sys.argv[1]))
