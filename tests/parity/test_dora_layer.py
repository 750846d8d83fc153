"""The DoRA and LoRA layer against PEFT's, in outputs and every gradient, and against float64 arithmetic."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qdora import nf4
from qdora.adapter import dora
from qdora.adapter import refresh as refresh_module
from qdora.adapter.dora import AdaptedLinear
from qdora.adapter.operator import scaled_factors
from qdora.adapter.refresh import Refresher, row_norms
from qdora.config import (
    ActivationCheckpointing,
    AdapterConfig,
    AdapterMethod,
    ModelConfig,
    ParallelConfig,
    Plan,
    QuantConfig,
)
from qdora.model import load_model
from qdora.model.activations import checkpoint_activations
from qdora.parallel import start_alone
from tests.support.adapters import BFLOAT16_TOLERANCE, FLOAT32_TOLERANCE
from tests.support.models import make_model

IN, OUT, RANK, ALPHA = 128, 96, 8, 24
CPU = torch.device("cpu")


@dataclass(slots=True)
class Case:
    """One setting of both layers."""

    dtype: torch.dtype = torch.float32
    quantised: bool = False
    bias: bool = False
    dora: bool = True
    rank_stabilized: bool = False
    dropout: float = 0.0


CASES = {
    "float32": Case(),
    "float32-bias": Case(bias=True),
    "float32-lora": Case(dora=False),
    "float32-rslora": Case(rank_stabilized=True),
    "float32-nf4": Case(quantised=True),
    "float32-nf4-bias": Case(quantised=True, bias=True),
    "float32-nf4-lora": Case(quantised=True, dora=False, bias=True),
    "bfloat16": Case(dtype=torch.bfloat16),
    "bfloat16-bias": Case(dtype=torch.bfloat16, bias=True),
    "bfloat16-nf4": Case(dtype=torch.bfloat16, quantised=True),
    "bfloat16-nf4-bias": Case(dtype=torch.bfloat16, quantised=True, bias=True),
    "float32-dropout": Case(dropout=0.3),
    "float32-dropout-bias": Case(dropout=0.3, bias=True),
    "float32-nf4-dropout": Case(quantised=True, dropout=0.3),
    "float32-dropout-lora": Case(dropout=0.3, dora=False),
    "bfloat16-dropout": Case(dtype=torch.bfloat16, dropout=0.3),
    "bfloat16-dropout-bias": Case(dtype=torch.bfloat16, dropout=0.3, bias=True),
    "bfloat16-dropout-lora": Case(dtype=torch.bfloat16, dropout=0.3, dora=False),
    "bfloat16-nf4-dropout": Case(dtype=torch.bfloat16, quantised=True, dropout=0.3),
    "bfloat16-nf4-dropout-lora": Case(dtype=torch.bfloat16, quantised=True, dropout=0.3, dora=False),
}


def make_layer(case: Case, weight: Tensor, bias: Tensor | None, rank: int = RANK) -> AdaptedLinear:
    """Our layer over `weight`, with random A, B and magnitude, its norm fresh."""
    base: nn.Module
    if case.quantised:
        base = nf4.NF4Linear(IN, OUT, bias is not None, double_quant=True, dtype=case.dtype)
        packed, scales = nf4.quantize(weight.to(case.dtype))
        codes, base.absmax_scale, base.absmax_mean = nf4.nest(scales, OUT)
        base.packed.data, base.absmax.data = packed, codes
    else:
        base = nn.Linear(IN, OUT, bias=bias is not None, dtype=case.dtype).requires_grad_(False)
        base.weight.data.copy_(weight)
    if bias is not None:
        base.bias.data.copy_(bias)  # type: ignore[union-attr,operator]
    scaling = AdapterConfig(rank=rank, alpha=ALPHA, rank_stabilized=case.rank_stabilized).scaling
    layer = AdaptedLinear(
        base, in_features=IN, out_features=OUT, rank=rank, scaling=scaling, dropout=case.dropout, dora=case.dora
    )
    # Values that bfloat16 holds exactly, so that both sides start from the same ones.
    layer.lora_a.data = (torch.randn(rank, IN) * 0.1).bfloat16().float()
    layer.lora_b.data = (torch.randn(OUT, rank) * 0.1).bfloat16().float()
    layer.measure(CPU)
    if layer.magnitude is not None:
        assert layer.base_norm_squared is not None
        layer.magnitude.data = layer.base_norm_squared.sqrt() * (0.9 + 0.2 * torch.rand(OUT))
    Refresher([nn.Sequential(layer)], case.dtype)(CPU)
    return layer


def make_peft(case: Case, layer: AdaptedLinear) -> nn.Module:
    """PEFT's layer with the values of ours, over the dense (dequantised) weight."""
    dense = nn.Sequential(nn.Linear(IN, OUT, bias=layer.base.bias is not None, dtype=case.dtype))
    dense[0].weight.data.copy_(nf4.weight_from(layer.base_tensors(), case.dtype))
    if layer.base.bias is not None:
        dense[0].bias.data.copy_(layer.base.bias)  # type: ignore[arg-type]
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=case.dropout,
        target_modules=["0"],
        use_dora=case.dora,
        use_rslora=case.rank_stabilized,
    )
    theirs = get_peft_model(dense, config, autocast_adapter_dtype=False).base_model.model[0]
    theirs.lora_A["default"].weight.data = layer.lora_a.data.to(case.dtype)
    theirs.lora_B["default"].weight.data = layer.lora_b.data.to(case.dtype)
    if layer.magnitude is not None:
        theirs.lora_magnitude_vector["default"].weight.data = layer.magnitude.data.clone()
    return theirs  # type: ignore[no-any-return]


