"""A micro-batch as one CUDA graph: what it computes, and that all it reads and writes stays where it is.

On a CPU nothing is recorded: what would be a graph computes again, from the same inputs at the same addresses.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qdora import parallel
from qdora.config import (
    ActivationCheckpointing,
    AdapterConfig,
    Attention,
    Dtype,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    QuantConfig,
)
from qdora.errors import ConfigError
from qdora.model import LoadedModel, load_model
from qdora.model.loss import IGNORED
from qdora.optim import build_optimizer, clip_gradients
from qdora.training.graph import GraphedGradients, check_device, check_model, fill_up
from qdora.training.trainer import accumulate_gradients
from tests.support.batches import BATCHES, LENGTH, ROWS
from tests.support.models import make_model


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    """Returns a tiny Llama in float32, B not zero, so that all gradients are there."""
    folder = make_model(tmp_path, "llama", num_hidden_layers=2)
    model = ModelConfig(path=str(folder), attention=Attention.varlen, dtype=Dtype.float32)
    world = parallel.start_alone("tests")
    found = load_model(folder, model, QuantConfig(), AdapterConfig(rank=4), ParallelConfig(), world)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in found.model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(std=0.05, generator=generator)
    found.refresh(world.device)
    found.model.train()
    return found


def gradients_of(loaded: LoadedModel) -> list[Tensor]:
    """Returns copies of the gradients."""
    found = [parameter.grad for parameter in loaded.model.parameters() if parameter.requires_grad]
    return [gradient.clone() for gradient in found if gradient is not None]


@pytest.mark.parametrize("kind", [ActivationCheckpointing.none, ActivationCheckpointing.full])
def test_gradients_are_those_without_a_graph(loaded: LoadedModel, kind: ActivationCheckpointing) -> None:
    world = parallel.start_alone("tests")
    loaded.recompute(kind, keep_random_state=False)
    add = GraphedGradients(loaded.model, world, ROWS, LENGTH)
    for names in (["full", "short rows"], ["one row"], ["many samples", "no label"], ["short rows", "full"]):
        batches = [BATCHES[name] for name in names]
        found = []
        for way in (None, add):
            for parameter in loaded.model.parameters():
                if way is None:
                    parameter.grad = None
                elif parameter in add._gradients:
                    parameter.grad = add._gradients[parameter].zero_()
            sums = accumulate_gradients(loaded.model, batches, world, add=way)
            found.append([*sums, *gradients_of(loaded)])
        assert len(found[0]) == len(found[1]) > 10
        for ours, eager in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5 * float(eager.abs().max()))


def test_filled_up_rows_keep_samples_apart_and_labels_in_place() -> None:
    for batch in BATCHES.values():
        rows = fill_up(batch, ROWS, LENGTH)
        assert rows.input_ids.shape == rows.position_ids.shape == (ROWS, LENGTH)
        assert rows.counts is not None
        assert int(rows.counts.sum()) == batch.num_label_tokens
        assert rows.places.numel() % (ROWS * LENGTH // 8) == 0
        labels = rows.input_ids.flatten()[rows.places[: batch.num_label_tokens]]
        assert torch.equal(labels, rows.targets[: batch.num_label_tokens])
        assert torch.equal(labels, batch.labels[batch.labels != IGNORED])
        assert rows.bounds.numel() - 1 in (16, 32, 64)
        assert rows.bounds[0] == 0
        assert rows.bounds[-1] == ROWS * LENGTH
        begins = (rows.position_ids.flatten() == 0).nonzero().squeeze(1)
        assert torch.equal(rows.bounds[: begins.numel()].long(), begins)
        assert {0, LENGTH} <= {int(bound) for bound in rows.bounds}, "a sample reaches from one row into the next"


class Given(TorchDispatchMode):
    """Notes the addresses of what operators read that none of them has made."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[int] = set()
        self._made: list[Tensor] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        made = {tensor.untyped_storage().data_ptr() for tensor in self._made}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.numel() and tensor.untyped_storage().data_ptr() not in made:
                self.addresses.add(tensor.untyped_storage().data_ptr())
        self._made += [one for one in tree_leaves(result) if isinstance(one, Tensor)]  # alive: no address is used twice
        return result


def test_all_that_a_graph_reads_stays_where_it_is(loaded: LoadedModel) -> None:
    """Steps of the optimiser with DoRA's refresh between, other graphs and an evaluation."""
    world, seen = parallel.start_alone("tests"), []
    add = GraphedGradients(loaded.model, world, ROWS, LENGTH)
    optimizer = build_optimizer(loaded.model, OptimConfig(learning_rate=1e-2))
    optimizer.register_step_post_hook(lambda *_: loaded.refresh(world.device))
    for name in ("full", "many samples", "full", "full"):
        add(BATCHES[name], torch.tensor(float(BATCHES[name].num_label_tokens)))
        if name == "full":
            (recorded,) = [one for key, one in add._graphs.items() if key == key_of("full")]
            before = [parameter.grad.clone() for parameter in add._gradients if parameter.grad is not None]
            with Given() as given:
                recorded.replay()
            torch._foreach_copy_([*add._gradients.values()], before)
            seen.append(given.addresses)
        clip_gradients(loaded.model, 1.0, world)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            loaded.model.token_loss(fill_up(BATCHES["one row"], 1, 16))
    assert seen[0]
    assert seen[0] == seen[1] == seen[2]


def key_of(name: str) -> tuple[int, int]:
    """Returns the key of a batch's graph."""
    rows = fill_up(BATCHES[name], ROWS, LENGTH)
    return rows.bounds.numel(), rows.places.numel()


def test_gradients_that_were_dropped_are_noticed(loaded: LoadedModel) -> None:
    add = GraphedGradients(loaded.model, parallel.start_alone("tests"), ROWS, LENGTH)
    number = torch.tensor(10.0)
    add(BATCHES["full"], number)
    loaded.model.zero_grad(set_to_none=True)
    with pytest.raises(AssertionError, match="gradients have moved"):
        add(BATCHES["full"], number)


def test_what_has_no_graph_is_told(loaded: LoadedModel) -> None:
    world, cuda = parallel.start_alone("tests"), torch.device("cuda")
    check_device(replace(world, device=cuda))
    check_model(loaded.model)
    with pytest.raises(ConfigError, match="needs a GPU"):
        check_device(world)
    mesh: Any = object()
    with pytest.raises(ConfigError, match="2 share them: use parallel=ddp"):
        check_device(replace(world, device=cuda, mesh=mesh, size=2))
    loaded.model.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ConfigError, match="the dynamic positions of LlamaForCausalLM depend on what the GPU has"):
        check_model(loaded.model)
    loaded.model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM has sdpa: set model\.attention=varlen"):
        check_model(loaded.model)
