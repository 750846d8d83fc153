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
    attach_losses,
    check_token_loss,
    chunked_cross_entropy,
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
    for function in (chunked_cross_entropy, expected):
        given = [leaf.clone().requires_grad_() for leaf in leaves]
        weight: Any = [given[1]] if function is chunked_cross_entropy else given[1]
        value = function(given[0], weight, given[2] if bias else None, labels, TRANSFORMS[name])
        (0.5 * value).backward()
        results.append([value, *(leaf.grad for leaf in given)])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs)


PEAK = """
from pathlib import Path
import torch
from qdora import cpu_products
from qdora.model.loss import LogitTransform, chunked_cross_entropy
from tests.support.processes import status_bytes

cpu_products.install()
hidden = torch.randn(8192, 64, dtype=torch.bfloat16, requires_grad=True)
weight = torch.randn(128_000, 64, dtype=torch.bfloat16)
labels = torch.randint(0, 128_000, (8192,))
before = status_bytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
chunked_cross_entropy(hidden, [weight], None, labels, LogitTransform()).backward()
print(status_bytes("VmHWM") - before)
"""


def test_memory_of_8192_tokens_and_128000_words_stays_small() -> None:
    done = run([sys.executable, "-c", PEAK], MALLOC_MMAP_THRESHOLD_="65536")  # no holes
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**28, "the logits alone are 4 GB in float32"


def test_row_without_a_label_adds_nothing() -> None:
    hidden = torch.randn(1, 5, HIDDEN, requires_grad=True)
    value = chunked_cross_entropy(
        hidden, [torch.randn(VOCABULARY, HIDDEN)], None, torch.full((1, 5), -100), LogitTransform()
    )
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
        self.shapes: list[tuple[int, ...]] = []
        text = SimpleNamespace(vocab_size=VOCABULARY)
        self.config = SimpleNamespace(get_text_config=lambda: text, _attn_implementation=attention)

    def decode(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        self.shapes.append(tuple(input_ids.shape))
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


def test_flash_attention_is_given_a_single_row() -> None:
    """It separates the samples of a lone row only."""
    torch.manual_seed(0)
    toy, ids = Toy(attention="flash_attention_2"), torch.randint(0, VOCABULARY, (3, 6))
    attach_losses(toy)
    positions = torch.arange(6).repeat(3, 1)
    one_row = toy.token_loss(ids, positions, ids)
    assert toy.shapes == [(1, 18)]
    toy.config._attn_implementation = "sdpa"
    torch.testing.assert_close(one_row, toy.token_loss(ids, positions, ids))
    assert toy.shapes[-1] == (3, 6)


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
