"""A compiled block computes what it did, as one graph, and is not compiled again for each length."""

from functools import partial
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
from qdora.model.loss import Rows
from tests.support.marks import nightly
from tests.support.models import make_model

SHAPES = [(2, 24), (2, 31), (2, 40), (2, 17), (3, 33), (4, 20)]
MOST_GRAPHS = 18
"""Training's first block (its input has no gradient), its others, and evaluation; Gemma's also by their attention. Each
for the first shape, for any length, and for any number of rows."""


def token_loss(model: Any, shape: tuple[int, int]) -> Tensor:
    """Loss of random tokens."""
    tokens = torch.randint(4, 200, shape, generator=torch.Generator().manual_seed(shape[1]))
    positions = torch.arange(shape[1]).expand(shape)
    loss: Tensor = model.token_loss(Rows.of(tokens, positions, tokens.roll(-1, 1), tokens.device))
    return loss


@torch.no_grad()
def evaluate(model: Any, shape: tuple[int, int]) -> Tensor:
    """The same, as an evaluation does it."""
    model.eval()
    loss = token_loss(model, shape)
    model.train()
    return loss


def step(model: Any, shape: tuple[int, int]) -> list[Tensor]:
    """Loss and gradients of random tokens."""
    loss = token_loss(model, shape)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


GEMMA_3 = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 16,
}


COMPILED = ["qdora/adapter/*.py", "qdora/nf4.py", "qdora/*kernels.py", "qdora/model/*.py", "tests/unit/test_compile.py"]


@pytest.mark.parametrize(
    ("family", "changes", "backend"),
    [
        ("llama", {}, "eager"),  # the same graphs, without code of their own
        pytest.param("llama", {}, "inductor", marks=pytest.mark.nightly(paths=COMPILED)),
        *nightly(("gemma3", GEMMA_3, "inductor")),
    ],
)
def test_compiled_blocks_compute_the_same_in_few_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any], backend: str
) -> None:
    folder = make_model(tmp_path, family, dtype=torch.float32, **changes)
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
    expected = [[*step(loaded.model, shape), evaluate(loaded.model, shape)] for shape in SHAPES]
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.utils.counters.clear()
    activations.compile_blocks(loaded.blocks, torch.device("cpu"))
    found = [[*step(loaded.model, shape), evaluate(loaded.model, shape)] for shape in SHAPES]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= MOST_GRAPHS
    before = found[-1][:-1]
    for _ in range(2):  # as after an update: the values are others, the graphs are not
        with torch.no_grad():
            for layer in adapted_layers(loaded.model).values():
                layer.lora_b.mul_(3)
        loaded.refresh(torch.device("cpu"))
        after = step(loaded.model, SHAPES[-1])
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(after, step(loaded.model, SHAPES[-1]), rtol=1e-4, atol=1e-4)
        assert not any(
            torch.allclose(old, new, rtol=1e-2, atol=0) for old, new in zip(before[1:], after[1:], strict=True)
        )
        before = after
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_missing_compiler_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"train\.compile=true needs a C\+\+ compiler"):
        activations.compile_blocks([], torch.device("cpu"))
