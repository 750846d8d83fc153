"""The runs of a study: which there are, what each is trained with, and which learning rate a method goes on with."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdora.config import AdapterMethod, StudyConfig
from qdora.config.commands import changed, written
from qdora.files import read_json

SHARED = ("model", "adapter", "data", "optim", "train", "parallel", "tracker")
"""Groups of options that all runs have in common."""


@dataclass(frozen=True, slots=True)
class Arm:
    """What is compared: a method, with a rank where it has an adapter."""

    method: str
    rank: int | None

    @property
    def label(self) -> str:
        """As tables and figures show it."""
        return self.method if self.rank is None else f"{self.method} r={self.rank}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run."""

    arm: Arm
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Returns the name of its folder."""
        rank = "" if self.arm.rank is None else f"-rank-{self.arm.rank}"
        return f"{self.arm.method}{rank}-rate-{self.learning_rate:g}-seed-{self.seed}"


def arms(config: StudyConfig) -> list[Arm]:
    """Every method with every rank that it has."""
    found = []
    for name, method in config.methods.items():
        ranks = config.ranks if method.ranks is None else method.ranks
        found += [Arm(name, rank) for rank in ([None] if method.adapter is AdapterMethod.none else ranks)]
    return found


def start_of(config: StudyConfig, method: str) -> str:
    """The weights that a method starts from: `none`, `nf4`, or `dequantised`."""
    own = config.methods[method]
    return "dequantised" if own.dequantised else own.quant.name


def starts(config: StudyConfig) -> list[str]:
    """Returns the weights that the methods start from, each once."""
    return sorted({start_of(config, method) for method in config.methods})


def search(config: StudyConfig) -> list[Cell]:
    """The runs that find the learning rates: all of them, with the first seed."""
    return [
        Cell(arm, rate, config.seeds[0]) for arm in arms(config) for rate in config.methods[arm.method].learning_rates
    ]


def best_rates(config: StudyConfig, folder: Path) -> dict[Arm, float]:
    """Each arm's learning rate with the lowest loss on data.eval, of those that ended with a finite one."""
    losses: dict[Arm, dict[float, float]] = {}
    for cell in search(config):
        loss = measured(folder / cell.name).get("eval_loss")
        if loss is not None and math.isfinite(loss):
            losses.setdefault(cell.arm, {})[cell.learning_rate] = loss
    return {arm: min(rates, key=lambda rate: rates[rate]) for arm, rates in losses.items()}


def compared(config: StudyConfig, rates: Mapping[Arm, float]) -> list[Cell]:
    """The runs that are compared: every seed at each arm's own learning rate."""
    return [Cell(arm, rate, seed) for seed in config.seeds for arm, rate in rates.items()]


def group_options(config: StudyConfig, group: str, but: Collection[str] = ()) -> list[str]:
    """Options of a group as the command line takes them: what differs from the defaults, except `but`."""
    given = getattr(config, group)
    pairs = changed(given, type(given)()).items()
    # Hydra refuses names that are not there yet, of data.columns, without the signs.
    signs = {name: "++" if isinstance(value, dict) else "" for name, value in pairs}
    return [f"{signs[name]}{group}.{name}={written(value)}" for name, value in pairs if name not in but]


def shared_options(config: StudyConfig) -> list[str]:
    """Returns the options that all runs share, as `qdora train` takes them, but for the base."""
    return [option for group in SHARED for option in group_options(config, group, {"path"} if group == "model" else ())]


def own_options(config: StudyConfig, cell: Cell, dequantised: Path) -> list[str]:
    """Returns the options of one run alone.

    Args:
        dequantised: the folder of the base as NF4 has it.
    """
    method = config.methods[cell.arm.method]
    options = [f"adapter.method={method.adapter.name}", f"quant.method={method.quant.name}"]
    options += [] if cell.arm.rank is None else [f"adapter.rank={cell.arm.rank}"]
    base = str(dequantised) if method.dequantised else config.model.path
    return [*options, f"model.path={written(base)}", f"optim.learning_rate={cell.learning_rate!r}", f"seed={cell.seed}"]


def measured(run: Path) -> dict[str, Any]:
    """What a finished run's summary says; nothing where it is not finished."""
    summary = read_json(run / "summary.json")
    if summary.get("status") != "finished":
        return {}
    losses = [*summary["eval_losses"].values()]
    names = ("steps", "num_tokens", "first_loss", "last_loss", "tokens_per_second", "num_trainable_parameters")
    kept = {name: summary.get(name) for name in names}
    kept["peak_memory_gib"] = max(summary["peak_memory_gib"])
    return kept | {"eval_loss_before": losses[0] if losses else None, "eval_loss": losses[-1] if losses else None}
