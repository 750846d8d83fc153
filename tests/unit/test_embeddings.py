"""Embedding and head in NF4: bitsandbytes' values, as little dequantised at a time as is said, and the same loss."""

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qdora import nf4
from qdora.config import AdapterConfig, AdapterMethod, Dtype, ModelConfig, ParallelConfig, Plan, QuantConfig
from qdora.errors import ModelError
from qdora.model import LoadedModel, load_model
from qdora.model.loss import LogitTransform, check_token_loss, chunked_cross_entropy, label_places
from qdora.nf4 import NF4Embedding, NF4Head, NF4Weight
from qdora.parallel import start_alone
from tests.support.models import FAMILIES, make_model

WORLD = start_alone("tests")
IDS = torch.arange(4, 68).view(2, 32)
NUM_TOKENS, HIDDEN = 300, 128
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4}
"""Sums of 300 products in float32, of values up to 50, in another order."""


def load(folder: Path, dtype: Dtype = Dtype.float32, **quant: Any) -> LoadedModel:
    """The base alone, not to be trained."""
    config, plan = ModelConfig(path=str(folder), dtype=dtype), ParallelConfig(plan=Plan.none)
    adapter = AdapterConfig(method=AdapterMethod.none)
    return load_model(folder, config, QuantConfig(embeddings=True, **quant), adapter, plan, WORLD, trainable=False)


@pytest.fixture(params=[True, False], ids=["double", "single"])
def quantised(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NF4Head:
    """A head of random values, in parts of 7 rows."""
    monkeypatch.setitem(nf4.PART_NUMEL, "cpu", 7 * HIDDEN)
    torch.manual_seed(0)
    head = NF4Head(HIDDEN, NUM_TOKENS, bias=False, double_quant=request.param, dtype=torch.float32)
    packed, scales = nf4.quantize(torch.randn(NUM_TOKENS, HIDDEN))
    head.packed.data = packed
    if request.param:
        codes, head.absmax_scale, head.absmax_mean = nf4.nest(scales, NUM_TOKENS)
        head.absmax.data = codes
    else:
        head.absmax.data = scales.view(torch.uint8)
    return head


def whole(weight: NF4Weight) -> Tensor:
    """Dequantised."""
    return nf4.weight_from(weight.tensors(), torch.float32).clone()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dequantised_weights(family: str, double_quant: bool, tmp_path: Path) -> None:
    """Of bitsandbytes, of the whole tensor; Gemma's scaled embedding and tied heads among them."""
    folder = make_model(tmp_path, family)
    ours = load(folder, double_quant=double_quant)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tied = theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert ours.report.quantised[-2:] == ["model.embed_tokens", "lm_head"]
    for name in ours.report.quantised[: -1 if tied else None]:
        weight = theirs.get_submodule(name).weight.data
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=double_quant)
        weight.copy_(bnb.dequantize_4bit(packed, state).view_as(weight))
    with torch.no_grad():
        logits, expected = (model.eval()(input_ids=IDS).logits for model in (ours.model, theirs))
    assert torch.equal(logits, expected)
    assert (ours.model.lm_head.packed is ours.model.model.embed_tokens.packed) == tied
    check_token_loss(ours.model, WORLD.device, packing=True)
    labels = IDS.roll(-1, 1)
    log_probabilities = expected.log_softmax(2).gather(2, labels[..., None])[..., 0]
    positions, (rows, columns) = torch.arange(32).expand_as(IDS), torch.ones_like(IDS).nonzero(as_tuple=True)
    found = ours.model.log_likelihoods(IDS, positions, rows, columns, labels.flatten())
    torch.testing.assert_close(found, log_probabilities.flatten())


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(2.0, 5.0)], ids=["plain", "soft-capped"])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_is_that_of_the_dense_head(quantised: NF4Head, bias: bool, transform: LogitTransform) -> None:
    weight, offset = whole(quantised), torch.randn(NUM_TOKENS) if bias else None
    hidden, labels = torch.randn(2, 9, HIDDEN), torch.randint(0, NUM_TOKENS, (2, 9))
    labels[0, :4] = -100
    results = []
    for tensors in (quantised.tensors(), [weight]):
        given = hidden.clone().requires_grad_()
        value = chunked_cross_entropy(given, tensors, offset, *label_places(labels), transform)
        value.backward()
        results.append((value.detach(), given.grad))
    torch.testing.assert_close(*results, **TOLERANCE)


def test_head_computes_as_a_linear_layer_with_its_gradient(quantised: NF4Head) -> None:
    x = torch.randn(5, HIDDEN, requires_grad=True)
    upstream = torch.randn(5, NUM_TOKENS)
    y = quantised(x)
    y.backward(upstream)
    assert x.grad is not None
    torch.testing.assert_close(y, x @ whole(quantised).T, **TOLERANCE)
    torch.testing.assert_close(x.grad, upstream @ whole(quantised), **TOLERANCE)


def test_only_what_is_needed_is_dequantised(quantised: NF4Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are looked up; of the head seven at a time, in the loss and in the logits."""
    embedding = NF4Embedding(NUM_TOKENS, HIDDEN, quantised.double_quant, torch.float32, None)
    embedding.share(quantised)
    shapes: list[int] = []
    dequantize = nf4.dequantize

    def noted(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        shapes.append(packed.shape[0])
        return dequantize(packed, absmax, dtype)

    expected = whole(quantised)[IDS]
    monkeypatch.setattr(nf4, "dequantize", noted)
    assert torch.equal(embedding(IDS), expected)
    assert shapes == [IDS.numel()]
    hidden = torch.randn(4, HIDDEN, requires_grad=True)
    chunked_cross_entropy(hidden, quantised.tensors(), None, *label_places(torch.arange(4)), LogitTransform())
    quantised(hidden)
    assert max(shapes[1:]) == 7
    assert sum(shapes[1:]) == 3 * NUM_TOKENS


def test_rows_without_whole_blocks_stay_as_they_are(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama-tied", hidden_size=96, head_dim=32)
    reason = "rows of 96, not a multiple of 64"
    assert load(folder).report.not_quantised.items() >= {"model.embed_tokens": reason, "lm_head": reason}.items()
    with pytest.raises(ModelError, match=r"quant\.strict=true .*embed_tokens \(rows of 96"):
        load(folder, strict=True)
