"""What a run has to show: what it left at its end, or its newest checkpoint where it has not ended yet."""

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError
from torch import Tensor

from qdora import checkpoint_folder, parallel
from qdora.adapter import peft_format
from qdora.adapter.trained_over import NOTE, gone, write_note
from qdora.card import Trained, write_adapter_card
from qdora.checkpoint_folder import Change, Manifest
from qdora.checkpoint_reader import CheckpointTensors
from qdora.config import AdapterMethod, RunConfig
from qdora.config.values import config_from_values
from qdora.errors import ConfigError, ModelError
from qdora.files import read_json
from qdora.model.companions import write_tokenizer
from qdora.model.folder import config_folder
from qdora.parallel import World
from qdora.run_folder import RunFolder

FOLDER = "adapters"
"""Within a run's: the adapters of checkpoints that were asked for, as PEFT reads them."""
WRITTEN_AS = 3
"""Goes up with what `write_adapter` writes, so that what was written otherwise before is written anew; 1 had no
tokenizer and no system turn, 2 no card."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """The weights of a run and what they were trained with."""

    run: RunFolder
    config: RunConfig
    """The last one; `changes` has what earlier steps had otherwise."""
    changes: list[Change]
    adapter: Path | None = None
    """Folder in PEFT format; None where every weight was trained."""
    checkpoint: Path | None = None
    manifest: Manifest | None = None
    """What that checkpoint says of itself; both are None where the run has ended."""

    @property
    def digest(self) -> str:
        """Tells checkpoints apart, also those of the same step."""
        return "" if self.manifest is None else _digest(self.manifest)


def find_result(run: RunFolder, world: World, notes: TextIO | None = None) -> RunResult:
    """Finds what the run left at its end, else its newest whole checkpoint, whose adapter is written out. *Collective*.

    Says on rank 0 that it is a checkpoint's, and of which step.

    Args:
        notes: where that is written; standard output by default.

    Raises:
        ConfigError: there is no run, or neither a result nor a checkpoint of it.
        CheckpointError: its checkpoints are damaged.
    """
    config = run.read_config()
    found: tuple[Path, Manifest] | None = None
    with parallel.failing_together(world, world.patient_group):  # rank 0 alone: the run may be going on
        if world.is_main and not run.has_ended(config):
            found = _newest(run, notes)
    found = parallel.broadcast(world, found, world.patient_group)
    if found is None:
        adapter = None if config.adapter.method is AdapterMethod.none else run.adapter
        return RunResult(run, config, run.read_changes(), adapter)
    checkpoint, manifest = found
    config = config_from_values(RunConfig, manifest.config)
    if config.adapter.method is AdapterMethod.none:
        return RunResult(run, config, manifest.changes, None, checkpoint, manifest)
    adapter = run.path / FOLDER / checkpoint.name
    with parallel.failing_together(world, world.patient_group):
        if world.is_main:
            write_adapter(checkpoint, manifest, config, adapter, notes)
    with parallel.failing_together(world, world.patient_group):  # not before: the wait is for a file that is there
        run.see(adapter / NOTE, "run", "each rank reads there the adapter that rank 0 has written of its checkpoint")
    return RunResult(run, config, manifest.changes, adapter, checkpoint, manifest)


def _newest(run: RunFolder, notes: TextIO | None) -> tuple[Path, Manifest]:
    newest, damaged = checkpoint_folder.newest_valid(run.checkpoints)
    if newest is None:
        reason = f": {next(iter(damaged.values()))}" if damaged else ""
        what = "all of whose checkpoints are damaged" if damaged else "and has no checkpoint yet"
        raise ConfigError(
            f"run={run.path} is not finished, {what}{reason}. Wait for its end, or start it again to go on "
            "(train.checkpoint_every=N writes checkpoints)"
        )
    manifest = checkpoint_folder.read_manifest(newest)
    num_steps = manifest.config["train"].get("num_steps")
    of = f" of {num_steps}" if num_steps is not None else ""
    passed = "".join(f"; {path.name} is damaged ({reason})" for path, reason in damaged.items())
    step = f"step {manifest.step}{of}{passed}"
    print(f"run={run.path} is not finished: its newest checkpoint is taken, {step}", file=notes, flush=True)
    return newest, manifest


def _digest(manifest: Manifest) -> str:
    return checkpoint_folder.digest_of([WRITTEN_AS, manifest.checksums, manifest.system, manifest.template])


def write_adapter(
    checkpoint: Path, manifest: Manifest, config: RunConfig, folder: Path, notes: TextIO | None = None
) -> None:
    """Writes the adapter of a checkpoint to `folder` as it would be at the end of the run, unless it is there.

    Removes those beside it whose checkpoint is gone.

    Args:
        notes: where it says that the adapter with which the run began is gone; standard output by default.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: the folder cannot be written.
    """
    digest = _digest(manifest)
    if read_json(folder / NOTE).get("checkpoint") == digest:
        return
    tensors = CheckpointTensors(checkpoint)
    layers = peft_format.stored_parameters(tensors.names())
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        dtype, scaling = getattr(torch, config.model.dtype.name), config.adapter.scaling
        stored: dict[str, Tensor] = {}
        for key, (layer, kind) in layers.items():
            (whole,) = tensors.read([key])
            stored[peft_format.tensor_name(layer, kind)] = peft_format.as_stored(whole, kind, dtype, scaling)
        peft_format.write_weights(partial / peft_format.WEIGHTS, stored)
        names = sorted({layer for layer, _ in layers.values()})
        peft_format.write_config(partial, config.adapter, str(config.model.path), names, with_projections=False)
        is_whole = _write_tokenizer(partial, manifest, config, notes)
        trained = replace(config.adapter, target_modules=names)
        run = RunFolder(checkpoint.parent.parent)
        result = RunResult(run, config, manifest.changes, folder, checkpoint, manifest)
        write_adapter_card(Trained(_base(config), config.model, config.quant, partial, trained, result), folder)
        write_note(
            partial,
            config.quant,
            base_fingerprint=manifest.model_fingerprint,
            checkpoint=digest if is_whole else None,  # None: written anew the next time
            system=manifest.system,
        )
        shutil.rmtree(folder, ignore_errors=True)  # of a step that was made again
        partial.rename(folder)
        there = {path.name for path in checkpoint_folder.complete(checkpoint.parent)}
        for other in checkpoint_folder.complete(folder.parent):
            if other.name not in there:
                shutil.rmtree(other, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if read_json(folder / NOTE).get("checkpoint") != digest:  # another process may have been first
            raise ConfigError(
                f"{folder} cannot be written, where the adapter of {checkpoint} is to be ({error}): copy the run to "
                "where you may write"
            ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _base(config: RunConfig) -> Path | None:
    """Returns the folder of the base's tokenizer; None where it was moved, as another model.path may be given."""
    with suppress(ModelError):
        return config_folder(config.model)
    return None


def _write_tokenizer(folder: Path, manifest: Manifest, config: RunConfig, notes: TextIO | None) -> bool:
    """Writes the tokenizer of the training as a run's end does; returns whether all that it comes from was there."""
    before = config.adapter.path
    base = _base(config) if manifest.template is not None else None
    write_tokenizer(folder, base, before, manifest.template)
    is_whole = before is None or Path(before).is_dir()
    if not is_whole:
        print(gone(str(before)), file=notes, flush=True)
    return is_whole
