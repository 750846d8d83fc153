"""A run from start to end: data, model, resume, training, and what it leaves in its folder."""

import hashlib
import platform
import secrets
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qdora import checkpoint, parallel
from qdora.adapter import peft_format
from qdora.checkpoint import Manifest
from qdora.config import ActivationCheckpointing, AdapterMethod, Plan, RunConfig
from qdora.data import BatchLoader, TokenDataset, prepare
from qdora.errors import EXIT_INTERRUPTED, CheckpointError, ModelError, TrainingError
from qdora.model import LoadedModel, load_model, load_tokenizer, model_folder
from qdora.model.activations import compile_blocks
from qdora.model.checkpoint_files import CheckpointFiles
from qdora.model.export import export_model
from qdora.model.loss import check_token_loss
from qdora.optim import state_tensors
from qdora.parallel import World
from qdora.run_folder import RunFolder, config_values
from qdora.tracking import make_tracker
from qdora.training.memory import choose_recomputation, memory_gib
from qdora.training.progress import summary_table
from qdora.training.report import write_report
from qdora.training.trainer import Trainer, num_steps

FINGERPRINT_BYTES = 1024
"""Of each tensor of the base model."""
PACKAGES = ("qdora", "torch", "bitsandbytes", "transformers", "accelerate", "datasets", "wandb")


def train(config: RunConfig) -> int:
    """Trains as `config` says on every rank that was started; returns the exit status. *Collective*.

    Raises:
        QdoraError: something the user can mend; on every rank.
    """
    world = parallel.start(config.parallel, trains_base=config.adapter.method is AdapterMethod.none)
    try:
        return _train(config, world)
    finally:
        parallel.stop()


def _train(config: RunConfig, world: World) -> int:
    run_id = config.run_id or time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
    run_id = parallel.broadcast(world, run_id)
    config = replace(config, run_id=run_id, output_dir=config.output_dir or f"outputs/{run_id}")
    folder = RunFolder(Path(str(config.output_dir)))
    found: tuple[Path, Manifest] | None = None
    with parallel.failing_together(world):
        if world.is_main:  # one rank decides: what the others see of the folder may be older
            found = folder.find_checkpoint(config)
    found = parallel.broadcast(world, found)
    torch.manual_seed(config.seed * 1000 + world.rank)  # dropout; every rank its own

    base = parallel.main_first(world, lambda: model_folder(config.model))
    with parallel.failing_together(world):
        tokenizer = load_tokenizer(base, config.model)
        check_vocabulary(base, tokenizer)
    train_data = parallel.main_first(world, lambda: prepare(config.data, str(config.data.train), tokenizer))
    train_loader = _loader(config, world, train_data, tokenizer.pad_token_id, shuffle=True)
    all_done = found is not None and found[1].step >= num_steps(config, train_loader)
    if all_done and parallel.broadcast(world, folder.is_finished()):
        if world.is_main:
            print(f"{folder.path} is finished already; raise train.num_steps (or train.num_epochs) to go on")
        return 0
    eval_data = None
    if config.data.eval is not None:
        eval_data = parallel.main_first(world, lambda: prepare(config.data, str(config.data.eval), tokenizer))
    eval_loader = None
    if eval_data is not None:
        eval_loader = partial(_loader, config, world, eval_data, tokenizer.pad_token_id, shuffle=False)

    loaded = load_model(base, config.model, config.quant, config.adapter, config.parallel, world, seed=config.seed)
    check_token_loss(loaded.model, world.device, config.data.packing)
    recomputation = _set_recomputation(config, world, loaded)
    if config.train.compile:
        compile_blocks(loaded.blocks, world.device)
    trainer = Trainer(config, world, loaded, train_loader, eval_loader, folder)
    fingerprints = {"data": train_data.fingerprint, "model": model_fingerprint(base)}
    if found is not None:
        _resume(trainer, *found, fingerprints)
    if world.is_main:
        folder.start(config, trainer.step)
    trainer.tracker = make_tracker(
        config.tracker,
        output_dir=folder.path,
        run_id=run_id,
        settings=dict(config_values(config)),
        resume_id=found[1].tracker_id if found else None,
        is_main=world.is_main,
    )
    if world.is_main:
        _announce(config, world, loaded, train_data, eval_data, trainer)
        print(recomputation)
    status = "failed"
    try:
        status = trainer.run(partial(_save, fingerprints))
        _write_results(trainer, status, base)
        if world.is_main and status == "finished" and folder.adapter.exists():
            trainer.tracker.log_adapter(folder.adapter)
    except TrainingError as error:
        _write_results(trainer, status, base)
        told = checkpoint.set_aside(folder.checkpoints, trainer.step) if world.is_main else ""
        raise TrainingError(f"{error}. {parallel.broadcast(world, told)}") from None
    finally:
        trainer.tracker.finish(status)
    if world.is_main:
        _conclude(config, folder, status, trainer.tracker.location)
    return EXIT_INTERRUPTED if status == "interrupted" else 0


