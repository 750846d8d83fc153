"""`qdora evaluate`: finds what is scored and on what, scores it on every rank, writes results.json."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from qdora import parallel
from qdora.adapter import peft_format
from qdora.config import DataConfig, EvaluateConfig, ParallelConfig, Plan, Protocol, QuantMethod
from qdora.config.commands import overlaid
from qdora.data.columns import read_rows
from qdora.data.conversation import Told
from qdora.device_memory import explaining_shortage
from qdora.errors import ConfigError, DataError
from qdora.evaluation.ranks import score_all
from qdora.evaluation.scoring import Job, generate_job, likelihood_job, loss_job
from qdora.evaluation.tasks import find_tasks, overall, summary
from qdora.files import NO_ROOM, lock, read_json, write_durably
from qdora.model import check_vocabulary, load_tokenizer, model_folder
from qdora.model.checkpoint_files import CheckpointFiles
from qdora.model.companions import tokenizer_fingerprint
from qdora.model.folder import context_length
from qdora.model.generate import end_tokens
from qdora.parallel import World
from qdora.subject import Subject, find_subject

RESULTS = "results.json"
VERSION = 2
"""Counts up when the same samples would be scored, or recorded, otherwise."""


def evaluate(config: EvaluateConfig) -> int:
    """Scores as `config` says, prints the scores and writes results.json; returns the exit status. *Collective*.

    Raises:
        QdoraError: the run, the model, the adapter or the data cannot be used.
    """
    world = parallel.start(ParallelConfig(plan=Plan.fsdp if config.sharded else Plan.ddp))
    subject = find_subject(config, "scored", world)
    output = _output(config, subject)
    if config.protocol is Protocol.harness:
        return _evaluate_by_harness(config, subject, output, world)
    data = _data(config, subject)
    sources = _sources(config, data)
    base = parallel.main_first(world, lambda: model_folder(subject.model))
    tokenizer = load_tokenizer(base, subject.model, subject.adapter.path)
    check_vocabulary(base, tokenizer)
    # Before the model is loaded: mistakes in the data show within seconds. Rank 0 first, as data is kept tokenised.
    jobs = parallel.main_first(
        world,
        lambda: {name: _job(config, data, source, tokenizer, base, subject.system) for name, source in sources.items()},
    )
    header = _header(config, subject, list(sources.values()))
    asked = [(name, job.fingerprint) for name, job in jobs.items()]
    # Rank 0's, as all go on with what is kept or none: machines may have copies of the data.
    header["identity"] = parallel.broadcast(world, _identity(config, subject, base, asked))
    other = subject.other_base(base)
    header["notes"] = [*([other] if other else []), *_notes(jobs, context_length(base, subject.model))]
    if world.is_main:
        for note in header["notes"]:
            print(note, flush=True)
    kept = parallel.broadcast(world, read_json(output / RESULTS), world.patient_group)
    _keep_others(kept, output, config, list(sources))
    if kept.get("identity") == header["identity"]:
        if world.is_main:
            _show(kept)
            print(f"these scores are there already: {output / RESULTS}")
        return 0
    partial = output / f".scored-{header['identity']}"
    with _taken(partial, world), explaining_shortage(lambda: _does_not_fit(config, subject, world)):
        loaded = subject.load(base, world)
        records = score_all(loaded, jobs, config.batch_size, world, partial)
        tasks = {name: summary(samples) for name, samples in records.items()}
        samples = [{"task": name, **sample} for name, some in records.items() for sample in some]
        if world.is_main:
            _write(output, header | overall(tasks) | {"tasks": tasks, "samples": samples})
    return 0


def _evaluate_by_harness(config: EvaluateConfig, subject: Subject, output: Path, world: World) -> int:
    from qdora.evaluation.harness import find_harness_tasks, run_harness  # an extra

    manager = parallel.main_first(world, lambda: find_harness_tasks(config))
    _keep_others(parallel.broadcast(world, read_json(output / RESULTS), world.patient_group), output, config, None)
    base = parallel.main_first(world, lambda: model_folder(subject.model))
    tokenizer = load_tokenizer(base, subject.model, subject.adapter.path)
    check_vocabulary(base, tokenizer)
    said = [
        (file.name, file.read_bytes())
        for file in sorted(base.glob("*"))
        if file.suffix in (".json", ".model", ".jinja")
    ]
    if subject.adapter.path is not None and (own := tokenizer_fingerprint(Path(subject.adapter.path))) is not None:
        said.append(("the adapter's", own.encode()))
    said.append(("the chat template", repr(tokenizer.chat_template).encode()))
    other = subject.other_base(base)
    if other and world.is_main:
        print(other, flush=True)
    partial = output / f".scored-{parallel.broadcast(world, _identity(config, subject, base, said))}"
    with _taken(partial, world), explaining_shortage(lambda: _does_not_fit(config, subject, world)):
        scores = run_harness(subject.load(base, world), tokenizer, config, manager, world, partial)
        if world.is_main:
            _write(output, _header(config, subject, list(config.tasks)) | scores)
    return 0


def _does_not_fit(config: EvaluateConfig, subject: Subject, world: World) -> str:
    fewer = f"lower batch_size={config.batch_size}, or " if config.batch_size > 1 else ""
    shared = "use more ranks" if config.sharded else "let several ranks share one copy of the model, sharded=true"
    decided = config.run is not None or subject.quant.method is QuantMethod.nf4
    return (
        f"rank {world.rank} of {world.size} ran out of memory while it scored {subject.model.path}: {fewer}{shared}"
        + ("" if decided else ", or quant=nf4, which scores other weights")
    )


def _data(config: EvaluateConfig, subject: Subject) -> DataConfig:
    """The run's own data options but those given."""
    data = config.data if subject.result is None else overlaid(subject.result.config.data, config.data)
    if data.eval is None and not config.tasks:
        raise ConfigError("data.eval is not set: give the file to score on, or tasks=[...] and tasks_path=DIR")
    return replace(data, limit=config.limit)


