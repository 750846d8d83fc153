"""Whether a run can go on, asked as early as it can be known, and with what changed.

Without torch, whose import takes seconds: `check_early` is called before anything else of a run is imported.
"""

import hashlib
import os
import secrets
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil

from qdora import checkpoint_folder
from qdora.adapter.trained_over import check_adapter, is_adapter
from qdora.changes import ways_out
from qdora.checkpoint_folder import Manifest
from qdora.config import RunConfig
from qdora.config.values import option
from qdora.data.sources import is_missing
from qdora.errors import CheckpointError, ConfigError, DataError, ModelError
from qdora.files import is_hub_id
from qdora.planning.length import resumed
from qdora.run_folder import RunFolder


def check_early(config: RunConfig) -> None:
    """Refuses what the folder's config and the checkpoint's manifest forbid; changes nothing.

    Every rank of a single machine asks, and all see the same. Several machines may not, and are asked later, together.

    Raises:
        QdoraError: the run cannot go on under `config`.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    if int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)) < num_ranks:
        return
    folder = RunFolder(Path(config.output_dir or f"outputs/{config.run_id or new_run_id()}"))
    found = folder.find_checkpoint(config, in_full=False)
    if found is not None:
        config = as_it_was(config, num_ranks, found[1])
        keep_rows_per_step(config, num_ranks, found[1])
        if config.train.num_steps is not None and not folder.is_finished():
            check_num_steps(config, *found, config.train.num_steps)
    check_inputs(config, found)


def check_inputs(config: RunConfig, found: tuple[Path, Manifest] | None) -> None:
    """Refuses a model, data or an adapter that is not there, with each way out.

    The adapter with which a run began is needed at its start alone: later its checkpoints have the weights.

    Args:
        found: the checkpoint that the run goes on from.

    Raises:
        ModelError, DataError, AdapterError: it is not there.
    """
    path = str(config.model.path)
    if not Path(path).expanduser().exists() and not is_hub_id(path):
        raise ModelError(f"model.path={path}: no such folder, and not a hub id such as org/name{if_moved(found)}")
    train, held_out = config.data.train, config.data.eval
    if train is not None and is_missing(train):
        raise DataError(f"no such data file or folder: {train}{if_moved(found, 'data.train')}")
    if held_out is not None and is_missing(held_out):
        way = ". If it was moved, data.eval=NEW goes on with the run, and data.eval=null without held-out data"
        raise DataError(f"no such data file or folder: {held_out}{way if found else ''}")
    adapter = config.adapter.path
    if found is None and adapter is not None:
        check_adapter(adapter)


def if_moved(found: tuple[Path, Manifest] | None, name: str = "model.path") -> str:
    """Returns the end of a refusal where the model or the data of a run is not there; nothing of a first start."""
    if found is None:
        return ""
    return f". If it was moved or renamed, {name}=NEW goes on with the run: its content is compared with {found[0]}'s"


def new_run_id() -> str:
    """The time of the start and four letters; the same again in ranks that torchrun has restarted."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
    agent = psutil.Process(os.getppid())
    letters = hashlib.sha256(f"{agent.pid} {agent.create_time()}".encode()).hexdigest()[:4]
    return time.strftime("%Y%m%d-%H%M%S-", time.localtime(agent.create_time())) + letters


def as_it_was(config: RunConfig, num_ranks: int, manifest: Manifest) -> RunConfig:
    """Returns `config` with the length that it leaves open as the run had it."""
    then, rows = manifest.config["train"], manifest.rows_per_step
    return replace(config, train=resumed(config.train, then, rows, num_ranks))


def keep_rows_per_step(config: RunConfig, num_ranks: int, manifest: Manifest) -> RunConfig:
    """`config` with as many rows a step as the run has had: on another number of ranks, by accumulating more or less.

    Raises:
        ConfigError: that is not possible, or the rows were changed without a change of ranks.
    """
    shape = ("micro_batch_size", "num_accumulation_steps")
    then, now = ([train[name] for name in shape] for train in (manifest.config["train"], asdict(config.train)))
    rows, a_rank = manifest.rows_per_step, now[0] * num_ranks
    if then == now and rows % a_rank == 0:
        return replace(config, train=replace(config.train, num_accumulation_steps=rows // a_rank))
    if rows == a_rank * now[1] or config.allow_changes:
        return config
    if rows % (then[0] * num_ranks) == 0:
        back = then
    elif rows % num_ranks == 0:
        largest = max(size for size in range(1, now[0] + 1) if rows // num_ranks % size == 0)
        back = [largest, rows // num_ranks // largest]
    else:
        back = []
    options = " ".join(f"train.{name}={value}" for name, value in zip(shape, back, strict=False))
    raise ConfigError(
        f"the run has {rows} rows a step, but train.micro_batch_size={now[0]} x train.num_accumulation_steps={now[1]} "
        f"on {num_ranks} ranks are {a_rank * now[1]}: choose ranks and options so that they are {rows}. "
        + ways_out(config, options or f"a number of ranks that divides {rows}")
    )


def check_num_steps(config: RunConfig, path: Path, manifest: Manifest, num_steps: int) -> None:
    """Raises `ConfigError` where a checkpoint is of a later step than the last of the run."""
    if manifest.step <= num_steps:
        return
    earlier = [one for one in checkpoint_folder.complete(path.parent) if one.name <= f"step-{num_steps:08d}"]
    back = f"train.num_steps={manifest.step} or more"
    if config.train.num_steps is None:
        back = f"train.num_epochs=null {back}"
    if earlier and str(earlier[-1]) != config.resume:
        back += f", or {option('resume', str(earlier[-1]))} (the later ones are set aside),"
    way = ways_out(config, back, forward=None)
    raise ConfigError(f"{path} is of step {manifest.step}, and the run is to have {num_steps}. {way}")


def check_fingerprints(config: RunConfig, path: Path, manifest: Manifest, fingerprints: dict[str, str]) -> None:
    """Refuses to go on over other data or another model.

    Args:
        fingerprints: of `data` and `model` as they are now.

    Raises:
        CheckpointError: they are not those of the checkpoint.
    """
    if config.allow_changes:
        return
    stored = {"data": manifest.data_fingerprint, "model": manifest.model_fingerprint}
    for what, (group, name) in {"data": ("data", "train"), "model": ("model", "path")}.items():
        if stored[what] == fingerprints[what]:
            continue
        why = ": other rows, another tokenizer or another chat template" if what == "data" else ""
        before, now = manifest.config[group][name], getattr(getattr(config, group), name)
        back = f"what {group}.{name}={now} held before, put back there," if before == now else ""
        adapter = manifest.config["adapter"].get("path")
        if back and what == "data" and adapter is not None and not is_adapter(adapter):
            back = f"adapter.path={adapter}, whose tokenizer and chat template it had, put back there,"
        raise CheckpointError(
            f"the {what} is not that of {path} (fingerprint {fingerprints[what]}, then {stored[what]}){why}. "
            + ways_out(config, back or option(f"{group}.{name}", before))
        )
