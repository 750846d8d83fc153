"""One optimiser step of qdora against PEFT's: same model, same NF4 bytes, same initial adapters, same batches.

    python benchmarks/step.py --model models/SmolLM2-135M-Instruct --tokens 1024 --output benchmarks/results/NAME.json

All arms live in one process and take steps in turn, so that whatever else the machine does meets them alike. What
counts is the ratio of medians; peak memory needs a process an arm (`--arms qdora` alone gives it).
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

from qdora import parallel
from qdora.adapter.dora import adapted_layers
from qdora.config import AdapterConfig, AdapterMethod, ModelConfig, ParallelConfig, Plan, QuantConfig
from qdora.model import load_model
from qdora.training.run import versions

ARMS = ("peft-qlora", "peft-qdora", "qlora", "qdora")
RANK = 16
LEARNING_RATE = 1e-4
LOSS_TOLERANCE = 0.02
"""Relative; the arms round bfloat16 products in different places."""


@dataclass(slots=True)
class Arm:
    """A model with its optimiser: `loss` gives the mean loss a token, `after_step` what must follow an update."""

    loss: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    after_step: Callable[[], None]

    def step(self, tokens: Tensor) -> float:
        """One update on (rows, length) tokens; returns the loss before it."""
        loss = self.loss(tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_step()
        return float(loss.detach())


def _initial(name: str, out: int, width: int) -> tuple[Tensor, Tensor]:
    """A and B of the layer `name`, the same in every arm; B is not zero, so that nothing can be left out."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    a = torch.randn(RANK, width, generator=generator) * width**-0.5
    return a.bfloat16(), (torch.randn(out, RANK, generator=generator) * 1e-3).bfloat16()


def ours(folder: Path, dora: bool, world: parallel.World) -> Arm:
    """qdora's own layers; float32 masters, bfloat16 arithmetic."""
    method = AdapterMethod.dora if dora else AdapterMethod.lora
    adapter = AdapterConfig(method=method, rank=RANK)
    config = ModelConfig(path=str(folder))
    loaded = load_model(folder, config, QuantConfig(), adapter, ParallelConfig(plan=Plan.none), world)
    for name, layer in adapted_layers(loaded.model).items():
        a, b = _initial(name, layer.out_features, layer.in_features)
        layer.lora_a.data.copy_(a)
        layer.lora_b.data.copy_(b)
    loaded.refresh(world.device)
    loaded.model.train()

    def loss(tokens: Tensor) -> Tensor:
        labels = torch.full_like(tokens, -100)
        labels[:, :-1] = tokens[:, 1:]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        total: Tensor = loaded.model.token_loss(tokens, positions, labels)
        return total / (tokens.numel() - tokens.shape[0])

    parameters = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    return Arm(loss, torch.optim.AdamW(parameters, LEARNING_RATE), lambda: loaded.refresh(world.device))


def theirs(folder: Path, dora: bool, device: torch.device) -> Arm:
    """PEFT over bitsandbytes' Linear4bit, adapters in bfloat16."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": device}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 repacks its weights in place at the first evaluation, which breaks PEFT's DoRA.
            module.support_avx512bf16_for_cpu = False
    model.is_loaded_in_4bit = True  # without it PEFT adapts the layers as if they were not quantised
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    peft_model: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
    kinds = {type(module).__module__ for module in peft_model.modules() if hasattr(module, "lora_A")}
    assert kinds == {"peft.tuners.lora.bnb"}, f"PEFT's 4-bit layers are not used: {kinds}"
    for name, module in peft_model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = _initial(name.removeprefix("base_model.model."), module.out_features, module.in_features)
            module.lora_A["default"].weight.data = a.to(device)
            module.lora_B["default"].weight.data = b.to(device)
            if dora:  # m starts as the norm of W alone, as in qdora
                vector = module.lora_magnitude_vector["default"]
                vector.weight.data = vector.weight.data.bfloat16()
    peft_model.train()
    parameters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    return Arm(
        lambda tokens: peft_model(input_ids=tokens, labels=tokens, use_cache=False).loss,
        torch.optim.AdamW(parameters, LEARNING_RATE),
        lambda: None,
    )


def measure(arms: dict[str, Arm], batches: list[Tensor], warmup: int) -> dict[str, dict[str, Any]]:
    """Steps of all arms in turn; seconds of each step after the warm-up, and every loss."""
    results: dict[str, dict[str, Any]] = {name: {"seconds": [], "losses": []} for name in arms}
    for index, tokens in enumerate(batches):
        for name, arm in arms.items():
            if tokens.is_cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            loss = arm.step(tokens)
            if tokens.is_cuda:
                torch.cuda.synchronize()
            results[name]["losses"].append(loss)
            if index >= warmup:
                results[name]["seconds"].append(time.perf_counter() - started)
    return results


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step, in rows of --length")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    logging.disable_progress_bar()
    world = parallel.start_alone("benchmarks/step.py")
    arms = {
        name: theirs(options.model, "dora" in name, world.device)
        if name.startswith("peft")
        else ours(options.model, "dora" in name, world)
        for name in options.arms
    }
    generator = torch.Generator().manual_seed(0)
    shape = (options.tokens // options.length, options.length)
    batches = [
        torch.randint(1000, 40000, shape, generator=generator).to(world.device)
        for _ in range(options.warmup + options.steps)
    ]
    results = measure(arms, batches, options.warmup)
    first = [result["losses"][0] for result in results.values()]
    assert max(first) - min(first) <= LOSS_TOLERANCE * min(first), f"the arms do not compute the same: {first}"

    table = Table(title=f"seconds a step of {options.tokens} tokens, {world.device.type}")
    for column in ("arm", "median", "min", "max", "loss", *(f"/ {name}" for name in arms if "peft" in name)):
        table.add_column(column)
    medians = {name: statistics.median(result["seconds"]) for name, result in results.items()}
    for name, result in results.items():
        seconds = [f"{value:.3f}" for value in (medians[name], min(result["seconds"]), max(result["seconds"]))]
        ratios = [f"{medians[name] / medians[other]:.2f}" for other in arms if "peft" in other]
        table.add_row(name, *seconds, f"{result['losses'][-1]:.4f}", *ratios)
    Console().print(table)
    if options.output:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        record = {
            "commit": commit.stdout.strip(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {world.device.type}",
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "versions": versions(),
            "tokens": options.tokens,
            "rank": RANK,
            "medians": medians,
            "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "results": results,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
