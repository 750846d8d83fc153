"""Where the processor's time of a thin step goes: `overhead.py`'s model, phase by phase.

    python benchmarks/phases.py --output phases.json

CPU microseconds of one thread a layer (16 blocks of seven) and step, medians: the model with its adapters switched off,
our QLoRA's and QDoRA's forward, backward, clipping, update and refresh; and what single launches take, of which
`launches.py` counts how many there are.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from overhead import RANK, TOKENS
from provenance import provenance
from random_model import SHAPES, write_random_model

from qdora import cpu_products, nf4, parallel
from qdora.adapter.dora import switched_off
from qdora.config import AdapterConfig, AdapterMethod, ModelConfig, OptimConfig, ParallelConfig, QuantConfig
from qdora.model import load_model
from qdora.model.loss import Rows
from qdora.optim import build_optimizer, clip_gradients
from qdora.parallel import World

LAYERS = 7 * SHAPES["thin"]["num_hidden_layers"]


class Phases:
    """CPU seconds of each phase, step by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Measures the block."""
        started = time.process_time()
        yield
        self.seconds[name].append(time.process_time() - started)

    def medians(self, warmup: int, layers: int) -> dict[str, float]:
        """Returns microseconds a layer, without the first `warmup` steps."""
        return {name: 1e6 * statistics.median(s[warmup:]) / layers for name, s in self.seconds.items()}


def stepper(method: AdapterMethod, folder: Path, world: World, found: Phases, *, is_off: bool) -> Callable[[], None]:
    """Returns what does one step and measures its phases; with `is_off` of the base alone, which has but two."""
    model_config, adapter = ModelConfig(path=str(folder)), AdapterConfig(method=method, rank=RANK)
    loaded = load_model(folder, model_config, QuantConfig(), adapter, ParallelConfig(), world)
    model: Any = loaded.model
    optimizer = build_optimizer(model, OptimConfig())
    if is_off:
        model.enable_input_require_grads()
    tokens = torch.arange(TOKENS)[None]
    rows = Rows.of(tokens, tokens, tokens, world.device)
    model.train()

    def step() -> None:
        with switched_off(model) if is_off else nullcontext():
            with found.of("forward"):
                loss = model.token_loss(rows)
            with found.of("backward"):
                loss.backward()
        if is_off:
            return
        with found.of("clipping"):
            clip_gradients(model, 1.0, world, loss.detach())
        with found.of("AdamW"):
            optimizer.step()
        with found.of("refresh"):
            loaded.refresh(world.device, defer=True)
        optimizer.zero_grad(set_to_none=True)

    return step


def launches() -> dict[str, float]:
    """Returns CPU microseconds of single operators on tensors of the thin model's size."""
    width = SHAPES["thin"]["hidden_size"]
    x, w = torch.randn(TOKENS, width).bfloat16(), torch.randn(width, width).bfloat16()
    y, a = torch.empty(TOKENS, width).bfloat16(), torch.randn(RANK, width).bfloat16()
    packed, absmax = nf4.quantize(w.float())
    base = [packed, *nf4.nest(absmax, width)]
    calls: dict[str, Callable[[], Any]] = {
        "product": lambda: torch.mm(x, w),
        "product in place": lambda: y.addmm_(x, w),
        "product with A": lambda: torch.mm(x, a.t()),
        "multiplication in place": lambda: y.mul_(1.0),
        "dequantisation": lambda: nf4.weight_from(base, torch.bfloat16),
    }
    found = {}
    for name, call in calls.items():
        repeats = []
        for _ in range(21):
            started = time.process_time()
            for _ in range(200):
                call()
            repeats.append((time.process_time() - started) / 200)
        found[name] = 1e6 * statistics.median(repeats)
    return found


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with patch.object(cpu_products, "install"):  # as in overhead.py
        world = parallel.start_alone("benchmarks/phases.py")
    kinds = {"without adapters": AdapterMethod.lora, "qlora": AdapterMethod.lora, "qdora": AdapterMethod.dora}
    found = {name: Phases() for name in kinds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "thin"
        write_random_model(folder, "thin")
        arms = [
            stepper(kind, folder, world, found[name], is_off=name == "without adapters") for name, kind in kinds.items()
        ]
    for _ in range(options.warmup + options.steps):
        for step in arms:  # in turn, as other work on the machine changes
            step()
    medians = {name: measured.medians(options.warmup, LAYERS) for name, measured in found.items()}
    text = json.dumps(provenance() | {"us_a_layer": medians, "us_a_launch": launches()}, indent=2)
    print(text)
    options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
