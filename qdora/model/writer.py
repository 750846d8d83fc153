"""Writing large files of tensors: several tensors at a time, each some rows at a time, to be gone on with.

What a file holds is known before the first value is: headers are written first and the whole size is reserved, so that
a full disk shows at once. Each worker then computes one tensor in pieces and writes them to their place. Tensors that
are done are noted in a journal beside the files. What a killed process wrote is in the kernel's hands: the same call
goes on after the tensors of the journal, and begins again only where the machine was started anew since.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from qdora.errors import ConfigError
from qdora.files import existing, forget_cached, sync

JOURNAL = "journal.jsonl"
CHUNK_NUMEL = 2**20
"""Values computed and written at a time by each worker: 4 MiB in float32, which stay near the core."""
BEHIND_BYTES = 2**26
"""Of what a worker has written last may be in memory."""
MAX_WORKERS = 8

Rows = Callable[[int, int], Tensor]
"""`rows(first, last)`: those rows of a tensor, (last - first, ...)."""


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor to be written. A tensor of one dimension has rows of one value; a scalar is one row."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of what `Rows` gives, and of what is stored."""
    start: Callable[[], Rows]
    """Called once, by the worker that is to write the tensor; what it returns may hold what all rows need."""
    stored_shape: tuple[int, ...] | None = None
    """As the file tells it, where that is not `shape`."""

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes: a file of the folder, and the offset in it."""

    job: Job
    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class Layout:
    """What is to be written, before a value of it is known."""

    headers: dict[str, bytes]
    """The beginning of each file."""
    places: Sequence[Place]

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        sizes = {file: len(header) for file, header in self.headers.items()}
        for place in self.places:
            sizes[place.file] = max(sizes[place.file], place.offset + place.job.num_bytes)
        return sizes


def safetensors_layout(jobs: Sequence[Job], max_shard_bytes: int, stem: str = "model") -> tuple[Layout, dict[str, Any]]:
    """One or more safetensors files of at most `max_shard_bytes` (a larger tensor has its own), and their index."""
    shards: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        if shards[-1] and size + job.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(job)
        size += job.num_bytes
    headers: dict[str, bytes] = {}
    places: list[Place] = []
    for index, shard in enumerate(shards):
        single = len(shards) == 1
        file = f"{stem}.safetensors" if single else f"{stem}-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        # Wide values first, so that every tensor is aligned to its own; the format wants no gaps.
        order = sorted(shard, key=lambda job: -job.dtype.itemsize)
        described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for job in order:
            described[job.name] = {
                "dtype": SAFETENSORS_NAMES[job.dtype],
                "shape": list(job.shape if job.stored_shape is None else job.stored_shape),
                "data_offsets": [offset, offset + job.num_bytes],
            }
            offset += job.num_bytes
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        for job in order:
            places.append(Place(job, file, len(headers[file]) + described[job.name]["data_offsets"][0]))
    weight_index = {
        "metadata": {"total_size": sum(job.num_bytes for job in jobs)},
        "weight_map": {place.job.name: place.file for place in places},
    }
    return Layout(headers, places), weight_index


SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def num_workers(device: torch.device) -> int:
    """One a core, at most 8; on a GPU one, as the reused buffer of dequantised weights is one for all threads."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0))) if device.type == "cpu" else 1


def write_tensors(folder: Path, layout: Layout, what: Any, workers: int) -> None:
    """Writes the files of `layout` to `folder`, or goes on with them where `folder` holds some of the same `what`.

    Args:
        what: JSON values that say all that decides the content; other content in `folder` is removed.
        workers: threads. One alone takes the tensors in the order of the files.

    Raises:
        ConfigError: there is no room.
        OSError: a file cannot be written.
    """
    done = _begin(folder, layout, what)
    sizes = layout.sizes()
    left = [place for place in layout.places if place.job.name not in done]
    if workers > 1:  # largest first, or one worker would be left with it at the end
        left.sort(key=lambda place: -place.job.num_bytes)
    descriptors = {file: os.open(folder / file, os.O_WRONLY) for file in sizes}
    journal = (folder / JOURNAL).open("a", encoding="utf-8")
    stopped, lock = threading.Event(), threading.Lock()
    try:
        with _bar(sum(sizes.values())) as advance, cores_shared(workers):
            advance(sum(place.job.num_bytes for place in layout.places if place.job.name in done))

            def write(place: Place) -> None:
                _write_one(place, descriptors[place.file], advance, stopped)
                with lock:
                    journal.write(json.dumps(place.job.name) + "\n")
                    journal.flush()

            with ThreadPoolExecutor(workers) as pool:
                try:
                    tasks = [pool.submit(write, place) for place in left]
                    for task in wait(tasks, return_when=FIRST_EXCEPTION).done:
                        task.result()
                except BaseException:
                    stopped.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        for descriptor in descriptors.values():
            os.fsync(descriptor)
    finally:
        journal.close()
        for descriptor in descriptors.values():
            os.close(descriptor)