def _sources(config: EvaluateConfig, data: DataConfig) -> dict[str, str]:
    """The data of each task by its name; a file alone is one."""
    if config.tasks:
        found = find_tasks(config.tasks, Path(str(config.tasks_path)))
        return {name: str(file) for name, file in found.items()}
    return {Path(str(data.eval)).name.partition(".")[0]: str(data.eval)}


def _output(config: EvaluateConfig, subject: Subject) -> Path:
    """What is given, else `evaluation` in the folder that is scored, or beside other outputs where that is none."""
    if config.output_dir:
        return Path(config.output_dir)
    scored = Path(str(config.run or config.adapter or subject.model.path))
    return (scored if scored.is_dir() else Path("outputs", scored.name)) / "evaluation"


def _keep_others(kept: dict[str, Any], output: Path, config: EvaluateConfig, tasks: list[str] | None) -> None:
    """Scores of other tasks, or by another protocol, are not written over where the folder was not given.

    Args:
        tasks: None stands for any.

    Raises:
        ConfigError: they are there.
    """
    found = {*kept["tasks"]} if isinstance(kept.get("tasks"), dict) else set[str]()
    is_other = kept.get("protocol") != config.protocol.name or (tasks is not None and {*tasks} != found)
    if config.output_dir is None and kept and is_other:
        raise ConfigError(
            f"{output / RESULTS} has scores of {', '.join(sorted(found))} with protocol={kept.get('protocol')}: remove "
            f"it, or give another folder, as output_dir={output}-{config.protocol.name}"
        )


