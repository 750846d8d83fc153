"""What a run leaves when it ends: adapter or model, summary.json, its report, and the last lines on the terminal."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from safetensors import SafetensorError

from qdora import checkpoint_folder, parallel
from qdora.adapter import peft_format
from qdora.adapter.trained_over import write_note
from qdora.card import Trained, write_adapter_card
from qdora.chat_template import DEFAULT_TEMPLATE
from qdora.config import AdapterMethod, DataFormat, RunConfig
from qdora.device_memory import memory_gib
from qdora.errors import CheckpointError
from qdora.model import LoadedModel
from qdora.model.companions import Stored, stored_template, write_tokenizer
from qdora.model.export import export_model
from qdora.run_folder import ENDED, RunFolder
from qdora.run_result import RunResult
from qdora.sharding import reshard, weight_bytes
from qdora.template_variables import with_defaults
from qdora.training.progress import summary_table
from qdora.training.trainer import Trainer

PACKAGES = ("qdora", "torch", "bitsandbytes", "transformers", "accelerate", "datasets", "wandb")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on; "absent" of what is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # qdora itself by its path, or a library that only some runs need
            found[name] = "absent"
    return found


def write_results(trainer: Trainer, status: str, base: Path, contents: dict[str, str | None]) -> None:
    """Writes the adapter (or the model), summary.json and, with `train.report`, the report. *Collective*.

    Args:
        base: the folder that the model came from.
        contents: `run_inputs.inputs` when training began, on rank 0.
    """
    config, world, loaded, folder = trainer.config, trainer.world, trainer.loaded, trainer.folder
    template = template_to_write(trainer, base)
    reshard(loaded.model)
    system = trainer.train_loader.dataset.report.system
    ended = status in ENDED
    with parallel.failing_together(world), _disk_errors_told(folder):
        if ended and config.adapter.method is AdapterMethod.none:
            export_model(loaded, folder.model, base, world, template)
            if world.is_main and system is not None:
                write_note(folder.model, None, system=system)
        elif ended:
            peft_format.save(loaded.model, folder.adapter, loaded.adapter, str(config.model.path), loaded.dtype, world)
            if world.is_main:
                write_note(folder.adapter, config.quant, base_fingerprint=contents["model.path"], system=system)
                write_tokenizer(folder.adapter, base, config.adapter.path, template)
    peaks = parallel.gather(world, memory_gib(world))
    own_bytes, total_bytes = weight_bytes(loaded.model)
    all_bytes = parallel.gather(world, own_bytes)
    if not world.is_main:
        return
    with _disk_errors_told(folder):
        folder.flush()
    records = folder.read_metrics()
    losses = [record["loss"] for record in records if "loss" in record]
    with _disk_errors_told(folder):
        folder.write_summary(
            {
                "status": status,
                "run_id": config.run_id,
                "steps": trainer.step,
                "num_steps": trainer.num_steps,
                "changes": [asdict(change) for change in trainer.changes],
                "num_skipped_steps": trainer.guard.num_skipped,
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
                "checkpoint_stall_s": trainer.checkpoints.total_stall_s,
                "not_quantised": loaded.report.not_quantised,
                "not_adapted": loaded.report.not_adapted,
                "model_fingerprint": contents["model.path"],
                "data_fingerprints": {name: told for name, told in contents.items() if name != "model.path"},
                "device": world.device.type,
                "world_size": world.size,
                "versions": versions(),
            }
        )
        if ended and config.adapter.method is not AdapterMethod.none:
            adapter = replace(config.adapter, target_modules=loaded.report.adapted)
            result = RunResult(folder, config, trainer.changes, folder.adapter)
            write_adapter_card(Trained(base, config.model, config.quant, folder.adapter, adapter, result))
        if config.train.report:
            from qdora.reporting.run import write_run_figure, write_run_page  # here: rank 0 alone needs matplotlib

            write_run_figure(folder)
            write_run_page(folder)


def template_to_write(trainer: Trainer, base: Path) -> Stored | None:
    """Returns the chat template of the training where no folder has it: ours, or one with variables of the run."""
    adapter, variables = trainer.config.adapter.path, trainer.config.model.chat_template_kwargs
    is_chat = trainer.train_loader.dataset.report.format in (DataFormat.messages.name, DataFormat.instruction.name)
    stored = (None if adapter is None else stored_template(Path(adapter))) or stored_template(base)
    if stored is not None:
        return with_defaults(stored, variables) if variables else None
    return DEFAULT_TEMPLATE if is_chat else None


@contextmanager
def _disk_errors_told(folder: RunFolder) -> Iterator[None]:
    """Raises `CheckpointError` where the results cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        good = checkpoint_folder.complete(folder.checkpoints)
        then = f"the same command goes on from {good[-1]}" if good else "there is no checkpoint to go on from"
        raise CheckpointError(
            f"the results could not be written to {folder.path}: {error}. Make room; {then}"
        ) from None


def num_trainable(loaded: LoadedModel) -> int:
    """Numbers that the optimiser changes, over all ranks."""
    return sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)


def conclude(
    config: RunConfig, folder: RunFolder, status: str, not_saved: str | None, tracker_location: str | None
) -> None:
    """The last lines on the terminal."""
    if status == "preempted":
        good = checkpoint_folder.complete(folder.checkpoints)
        saved = "and saved" if good and not not_saved else f"and not saved ({not_saved or 'no step was made'})"
        print(f"interrupted {saved}; go on with the same command and output_dir={folder.path}")
        if not_saved and good:
            print(f"it goes on from {good[-1]}")
        return
    result = folder.model if config.adapter.method is AdapterMethod.none else folder.adapter
    figure = ("figure", str(folder.report)) if config.train.report else ("report", f"qdora report run={folder.path}")
    rows = [("result", str(result)), figure, ("metrics", str(folder.metrics))]
    if tracker_location:
        rows.append(("W&B run", tracker_location))
    if config.adapter.method is not AdapterMethod.none:
        rows.append(("next", f"qdora merge run={folder.path} output={folder.path}/merged"))
    summary_table(rows, f"run {config.run_id}: {status}")