def finish(folder: Path, output: Path) -> None:
    """Gives what was written its name, when every other file is in `folder`, too."""
    for file in folder.rglob("*"):
        sync(file)
    sync(folder)
    folder.rename(output)
    sync(output.parent)
    (output / JOURNAL).unlink(missing_ok=True)  # last: without it all would be written again


class _StoppedError(Exception):
    """Another worker failed."""


def _write_one(place: Place, descriptor: int, advance: Callable[[int], None], stopped: threading.Event) -> None:
    job = place.job
    if not job.num_bytes:
        return
    rows = job.start()
    step = max(1, CHUNK_NUMEL * job.dtype.itemsize // job.row_bytes)
    for first in range(0, job.num_rows, step):
        if stopped.is_set():
            raise _StoppedError
        last = min(first + step, job.num_rows)
        values = rows(first, last)
        assert values.dtype == job.dtype, f"{job.name}: {values.dtype} instead of {job.dtype}"
        raw: Any = values.contiguous().view(-1).view(torch.uint8).numpy()
        assert raw.nbytes == (last - first) * job.row_bytes, f"{job.name}: {raw.nbytes} bytes for {last - first} rows"
        view, offset = memoryview(raw), place.offset + first * job.row_bytes
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count
            # The disk begins at once, not at the end, and the kernel uses few pages again and again.
            forget_cached(descriptor, max(0, offset - BEHIND_BYTES), offset)
        advance((last - first) * job.row_bytes)


def _begin(folder: Path, layout: Layout, what: Any) -> set[str]:
    """Makes the folder ready; returns the names of the tensors that are in it already."""
    head = json.dumps({"boot": _boot_id(), "what": what, "sizes": layout.sizes()}, sort_keys=True)
    journal = folder / JOURNAL
    if journal.exists():
        lines = journal.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and lines[0] == head:
            done = set()
            for line in lines[1:]:
                try:
                    done.add(json.loads(line))
                except json.JSONDecodeError:  # the last one, cut by a kill: that tensor is written again
                    break
            return done
    clear(folder)
    needed = sum(layout.sizes().values())
    try:
        folder.mkdir(parents=True)
        journal.touch()  # first, so that the folder is known as what it is
        for file, size in layout.sizes().items():
            with (folder / file).open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, size)
                stream.write(layout.headers[file])
        journal.write_text(head + "\n", encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(existing(folder)).free
        raise ConfigError(
            f"{folder} cannot be written: {error.strerror} ({needed / 2**30:.2f} GiB are needed, "
            f"{free / 2**30:.2f} GiB are free)"
        ) from None
    return set()


def clear(folder: Path) -> None:
    """Removes what an earlier call has left.

    Raises:
        ConfigError: the folder is somebody else's.
    """
    if folder.exists():
        if any(folder.iterdir()) and not (folder / JOURNAL).exists():
            raise ConfigError(f"{folder} is in the way and not of a merge: move it, or give another output")
        shutil.rmtree(folder)


def _boot_id() -> str:
    """Changes whenever the machine starts; where that is not known, every process counts as a start."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return str(os.getpid())


@contextmanager
def cores_shared(workers: int) -> Iterator[None]:
    """Workers share the cores: torch's own threads would be too many."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing", total=total)
        yield lambda count: progress.advance(task, count)
