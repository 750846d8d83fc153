"""A run from start to end: data, model, resume, training, and what it leaves in its folder."""

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from qdora import checkpoint, checkpoint_folder, parallel
from qdora.adapter import peft_format
from qdora.adapter.trained_over import gone, is_adapter
from qdora.changes import RANKS, changes_since, of_learning, shown, shown_change
from qdora.checkpoint_folder import Change, Manifest
from qdora.checkpoint_reader import CheckpointTensors
from qdora.config import (
    ActivationCheckpointing,
    AdapterConfig,
    AdapterMethod,
    Attention,
    OnExceed,
    ParallelConfig,
    Plan,
    PreflightConfig,
    RunConfig,
)
from qdora.config.groups import ACCUMULATION_STEPS
from qdora.config.values import config_from_values, config_values
from qdora.data import BatchLoader, TokenDataset, prepare
from qdora.device_memory import explaining_shortage, free_memory
from qdora.errors import EXIT_PREEMPTED, ConfigError, DataError, ModelError, TrainingError
from qdora.interrupt import interrupt
from qdora.model import LoadedModel, check_vocabulary, load_model, load_tokenizer, model_folder
from qdora.model.activations import compile_blocks
from qdora.model.checkpoint_files import CheckpointFiles
from qdora.model.companions import Stored
from qdora.model.folder import other_base
from qdora.model.loss import check_token_loss
from qdora.optim import state_tensors
from qdora.parallel import World
from qdora.planning.length import describe, few_steps, fitted, steps_of
from qdora.planning.preflight import Settled, settle
from qdora.rates import Rates, measure_rates
from qdora.run_folder import CHANGES, RunFolder
from qdora.run_inputs import inputs
from qdora.sharding import weight_bytes
from qdora.tracking import make_tracker
from qdora.training.graph import check_device, check_model
from qdora.training.memory import StepBytes, choose_recomputation, remedies, step_bytes
from qdora.training.results import conclude, num_trainable, template_to_write, versions, write_results
from qdora.training.resume import (
    as_it_was,
    check_fingerprints,
    check_num_steps,
    if_moved,
    keep_rows_per_step,
    new_run_id,
)
from qdora.training.trainer import CHANGED, Trainer


@dataclass(frozen=True, slots=True)
class Recomputation:
    """What the backward computes again, and the memory of a step."""

    kind: ActivationCheckpointing
    need: StepBytes
    told: str


@dataclass(frozen=True, slots=True)
class Sources:
    """What a run trains on and from."""

    base: Path
    """Folder of the base model."""
    pad_token_id: int
    train: TokenDataset
    eval: TokenDataset | None
    fingerprints: dict[str, str]
    """By content, of `data` and `model`."""


def train(config: RunConfig) -> int:
    """Trains as `config` says on every rank that was started; returns the exit status. *Collective*.

    Raises:
        QdoraError: something the user can mend; on every rank.
    """
    world = parallel.start(config.parallel, trains_base=config.adapter.method is AdapterMethod.none)
    new_id = parallel.broadcast(world, config.run_id or new_run_id())
    folder = RunFolder(Path(config.output_dir or f"outputs/{new_id}"))
    try:
        status = _train(config, world, folder, new_id)
    except Exception:
        parallel.disarm_watchdog()  # the error has where it stood
        if world.size == 1:  # of several the others may know nothing of it, and leaving a group waits for them
            parallel.stop()
        raise
    finally:
        folder.release()
    parallel.stop()
    return status