@contextmanager
def _taken(partial: Path, world: World) -> Iterator[None]:
    """Makes the folder of what is scored and keeps another evaluation from it. *Collective* at its start.

    At a good end it goes, with those that nobody scores into any more.

    Raises:
        ConfigError: it cannot be made, the same evaluation is going on, or no room is left.
    """
    descriptor = None
    with parallel.failing_together(world):
        try:
            partial.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"output_dir={partial.parent} cannot be made: {error.strerror}") from None
        if world.is_main and not lock(descriptor):
            raise ConfigError(f"the same is being scored into {partial.parent}: wait, or give another output_dir")
    try:
        yield
        if world.is_main:
            for scored in partial.parent.glob(".scored-*"):
                if scored == partial or _is_left(scored):
                    shutil.rmtree(scored, ignore_errors=True)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        told = f"no room is left in output_dir={partial.parent} ({error.strerror})"
        raise ConfigError(f"{told}: make some and start again, which goes on from here") from None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is_left(scored: Path) -> bool:
    """Whether nobody scores into the folder any more."""
    try:
        descriptor = os.open(scored, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    is_left = lock(descriptor)
    os.close(descriptor)
    return is_left


def _header(config: EvaluateConfig, subject: Subject, data: list[str]) -> dict[str, Any]:
    return {
        "protocol": config.protocol.name,
        "model": subject.model.path,
        "quant": subject.quant.method.name,
        "adapter": subject.adapter.path,
        **_checkpoint(subject),
        "data": data[0] if len(data) == 1 else data,
    }


def _checkpoint(subject: Subject) -> dict[str, Any]:
    """What the scores are of, where the run is not finished."""
    checkpoint = None if subject.result is None else subject.result.checkpoint
    return {} if checkpoint is None else {"checkpoint": str(checkpoint)}


def _identity(config: EvaluateConfig, subject: Subject, base: Path, asked: list[Any]) -> str:
    """Hashes what a score depends on: the weights, what is asked of them token by token, and what computes together."""
    said: list[Any] = [VERSION, config.protocol.name, config.batch_size]
    said += [CheckpointFiles(base).fingerprint(), subject.model.dtype.name, subject.model.attention.untrained.name]
    said += [subject.quant.method.name, subject.quant.double_quant, subject.quant.embeddings]
    if subject.result is not None and subject.result.checkpoint is not None:
        said.append(subject.result.digest)
    said += asked
    digest = hashlib.sha256(repr(said).encode())
    digest.update((base / "config.json").read_bytes())
    if subject.adapter.path is not None:
        for name in (peft_format.CONFIG, peft_format.WEIGHTS):
            digest.update((Path(subject.adapter.path) / name).read_bytes())
    return digest.hexdigest()[:16]


def _job(config: EvaluateConfig, data: DataConfig, source: str, tokenizer: Any, base: Path, system: str | None) -> Job:
    if config.protocol is Protocol.loss:
        return loss_job(data, source, tokenizer, config.batch_size)
    told, ends = Told(), end_tokens(tokenizer, base)
    rows = [*read_rows(data, source, data.limit, tell=told.add)]
    if not rows:
        raise DataError(f"{source} is empty: it has no row")
    if config.protocol is Protocol.likelihood:
        job = likelihood_job(rows, data, tokenizer, config.batch_size, ends, system)
    else:
        job = generate_job(rows, data, tokenizer, config.max_new_tokens, ends, system)
    return replace(job, note="\n".join(filter(None, [*told.lines(), job.note])))


def _notes(jobs: dict[str, Job], context: int | None) -> Iterator[str]:
    """What a reader of the scores should know of the rows, in a model of so many tokens."""
    for name, job in jobs.items():
        if job.note:
            yield job.note
        if context and (longer := sum(length > context for length in job.lengths)):
            count = f"{longer} of {len(job.lengths)} samples"
            yield f"{name}: {count} are longer than the model's context of {context} tokens"


def _write(output: Path, results: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_durably(output / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    _show(results)
    print(f"written to {output / RESULTS}", flush=True)


def _show(results: dict[str, Any]) -> None:
    """A line for each task, and their mean."""
    tasks: dict[str, dict[str, Any]] = results["tasks"]
    lines = tasks | ({"mean": results} if len(tasks) > 1 else {})
    columns = ["accuracy", "accuracy_normalised", "chance", "majority", "loss"]
    columns += ["perplexity"] if "accuracy" not in results else []
    names = [name for name in [*columns, "num_samples"] if any(name in scores for scores in lines.values())]
    table = Table(title=f"protocol={results['protocol']}", title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("task", style="cyan", overflow="fold")
    for name in names:
        title = {"accuracy_normalised": "by length", "num_samples": "samples"}.get(name, name)
        table.add_column(title, justify="right", no_wrap=True)
    for task, scores in lines.items():
        shown = []
        for name in names:
            value = scores.get(name)
            text = "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
            shown.append(f"{text} ± {scores['standard_error']:.3f}" if name == "accuracy" and text else text)
        table.add_row(task, *shown)
    Console(highlight=False).print(table)
