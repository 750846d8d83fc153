"""Loss and every gradient, gathered whole, of the cases of test_gradients."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
import torch._inductor.compile_fx  # for the compiled cases: a second of a core, before ranks are forked
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from qdora import parallel
from qdora.config import (
    ActivationCheckpointing,
    AdapterConfig,
    AdapterMethod,
    Dtype,
    Gather,
    ModelConfig,
    ParallelConfig,
    Plan,
    QuantConfig,
    QuantMethod,
)
from qdora.data import Batch
from qdora.model import load_model
from qdora.model.activations import compile_blocks
from qdora.optim import clip_gradients
from qdora.parallel import World
from qdora.sharding import gather_rows, own_rows
from qdora.training.bound import work_of
from qdora.training.trainer import accumulate_gradients

NUM_BATCHES, ROWS, LENGTH = 4, 2, 24
CLIPPED_NORM = 0.01
"""Below every gradient's norm."""


class ReceivedBytes(TorchDispatchMode):
    """Counts the bytes of weights and gradients that other ranks send to this one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.c10d._allgather_base_.default:
            whole, own = args[:2]
            self.count += (whole.numel() - own.numel()) * whole.element_size()
        elif operator is torch.ops.c10d._reduce_scatter_base_.default:
            own, whole = args[:2]
            self.count += (whole.numel() - own.numel()) * whole.element_size()
        return operator(*args, **(kwargs or {}))


def batches_of(world: World, accumulate: bool) -> list[Batch]:
    """This rank's share of four fixed micro-batches whose label tokens differ in number by a factor of ten."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 200, (NUM_BATCHES, ROWS, LENGTH), generator=generator)
    labels = ids.roll(-1, 2)
    for index in range(NUM_BATCHES):
        labels[index, :, : LENGTH - 2 - 7 * index] = -100
    labels[:, :, -1] = -100
    own = range(world.rank, NUM_BATCHES, world.size)
    groups = [[index] for index in own] if accumulate else [list(own)]
    batches = []
    for group in groups:
        inputs, targets = ids[group].flatten(0, 1), labels[group].flatten(0, 1)
        positions = torch.arange(LENGTH).expand_as(inputs)
        batches.append(Batch(inputs, positions, targets, int((targets != -100).sum()), inputs.numel()))
    return batches


def run_case(case: dict[str, Any], models: Path, output: Path) -> dict[str, float]:
    """Loads, moves the adapter off its start, and leaves the gathered gradients in OUTPUT/NAME.safetensors."""
    full = case["adapter"] == "none"
    config = ParallelConfig(
        plan=Plan[case["plan"]],
        shard_size=2 if case["plan"] == "hsdp" else None,
        reshard_after_forward=case.get("reshard_after_forward", True),
        gather=Gather[case.get("gather", "ahead")],
        cpu_offload=case.get("cpu_offload", False),
        offload_activations=case.get("offload_activations", False),
    )
    model_folder = models / case.get("model", "tied")
    world = parallel.start(config, trains_base=full)
    loaded = load_model(
        model_folder,
        ModelConfig(path=str(model_folder), dtype=Dtype[case["dtype"]]),
        QuantConfig(method=QuantMethod[case["quant"]], embeddings=case.get("embeddings", False)),
        AdapterConfig(
            method=AdapterMethod[case["adapter"]], rank=4, target_modules=case.get("target_modules", "all-linear")
        ),
        config,
        world,
    )
    trained = {name: parameter for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        own, first = own_rows(parameter)
        own.add_(0.02 * noise[first : first + own.shape[0]])
    loaded.refresh(world.device)
    loaded.recompute(ActivationCheckpointing[case.get("checkpointing", "none")])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if case.get("compiled"):
        compile_blocks(loaded.blocks, world.device)
    loaded.model.train()
    batches = batches_of(world, case["accumulate"])
    work = work_of(loaded, world, config)
    received = ReceivedBytes()
    with nullcontext() if case.get("compiled") else received:  # nothing is compiled under a dispatch mode
        own_loss, _ = accumulate_gradients(
            loaded.model, batches, world, reduce_each=work.reduces_each, keep_gathered=work.gathers_once
        )
    counters = torch._dynamo.utils.counters
    assert bool(counters["stats"]["unique_graphs"]) == bool(case.get("compiled")), counters
    assert not counters["graph_break"], f"a block is not one graph: {counters['graph_break']}"
    missing = [name for name, parameter in trained.items() if parameter.grad is None]
    assert not missing, f"no gradient: {missing}"
    gradients = {}
    for name, parameter in trained.items():
        (whole,) = gather_rows([parameter.grad], torch.float32, world.device)  # type: ignore[list-item]
        gradients[name] = whole.contiguous().clone()
    if world.is_main:
        save_file(gradients, output / f"{case['name']}.safetensors")
    loss, grad_norm = clip_gradients(loaded.model, CLIPPED_NORM, world, own_loss).tolist()
    (clipped_norm,) = clip_gradients(loaded.model, 0.0, world).tolist()
    return {
        "loss": loss,
        "grad_norm": grad_norm,
        "clipped_norm": clipped_norm,
        "received_bytes": received.count,
        "expected_bytes": work.step_bytes(len(batches)),
    }


def run_cases(cases: list[dict[str, Any]], models: Path, output: Path) -> dict[str, dict[str, float]]:
    """Runs the cases one after the other, on a rank of several; returns their losses and norms by name."""
    return {case["name"]: run_case(case, models, output) for case in cases}
