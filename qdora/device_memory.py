"""How much memory a rank has taken, and how much it could still take."""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from qdora.errors import OutOfMemoryError
from qdora.parallel import World

_CGROUPS = (  # folder, limit, used, and what of it is page cache
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    ("", "memory.max", "memory.current", ("inactive_file", "active_file")),
)


def memory_gib(world: World) -> float:
    """Peak memory of this rank: allocated on its GPU, else resident on the host."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    return _peak_resident() / 2**30


def _peak_resident() -> int:
    """Bytes of this program at most; `ru_maxrss` counts what the process that started it held, too."""
    try:
        with Path("/proc/self/status").open(encoding="utf-8") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 2**10
    except (OSError, StopIteration):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)


@contextmanager
def explaining_shortage(explain: Callable[[], str]) -> Iterator[None]:
    """Turns a failed allocation inside the block into a message.

    Raises:
        OutOfMemoryError: on this rank; the others wait for it until the launcher ends them.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise OutOfMemoryError(explain()) from None


def free_memory(world: World) -> int:
    """Bytes that this rank can still allocate on its device; without GPUs the ranks of a machine share its memory."""
    if world.device.type == "cuda":
        cached = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
        return int(torch.cuda.mem_get_info(world.device)[0]) + cached
    return free_host_memory() // world.local_size


def free_host_memory() -> int:
    """Bytes that the processes of this machine, or of this container, can still allocate."""
    return int(min([psutil.virtual_memory().available, *_free_in_cgroups()]))


def _free_in_cgroups() -> list[int]:
    """What the limits of this process's container or job (cgroup v1 or v2) leave; what the page cache holds is free."""
    found = []
    listed = Path("/proc/self/cgroup")
    lines = listed.read_text().splitlines() if listed.exists() else []
    own = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for folder, limit_name, used_name, cache_names in _CGROUPS:
        for path in (own.get(folder, "/"), "/"):
            group = Path(f"/sys/fs/cgroup/{folder}/{path}")
            if not (group / limit_name).exists():
                continue
            limit, used = ((group / name).read_text().strip() for name in (limit_name, used_name))
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cache = sum(int(statistics[name]) for name in cache_names)
            found += [] if limit == "max" else [max(0, int(limit) - int(used) + cache)]
    return found
