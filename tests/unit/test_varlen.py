"""Attention of packed rows by samples: what it computes, for which models, and that nobody sees another's tokens."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig

from qdora.changes import differing
from qdora.config import ActivationCheckpointing, AdapterConfig, Attention, ModelConfig, ParallelConfig, QuantConfig
from qdora.errors import ModelError
from qdora.model import LoadedModel, load_model, varlen
from qdora.model import load as load_module
from qdora.model.loss import Rows, check_token_loss
from qdora.parallel import start_alone
from tests.support.models import make_model

POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4, 5, 6]])
BOUNDS = [0, 4, 7, 8, 9, 16]


def test_bounds_are_where_positions_begin_anew() -> None:
    bounds, longest = varlen.bounds_of(POSITIONS)
    assert (bounds.tolist(), bounds.dtype, longest) == (BOUNDS, torch.int32, 7)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_is_that_with_a_mask(kv_heads: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(16, heads, 8, generator=generator, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    bounds, longest = varlen.bounds_of(POSITIONS)
    ours = varlen.attend(q, k, v, bounds, longest, 0.3, window)
    sample = torch.repeat_interleave(torch.arange(5), bounds.diff())
    back = torch.arange(16)[:, None] - torch.arange(16)
    mask = (sample[:, None] == sample) & (back >= 0) & (back < (window or 16))
    heads_first = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    theirs = scaled_dot_product_attention(*heads_first, mask, scale=0.3, enable_gqa=True)[0].transpose(0, 1)
    upstream = torch.randn(ours.shape, generator=generator)
    torch.testing.assert_close(ours, theirs)
    for own, other in zip(
        torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(theirs, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(own, other)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": 3},
    "phi3": {"sliding_window": 3},
    "gemma3": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 3,
    },
}


def load(folder: Path, attention: Attention, *, trainable: bool = True) -> LoadedModel:
    return load_model(
        folder,
        ModelConfig(path=str(folder), attention=attention),
        QuantConfig(),
        AdapterConfig(rank=4),
        ParallelConfig(),
        start_alone("test"),
        trainable=trainable,
    )


def loss_and_gradients(loaded: LoadedModel, rows: Rows) -> list[Tensor]:
    loaded.model.train()
    loss = loaded.model.token_loss(rows)
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in loaded.model.parameters() if p.requires_grad])]


def test_families_that_auto_takes_it_for_are_those_that_are_tried(tmp_path: Path) -> None:
    folders = [make_model(tmp_path / family, family, **changes) for family, changes in FAMILIES.items()]
    tried = {AutoConfig.from_pretrained(folder).model_type for folder in folders}
    assert tried == {*varlen.FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_trained_as_with_a_mask(family: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", family=family, **FAMILIES[family])
    tokens = torch.randint(4, 200, POSITIONS.shape, generator=torch.Generator().manual_seed(0))
    rows = Rows.of(tokens, POSITIONS, tokens.roll(-1, 1), torch.device("cpu"))
    found = {}
    for attention in (Attention.sdpa, Attention.varlen):
        loaded = load(folder, attention)
        check_token_loss(loaded.model, torch.device("cpu"), packing=True)
        assert loaded.model.config._attn_implementation == attention.name
        found[attention] = loss_and_gradients(loaded, rows)
    for ours, theirs in zip(found[Attention.varlen], found[Attention.sdpa], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.03 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", [ActivationCheckpointing.full, ActivationCheckpointing.selective])
def test_recomputation_knows_the_samples_too(kind: ActivationCheckpointing, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    tokens = torch.randint(4, 200, POSITIONS.shape, generator=torch.Generator().manual_seed(0))
    rows = Rows.of(tokens, POSITIONS, tokens.roll(-1, 1), torch.device("cpu"))
    plain, recomputed = load(folder, Attention.varlen), load(folder, Attention.varlen)
    recomputed.recompute(kind)
    for ours, theirs in zip(loss_and_gradients(recomputed, rows), loss_and_gradients(plain, rows), strict=True):
        assert torch.equal(ours, theirs)


def test_what_answers_has_a_cache_and_masks(tmp_path: Path) -> None:
    """Without training it is sdpa."""
    folder = make_model(tmp_path / "model", "llama")
    for attention in (Attention.varlen, Attention.auto):
        assert load(folder, attention, trainable=False).model.config._attn_implementation == "sdpa"


def test_auto_is_sdpa_on_a_cpu(tmp_path: Path) -> None:
    loaded = load(make_model(tmp_path / "model", "llama"), Attention.auto)
    assert loaded.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("reason", "attention"), [(None, "varlen"), ("it is too old", "sdpa")])
def test_auto_takes_it_where_nothing_is_missing(
    reason: str | None, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "missing", lambda *_, **__: reason)
    folder = make_model(tmp_path / "model", "llama")
    assert load(folder, Attention.auto).model.config._attn_implementation == attention
    assert load(folder, Attention.auto, trainable=False).model.config._attn_implementation == "sdpa"


def test_what_was_asked_for_and_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "missing", lambda *_, **__: "it is too old")
    with pytest.raises(ModelError, match=r"model\.attention=varlen: it is too old; use sdpa"):
        load(make_model(tmp_path / "model", "llama"), Attention.varlen)


def test_one_rank_without_it_leaves_all_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `any_of` says of another rank."""
    asked: list[bool] = []
    monkeypatch.setattr(varlen, "missing", lambda *_, **__: None)
    monkeypatch.setattr(load_module, "any_of", lambda _, value: bool(asked.append(value)) or True)
    model: Any = SimpleNamespace()  # on which nothing can be set
    load_module._choose_attention(model, Attention.auto, torch.bfloat16, start_alone("test"))
    assert asked == [False]


