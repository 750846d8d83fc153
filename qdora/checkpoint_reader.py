"""Reading what torch.distributed.checkpoint wrote, without its unpickling of whatever it finds."""

import pickle
from pathlib import Path, PosixPath
from pickle import UnpicklingError
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_PLAIN_CLASSES = {
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""What torch's `.metadata` is made of, by module."""


class _Unpickler(pickle.Unpickler):
    """Makes nothing but `_PLAIN_CLASSES`: another class could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.partition(".")[0], name) == ("pathlib", "PosixPath"):  # Python 3.13 has it in pathlib._local
            return PosixPath
        if name not in _PLAIN_CLASSES.get(module, ()):
            raise UnpicklingError(f"its metadata names {module}.{name}, which is not read")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """torch's reader, which reads tensors with `weights_only`; its metadata may hold plain classes alone."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises `UnpicklingError` on anything else."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