def _train(config: RunConfig, world: World, folder: RunFolder, new_id: str) -> int:
    found = _find_checkpoint(config, folder, world)
    run_id = new_id if found is None or config.run_id else found[1].run_id
    given = config = replace(config, run_id=run_id, output_dir=str(folder.path))
    if found is not None:
        given = as_it_was(given, world.size, found[1])
        config = keep_rows_per_step(given, world.size, found[1])
        config = replace(config, adapter=_adapter_of_a_run_that_goes_on(config.adapter, found[0], world))
    torch.manual_seed(config.seed * 1000 + world.rank)  # dropout; every rank its own

    sources = _read_sources(config, world, found)
    base, fingerprints = sources.base, sources.fingerprints
    train_loader = _loader(config, world, sources.train, sources.pad_token_id, shuffle=True)
    open_length, num_rows = config.train, train_loader.num_rows
    given, config = _with_length(given, config, num_rows, world.size)
    length = [describe(open_length, config.train, num_rows, world.size)]
    if found is None:  # else the rows of a step are what they were
        length.append(few_steps(open_length, num_rows, world.size))
    train_loader.num_accumulation_steps = config.train.num_accumulation_steps or ACCUMULATION_STEPS
    num_steps = steps_of(config.train, num_rows, world.size)
    if found is not None:
        check_fingerprints(config, *found, fingerprints)
        if found[1].step >= num_steps and parallel.broadcast(world, folder.is_finished()):
            if world.is_main:
                _say_finished(folder, _changes(given, world, found[1], fingerprints))
            return 0
        check_num_steps(config, *found, num_steps)
    eval_loader = None
    if sources.eval is not None:
        eval_loader = partial(_loader, config, world, sources.eval, sources.pad_token_id, shuffle=False)

    world, settled, rates = _settle(config, base, world, found[1] if found else None)
    config, given = (replace(some, parallel=settled.parallel) for some in (config, given))
    if settled.exceeds and world.is_main:
        print(f"warning: {settled.told}", flush=True)
    changes = _changes(given, world, found[1], fingerprints) if found else []
    if changes and world.is_main:
        print(f"changed {'; '.join(shown(changes))}", flush=True)
    if config.train.cuda_graph:
        check_device(world)
    with explaining_shortage(lambda: _does_not_load(config, world)):
        loaded = load_model(base, config.model, config.quant, config.adapter, config.parallel, world, seed=config.seed)
        check_token_loss(loaded.model, world.device, config.data.packing)
    if config.train.cuda_graph:
        check_model(loaded.model)
    recomputation = _set_recomputation(config, world, loaded)
    if config.train.compile:
        if config.model.attention is Attention.varlen and world.device.type == "cpu":
            raise ConfigError("model.attention=varlen is not compiled on a CPU: use sdpa, or train.compile=false")
        compile_blocks(loaded.blocks, world.device)
    trainer = Trainer(config, world, loaded, train_loader, eval_loader, folder, rates)
    if found is not None:
        _resume(trainer, *found)
        trainer.changes, trainer.new_changes = [*found[1].changes, *changes], changes
    interrupt.training = True
    with parallel.failing_together(world, world.patient_group):
        if world.is_main:
            folder.start(given, trainer.step, trainer.changes)
    if world.local_size < world.size:
        _check_is_shared(folder, world)
    with parallel.failing_together(world, world.patient_group):  # W&B may take longer than parallel.timeout_s
        trainer.tracker = make_tracker(
            config.tracker,
            output_dir=folder.path,
            run_id=run_id,
            settings=_settings(replace(config, adapter=given.adapter), trainer.changes),
            resume_id=found[1].tracker_id if found else None,
            is_main=world.is_main,
        )
    for record in folder.read_metrics():  # what a killed run had not sent; the tracker knows what it has
        trainer.tracker.log({name: value for name, value in record.items() if name != CHANGED}, record["step"])
    if world.is_main:
        data = [sources.train, *([sources.eval] if sources.eval else [])]
        _announce(config, world, loaded, data, trainer, length)
        if not settled.exceeds:
            print(settled.told)
        print(recomputation.told)
    contents = inputs(config, base) if world.is_main else {}
    manifest = partial(_manifest, given, fingerprints, template_to_write(trainer, base))
    status = _to_the_end(trainer, recomputation, manifest, base, contents)
    if world.is_main:
        conclude(config, folder, status, trainer.checkpoints.failure, trainer.tracker.location)
    return EXIT_PREEMPTED if status == "preempted" else 0


