"""What sharding refuses before it divides anything, and that it leaves a model on one rank alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from qdora.config import AdapterConfig, ModelConfig, ParallelConfig, QuantConfig
from qdora.errors import ModelError
from qdora.model import load_model
from qdora.parallel import start_alone
from qdora.sharding import shard
from tests.support.models import make_model


def test_frozen_parameter_that_the_gather_would_round_is_refused() -> None:
    mesh: Any = object()  # it is looked at before the mesh is
    world = replace(start_alone("test"), mesh=mesh)
    model = nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(ModelError, match=r"weight is torch\.float32 and frozen: sharding would round it to torch\.bf"):
        shard(model, [], [], world, ParallelConfig(), torch.bfloat16)


def test_model_on_one_rank_is_not_wrapped(tmp_path: Path) -> None:
    """`fully_shard` would copy every weight for its gather."""
    folder = make_model(tmp_path, "llama", num_hidden_layers=1)
    parallel, world = ParallelConfig(), start_alone("test")
    assert parallel.plan.name == "fsdp"
    loaded = load_model(folder, ModelConfig(path=str(folder)), QuantConfig(), AdapterConfig(rank=4), parallel, world)
    assert not [module for module in loaded.model.modules() if isinstance(module, FSDPModule)]
    assert not [parameter for parameter in loaded.model.parameters() if isinstance(parameter, DTensor)]
