"""Training checkpoints: what training changes, never the frozen base.

    checkpoints/step-00000012/   manifest.json, and the tensors as torch.distributed.checkpoint writes them

A checkpoint is written under a temporary name and renamed when complete, so a folder without `.partial` is whole.
"""

import json
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from qdora.errors import CheckpointError
from qdora.parallel import World, failing_together, gather, main_first

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


@dataclass(kw_only=True, slots=True)
class Manifest:
    """What a checkpoint knows besides its tensors; JSON."""

    schema_version: int = SCHEMA_VERSION
    step: int
    num_tokens: int
    loader: dict[str, int]
    world_size: int
    run_id: str
    tracker_id: str | None
    config: dict[str, Any]
    versions: dict[str, str]
    data_fingerprint: str
    model_fingerprint: str


def _rng_state(world: World) -> dict[str, Tensor]:
    state = {f"rng.cpu.{world.rank}": torch.get_rng_state()}
    if world.device.type == "cuda":
        state[f"rng.cuda.{world.rank}"] = torch.cuda.get_rng_state(world.device)
    return state


def save(folder: Path, tensors: dict[str, Tensor], manifest: Manifest, world: World, keep: int) -> Path:
    """Writes `folder/step-N`, after which the newest `keep` and at least two remain. *Collective*.

    Older ones go first: the newest is known to be good only when the step after it has been computed.
    """
    final = folder / f"step-{manifest.step:08d}"
    partial = final.with_name(final.name + ".partial")

    def clear() -> None:
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.partial"):
                shutil.rmtree(leftover)
            for old in complete(folder)[: -max(keep - 1, 1)]:
                shutil.rmtree(old)

    main_first(world, clear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on one rank: "torch.distributed is not initialized, assuming single process"
        dcp_save(tensors | _rng_state(world), checkpoint_id=partial)

    def publish() -> None:
        if world.is_main:
            (partial / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)

    main_first(world, publish)
    return final


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.suffix and (path / MANIFEST).exists())


def set_aside(folder: Path, step: int) -> str:
    """Renames the checkpoint of weights that turned out not to compute, if there is one; what to tell the user."""
    given, aside = folder / f"step-{step:08d}", folder / f"step-{step:08d}.suspect"
    told = ""
    if given.exists():
        shutil.rmtree(aside, ignore_errors=True)
        given.rename(aside)
        told = f"{given.name} holds these weights and was renamed to {aside.name}. "
    good = complete(folder)
    return told + (f"The same command goes on from {good[-1]}" if good else "There is no earlier checkpoint")


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: not a checkpoint, or of another version of qdora.
    """
    try:
        values = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{checkpoint} is not a checkpoint of qdora: {error}") from None
    if values.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{checkpoint} has schema version {values.get('schema_version')}, this qdora reads {SCHEMA_VERSION}"
        )
    return Manifest(**values)


def load(checkpoint: Path, tensors: dict[str, Tensor], manifest: Manifest, world: World) -> None:
    """Reads the checkpoint into `tensors` in place, and the random state if the world has the same size. *Collective*.

    Raises:
        CheckpointError: its tensors are not those.
    """
    rng = _rng_state(world) if gather(world, manifest.world_size)[0] == world.size else {}
    with failing_together(world), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp_load(tensors | rng, checkpoint_id=checkpoint)
        except (RuntimeError, KeyError, ValueError, OSError, CheckpointException) as error:
            raise CheckpointError(f"{checkpoint} cannot be read into this model: {_first_line(error)}") from None
    for name, state in rng.items():
        if ".cpu." in name:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, world.device)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