def test_missing_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(make_model(tmp_path / "model", "llama"), Attention.sdpa).model
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert varlen.missing(model, cpu, torch.bfloat16, known=False) is None
    assert varlen.missing(model, cpu, torch.bfloat16, known=True) == "LlamaForCausalLM on a cpu has not been tried"
    assert varlen.missing(model, gpu, torch.float32, known=True) == "it computes in bfloat16 on a GPU"
    for agrees, told in ((True, None), (False, "torch's kernel does not compute it here")):
        monkeypatch.setattr(varlen, "agrees", lambda *_, answer=agrees: answer)
        assert varlen.missing(model, gpu, torch.bfloat16, known=True) == told
    model.config.model_type = "nemotron"
    assert varlen.missing(model, gpu, torch.bfloat16, known=True) == "LlamaForCausalLM on a cuda has not been tried"
    model._can_set_attn_implementation = lambda: False
    assert varlen.missing(model, gpu, torch.bfloat16, known=False) == "LlamaForCausalLM takes no attention but its own"


def test_run_of_before_goes_on_with_it() -> None:
    """`auto` was not there then, and is another on another machine; `eager` rounds otherwise."""
    names = {name: {"model.attention": name} for name in ("auto", "sdpa", "varlen", "eager")}
    for name in ("auto", "sdpa", "varlen"):
        assert differing(names["auto"], names[name], ()) == []
    assert differing(names["auto"], names["eager"], ()) == ["model.attention"]
    assert differing({"seed": 1}, {"seed": 2}, ()) == ["seed"]


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        ({"softcap": 50.0}, {}, "wants softcap, .* use sdpa"),
        ({"new_option": 1}, {}, "wants new_option"),
        ({"is_causal": False}, {}, "wants a mask"),
        ({}, {"config": SimpleNamespace(sliding_window=8)}, "wants a window by its mask alone"),
        ({"s_aux": torch.zeros(2)}, {}, "wants s_aux"),
        ({"dropout": 0.1}, {}, "wants dropout"),
        ({}, {"is_causal": False}, "wants a mask"),
    ],
)
def test_what_it_does_not_know_is_refused(options: dict[str, Any], module: dict[str, Any], message: str) -> None:
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ModelError, match=message):
        varlen._forward(SimpleNamespace(**module), q, q, q, None, **options)


def test_a_cache_is_refused() -> None:
    q, k = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(ModelError, match="wants keys or values of another size"):
        varlen._forward(SimpleNamespace(), q, k, k, None)


def test_kernel_that_computes_something_else_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu, attend = torch.device("cpu"), varlen.attend
    assert varlen.agrees(cpu, torch.bfloat16, 4, 2, 64)
    calls: list[int] = []

    def blind(*arguments: Any) -> Tensor:
        """Every other call does not look at the window."""
        calls.append(1)
        return attend(*arguments[:-1], None if len(calls) % 2 else arguments[-1])

    monkeypatch.setattr(varlen, "attend", blind)
    assert not varlen.agrees(cpu, torch.bfloat16, 4, 2, 64)
    assert "fails on this device" in caplog.text
