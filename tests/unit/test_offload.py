"""Hidden states that wait for the backward in host memory are gone from the device until then."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from qdora import parallel
from qdora.config import (
    ActivationCheckpointing,
    AdapterConfig,
    Gather,
    ModelConfig,
    ParallelConfig,
    Plan,
    QuantConfig,
    QuantMethod,
)
from qdora.errors import ConfigError
from qdora.model import LoadedModel, load_model
from qdora.model.loss import Rows
from tests.support.models import make_model

NUM_BLOCKS, ROWS, LENGTH = 4, 2, 16


def load(folder: Path, offload: bool) -> LoadedModel:
    """The model with full recomputation, in training mode."""
    config = ParallelConfig(offload_activations=offload, activation_checkpointing=ActivationCheckpointing.full)
    world = parallel.start_alone("test")
    loaded = load_model(folder, ModelConfig(path=str(folder)), QuantConfig(), AdapterConfig(rank=4), config, world)
    loaded.recompute(ActivationCheckpointing.full)
    loaded.model.train()
    return loaded


def loss_of(loaded: LoadedModel, entered: list[StorageWeakRef]) -> torch.Tensor:
    """Of fixed tokens; notes what enters each block."""
    hooks = [
        block.register_forward_pre_hook(lambda _, given: entered.append(StorageWeakRef(given[0].untyped_storage())))
        for block in loaded.blocks
    ]
    tokens = torch.randint(4, 200, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    rows = Rows.of(tokens, torch.arange(LENGTH).expand(tokens.shape), tokens, tokens.device)
    loss: torch.Tensor = loaded.model.token_loss(rows)
    for hook in hooks:
        hook.remove()
    return loss


def num_alive(entered: list[StorageWeakRef]) -> int:
    return sum(not storage.expired() for storage in entered)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=NUM_BLOCKS)


@pytest.mark.parametrize(("offload", "kept"), [(False, NUM_BLOCKS), (True, 1)])
def test_hidden_states_leave_the_device_but_the_last(folder: Path, offload: bool, kept: int) -> None:
    loaded = load(folder, offload)
    for _ in range(2):  # micro-batches
        entered: list[StorageWeakRef] = []
        loss = loss_of(loaded, entered)
        assert len(entered) == NUM_BLOCKS
        assert num_alive(entered) == kept
        loss.backward()
        del loss
        assert num_alive(entered) == 0


def test_gradients_are_the_same_bit_for_bit_also_after_a_forward_without_a_backward(folder: Path) -> None:
    gradients = []
    for offload in (False, True):
        loaded = load(folder, offload)
        unused: Any = loss_of(loaded, [])
        del unused
        for _ in range(2):
            loss_of(loaded, []).backward()
        gradients.append([p.grad for p in loaded.model.parameters() if p.requires_grad])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))  # type: ignore[arg-type]
    assert any(gradient.any() for gradient in gradients[0])  # type: ignore[union-attr]


def test_options_that_contradict_each_other_are_refused() -> None:
    assert ParallelConfig(offload_activations=True).activation_checkpointing is ActivationCheckpointing.full
    selective = ActivationCheckpointing.selective
    with pytest.raises(ConfigError, match=r"offload_activations=true needs .*checkpointing=full, not selective"):
        ParallelConfig(offload_activations=True, activation_checkpointing=selective)
    with pytest.raises(ConfigError, match=r"parallel\.gather=part needs .*reshard_after_forward=true"):
        ParallelConfig(gather=Gather.part, reshard_after_forward=False)
    with pytest.raises(ConfigError, match=r"parallel\.gather=block needs parallel=fsdp or hsdp"):
        ParallelConfig(gather=Gather.block, plan=Plan.ddp)
    with pytest.raises(ConfigError, match=r"quant\.embeddings=true needs quant=nf4, not none"):
        QuantConfig(method=QuantMethod.none, embeddings=True)
