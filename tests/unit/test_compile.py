"""A compiled block computes what it did, as one graph, and is not compiled again for each length."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

from qdora import parallel
from qdora.adapter.dora import adapted_layers
from qdora.config import AdapterConfig, Dtype, ModelConfig, ParallelConfig, QuantConfig
from qdora.errors import ConfigError
from qdora.model import activations, load_model
from tests.support import make_model

SHAPES = [(2, 24), (2, 31), (2, 40), (2, 17), (3, 33), (4, 20)]
MOST_GRAPHS = 6
"""Blocks after the first get inputs with gradients, the first does not: each with the first shape, another length, and
another number of rows."""


def step(model: Any, shape: tuple[int, int]) -> list[Tensor]:
    """Loss and gradients of random tokens."""
    tokens = torch.randint(4, 200, shape, generator=torch.Generator().manual_seed(shape[1]))
    positions = torch.arange(shape[1]).expand(shape)
    loss = model.token_loss(tokens, positions, tokens.roll(-1, 1))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_compiled_blocks_compute_the_same_in_few_graphs(tmp_path: Path, family: str) -> None:
    folder = make_model(tmp_path, family, dtype=torch.float32)
    loaded = load_model(
        folder,
        ModelConfig(path=str(folder), dtype=Dtype.float32),
        QuantConfig(),
        AdapterConfig(rank=4, target_modules=[".*(q|o|qkv|down)_proj"]),
        ParallelConfig(),
        parallel.start_alone("test"),
    )
    for layer in adapted_layers(loaded.model).values():
        layer.lora_b.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    loaded.refresh(torch.device("cpu"))
    loaded.model.train()
    expected = [step(loaded.model, shape) for shape in SHAPES]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    activations.compile_blocks(loaded.blocks, torch.device("cpu"))
    found = [step(loaded.model, shape) for shape in SHAPES]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= MOST_GRAPHS


def test_a_missing_compiler_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"train\.compile=true needs a C\+\+ compiler"):
        activations.compile_blocks([], torch.device("cpu"))
