"""Reading rows of tensors from safetensors files, and nothing more of them.

The files are read with `pread`, not mapped: pages of a mapped file count as the process's memory until the kernel takes
them back, and a rank must never be seen to hold the model.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdora.errors import ModelError
from qdora.files import forget_cached, read_json

logger = logging.getLogger(__name__)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHARD = re.compile(r"-\d+-of-(\d+)\.safetensors$")
_CHUNK_BYTES = 2**25
_FINGERPRINT_BYTES = 1024
"""Of each tensor."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class CheckpointFiles:
    """The tensors of a folder of safetensors files, by the names in the files.

    Raises:
        ModelError: no safetensors, a pickle-only checkpoint, a file that is missing, damaged or cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read_once = False
        """What is read need not stay in the page cache: nobody is to read it again soon."""

    @cached_property
    def entries(self) -> dict[str, Entry]:
        # The order of transformers: the one file before an index that may be older, and no other beside them.
        whole, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        if whole.exists():
            files = [whole]
        elif index.exists():
            files = _indexed(index)
        else:
            files = _unnamed(self.folder)
        if not files:
            pickles = [path.name for pattern in _PICKLES for path in self.folder.glob(pattern)]
            if pickles:
                raise ModelError(
                    f"{self.folder} holds only pickled weights ({pickles[0]}), which can run code when read. Convert "
                    "them once, where you trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
                )
            raise ModelError(f"no *.safetensors in {self.folder}")
        entries: dict[str, Entry] = {}
        copies: dict[str, list[str]] = {}
        for file in files:
            for name, entry in _header(file):
                if name in entries:
                    copies.setdefault(name, [entries[name].file.name]).append(file.name)
                entries[name] = entry  # of the last file by its name, as transformers does
        if copies:
            _tell(_stale(index, copies))
        return entries

    def read_rows(self, name: str, first: int, out: Tensor) -> None:
        """Fills `out` with the rows of `name` from `first` on, converted to its dtype and device.

        A tensor of one dimension has rows of one value; a scalar is one row.
        """
        entry = self.entries[name]
        if not out.numel():
            return
        width = prod(entry.shape[1:])
        rows = out.view(-1, width)
        step = max(1, _CHUNK_BYTES // (width * entry.dtype.itemsize))
        descriptor = os.open(entry.file, os.O_RDONLY)
        try:
            for start in range(0, rows.shape[0], step):
                some = rows[start : start + step]
                offset = entry.offset + (first + start) * width * entry.dtype.itemsize
                direct = some.device.type == "cpu" and some.dtype == entry.dtype and some.is_contiguous()
                buffer = some if direct else torch.empty(some.shape, dtype=entry.dtype)
                raw: Any = buffer.flatten().view(torch.uint8).numpy()
                _read_exactly(descriptor, memoryview(raw), offset)
                if self.read_once:
                    forget_cached(descriptor, offset, offset + raw.nbytes)
                if not direct:
                    some.copy_(buffer)
        finally:
            os.close(descriptor)

    def read(self, name: str) -> Tensor:
        """The whole tensor, as stored."""
        entry = self.entries[name]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_rows(name, 0, out)
        return out

    def first_bytes(self, name: str, count: int) -> bytes:
        """The tensor's first `count` bytes as stored, fewer where it has fewer."""
        entry = self.entries[name]
        with entry.file.open("rb") as stream:
            stream.seek(entry.offset)
            return stream.read(min(count, prod(entry.shape) * entry.dtype.itemsize))

    def fingerprint(self) -> str:
        """Names, shapes and first bytes of all tensors, hashed: another fine-tune of the same model differs."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            digest.update(repr((name, str(entry.dtype), entry.shape)).encode())
            digest.update(self.first_bytes(name, _FINGERPRINT_BYTES))
        return digest.hexdigest()[:16]


def _unnamed(folder: Path) -> list[Path]:
    """The weight files of a folder that has none of the usual names: all shards of one set, or the only file.

    Raises:
        ModelError: several files that are no set, a set that is not complete, or an adapter alone.
    """
    found = sorted(folder.glob("*.safetensors"))
    files = [file for file in found if not file.name.startswith("adapter_model")]
    if found and not files:
        raise ModelError(f"{folder} holds an adapter and no model: give its base as model.path, and adapter={folder}")
    shards = [_SHARD.search(file.name) for file in files]
    sizes = {int(shard[1]) for shard in shards if shard}
    if len(files) > 1 and not (len(sizes) == 1 and all(shards)):
        names = ", ".join(file.name for file in files)
        raise ModelError(
            f"{folder} holds {names}, and neither model.safetensors nor an index says which are the model's weights: "
            "rename the one that is, to model.safetensors"
        )
    if sizes and {len(files)} != sizes:
        raise ModelError(f"{folder} holds {len(files)} of {max(sizes)} weight files: download the others")
    return files


def _read_exactly(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise ModelError("a weight file became shorter while it was read")
        view, offset = view[count:], offset + count


def _stale(index: Path, copies: dict[str, list[str]]) -> str:
    """Says which tensors are in several files, and which file counts."""
    name, files = next(iter(copies.items()))
    named = read_json(index).get("weight_map", {}).get(name)
    says = f", {index.name} names {named}" if named is not None else ""
    more = f"; so are {len(copies) - 1} more tensors" if len(copies) > 1 else ""
    return (
        f"{index.parent}: {name} is in {' and in '.join(files)}{says}; the one in {files[-1]} is read, the last file "
        f"by its name, as transformers does{more}. If that is a stale copy, download the folder anew or take it out"
    )


@lru_cache(maxsize=64)
def _tell(line: str) -> None:
    """Warns once a process, on one rank, of what every reader of the files finds."""
    if int(os.environ.get("RANK", 0)) == 0:
        logger.warning("%s", line)


def _indexed(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        outside = sorted(name for name in names if Path(name).name != name)
    except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, or JSON of another shape
        raise ModelError(f"{index} is not an index of safetensors files or is damaged; download it again") from None
    if outside:
        raise ModelError(f"{index} names {outside[0]!r}, which is not a file of its own folder")
    return [index.parent / name for name in sorted(names)]


def _header(file: Path) -> Iterator[tuple[str, Entry]]:
    """The tensors that a safetensors file declares; checks that the file is as long as they need."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelError(f"{file} is cut short: {size} bytes do not hold its own header; download it again")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        places = {
            name: (value["dtype"], tuple(value["shape"]), *value["data_offsets"]) for name, value in header.items()
        }
    except FileNotFoundError:
        raise ModelError(f"{file} is missing, though the index names it; download it again") from None
    except PermissionError:
        raise ModelError(f"{file} may not be read by this user: give the right, or run as its owner") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{file} is not a safetensors file or is damaged; download it again") from None
    start = 8 + length
    for name, (dtype, shape, first, end) in places.items():
        if start + end > size:
            raise ModelError(
                f"{file} is cut short: {size} bytes where {name} alone needs {start + end}; download it again"
            )
        if dtype not in _DTYPES:
            raise ModelError(f"{name} in {file} has dtype {dtype}, which qdora does not read")
        yield name, Entry(file, _DTYPES[dtype], shape, start + first)