def _set_recomputation(config: RunConfig, world: World, loaded: LoadedModel) -> str:
    """Applies `parallel.activation_checkpointing` to the blocks; what to tell of it. *Collective*."""
    kind = config.parallel.activation_checkpointing
    if kind is not ActivationCheckpointing.auto:
        loaded.recompute(kind)
        return f"activations: recomputation {kind.name}, as configured"
    rows, length = config.train.micro_batch_size, config.data.max_length
    kind, told = choose_recomputation(loaded, world, rows, length, not config.parallel.reshard_after_forward)
    loaded.recompute(kind)
    return f"activations: {told}"


def _save(fingerprints: dict[str, str], trainer: Trainer) -> None:
    """Writes a checkpoint of where the trainer stands. *Collective*."""
    config, world = trainer.config, trainer.world
    state = Manifest(
        step=trainer.step,
        num_tokens=trainer.num_tokens,
        loader=trainer.train_loader.state_dict(),
        world_size=world.size,
        run_id=str(config.run_id),
        tracker_id=trainer.tracker.id,
        config=config_values(config),
        versions=versions(),
        data_fingerprint=fingerprints["data"],
        model_fingerprint=fingerprints["model"],
    )
    tensors = state_tensors(trainer.model, trainer.optimizer)
    checkpoint.save(trainer.folder.checkpoints, tensors, state, world, config.train.keep_checkpoints)


def check_vocabulary(base: Path, tokenizer: Any) -> None:
    """Raises `ModelError` if the tokenizer makes ids that the checkpoint's embedding has no row for."""
    shapes = {name: entry.shape for name, entry in CheckpointFiles(base).entries.items() if "embed" in name}
    rows = max((shape[0] for shape in shapes.values() if len(shape) == 2), default=None)
    highest = max(tokenizer.get_vocab().values())
    if rows is not None and highest >= rows:
        raise ModelError(
            f"the tokenizer in {base} makes token ids up to {highest}, but the model's embedding has {rows} rows: "
            "they do not belong together"
        )


