"""`parallel.gather` changes what is gathered at a time and nothing else."""

import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from qdora import parallel
from qdora.config import (
    ActivationCheckpointing,
    AdapterConfig,
    Gather,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    QuantConfig,
)
from qdora.model import load_model
from qdora.model.loss import mean_loss
from qdora.nf4 import opaque_layers
from qdora.optim import build_optimizer
from qdora.training import memory
from qdora.training.trainer import accumulate_gradients
from tests.distributed.gradients_on_ranks import batches_of
from tests.support.models import make_model
from tests.support.ranks import RankPool

NUM_STEPS = 3
PATIENCE = 5
"""Milliseconds for gloo to let go of a buffer."""


def groups_of(state: Any) -> list[Any]:
    """What a module's FSDP2 gathers; before torch 2.12 one group at most."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [group for group in (state._fsdp_param_group,) if group is not None] if groups is None else [*groups]


class GatheredBytes(TorchDispatchMode):
    """Bytes of gathered weights that are alive: buffers of a collective, and the parameters copied out of them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
        self.groups = [group for state in states for group in groups_of(state)]
        self.received: list[tuple[StorageWeakRef, int]] = []
        self.at_work: list[list[int]] = []
        self.at_all: list[list[int]] = []
        """Of each step: while adapted layers compute, and at any time."""

    def begin_step(self) -> None:
        """What is seen from now on is the next step's."""
        self.at_work.append([])
        self.at_all.append([])

    def alive(self, patience_ms: int = PATIENCE) -> int:
        """Now, or as soon as the threads of gloo have let go of what they have sent."""
        for _ in range(patience_ms):
            self.received = [(storage, size) for storage, size in self.received if not storage.expired()]
            if not self.received:
                break
            time.sleep(1e-3)
        outputs = [out for group in self.groups for param in group.fsdp_params for out in param.all_gather_outputs]
        return sum(size for _, size in self.received) + sum(out.untyped_storage().size() for out in outputs)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.c10d._allgather_base_.default:
            storage = args[0].untyped_storage()
            self.received.append((StorageWeakRef(storage), storage.nbytes()))
        names = (torch.ops.qdora.adapted_linear.default, torch.ops.qdora.adapted_linear_backward.default)
        if operator in names:
            self.at_work[-1].append(self.alive())
        if operator in names or "c10d" in str(operator) or "split_with_sizes_copy" in str(operator):
            self.at_all[-1].append(self.alive())
        return result


def most(steps: list[list[int]]) -> int:
    """Returns the most bytes at a time, by the least of the steps at each place: gloo may let go of one late."""
    return max(map(min, zip(*steps, strict=True)))


def size_of(module: Any) -> int:
    """Bytes of its gathered weights: trained ones travel in bfloat16."""
    return sum(p.numel() * (2 if p.requires_grad else p.element_size()) for p in module.parameters())


def train_three_steps(gather: Gather, recomputation: ActivationCheckpointing, folder: Path) -> dict[str, Any]:
    """Trains; returns the losses and the gathered bytes."""
    config = ParallelConfig(gather=gather)
    world = parallel.start(config)
    model = ModelConfig(path=str(folder))
    loaded = load_model(folder, model, QuantConfig(embeddings=True), AdapterConfig(rank=4), config, world)
    need = memory.step_bytes(loaded, world, 2, 24)
    loaded.recompute(recomputation)
    loaded.model.train()
    optimizer = build_optimizer(loaded.model, OptimConfig(learning_rate=1e-2))
    optimizer.register_step_post_hook(lambda *_: loaded.refresh(world.device))
    losses = []
    gathered = GatheredBytes(loaded.model)
    for _ in range(NUM_STEPS):
        batches = batches_of(world, accumulate=True)
        gathered.begin_step()
        with opaque_layers(), gathered:
            own_loss, _ = accumulate_gradients(loaded.model, batches, world)
        losses += parallel.all_sum(world, float(own_loss))
        optimizer.step()
        optimizer.zero_grad()
    losses.append(mean_loss(loaded.model, [batches_of(world, accumulate=True)], world))
    return {
        "losses": losses,
        "at_work": most(gathered.at_work),
        "at_all": most(gathered.at_all),
        "bytes": {
            "block": size_of(loaded.blocks[0]),
            "attention": size_of(loaded.blocks[0].self_attn),
            "mlp": size_of(loaded.blocks[0].mlp),
            "norm": size_of(loaded.model.model.norm),
        },
        "told": need.gathered,
        "left": gathered.alive(patience_ms=60_000),
    }


Found = dict[str, dict[str, Any]]


def train_each_way(folder: Path) -> Found:
    """Trains three steps in every way, on a rank of several."""
    return {
        f"{gather.name}-{recomputation.name}": train_three_steps(gather, recomputation, folder)
        for gather, recomputation in product(Gather, (ActivationCheckpointing.none, ActivationCheckpointing.full))
    }


@pytest.fixture(scope="module")
def found(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What was seen on two ranks, by `gather` and recomputation."""
    model = make_model(tmp_path_factory.mktemp("gather"), "llama", num_hidden_layers=4)
    first, second = pool.run(train_each_way, model, nproc=2)
    assert first == second
    return first  # type: ignore[no-any-return]


def test_losses_are_the_same_bit_for_bit(found: Found) -> None:
    losses = [one["losses"] for one in found.values()]
    assert losses[0][-1] < losses[0][0], "three steps and an evaluation"
    assert all(other == losses[0] for other in losses)


@pytest.mark.parametrize("recomputation", ["none", "full"])
def test_each_way_gathers_less_at_a_time(found: Found, recomputation: str) -> None:
    """While a layer computes: two blocks, one, the larger part of one; the norm at the end stays gathered."""
    ahead, block, part = (found[f"{gather}-{recomputation}"] for gather in ("ahead", "block", "part"))
    size = block["bytes"]
    rest = size["block"] - size["attention"] - size["mlp"] + size["norm"]
    assert ahead["at_work"] == 2 * size["block"] + size["norm"]
    assert block["at_work"] == size["block"] + size["norm"]
    assert part["at_work"] == size["mlp"] + rest
    # Also while FSDP2 copies what it has received.
    assert ahead["at_all"] > block["at_all"] > part["at_all"] == 2 * size["mlp"] + rest
    assert block["at_all"] == 2 * size["block"] + size["norm"]


def test_what_is_told_before_covers_it(found: Found) -> None:
    """The count has the gradients too, in float32, of the trained tenth."""
    for name, one in found.items():
        assert 0.7 * one["told"] < one["at_work"] <= one["told"] + one["bytes"]["norm"], name


def test_nothing_stays_gathered_after_an_evaluation(found: Found) -> None:
    assert {one["left"] for one in found.values()} == {0}
