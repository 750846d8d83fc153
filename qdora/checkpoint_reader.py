"""Reading what torch.distributed.checkpoint wrote, without its unpickling of whatever it finds."""

import pickle
import warnings
from pathlib import Path, PosixPath
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from qdora.errors import CheckpointError, first_line

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


class CheckpointTensors(Reader):
    """Single tensors of a training checkpoint."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Once."""
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata

    def names(self) -> list[str]:
        """Returns the names of all tensors.

        Raises:
            CheckpointError: they cannot be read.
        """
        try:
            return [*self.read_metadata().state_dict_metadata]
        except (ValueError, OSError, EOFError, AttributeError, UnpicklingError) as error:
            raise CheckpointError(f"{self.folder} cannot be read: {first_line(error)}") from None

    def read(self, names: list[str]) -> list[Tensor]:
        """Whole tensors on the CPU, as they are stored.

        Raises:
            CheckpointError: they are not there, or cannot be read.
        """
        try:
            known: dict[str, Any] = self.read_metadata().state_dict_metadata
            tensors = {name: torch.empty(known[name].size, dtype=known[name].properties.dtype) for name in names}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp_load(dict(tensors), storage_reader=self, no_dist=True)
        except KeyError as error:
            raise CheckpointError(f"{self.folder} has no {error.args[0]}: it is of another run") from None
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise CheckpointError(f"{self.folder} cannot be read: {first_line(reason)}") from None
        except (RuntimeError, ValueError, OSError, EOFError, AttributeError, UnpicklingError) as error:
            raise CheckpointError(f"{self.folder} cannot be read: {first_line(error)}") from None
        return [*tensors.values()]