def model_fingerprint(base: Path) -> str:
    """Names, shapes and first bytes of the base model's tensors, hashed: another fine-tune of it differs."""
    files = CheckpointFiles(base)
    digest = hashlib.sha256()
    for name, entry in sorted(files.entries.items()):
        digest.update(repr((name, str(entry.dtype), entry.shape)).encode())
        digest.update(files.first_bytes(name, FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def _loader(config: RunConfig, world: World, data: TokenDataset, pad_token_id: int, *, shuffle: bool) -> BatchLoader:
    return BatchLoader(
        data,
        micro_batch_size=config.train.micro_batch_size,
        num_accumulation_steps=config.train.num_accumulation_steps if shuffle else 1,
        max_length=config.data.max_length,
        packing=config.data.packing,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        shuffle=shuffle,
        pad_token_id=pad_token_id,
    )


def _resume(trainer: Trainer, path: Path, manifest: Manifest, fingerprints: dict[str, str]) -> None:
    """Puts the trainer where the checkpoint stands. *Collective*."""
    for what, then in (("data", manifest.data_fingerprint), ("model", manifest.model_fingerprint)):
        if then != fingerprints[what]:
            raise CheckpointError(
                f"the {what} has changed since {path} was written: restore it, or use another output_dir"
            )
    checkpoint.load(path, state_tensors(trainer.model, trainer.optimizer), manifest, trainer.world)
    trainer.loaded.refresh(trainer.world.device)
    trainer.step, trainer.num_tokens = manifest.step, manifest.num_tokens
    trainer.train_loader.load_state_dict(manifest.loader)


def _announce(
    config: RunConfig,
    world: World,
    loaded: LoadedModel,
    train_data: TokenDataset,
    eval_data: TokenDataset | None,
    trainer: Trainer,
) -> None:
    trainable = num_trainable(loaded)
    plan = config.parallel.plan.name if world.size > 1 else Plan.none.name
    print(f"model: {config.model.path}, {'; '.join(loaded.report.lines())}; {trainable:,} trainable parameters")
    print(f"ranks: {world.size} on {world.device.type}, parallel={plan}; loaded in {loaded.load_s:.1f} s")
    packed = f"; rows {trainer.train_loader.packing_efficiency:.0%} full" if config.data.packing else ""
    print(f"train: {train_data.report.describe()}{packed}")
    if eval_data is not None:
        print(f"eval:  {eval_data.report.describe()}")
    if trainer.tracker.notice:
        print(trainer.tracker.notice)
    if trainer.step:
        print(f"going on from step {trainer.step} of {trainer.num_steps}", flush=True)


def _write_results(trainer: Trainer, status: str, base: Path) -> None:
    """Writes the adapter (or the model), summary.json and report.png. *Collective*."""
    config, world, loaded, folder = trainer.config, trainer.world, trainer.loaded, trainer.folder
    parallel.reshard(loaded.model)
    if status == "finished" and config.adapter.method is AdapterMethod.none:
        export_model(loaded, folder.model, base, world)
    elif status == "finished":
        peft_format.save(loaded.model, folder.adapter, loaded.adapter, str(config.model.path), loaded.dtype, world)
    peaks = parallel.gather(world, memory_gib(world))
    own_bytes, total_bytes = parallel.weight_bytes(loaded.model)
    all_bytes = parallel.gather(world, own_bytes)
    if not world.is_main:
        return
    records = folder.read_metrics()
    losses = [record["loss"] for record in records if "loss" in record]
    folder.write_summary(
        {
            "status": status,
            "run_id": config.run_id,
            "steps": trainer.step,
            "num_steps": trainer.num_steps,
            "num_tokens": trainer.num_tokens,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "eval_losses": {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record},
            "tokens_per_second": trainer.tokens_per_second(),
            "peak_memory_gib": peaks,
            "weight_bytes_per_rank": all_bytes,
            "weight_bytes_total": total_bytes,
            "num_trainable_parameters": num_trainable(loaded),
            "load_s": loaded.load_s,
            "not_quantised": loaded.report.not_quantised,
            "not_adapted": loaded.report.not_adapted,
            "device": world.device.type,
            "world_size": world.size,
            "versions": versions(),
        }
    )
    write_report(folder.metrics, folder.report, f"{config.run_id}: {config.adapter.method.name} on {config.model.path}")


def num_trainable(loaded: LoadedModel) -> int:
    """Numbers that the optimiser changes, over all ranks."""
    return sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)


def _conclude(config: RunConfig, folder: RunFolder, status: str, tracker_location: str | None) -> None:
    if status == "interrupted":
        print(f"interrupted and saved; go on with the same command and output_dir={folder.path}")
        return
    result = folder.model if config.adapter.method is AdapterMethod.none else folder.adapter
    rows = [("result", str(result)), ("figure", str(folder.report)), ("metrics", str(folder.metrics))]
    if tracker_location:
        rows.append(("W&B run", tracker_location))
    if config.adapter.method is not AdapterMethod.none:
        rows.append(("next", f"qdora merge run={folder.path} output={folder.path}/merged"))
    summary_table(rows, f"run {config.run_id}: {status}")
