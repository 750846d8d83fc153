"""`qdora study`: finds each method's learning rate, trains every seed at it, scores all, and says who differs.

    output_dir/
      METHOD-rank-4-rate-0.001-seed-0/    a run, with `evaluation/` where it is one of those that are compared
      base-none/, base-nf4/, ...          scores of what training started from
      dequantised/                        the base as NF4 has it, where a method starts from that
      study.json, study.md, study.png     what it has come to (`qdora.study.results`)
      runs.jsonl.gz, samples.csv.gz       every number behind it

The same command goes on with what is left. Checkpoints of finished runs are removed: only results count here.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf

from qdora.adapter import peft_format
from qdora.adapter.dora import adapted_layers
from qdora.commands.members import CELL, STOP, evaluate, run_members, run_process, signals_told, taken
from qdora.commands.sweep_results import RECORDS
from qdora.config import AdapterConfig, AdapterMethod, QuantConfig, StudyConfig
from qdora.config.commands import written
from qdora.errors import EXIT_ERROR, EXIT_PREEMPTED, ConfigError
from qdora.evaluation.tasks import find_tasks
from qdora.files import read_json
from qdora.model import model_folder
from qdora.model.build import build_model
from qdora.study.cells import (
    Cell,
    arms,
    best_rates,
    compared,
    group_options,
    measured,
    own_options,
    search,
    shared_options,
    starts,
)
from qdora.study.results import conclude


def study(config: StudyConfig) -> int:
    """Runs the study, or what is left of it; returns the exit status: 75 where it was told to stop.

    Raises:
        ConfigError: the options are wrong, no run of a method has ended, or the tasks cannot be scored.
    """
    if "RANK" in os.environ:
        raise ConfigError("qdora study starts the ranks of its runs itself, NPROC=N of them: leave out torchrun")
    find_tasks(config.tasks, Path(str(config.tasks_path)))  # before hours of training
    folder = Path(config.output_dir or "outputs/study")
    with taken(folder), signals_told(folder / STOP):
        if "dequantised" in starts(config):
            _dequantise(config, folder)
        _score_bases(config, folder)  # a mistake in the tasks shows here
        _run(config, search(config), folder)
        rates = best_rates(config, folder)
        if not _is_told_to_stop(folder):
            if missing := [arm.label for arm in arms(config) if arm not in rates]:
                raise ConfigError(f"no run of {', '.join(missing)} has ended with a loss: see the messages above")
            _run(config, compared(config, rates), folder, _evaluation(config))
        if _is_told_to_stop(folder):
            print(f"interrupted; the same command goes on with what is left of the study in {folder}", flush=True)
            return EXIT_PREEMPTED
        return 0 if conclude(config, folder, rates) else EXIT_ERROR


def _is_told_to_stop(folder: Path) -> bool:
    return (folder / STOP).stat().st_size > 0


def _run(config: StudyConfig, cells: Sequence[Cell], folder: Path, evaluation: list[str] | None = None) -> None:
    """Trains (and scores) the cells through Hydra's launcher; what is there already is left alone.

    Raises:
        ConfigError: a run cannot go on as it is asked to, as with options that it was not trained with.
    """
    if _is_told_to_stop(folder):
        return
    shared = shared_options(config)
    options = {cell.name: own_options(config, cell, folder / "dequantised") for cell in cells}
    # They are no product of values, which is what Hydra's sweeper makes: each is a choice of a group of their own.
    choices = folder / RECORDS / "choices"
    (choices / CELL).mkdir(parents=True, exist_ok=True)
    for name, own in options.items():
        file = choices / CELL / f"{name}.yaml"
        file.write_text("# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.from_dotlist(own)), encoding="utf-8")
    search_path = f"hydra.searchpath=[{written(f'file://{choices.resolve()}')}]"
    chosen = f"+{CELL}={','.join(options)}"
    fixed = frozenset(option.partition("=")[0] for option in shared)
    run_members(folder, [*shared, *config.launcher, search_path, chosen], fixed, options, evaluation)
    for cell in cells:
        if message := read_json(folder / RECORDS / f"{cell.name}.json").get("message"):
            raise ConfigError(message)
        if measured(folder / cell.name):
            shutil.rmtree(folder / cell.name / "checkpoints", ignore_errors=True)


def _evaluation(config: StudyConfig) -> list[str]:
    """Options of `qdora evaluate` for every model."""
    asked = [f"tasks={written(config.tasks)}", f"tasks_path={written(config.tasks_path)}"]
    return [*asked, f"protocol={config.protocol.name}", f"batch_size={config.batch_size}"]


def _score_bases(config: StudyConfig, folder: Path) -> None:
    """Scores what training starts from, as the runs are scored.

    Raises:
        ConfigError: it cannot be.
    """
    shared = group_options(config, "data", {"train", "eval", "packing", "limit"})
    shared += group_options(config, "model", {"path"})
    for name in starts(config):
        if _is_told_to_stop(folder):
            return
        path = folder / "dequantised" if name == "dequantised" else config.model.path
        quant = "nf4" if name == "nf4" else "none"
        model = [f"model.path={written(str(path))}", f"quant.method={quant}"]
        output = f"output_dir={written(str(folder / f'base-{name}'))}"
        status = evaluate([*shared, *model, *_evaluation(config), output], folder / STOP, dict(os.environ))
        if status not in (0, EXIT_PREEMPTED):
            raise ConfigError(f"the base ({name}) could not be scored: see the message above")


def _dequantise(config: StudyConfig, folder: Path) -> None:
    """Writes the base as NF4 has it, in the compute dtype: merged with an adapter that changes nothing.

    Raises:
        ConfigError: it cannot be written.
    """
    output, unchanged = folder / "dequantised", folder / ".unchanged"
    if output.exists() or _is_told_to_stop(folder):
        return
    adapter = AdapterConfig(method=AdapterMethod.lora, rank=1)
    empty = build_model(model_folder(config.model), config.model, QuantConfig(), adapter)
    tensors = {}
    for name, layer in adapted_layers(empty.model).items():
        tensors[peft_format.tensor_name(name, "lora_a")] = torch.zeros(1, layer.in_features)
        tensors[peft_format.tensor_name(name, "lora_b")] = torch.zeros(layer.out_features, 1)
    unchanged.mkdir(exist_ok=True)
    peft_format.write_weights(unchanged / peft_format.WEIGHTS, tensors)
    modules = peft_format.target_modules(empty.model)
    peft_format.write_config(unchanged, adapter, str(config.model.path), modules)
    print("== the base as NF4 has it", flush=True)
    model = group_options(config, "model")
    options = [f"adapter={unchanged}", *model, "quant.method=nf4", f"dtype={config.model.dtype.name}", "verify=false"]
    command = [sys.executable, "-m", "qdora", "merge", *options, f"output={written(str(output))}"]
    status = run_process(command, folder / STOP, dict(os.environ))
    shutil.rmtree(unchanged)
    if status not in (0, EXIT_PREEMPTED):
        raise ConfigError("the base could not be dequantised: see the message above")
