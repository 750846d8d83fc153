"""Training checkpoints: what training changes, never the frozen base; written while training goes on.

    checkpoints/step-00000012/   manifest.json, and the tensors as torch.distributed.checkpoint writes them
    checkpoints/latest           the name of the newest, moved last; resume=.../latest reads it

Tensors are copied to host memory, which is all that training waits for. A thread of each rank has them written to
`step-N.partial` (torch makes them durable) and takes their checksums. At the end of a step by which every rank is done,
rank 0 adds the manifest with the checksums and renames the folder: one without a suffix is whole. A write that fails (a
full disk) leaves the earlier checkpoints as they are and is tried again later.
"""

import logging
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save

from qdora.checkpoint_folder import LATEST, MANIFEST, Manifest, checksum, complete, read_manifest
from qdora.checkpoint_reader import Reader
from qdora.errors import CheckpointError, first_line
from qdora.files import sync, write_durably
from qdora.parallel import World, broadcast, failing_together, gather

logger = logging.getLogger(__name__)
# On one rank; it comes from a thread of torch's, where no block around a call would reach it.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Checkpoints:
    """The checkpoints of a run, at most one of them being written.

    Methods are *collective* and belong to the end of a step; `written` is not.
    """

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._sealing: Future[dict[str, str]] | None = None
        self._manifest: Manifest | None = None
        self.failure: str | None = None
        """Why the last one could not be written, if so."""
        self.retry_at: int | None = None
        """The step at which to try again."""
        self._num_failures = 0
        self.stall_s = self.total_stall_s = 0.0
        """Seconds that training has waited, the first since it was last set to 0."""

    @property
    def under_way(self) -> bool:
        """Whether one is being written; the same on all ranks."""
        return self._manifest is not None

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._sealing is None or self._sealing.done()

    def save_async(self, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        """Copies `tensors` and begins to write them; waits for the one before, if it is not there yet."""
        self.wait()
        started = time.perf_counter()
        partial = self._path(manifest.step).with_suffix(".partial")

        def clear() -> None:
            for leftover in self.folder.glob("step-*.partial"):
                _remove(leftover)
            partial.mkdir(parents=True)

        self._manifest, self._sealing = manifest, None
        self.failure = self._on_main(clear)
        if self.failure is None:
            state = tensors | _rng_state(self.world)
            alone = not dist.is_initialized()
            writing: Any = async_save(state, checkpoint_id=partial, process_group=self._group, no_dist=alone)
            self._sealing = self._thread.submit(_seal, writing, partial, self.world.rank)
        self._count(started)

    def wait(self) -> None:
        """Waits for the one under way, if there is one, and publishes it, or notes in `failure` why it could not be."""
        if self._manifest is None:
            return
        started, manifest = time.perf_counter(), self._manifest
        final = self._path(manifest.step)
        partial = final.with_suffix(".partial")
        checksums, error = {}, self.failure
        if self._sealing is not None:
            try:
                checksums = self._sealing.result()
            except (OSError, RuntimeError, CheckpointException) as raised:
                error = _first_line(raised)
        parts = gather(self.world, (checksums, error), self.world.patient_group)
        error = next((reason for _, reason in parts if reason), None)
        manifest.checksums = {name: value for part, _ in parts for name, value in part.items()}

        def publish() -> None:
            write_durably(partial / MANIFEST, manifest.to_json())
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync(self.folder)
            write_durably(self.folder / LATEST, final.name + "\n")

        self.failure = error or self._on_main(publish)
        self.retry_at = None
        if self.failure is None:
            self._num_failures = 0
            if self.world.is_main:
                self._remove_old()
        else:
            self._on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
            self.retry_at = manifest.step + 2**self._num_failures
            self._num_failures += 1
            if self.world.is_main:
                words = "the checkpoint of step %d could not be written: %s. Earlier ones stay"
                logger.warning(words, manifest.step, self.failure)
        self._manifest = self._sealing = None
        self._count(started)

    def _count(self, started: float) -> None:
        seconds = time.perf_counter() - started
        self.stall_s += seconds
        self.total_stall_s += seconds

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _on_main(self, action: Callable[[], None]) -> str | None:
        """Why `action` failed on rank 0, on every rank."""
        reason = None
        if self.world.is_main:
            try:
                action()
            except OSError as error:
                reason = _first_line(error)
        return broadcast(self.world, reason, self.world.patient_group)

    def _remove_old(self) -> None:
        """Leaves the newest `keep` and the best by eval loss."""
        found = complete(self.folder)
        losses = {}
        for path in found:
            with suppress(CheckpointError):
                losses[path] = read_manifest(path).eval_loss
        best = sorted((loss, path) for path, loss in losses.items() if loss is not None)[:1]
        for old in found[: -self.keep]:
            if old not in [path for _, path in best]:
                try:
                    _remove(old.rename(old.with_suffix(".partial")))  # never half of one under its name
                except OSError as error:
                    logger.warning("the old checkpoint %s could not be removed: %s", old, error)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _seal(writing: "Future[Any]", partial: Path, rank: int) -> dict[str, str]:
    """Waits until all of `partial` is on the disk; checksums of this rank's files."""
    writing.result()
    own = [file for file in sorted(partial.iterdir()) if file.name.startswith(f"__{rank}_")]
    own += [partial / ".metadata"] if rank == 0 else []
    return {file.name: checksum(file) for file in own}


def _rng_state(world: World) -> dict[str, Tensor]:
    state = {f"rng.cpu.{world.rank}": torch.get_rng_state()}
    if world.device.type == "cuda":
        state[f"rng.cuda.{world.rank}"] = torch.cuda.get_rng_state(world.device)
    return state


def load(checkpoint: Path, tensors: dict[str, Tensor], manifest: Manifest, world: World) -> None:
    """Reads the checkpoint into `tensors` in place, and the random state if the world has the same size. *Collective*.

    Raises:
        CheckpointError: its tensors are not those.
    """
    rng = _rng_state(world) if manifest.world_size == world.size else {}
    reader = Reader(checkpoint)
    try:
        with failing_together(world):
            try:
                reader.read_metadata()  # what is wrong with it, torch would print with a traceback
            except (RuntimeError, ValueError, OSError, EOFError, AttributeError, UnpicklingError) as error:
                raise CheckpointError(_first_line(error)) from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp_load(tensors | rng, storage_reader=reader)
    except (RuntimeError, KeyError, ValueError, OSError, CheckpointError, CheckpointException) as error:
        raise CheckpointError(f"{checkpoint} cannot be read into this model: {_first_line(error)}") from None
    for name, state in rng.items():
        if ".cpu." in name:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, world.device)


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # one reason of those that ranks had
        error = next(iter(error.failures.values()))[0]
    return first_line(error)
