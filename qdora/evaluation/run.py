"""`qdora evaluate`: finds what is scored and on what, scores it on every rank, writes results.json."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from qdora import parallel
from qdora.adapter import peft_format
from qdora.config import DataConfig, EvaluateConfig, ParallelConfig, Plan, Protocol
from qdora.config.commands import overlaid
from qdora.data.sources import Row, fingerprint, load_rows
from qdora.errors import ConfigError, DataError
from qdora.evaluation.ranks import score_all
from qdora.evaluation.scoring import Job, generate_job, likelihood_job, loss_job
from qdora.evaluation.tasks import find_tasks, overall, summary
from qdora.files import write_durably
from qdora.model import load_tokenizer, model_folder
from qdora.model.checkpoint_files import CheckpointFiles
from qdora.model.generate import end_tokens
from qdora.run_folder import plain
from qdora.subject import Subject, find_subject

RESULTS = "results.json"
VERSION = 1
"""Counts up when the same samples would be scored otherwise."""


def evaluate(config: EvaluateConfig) -> int:
    """Scores as `config` says, prints the scores and writes results.json; returns the exit status. *Collective*.

    Raises:
        QdoraError: the run, the model, the adapter or the data cannot be used.
    """
    world = parallel.start(ParallelConfig(plan=Plan.ddp))  # a whole copy of the model on each rank
    subject = find_subject(config, "scored")
    output = _output(config, subject)
    if config.protocol is Protocol.harness:
        from qdora.evaluation.harness import run_harness  # an extra

        base = model_folder(subject.model)
        scores = run_harness(subject.load(base, world), load_tokenizer(base, subject.model), config, world)
        return _write(output, _header(config, subject, list(config.tasks)) | scores)
    data = _data(config, subject)
    sources = _sources(config, data)
    base = parallel.main_first(world, lambda: model_folder(subject.model))
    tokenizer = load_tokenizer(base, subject.model)
    header = _header(config, subject, [str(source) for source in sources.values()])
    header["identity"] = _identity(config, subject, data, base, sources)
    if (kept := _read(output / RESULTS)).get("identity") == header["identity"]:
        if world.is_main:
            _show(kept)
            print(f"these scores are there already: {output / RESULTS}")
        return 0
    # Before the model is loaded: mistakes in the data show within a second.
    jobs = {name: _job(config, data, source, tokenizer, base) for name, source in sources.items()}
    loaded = subject.load(base, world)
    partial = output / f".scored-{header['identity']}"
    records = score_all(loaded, jobs, config.batch_size, world, partial)
    tasks = {name: summary(samples) for name, samples in records.items()}
    samples = [{"task": name, **sample} for name, some in records.items() for sample in some]
    if world.is_main:
        _write(output, header | overall(tasks) | {"tasks": tasks, "samples": samples})
        shutil.rmtree(partial)
    return 0


def _data(config: EvaluateConfig, subject: Subject) -> DataConfig:
    """The run's own data options but those given."""
    data = config.data if subject.run is None else overlaid(subject.run.read_config().data, config.data)
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
    if config.output_dir:
        return Path(config.output_dir)
    return Path(str(config.run or config.adapter or subject.model.path)) / "evaluation"


def _header(config: EvaluateConfig, subject: Subject, data: list[str]) -> dict[str, Any]:
    return {
        "protocol": config.protocol.name,
        "model": subject.model.path,
        "quant": subject.quant.method.name,
        "adapter": subject.adapter.path,
        "data": data[0] if len(data) == 1 else data,
    }


def _identity(config: EvaluateConfig, subject: Subject, data: DataConfig, base: Path, sources: dict[str, str]) -> str:
    """Of all that a score depends on: the weights, the samples, and how they are scored."""
    said: list[Any] = [VERSION, config.protocol.name, config.batch_size, config.max_new_tokens]
    said += [CheckpointFiles(base).fingerprint(), subject.model.dtype.name, subject.model.attention.name]
    said += [plain({"quant": subject.quant.method, "double": subject.quant.double_quant})]
    said += [subject.quant.embeddings, subject.adapter.method.name, subject.adapter.scaling]
    said += [data.format.name, data.max_length, data.overlong.name, data.limit]
    said += [(name, fingerprint(source)) for name, source in sources.items()]
    digest = hashlib.sha256(repr(said).encode())
    if subject.adapter.path is not None:
        digest.update((Path(subject.adapter.path) / peft_format.WEIGHTS).read_bytes())
    return digest.hexdigest()[:16]


def _job(config: EvaluateConfig, data: DataConfig, source: str, tokenizer: Any, base: Path) -> Job:
    if config.protocol is Protocol.loss:
        return loss_job(data, source, tokenizer, config.batch_size)
    rows = _rows(source, data.limit)
    if config.protocol is Protocol.likelihood:
        return likelihood_job(rows, data.format, tokenizer, config.batch_size)
    ends = end_tokens(tokenizer, base)
    return generate_job(rows, data.format, tokenizer, config.batch_size, config.max_new_tokens, ends)


def _rows(source: str, limit: int | None) -> list[Row]:
    rows = list(load_rows(source, limit))
    if not rows:
        raise DataError(f"{source} is empty: it has no row")
    return rows


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _write(output: Path, results: dict[str, Any]) -> int:
    output.mkdir(parents=True, exist_ok=True)
    write_durably(output / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    _show(results)
    print(f"written to {output / RESULTS}", flush=True)
    return 0


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
