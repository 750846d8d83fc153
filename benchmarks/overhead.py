"""Optimiser steps of a model so thin that only dispatch costs: what the processor has to do while a GPU waits for it.

    python benchmarks/overhead.py --output overhead.json

16 Llama blocks of width 64 on 3 tokens, one thread, arms in turn. Matrix products of this size take microseconds:
what is left are Python, autograd and the launch of each operator, as many as in a model of any width. Ratios within
one run count, milliseconds are this machine's. Peers are PEFT's QLoRA and QDoRA over bitsandbytes' Linear4bit.

Ends with status 1 where an arm takes more of PEFT QLoRA's time than `MOST` says, which has room for noise.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from arms import Case, build
from provenance import provenance
from random_model import SHAPES, write_random_model
from step import measure
from transformers.utils import logging

from qdora import cpu_products, parallel
from qdora.config import ActivationCheckpointing
from qdora.training.memory import FASTEST_FIRST

ARMS = ("peft-qlora", "peft-qdora", "qlora", "qdora", "qdora-compiled")
MOST = {"qlora": 1.0, "qdora": 1.2}
TOKENS, RANK = 3, 16


def overhead(arms: list[str], steps: int, warmup: int, recomputation: str = "none") -> dict[str, Any]:
    """Returns median milliseconds of a step of each arm, and its share of PEFT QLoRA's where that is among them.

    `cpu_ms` is the process's own time, which other work on the machine disturbs less.
    """
    torch.set_num_threads(1)
    with patch.object(cpu_products, "install"):  # products this small need it not: its Python would count as dispatch
        world = parallel.start_alone("benchmarks/overhead.py")
    case = Case(TOKENS, TOKENS, RANK, ActivationCheckpointing[recomputation], accumulation=1)
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder) / "thin", "thin")
        built = {name: build(name, Path(folder) / "thin", case, world) for name in arms}
    results = measure(built, case, world, SHAPES["thin"]["vocab_size"], warmup, steps)
    kinds = {"ms": "seconds", "cpu_ms": "cpu_seconds"}
    found = {
        name: {unit: 1000 * statistics.median(result[kind]) for unit, kind in kinds.items()}
        for name, result in results.items()
    }
    for figures in found.values():
        if "peft-qlora" in found:
            figures["of_peft_qlora"] = figures["ms"] / found["peft-qlora"]["ms"]
            figures["cpu_of_peft_qlora"] = figures["cpu_ms"] / found["peft-qlora"]["cpu_ms"]
    return found


def main() -> None:
    """Measures and writes JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--recomputation", choices=[kind.name for kind in FASTEST_FIRST], default="none")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    logging.disable_progress_bar()
    record = provenance() | {"arms": overhead(options.arms, options.steps, options.warmup, options.recomputation)}
    text = json.dumps(record, indent=2)
    print(text)
    options.output.write_text(text + "\n", encoding="utf-8")
    if options.recomputation != "none":  # `MOST` is without
        return
    shares = {name: figures.get("of_peft_qlora", 0.0) for name, figures in record["arms"].items()}
    more = [f"{name} {shares[name]:.2f}, not {most:g}" for name, most in MOST.items() if shares.get(name, 0.0) > most]
    if more:
        sys.exit("more of PEFT QLoRA's time than it was: " + "; ".join(more))


if __name__ == "__main__":
    main()