def _settle(config: RunConfig, base: Path, world: World, found: Manifest | None) -> tuple[World, Settled, Rates]:
    """The plan of the run, the ranks divided by it, and what they do a second. *Collective*.

    Args:
        found: of the checkpoint that the run goes on from: it keeps its plan on as many ranks, and is not refused.
    """
    dtype = getattr(torch, config.model.dtype.name)
    is_auto = config.parallel.plan is Plan.auto
    if found is not None:
        if config.plan.on_exceed is OnExceed.refuse:
            config = replace(config, plan=PreflightConfig(on_exceed=OnExceed.warn))
        if is_auto and found.world_size == world.size:
            then = config_from_values(ParallelConfig, found.config["parallel"])
            chosen = {name: getattr(then, name) for name in ("plan", "cpu_offload", "gather", "offload_activations")}
            config = replace(config, parallel=replace(config.parallel, **chosen))
    rates = measure_rates(world, dtype)
    settled = settle(config, base, world, rates)
    if is_auto:
        world = parallel.start(settled.parallel, trains_base=config.adapter.method is AdapterMethod.none)
        rates = measure_rates(world, dtype)
    return world, settled, rates


def _changes(given: RunConfig, world: World, manifest: Manifest, fingerprints: dict[str, str]) -> list[Change]:
    """Returns what holds from the next step on, and did not before."""
    then = {"data": manifest.data_fingerprint, "model": manifest.model_fingerprint}
    contents = {f"fingerprint of the {what}": (then[what], now) for what, now in fingerprints.items()}
    return changes_since(given, world.size, manifest, contents)


def _settings(config: RunConfig, changes: list[Change]) -> dict[str, object]:
    """Returns what the tracker records of the options."""
    return config_values(config) | ({CHANGES: [asdict(change) for change in changes]} if changes else {})


def _say_finished(folder: RunFolder, changes: list[Change]) -> None:
    print(f"{folder.path} is finished already; raise train.num_steps (or train.num_epochs) to go on")
    passed_over = {RANKS, "data.train", "model.path"}  # moved, they are the same, unless a fingerprint is another
    pairs = ", ".join(shown_change(change) for change in of_learning(changes) if change.option not in passed_over)
    if pairs:
        print(f"it was not trained with what is given now ({pairs}): output_dir=ANOTHER begins a run that is")


def _check_is_shared(folder: RunFolder, world: World) -> None:
    """Raises `ConfigError` on every rank where several machines have a folder each. *Collective*."""
    mark = folder.path / f"{parallel.broadcast(world, secrets.token_hex(4))}.partial"
    try:
        with parallel.failing_together(world, world.patient_group):
            if world.is_main:
                mark.touch()
            folder.see(mark, "output_dir", "each rank writes its part of a checkpoint there")
    finally:
        if world.is_main:
            mark.unlink()


def _adapter_of_a_run_that_goes_on(adapter: AdapterConfig, checkpoint: Path, world: World) -> AdapterConfig:
    """Returns `adapter`, with the layers of the checkpoint where the one that the run began with is gone.

    *Collective*.
    """
    is_gone = adapter.path is not None and not is_adapter(adapter.path)
    if not parallel.broadcast(world, is_gone):
        return adapter
    if world.is_main:
        print(gone(str(adapter.path)), flush=True)
    with parallel.failing_together(world):
        stored = peft_format.stored_parameters(CheckpointTensors(checkpoint).names())
    return replace(adapter, path=None, target_modules=sorted({layer for layer, _ in stored.values()}))


def _model_folder(config: RunConfig, found: tuple[Path, Manifest] | None) -> Path:
    try:
        return model_folder(config.model)
    except ModelError as error:
        raise ModelError(f"{error}{if_moved(found)}") from None


