"""The commands that make a run or a study again, with every option that is not at its default."""

import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qdora.config import AdapterMethod, DataConfig, MethodConfig, ModelConfig, RunConfig, StudyConfig
from qdora.config.values import as_word, config_values, flatten, option, plain, usual_options

MADE_BY_THE_RUN = {"run_id"}
"""Which differ each time."""
Values = dict[str, Any]


def changed_options(config: RunConfig) -> Values:
    """The dotted options of a run that are not at their defaults."""
    usual = usual_options()
    return {name: value for name, value in flatten(config_values(config)).items() if usual[name] != value}


def train_command(config: RunConfig, num_ranks: int) -> str:
    """`qdora train` with the run's own options."""
    options = {name: value for name, value in changed_options(config).items() if name not in MADE_BY_THE_RUN}
    start = "qdora train"
    if num_ranks > 1:
        start = f"torchrun --standalone --nproc-per-node={num_ranks} -m qdora train"
    return command(start, (option(name, value) for name, value in options.items()))


def follow_up_commands(run: Path, config: RunConfig, evaluations: dict[str, Values]) -> list[str]:
    """What is done with a run: `qdora merge`, the evaluations that were made, `qdora analyze`, and the report."""
    own = option("run", str(run))
    found = []
    if config.adapter.method is not AdapterMethod.none:
        found.append(command("qdora merge", [own, option("output", str(run / "merged"))]))
    for name, results in evaluations.items():
        found.append(command("qdora evaluate", [own, *_scored(results), option("output_dir", str(run / name))]))
    if not evaluations and config.data.eval is not None:
        found.append(command("qdora evaluate", [own]))
    return [*found, command("qdora analyze", [own]), command("qdora report", [own])]


def _scored(results: Values) -> list[str]:
    """What was scored, and how."""
    protocol, data, tasks = results["protocol"], results.get("data"), [*results.get("tasks", {})]
    asked = [option("protocol", protocol)]
    if protocol == "harness":
        return [option("tasks", tasks), *asked]
    if isinstance(data, list):
        folder = os.path.commonpath([Path(file).parent for file in data])
        return [option("tasks", tasks), option("tasks_path", folder), *asked]
    return [option("data.eval", data), *asked]


def study_command(config: Values) -> str:
    """`qdora study` with what study.json says of its options."""
    usual = _study_defaults()
    methods = config["methods"]
    own = flatten({name: value for name, value in config.items() if name != "methods"})
    options = [option(name, value) for name, value in own.items() if usual.get(name, ...) != value]
    # All in one: Hydra takes no single method, as OmegaConf makes no dataclass of a dictionary.
    all_methods = ",".join(f"{name}:{_method(values)}" for name, values in methods.items())
    return command("qdora study", [*options, shlex.quote(f"+methods={{{all_methods}}}")])


def _study_defaults() -> Values:
    needed: dict[str, Any] = {"tasks": ["-"], "tasks_path": "-", "methods": {"_": MethodConfig(learning_rates=[1.0])}}
    usual = StudyConfig(model=ModelConfig(path="-"), data=DataConfig(train="-", eval="-"), **needed)
    values = {name: getattr(usual, name) for name in StudyConfig.__dataclass_fields__}
    groups = {name: value for name, value in values.items() if hasattr(value, "__dataclass_fields__")}
    as_values = {
        name: {one: getattr(group, one) for one in group.__dataclass_fields__} for name, group in groups.items()
    }
    return flatten(plain({**values, **as_values, "methods": None}))


def _method(values: Values) -> str:
    usual = plain({name: getattr(MethodConfig(learning_rates=[1.0]), name) for name in values})
    own = {name: value for name, value in values.items() if value != usual[name]}
    return "{" + ",".join(f"{name}:{as_word(value)}" for name, value in own.items()) + "}"


def command(start: str, options: Iterable[str]) -> str:
    """One option a line."""
    return " \\\n  ".join([start, *options])
