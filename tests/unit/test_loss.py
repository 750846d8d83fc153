"""The chunked cross entropy is the cross entropy of the whole logits."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdora.data import Batch
from qdora.errors import ModelError
from qdora.model import loss
from qdora.model.loss import (
    LogitTransform,
    Rows,
    attach_losses,
    check_token_loss,
    chunked_cross_entropy,
    label_places,
    mean_loss,
)
from qdora.parallel import start_alone
from tests.support.processes import run

HIDDEN, VOCABULARY = 24, 50
TRANSFORMS = {
    "plain": LogitTransform(),
    "soft-capped": LogitTransform(cap=3.0),
    "scaled": LogitTransform(scale=0.25),
    "both": LogitTransform(scale=2.0, cap=5.0),
}


def expected(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, transform: LogitTransform) -> Tensor:
    """Through the whole logits."""
    logits = nn.functional.linear(hidden, weight, bias) * transform.scale
    if transform.cap is not None:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_loss_and_gradients_are_those_of_the_whole_logits(
    monkeypatch: pytest.MonkeyPatch, name: str, bias: bool, chunk_rows: int
) -> None:
    monkeypatch.setitem(loss.CHUNK_NUMEL, "cpu", chunk_rows * VOCABULARY)
    torch.manual_seed(0)
    leaves = [torch.randn(2, 9, HIDDEN), torch.randn(VOCABULARY, HIDDEN)] + ([torch.randn(VOCABULARY)] if bias else [])
    labels = torch.randint(0, VOCABULARY, (2, 9))
    labels[0, :4] = -100
    results = []
    for ours in (True, False):
        given = [leaf.clone().requires_grad_() for leaf in leaves]
        offset = given[2] if bias else None
        if ours:
            value = chunked_cross_entropy(given[0], [given[1]], offset, *label_places(labels), TRANSFORMS[name])
        else:
            value = expected(given[0], given[1], offset, labels, TRANSFORMS[name])
        (0.5 * value).backward()
        results.append([value, *(leaf.grad for leaf in given)])
    for found, theirs in zip(*results, strict=True):
        assert found is not None
        torch.testing.assert_close(found, theirs)


PEAK = """
from pathlib import Path
import torch
from qdora import cpu_products
from qdora.model.loss import LogitTransform, chunked_cross_entropy, label_places
from tests.support.processes import status_bytes

cpu_products.install()
hidden = torch.randn(2048, 16, dtype=torch.bfloat16, requires_grad=True)
weight = torch.randn(128_000, 16, dtype=torch.bfloat16)
labels = torch.randint(0, 128_000, (2048,))
before = status_bytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
chunked_cross_entropy(hidden, [weight], None, *label_places(labels), LogitTransform()).backward()
print(status_bytes("VmHWM") - before)
"""


@pytest.mark.nightly(paths=["qdora/model/loss.py"])
def test_memory_of_2048_tokens_and_128000_words_stays_small() -> None:
    done = run([sys.executable, "-c", PEAK], MALLOC_MMAP_THRESHOLD_="65536")  # no holes
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**28, "the logits alone are 1 GB in float32"


def test_row_without_a_label_adds_nothing() -> None:
    hidden = torch.randn(1, 5, HIDDEN, requires_grad=True)
    places, targets = label_places(torch.full((1, 5), -100))
    weight = torch.randn(VOCABULARY, HIDDEN)
    value = chunked_cross_entropy(hidden, [weight], None, places, targets, LogitTransform())
    value.backward()
    assert value == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


class Toy(nn.Module):
    """What `token_loss` needs of a model, with something of its own after the head, or eyes for earlier samples."""

    def __init__(self, factor: float = 1.0, sees_the_row: bool = False, attention: str = "sdpa") -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.factor, self.sees_the_row = factor, sees_the_row
        self.options: dict[str, Any] = {}
        text = SimpleNamespace(vocab_size=VOCABULARY)
        self.config = SimpleNamespace(get_text_config=lambda: text, _attn_implementation=attention)

    def decode(self, input_ids: Tensor, **options: Any) -> SimpleNamespace:
        self.options = options
        hidden = self.embedding(input_ids)
        return SimpleNamespace(last_hidden_state=hidden.cumsum(1) if self.sees_the_row else hidden)

    def get_decoder(self) -> object:
        return self.decode

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: object) -> object:
        return SimpleNamespace(logits=self.factor * self.head(self.decode(input_ids).last_hidden_state))


@pytest.mark.parametrize(
    ("model", "packing", "message"),
    [
        ({}, True, None),
        ({"factor": 3.0}, False, "changes its logits in a way qdora does not know"),
        ({"sees_the_row": True}, False, None),
        ({"sees_the_row": True}, True, "lets samples that share a row see each other .* data.packing=false"),
    ],
)
def test_model_that_would_be_trained_wrongly_is_refused(
    model: dict[str, Any], packing: bool, message: str | None
) -> None:
    torch.manual_seed(0)
    toy = Toy(**model)
    attach_losses(toy)
    with nullcontext() if message is None else pytest.raises(ModelError, match=message):
        check_token_loss(toy, torch.device("cpu"), packing)


@pytest.mark.parametrize("attention", ["flash_attention_2", "varlen"])
def test_attention_by_samples_is_told_where_they_begin(attention: str) -> None:
    """As transformers tells flash-attention, of a lone row; nobody else, as models may not take it."""
    torch.manual_seed(0)
    toy, ids = Toy(attention=attention), torch.randint(0, VOCABULARY, (2, 6))
    attach_losses(toy)
    rows = Rows.of(ids, torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]), ids, torch.device("cpu"))
    told = toy.token_loss(rows)
    assert toy.options["position_ids"].shape == (1, 12)
    assert toy.options["cu_seq_lens_q"].tolist() == toy.options["cu_seq_lens_k"].tolist() == [0, 3, 5, 6, 7, 12]
    assert toy.options["max_length_q"] == toy.options["max_length_k"] == 5
    toy.config._attn_implementation = "sdpa"
    torch.testing.assert_close(told, toy.token_loss(rows))
    assert set(toy.options) == {"position_ids", "use_cache"}
    assert toy.options["position_ids"].shape == (2, 6)


def test_log_likelihoods_are_those_of_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.CHUNK_NUMEL, "cpu", 3 * VOCABULARY)
    torch.manual_seed(0)
    model, ids = Toy(1.0), torch.randint(0, VOCABULARY, (3, 6))
    rows, columns, targets = torch.tensor([[0, 0, 2, 1, 0], [5, 5, 0, 3, 1], [1, 2, 0, 4, 4]])
    log_probabilities = model.forward(ids).logits.log_softmax(2)  # type: ignore[attr-defined]
    expected = log_probabilities[rows, columns, targets].detach()
    attach_losses(model)
    torch.testing.assert_close(model.log_likelihoods(ids, ids, rows, columns, targets), expected)


def test_mean_loss_is_without_dropout_and_the_model_trains_on_afterwards() -> None:
    class Dropping(nn.Module):
        def token_loss(self, *_: Tensor) -> Tensor:
            return torch.tensor(100.0 if self.training else 6.0)

    model, ids = Dropping(), torch.zeros(1, 2, dtype=torch.int64)
    batch = Batch(ids, ids, ids, num_label_tokens=2, num_tokens=2)
    assert mean_loss(model, [[batch], [batch, batch]], start_alone("test")) == 3.0
    assert model.training