def norm_of(layer: AdaptedLinear) -> Tensor:
    """Returns the row norms, (out,) float64."""
    return row_norms([[layer]], [layer.lora_a.detach()[None]], layer.lora_b.detach()).double()


def _difference(ours: Tensor | None, theirs: Tensor | None) -> float:
    assert ours is not None
    assert theirs is not None
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", CASES)
def test_layer_agrees_with_peft(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    layer = make_layer(case, torch.randn(OUT, IN) * 0.05, torch.randn(OUT) if case.bias else None)
    theirs = make_peft(case, layer)
    x, upstream = torch.randn(3, 40, IN, dtype=case.dtype), torch.randn(3, 40, OUT, dtype=case.dtype)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = []
    for module, given in zip((layer, theirs), inputs, strict=True):
        torch.manual_seed(7)  # the same dropout mask: each draws one, over x
        module.train()
        outputs.append(module(given))
        outputs[-1].backward(upstream)
    pairs = {
        "output": outputs,
        "input": [given.grad for given in inputs],
        "A": [layer.lora_a.grad, theirs.lora_A["default"].weight.grad],
        "B": [layer.lora_b.grad, theirs.lora_B["default"].weight.grad],
    }
    if layer.magnitude is not None:
        pairs["magnitude"] = [layer.magnitude.grad, theirs.lora_magnitude_vector["default"].weight.grad]
    assert outputs[0].dtype == case.dtype
    tolerance = FLOAT32_TOLERANCE if case.dtype == torch.float32 else BFLOAT16_TOLERANCE
    differences = {what: _difference(*pair) for what, pair in pairs.items()}
    assert max(differences.values()) <= tolerance, differences


def test_layer_gradient_reaches_only_the_adapter() -> None:
    layer = make_layer(Case(quantised=True, bias=True), torch.randn(OUT, IN), torch.randn(OUT))
    layer(torch.randn(4, IN)).sum().backward()
    trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert trained == {"lora_a", "lora_b", "magnitude"}


@pytest.mark.parametrize("rows_at_a_time", [OUT, 7])
@pytest.mark.parametrize("quantised", [True, False])
def test_norm_agrees_with_float64(quantised: bool, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "CHUNK_NUMEL", rows_at_a_time * IN)
    torch.manual_seed(0)
    layer = make_layer(Case(quantised=quantised), torch.randn(OUT, IN), None)
    weight = nf4.weight_from(layer.base_tensors(), torch.float32).double()
    dense = weight + layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
    torch.testing.assert_close(norm_of(layer), dense.norm(dim=1), rtol=1e-6, atol=0)


def test_norm_of_rows_that_cancel_is_exact() -> None:
    """Rows where s B A is nearly -W: the expanded sum would lose all its digits."""
    torch.manual_seed(0)
    layer = make_layer(Case(), torch.randn(OUT, IN), None)
    update = layer.scaling * layer.lora_b.data @ layer.lora_a.data
    weight: nn.Parameter = layer.base.weight  # type: ignore[assignment]
    weight.data[:10] = -update[:10] * (1 + 1e-4 * torch.randn(10, IN))
    layer.measure(CPU)
    dense = weight.double() + layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
    norm = norm_of(layer)
    # What is left is 1e-4 of W, itself rounded to float32's 6e-8: 3 to 4 digits of it are there at all.
    torch.testing.assert_close(norm[:10], dense.norm(dim=1)[:10], rtol=2e-3, atol=0)
    torch.testing.assert_close(norm[10:], dense.norm(dim=1)[10:], rtol=1e-6, atol=0)


def test_refresh_recomputes_rows_that_cancel_in_one_layer_of_several() -> None:
    torch.manual_seed(0)
    layers = [make_layer(Case(), torch.randn(OUT, IN), None) for _ in range(3)]
    weight: nn.Parameter = layers[1].base.weight  # type: ignore[assignment]
    weight.data[:10] = -(1 + 1e-4) * layers[1].scaling * layers[1].lora_b.data[:10] @ layers[1].lora_a.data
    layers[1].measure(CPU)
    Refresher([nn.Sequential(*layers[:2]), nn.Sequential(layers[2])], torch.float32)(CPU)
    for layer in layers:
        assert layer.gain is not None
        assert layer.magnitude is not None
        base: nn.Parameter = layer.base.weight  # type: ignore[assignment]
        dense = base.double() + layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
        norm = layer.magnitude / layer.gain.view(torch.float32).squeeze(1)
        torch.testing.assert_close(norm.double(), dense.norm(dim=1), rtol=2e-3, atol=0)


def test_layers_of_several_shapes_and_scalings_are_refreshed_as_each_alone() -> None:
    """Layers of a shape that are not beside each other in the block, too."""
    torch.manual_seed(0)
    shapes = [(OUT, IN), (2 * OUT, IN), (OUT, IN), (OUT, 2 * IN), (OUT, IN)]
    layers = []
    for index, (rows, columns) in enumerate(shapes):
        base = nn.Linear(columns, rows, bias=False)
        options = {"in_features": columns, "out_features": rows, "scaling": 1.0 + (index == 2), "dropout": 0.0}
        layer = AdaptedLinear(base, rank=RANK, dora=True, **options)  # type: ignore[arg-type]
        layer.lora_a.data, layer.lora_b.data = torch.randn(RANK, columns), torch.randn(rows, RANK)
        layer.measure(CPU)
        assert layer.magnitude is not None
        layer.magnitude.data = torch.rand(rows) + 0.5
        layers.append(layer)
    Refresher([nn.Sequential(*layers)], torch.float32)(CPU)
    for layer in layers:
        assert layer.gain is not None
        assert layer.magnitude is not None
        base_weight: nn.Parameter = layer.base.weight  # type: ignore[assignment]
        dense = base_weight.double() + layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
        gain = layer.magnitude.double() / dense.norm(dim=1)
        torch.testing.assert_close(layer.gain.view(torch.float32).squeeze(1).double(), gain, rtol=1e-5, atol=0)


def test_rows_of_zeros_give_zeros_and_no_nan() -> None:
    weight = torch.randn(OUT, IN)
    weight[5] = 0
    layer = make_layer(Case(quantised=True), weight, None)
    layer.lora_b.data[5] = 0
    Refresher([nn.Sequential(layer)], torch.float32)(CPU)
    y = layer(torch.randn(4, IN))
    y.sum().backward()
    assert not y[:, 5].any()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("changed", ["lora_a", "lora_b", "magnitude"])
def test_refresh_follows_every_change(changed: str) -> None:
    torch.manual_seed(0)
    case = Case(quantised=True)
    layer = make_layer(case, torch.randn(OUT, IN), None)
    x = torch.randn(4, IN)
    before = layer(x)
    getattr(layer, changed).data.mul_(1.5)
    Refresher([nn.Sequential(layer)], case.dtype)(CPU)
    theirs = make_peft(case, layer)
    assert not torch.allclose(layer(x), before, rtol=1e-2)
    assert _difference(layer(x), theirs(x)) <= FLOAT32_TOLERANCE


def assert_made_is_what_a_call_would_make(layers: list[AdaptedLinear], dtype: torch.dtype) -> None:
    """Asserts that what a refresh has made of A and B is there, and right."""
    for layer in layers:
        a, b = layer.trained_factors()
        called = scaled_factors(a, b, layer.gain, layer.magnitude, layer.scaling, dtype)
        made = layer.rounded(dtype)
        assert made is not None
        for ours, theirs in zip(made, called, strict=True):
            if theirs is None:
                assert ours is None
            else:
                assert torch.equal(ours, theirs.expand_as(ours))


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refresh_makes_what_a_call_would(dora: bool, dtype: torch.dtype) -> None:
    """For several layers at once, also after a part of them was refreshed alone."""
    torch.manual_seed(0)
    layers = [make_layer(Case(dtype=dtype, dora=dora), torch.randn(OUT, IN), None) for _ in range(3)]
    every, some_of_them = (Refresher([nn.Sequential(*some)], dtype) for some in (layers, layers[1:]))
    for refresh, some in ((every, layers), (some_of_them, layers[1:]), (every, layers)):
        with torch.no_grad():
            for layer in layers:
                layer.lora_b.add_(0.01 * torch.randn(OUT, RANK))
        refresh(CPU)
        assert_made_is_what_a_call_would_make(some, dtype)
    assert layers[0].rounded(torch.float16) is None
    layers[0].lora_a = nn.Parameter(layers[0].lora_a.detach().clone())
    assert layers[0].rounded(dtype) is None


@pytest.mark.parametrize("numel", [1, 2**22], ids=["a block at a time", "all at once"])
@pytest.mark.parametrize("dora", [True, False])
def test_layers_of_several_ranks_are_refreshed_some_blocks_at_a_time(
    dora: bool, numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PEFT's `rank_pattern` makes them; one block has no adapter, and only the last one's rows have cancelled."""
    monkeypatch.setattr(refresh_module, "REFRESHED_NUMEL", numel)
    torch.manual_seed(0)
    layers = [make_layer(Case(dora=dora), torch.randn(OUT, IN), None, rank) for rank in (8, 4, 8, 2)]
    blocks = [nn.Sequential(*layers[:3]), nn.Linear(4, 4), nn.Sequential(layers[3])]
    refresh = Refresher(blocks, torch.float32)
    with torch.no_grad():
        for layer in layers:
            layer.lora_b.mul_(1.5)
    assert bool(refresh(CPU, defer=True)) is False
    weight: nn.Parameter = layers[3].base.weight  # type: ignore[assignment]
    weight.data[:10] = -(1 + 1e-4) * layers[3].scaling * layers[3].lora_b.data[:10] @ layers[3].lora_a.data
    layers[3].measure(CPU)
    assert bool(refresh(CPU, defer=True)) is dora
    assert refresh(CPU) is None
    assert_made_is_what_a_call_would_make(layers, torch.float32)
    for layer in layers if dora else []:
        assert layer.magnitude is not None
        assert layer.gain is not None
        norm = layer.magnitude / layer.gain.view(torch.float32).squeeze(1)
        base: nn.Parameter = layer.base.weight  # type: ignore[assignment]
        dense = base.double() + layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
        torch.testing.assert_close(norm.double(), dense.norm(dim=1), rtol=2e-3, atol=0)


def test_refresh_that_fails_leaves_nothing_that_a_forward_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = make_layer(Case(), torch.randn(OUT, IN), None)
    refresh, x = Refresher([nn.Sequential(layer)], torch.float32), torch.randn(4, IN)
    refresh(CPU)
    expected = layer(x)
    monkeypatch.setattr(AdaptedLinear, "project", Mock(side_effect=torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        refresh(CPU)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("dora", [True, False])
def test_forward_follows_factors_that_were_written_since_the_refresh(dora: bool) -> None:
    """Of LoRA that is all; DoRA's gain is a refresh's, which the trainer's hook does after each update."""
    torch.manual_seed(0)
    layer = make_layer(Case(quantised=True, dora=dora), torch.randn(OUT, IN), None)
    x = torch.randn(4, IN)
    before = layer(x)
    with torch.no_grad():
        layer.lora_b.mul_(2)
    doubled = layer(x)
    gain = None if layer.gain is None else layer.gain.view(torch.float32)
    base = x @ nf4.weight_from(layer.base_tensors(), torch.float32, gain).T
    torch.testing.assert_close(doubled - base, 2 * (before - base), rtol=1e-3, atol=1e-4)


def test_magnitudes_of_zero_have_a_gradient_of_zero() -> None:
    torch.manual_seed(0)
    layer = make_layer(Case(quantised=True), torch.randn(OUT, IN), None)
    assert layer.magnitude is not None
    layer.magnitude.data[7] = 0
    Refresher([nn.Sequential(layer)], torch.float32)(CPU)
    y = layer(torch.randn(4, IN))
    y.square().sum().backward()
    assert layer.magnitude.grad is not None
    assert layer.magnitude.grad[7] == 0
    assert layer.magnitude.grad.isfinite().all()
    assert (layer.magnitude.grad[:7] != 0).all()


@pytest.mark.parametrize("context", [nullcontext, nf4.opaque_layers])
def test_output_can_be_written_in_place(context: Callable[[], AbstractContextManager[None]]) -> None:
    """As some models do with queries; of DoRA torch says that its backward would want the output as it was."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, IN, requires_grad=True)
    for is_dora in (False, True):
        layer = make_layer(Case(quantised=True, dora=is_dora), torch.randn(OUT, IN), None)
        with context():
            (expected,) = torch.autograd.grad((layer(x) * 3).sum(), x)
            y = layer(x)
            y *= 3
            if is_dora:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    y.sum().backward()
            else:
                torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_opaque_operators_compute_as_the_eager_function(quantised: bool, dora: bool) -> None:
    """They are what selective recomputation and counts are shown, below the autograd of the eager function."""
    torch.manual_seed(0)
    layer = make_layer(Case(dtype=torch.bfloat16, quantised=quantised, dora=dora), torch.randn(OUT, IN), None)
    x, upstream = torch.randn(4, IN).bfloat16(), torch.randn(4, OUT).bfloat16()
    found = []
    for is_opaque, context in ((False, nullcontext()), (True, nf4.opaque_layers())):
        given = x.clone().requires_grad_()
        layer.zero_grad()
        with context, Seen() as seen:
            y = layer(given)
            y.backward(upstream)
        gradients = [parameter.grad for parameter in layer.parameters() if parameter.requires_grad]
        found.append([y, given.grad, *gradients])
        assert ({"adapted_linear", "adapted_linear_backward"} <= seen.names) == is_opaque
        assert ("addmm_" in seen.names) != is_opaque
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("dora", [True, False])
def test_selective_recomputation_computes_a_layer_once(dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapted or frozen, in the forward; gradients are those of a block that recomputes nothing, to the bit."""
    torch.manual_seed(0)
    adapted = make_layer(Case(dtype=torch.bfloat16, quantised=True, dora=dora), torch.randn(OUT, IN), None)
    frozen = make_layer(Case(dtype=torch.bfloat16, quantised=True), torch.randn(OUT, IN), None).base
    down = nn.Linear(OUT, IN, dtype=torch.bfloat16).requires_grad_(False)
    block = nn.Sequential(adapted, nn.SiLU(), down, frozen)
    x, computed = torch.randn(4, IN).bfloat16(), []
    weight_from = nf4.weight_from
    monkeypatch.setattr(nf4, "weight_from", lambda *args: computed.append(args) or weight_from(*args))  # type: ignore[func-returns-value]
    found = []
    for kind in (ActivationCheckpointing.none, ActivationCheckpointing.selective):
        computed.clear()
        checkpoint_activations([block], kind)
        given = x.clone().requires_grad_()
        block.zero_grad()
        with Seen() as seen:
            block(given).float().square().sum().backward()
        found.append([given.grad, *(p.grad for p in block.parameters() if p.requires_grad)])
        assert len(computed) == 4, "each weight is dequantised once in the forward and once in the backward"
        assert ("adapted_linear" in seen.names) == (kind is ActivationCheckpointing.selective)
        assert "adapted_linear_backward" not in seen.names, "the eager function has its own backward"
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


class Seen(TorchDispatchMode):
    """Records the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_step_0_is_exactly_the_quantised_base_model(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_model(tmp_path_factory.mktemp("model"), family)
    _assert_step_0_is_the_base(folder)


def test_step_0_of_the_real_model_is_exactly_its_quantised_base(smollm2: Path) -> None:
    _assert_step_0_is_the_base(smollm2)


def _assert_step_0_is_the_base(folder: Path) -> None:
    ids = torch.arange(4, 68).view(2, 32)
    logits = []
    for method in (AdapterMethod.none, AdapterMethod.dora):
        loaded = load_model(
            folder,
            ModelConfig(path=str(folder)),
            QuantConfig(),
            AdapterConfig(method=method),
            ParallelConfig(plan=Plan.none),
            start_alone("test"),
            trainable=method is AdapterMethod.dora,
        )
        with torch.no_grad():
            logits.append(loaded.model(input_ids=ids).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("quantised", [True, False])
def test_large_bias_leaves_the_magnitudes_gradient_alone(quantised: bool) -> None:
    """In bfloat16: dm is the sum of dy (y - bias) / m, of which a y rounded with its bias has nothing left."""
    torch.manual_seed(0)
    weight, x, dy = torch.randn(OUT, IN) * 0.05, torch.randn(64, IN).bfloat16(), torch.randn(64, OUT).bfloat16()
    gradients = []
    for bias in (torch.zeros(OUT), 100 * torch.randn(OUT)):
        torch.manual_seed(1)
        layer = make_layer(Case(dtype=torch.bfloat16, quantised=quantised), weight, bias)
        layer(x).backward(dy)
        assert layer.magnitude is not None
        gradients.append(layer.magnitude.grad)
    assert gradients[0] is not None
    assert torch.equal(*gradients)  # type: ignore[arg-type]
