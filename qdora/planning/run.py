"""`qdora plan`: what fits on given cards, how fast it is about, and the command that runs it."""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from qdora.config import PlanConfig, Report
from qdora.data import prepare
from qdora.data.loader import num_rows
from qdora.files import check_writable, naming_option, output_may_close
from qdora.model import load_tokenizer
from qdora.model.folder import config_folder
from qdora.planning.hardware import find_hardware
from qdora.planning.length import fitted, steps_of
from qdora.planning.plans import Planned, Planner, fastest
from qdora.planning.report import as_json, draw, show

LEAST_WIDTH = 96
"""Columns of the table; a narrower terminal wraps its lines."""


@dataclass(frozen=True, slots=True)
class Data:
    """What of the user's data the run computes."""

    num_tokens: int
    """Tokens of all the run's passes over the data."""
    num_steps: int
    """Optimiser updates of the run."""


def plan(config: PlanConfig) -> int:
    """Prints the plans and the fastest that fits; 0 if one does, 1 if none.

    Raises:
        QdoraError: the model's config, the hardware or the data cannot be read, or the figure not be written.
    """
    hardware = find_hardware(config.hardware)
    if config.figure is not None:
        check_writable("figure", config.figure)
    config, data = _with_data(config, hardware.num_ranks)
    planner = Planner(config, config_folder(config.model), hardware)
    plans = planner.plans()
    chosen = fastest(plans)
    more = _whole_run(config, data, chosen) if data and chosen else {}
    with output_may_close():
        if config.report is Report.json:
            print(as_json(planner, plans, more))
        else:
            _tell(config, planner, plans, more)
        sys.stdout.flush()
    if config.figure is not None:
        title = f"{config.model.path}, rows of {config.data.max_length} tokens, on {config.hardware}"
        with naming_option("figure", config.figure):
            draw(plans, hardware, title, Path(config.figure))
    return 0 if chosen else 1


def _tell(config: PlanConfig, planner: Planner, plans: list[Planned], more: dict[str, Any]) -> None:
    """For people."""
    hardware, chosen = planner.hardware, fastest(plans)
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, LEAST_WIDTH)
    show(planner, plans, console)
    rates = "measured here" if hardware.measured else "of data sheets, nothing was run on such a card"
    link = f", {8 * hardware.node_link / 1e9:.0f} Gbit/s between nodes" if hardware.num_nodes > 1 else ""
    print(f"Memory is counted and held to measured steps; times are rough, from rates {rates}{link}.")
    if more:
        hours = more["hours"]
        time = f"{3600 * hours:.0f} s" if hours < 0.1 else f"{hours:.1f} h"
        price = f", {more['price']:.2f} at {config.price_per_hour} an hour" if "price" in more else ""
        print(f"The data, {more['num_tokens']:,} tokens in {more['num_steps']:,} steps: about {time}{price}")
    if chosen:
        print(f"\n{planner.command(chosen.choice)}")
    else:
        print("Nothing fits: lower data.max_length or adapter.rank, or take quant=nf4, a smaller model, or more cards")


def _with_data(config: PlanConfig, num_ranks: int) -> tuple[PlanConfig, Data | None]:
    """The config with what training would choose by the size of the data, and that; as given where there is none."""
    if config.data.train is None:
        return config, None
    tokenizer = load_tokenizer(config_folder(config.model), config.model, config.adapter.path)
    dataset = prepare(config.data, config.data.train, tokenizer)
    rows = num_rows(dataset.lengths, config.data.packing, config.data.max_length)
    train = fitted(config.train, rows, num_ranks)
    num_steps = steps_of(train, rows, num_ranks)
    passes = num_steps / steps_of(replace(train, num_steps=None, num_epochs=1.0), rows, num_ranks)
    return replace(config, train=train), Data(math.ceil(passes * dataset.report.num_tokens), num_steps)


def _whole_run(config: PlanConfig, data: Data, chosen: Planned) -> dict[str, Any]:
    """Returns what the run takes: tokens, steps, hours, and the price where one is given."""
    hours = data.num_steps * chosen.time.seconds / 3600
    price = {} if config.price_per_hour is None else {"price": hours * config.price_per_hour}
    return {"num_tokens": data.num_tokens, "num_steps": data.num_steps, "hours": hours, **price}