def _read_sources(config: RunConfig, world: World, found: tuple[Path, Manifest] | None) -> Sources:
    """Finds the model and reads its tokenizer and the data. *Collective*.

    Args:
        found: the checkpoint that the run goes on from.

    Raises:
        DataError: they are not the same on every rank.
    """
    if world.is_main:
        print(f"loading {config.model.path} and {config.data.train}", flush=True)
    base = parallel.main_first(world, lambda: _model_folder(config, found))
    with parallel.failing_together(world):
        path = config.adapter.path
        if path is not None and world.is_main and (other := other_base(Path(path), config.model, base)):
            print(other, flush=True)
        tokenizer = load_tokenizer(base, config.model, path)
        check_vocabulary(base, tokenizer)
    paths = [path for path in (config.data.train, config.data.eval) if path is not None]
    train_data, *eval_data = parallel.main_first(
        world, lambda: [prepare(config.data, path, tokenizer) for path in paths]
    )
    with parallel.failing_together(world):
        fingerprints = {"data": train_data.fingerprint, "model": CheckpointFiles(base).fingerprint()}
    of_ranks = parallel.gather(world, fingerprints)
    for what, option in (("data", "data.train"), ("model", "model.path")):
        others = [rank for rank, one in enumerate(of_ranks) if one[what] != of_ranks[0][what]]
        if others:
            raise DataError(
                f"{option} is not the same on every machine: rank {others[0]} has another {what} than rank 0. Copy one "
                "to all, or give a folder that they share"
            )
    return Sources(base, tokenizer.pad_token_id, train_data, eval_data[0] if eval_data else None, fingerprints)


def _find_checkpoint(config: RunConfig, folder: RunFolder, world: World) -> tuple[Path, Manifest] | None:
    """As one rank sees it, because what the others see of the folder may be older. *Collective*."""
    found: tuple[Path, Manifest] | None = None
    with parallel.failing_together(world, world.patient_group):  # checksums of large files
        if world.is_main:
            found = folder.find_checkpoint(config)
    return parallel.broadcast(world, found)


def _to_the_end(
    trainer: Trainer,
    recomputation: Recomputation,
    manifest: Callable[[Trainer], Manifest],
    base: Path,
    contents: dict[str, str | None],
) -> str:
    """Trains, writes the results and ends the record; returns the status. *Collective*."""
    world, folder = trainer.world, trainer.folder
    status = "failed"
    try:
        with explaining_shortage(lambda: _does_not_fit(trainer, recomputation)):
            ended = trainer.run(manifest)
        write_results(trainer, ended, base, contents)
        if world.is_main and ended != "preempted" and folder.adapter.exists():
            trainer.tracker.log_adapter(folder.adapter)
        status = ended
    except TrainingError as error:
        trainer.checkpoints.wait()
        write_results(trainer, status, base, contents)
        told = checkpoint_folder.set_aside(folder.checkpoints, trainer.step) if world.is_main else ""
        raise TrainingError(f"{error}. {parallel.broadcast(world, told)}") from None
    finally:
        parallel.disarm_watchdog()  # W&B takes its time
        trainer.tracker.finish(status)
    return status


def _set_recomputation(config: RunConfig, world: World, loaded: LoadedModel) -> Recomputation:
    """Measures a step and applies `parallel.activation_checkpointing`. *Collective*."""
    kind, rows, length = config.parallel.activation_checkpointing, config.train.micro_batch_size, config.data.max_length
    too_large = (
        f"rank {world.rank} of {world.size} ran out of memory over a micro-batch of {rows} x {length} tokens: lower "
        "train.micro_batch_size (and raise train.num_accumulation_steps) or data.max_length"
    )
    with explaining_shortage(lambda: too_large):
        need = step_bytes(loaded, world, rows, length)
        need = need.with_graph() if config.train.cuda_graph else need
    told = f"recomputation {kind.name}, as configured"
    if kind is ActivationCheckpointing.auto:
        needs, free = zip(*parallel.gather(world, (need, free_memory(world))), strict=True)
        keep_gathered = not config.parallel.reshard_after_forward
        kind, told = choose_recomputation(list(needs), min(free), keep_gathered, world.device)
    loaded.recompute(kind, keep_random_state=not config.train.cuda_graph)
    return Recomputation(kind, need, f"activations: {told}")


def _does_not_load(config: RunConfig, world: World) -> str:
    return (
        f"rank {world.rank} of {world.size} ran out of memory while it loaded {config.model.path}: use more ranks "
        "under parallel=fsdp, parallel.cpu_offload=true, quant=nf4, or a smaller model"
    )


