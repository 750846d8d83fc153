"""`qdora plan`: what fits on given cards, how fast it is about, and the command that runs it."""

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from qdora.config import PlanConfig, Report
from qdora.data import prepare
from qdora.model import load_tokenizer, model_folder
from qdora.model.folder import config_folder
from qdora.planning.hardware import find_hardware
from qdora.planning.plans import Planned, Planner, fastest
from qdora.planning.report import as_json, draw, show


def plan(config: PlanConfig) -> int:
    """Prints every plan and the fastest that fits; 0 if one does, 1 if none.

    Raises:
        QdoraError: the model's config, the hardware or the data cannot be read.
    """
    hardware = find_hardware(config.hardware)
    planner = Planner(config, config_folder(config.model), hardware)
    plans = planner.plans()
    chosen = fastest(plans)
    more = _whole_run(config, chosen) if chosen else {}
    if config.figure is not None:
        title = f"{config.model.path}, rows of {config.data.max_length} tokens, on {config.hardware}"
        draw(plans, hardware, title, Path(config.figure))
    if config.report is Report.json:
        print(as_json(planner, plans, more))
        return 0 if chosen else 1
    show(planner, plans, Console(soft_wrap=True, highlight=False))
    rates = "measured here" if hardware.measured else "of data sheets, nothing was run on such a card"
    print(f"Memory is counted and held to measured steps; times are rough, from rates {rates}.")
    if more:
        price = f", {more['price']:.2f} at {config.price_per_hour} an hour" if "price" in more else ""
        print(f"The data, {more['num_tokens']:,} tokens: {more['hours']:.2g} h{price}")
    if chosen:
        print(f"\n{planner.command(chosen.choice)}")
    else:
        print("Nothing fits: lower data.max_length or adapter.rank, or take quant=nf4, a smaller model, or more cards")
    return 0 if chosen else 1


def _whole_run(config: PlanConfig, chosen: Planned) -> dict[str, Any]:
    """What the user's data takes over all epochs; nothing where none is given."""
    if config.data.train is None:
        return {}
    tokenizer = load_tokenizer(model_folder(config.model), config.model)
    dataset = prepare(config.data, config.data.train, tokenizer)
    num_tokens = math.ceil(dataset.report.num_tokens * (config.train.num_epochs or 1.0))
    hours = num_tokens / chosen.tokens_per_second / 3600
    price = {} if config.price_per_hour is None else {"price": hours * config.price_per_hour}
    return {"num_tokens": num_tokens, "hours": hours, **price}