def _does_not_fit(trainer: Trainer, recomputation: Recomputation) -> str:
    config, world, kind, need = trainer.config, trainer.world, recomputation.kind, recomputation.need
    own_bytes, _ = weight_bytes(trainer.model)
    total = need.total(kind, not config.parallel.reshard_after_forward)
    return (
        f"rank {world.rank} of {world.size} ran out of memory in step {trainer.step + 1}: its weights take "
        f"{own_bytes / 2**30:.2f} GiB, a step of micro-batches of {config.train.micro_batch_size} x "
        f"{config.data.max_length} tokens about {total / 2**30:.2f} more. What lowers that: "
        f"{remedies(need, kind, config, world, own_bytes)}; more ranks under parallel=fsdp share the weights"
    )


def _manifest(given: RunConfig, fingerprints: dict[str, str], template: Stored | None, trainer: Trainer) -> Manifest:
    """Where the trainer stands."""
    return Manifest(
        step=trainer.step,
        num_tokens=trainer.num_tokens,
        eval_loss=trainer.eval_loss,
        loader=trainer.train_loader.state_dict(),
        guard=trainer.guard.state_dict(),
        rows_per_step=trainer.train_loader.rows_per_step,
        world_size=trainer.world.size,
        run_id=str(trainer.config.run_id),
        tracker_id=trainer.tracker.id,
        config=config_values(given),
        changes=trainer.changes,
        versions=versions(),
        data_fingerprint=fingerprints["data"],
        model_fingerprint=fingerprints["model"],
        system=trainer.train_loader.dataset.report.system,
        template=template,
    )


def _loader(config: RunConfig, world: World, data: TokenDataset, pad_token_id: int, *, shuffle: bool) -> BatchLoader:
    return BatchLoader(
        data,
        micro_batch_size=config.train.micro_batch_size,
        num_accumulation_steps=(config.train.num_accumulation_steps or ACCUMULATION_STEPS) if shuffle else 1,
        max_length=config.data.max_length,
        packing=config.data.packing,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        shuffle=shuffle,
        pad_token_id=pad_token_id,
    )


def _resume(trainer: Trainer, path: Path, manifest: Manifest) -> None:
    """Puts the trainer where the checkpoint stands. *Collective*."""
    checkpoint.load(path, state_tensors(trainer.model, trainer.optimizer), manifest, trainer.world)
    trainer.loaded.refresh(trainer.world.device)
    trainer.step, trainer.num_tokens = manifest.step, manifest.num_tokens
    trainer.train_loader.load_state_dict(manifest.loader)
    trainer.guard.load_state_dict(manifest.guard)


def _with_length(given: RunConfig, config: RunConfig, num_rows: int, num_ranks: int) -> tuple[RunConfig, RunConfig]:
    """Both with what they leave open of the run's length; `config` is `given` with the rows a step of a resumed run."""
    made = fitted(config.train, num_rows, num_ranks)
    names = ("num_accumulation_steps", "num_epochs")
    chosen = {name: getattr(made, name) for name in names if getattr(config.train, name) is None}
    return replace(given, train=replace(given.train, **chosen)), replace(config, train=made)


def _announce(
    config: RunConfig,
    world: World,
    loaded: LoadedModel,
    data: list[TokenDataset],
    trainer: Trainer,
    length: list[str | None],
) -> None:
    trainable = num_trainable(loaded)
    plan = config.parallel.plan_on(world.size).name
    print(f"model: {config.model.path}, {'; '.join(loaded.report.lines())}; {trainable:,} trainable parameters")
    attention = loaded.model.config._attn_implementation
    how = f"parallel={plan}, attention {attention}"
    print(f"ranks: {world.size} on {world.device.type}, {how}; loaded in {loaded.load_s:.1f} s")
    packed = f"; rows {trainer.train_loader.packing_efficiency:.0%} full" if config.data.packing else ""
    for name, dataset, more in zip(("train:", "eval: "), data, (packed, ""), strict=False):
        print(f"{name} {dataset.report.describe(more)}")
    for line in filter(None, length):
        print(line)
    if trainer.tracker.notice:
        print(trainer.tracker.notice)
    if trainer.step:
        print(f"going on from step {trainer.step} of {trainer.num_steps}", flush=True)
