"""VeRA against PEFT's, DVoRA against plain float32 arithmetic: layer, training, and files in both directions."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from peft.tuners.vera.model import VeraModel
from safetensors.torch import load_file
from torch import Tensor, nn

from qdora import nf4
from qdora.adapter import peft_format
from qdora.adapter.dora import adapted_layers, reset
from qdora.adapter.inject import inject
from qdora.adapter.refresh import Refresher
from qdora.adapter.vera import VeraLinear, projections, vera_layers
from qdora.config import AdapterConfig, AdapterMethod
from qdora.errors import AdapterError
from tests.support.adapters import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    WORLD,
    assert_same_logits,
    load_ours,
    load_theirs,
    logits_of,
    perturb,
)
from tests.support.models import make_model

CPU = torch.device("cpu")
WIDTHS = (128, 192, 64)
"""Of two layers in a row: each is smaller than the shared A and B in one dimension."""
RANK, KEY = 24, 7
STEPS_TOLERANCE = 1e-5
"""Relative to the norm: ten float32 steps of AdamW, which blow rounding of small gradients up (seen: 3e-7)."""
VERA, DVORA = AdapterMethod.vera, AdapterMethod.dvora


@dataclass(slots=True)
class Case:
    """One setting of both models."""

    dtype: torch.dtype = torch.float32
    quantised: bool = False
    dropout: float = 0.0
    alpha: float | None = None


CASES = {
    "float32": Case(),
    "float32-nf4": Case(quantised=True),
    "float32-dropout": Case(dropout=0.3),
    "float32-nf4-dropout": Case(quantised=True, dropout=0.3),
    "bfloat16": Case(dtype=torch.bfloat16),
    "bfloat16-nf4": Case(dtype=torch.bfloat16, quantised=True),
}


def make_ours(case: Case, method: AdapterMethod) -> nn.Sequential:
    """Two linear layers with biases and adapters that have moved, their norms fresh."""
    torch.manual_seed(0)
    bases: list[nn.Module] = []
    for width, out in pairwise(WIDTHS):
        base: nn.Module = nn.Linear(width, out, dtype=case.dtype)
        if case.quantised:
            dense, base = base, nf4.NF4Linear(width, out, True, double_quant=False, dtype=case.dtype)
            base.packed.data, scales = nf4.quantize(dense.weight.data)  # type: ignore[operator]
            base.absmax.data, base.bias.data = scales.view(torch.uint8), dense.bias.data  # type: ignore[union-attr,operator]
        bases.append(base)
    model = nn.Sequential(*bases)
    config = AdapterConfig(method=method, rank=RANK, projection_key=KEY, dropout=case.dropout, alpha=case.alpha)
    inject(model, ["0", "1"], config)
    reset(model, CPU, seed=0)
    perturb({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
    for layer in vera_layers(model):  # values that bfloat16 holds exactly: both sides start from the same ones
        for parameter in layer.trained_factors():
            parameter.data = parameter.data.bfloat16().float()
    Refresher([model], case.dtype)(CPU)
    return model


def make_peft(case: Case, ours: nn.Sequential) -> PeftModel:
    """PEFT's model with the values of ours, over the dense (dequantised) weights."""
    dense = nn.Sequential(*(nn.Linear(*size, dtype=case.dtype) for size in pairwise(WIDTHS)))
    for layer, linear in zip(vera_layers(ours), dense, strict=True):
        linear.weight.data = nf4.weight_from(layer.base_tensors(), case.dtype).clone()
        linear.bias.data = layer.base.bias.data.clone()  # type: ignore[union-attr,operator]
    config = VeraConfig(r=RANK, target_modules=["0", "1"], projection_prng_key=KEY, vera_dropout=case.dropout)
    theirs = get_peft_model(dense, config)
    for name, (d, b) in vectors_of(theirs).items():
        mine = adapted_layers(ours)[name].trained_factors()
        d.data, b.data = mine[0].data.clone(), mine[1].data.clone()
    return theirs


def vectors_of(theirs: PeftModel) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """d and b of PEFT's layers."""
    layers = {name: theirs.base_model.model[int(name)] for name in ("0", "1")}
    return {name: (layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]) for name, layer in layers.items()}


def difference(ours: Tensor | None, theirs: Tensor | None) -> float:
    """Relative to the norm."""
    assert ours is not None
    assert theirs is not None
    return float((ours.detach().float() - theirs.detach().float()).norm() / theirs.detach().float().norm())


@pytest.mark.parametrize(("key", "rank", "width", "out"), [(0, 4, 64, 192), (7, 256, 576, 1536), (2**40, 3, 5, 7)])
def test_projections_are_those_of_peft_bit_for_bit(key: int, rank: int, width: int, out: int) -> None:
    config = VeraConfig(r=rank, target_modules=["0"], projection_prng_key=key)
    theirs = VeraModel(nn.Sequential(nn.Linear(width, out)), config, "default")
    ours = projections(rank, width, out, key)
    assert torch.equal(ours[0], theirs.vera_A["default"])
    assert torch.equal(ours[1], theirs.vera_B["default"])
    assert not torch.equal(ours[0], projections(rank, width, out, key + 1)[0])


def test_fresh_layer_is_the_papers_and_shares_one_pair() -> None:
    model = nn.Sequential(nn.Linear(128, 192), nn.Linear(192, 64))
    base = nn.Sequential(*model)
    x = torch.randn(5, 128)
    wanted = base(x)
    inject(model, ["0", "1"], AdapterConfig(method=VERA, rank=RANK))
    reset(model, CPU, seed=3)
    first, second = vera_layers(model)
    assert first.shared_a is second.shared_a
    assert tuple(first.shared_a.shape) == (RANK, 192)
    assert tuple(second.shared_b.shape) == (192, RANK)
    assert not model.state_dict().keys() & {"0.shared_a", "0.shared_b"}
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 2 * RANK + 192 + 64
    assert all(bool((layer.trained_factors()[0] == 0.1).all()) for layer in (first, second))
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("name", CASES)
def test_vera_agrees_with_peft(name: str) -> None:
    case = CASES[name]
    ours = make_ours(case, VERA)
    theirs = make_peft(case, ours)
    x, upstream = torch.randn(40, WIDTHS[0], dtype=case.dtype), torch.randn(40, WIDTHS[-1], dtype=case.dtype)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = []
    for model, given in zip((ours, theirs), inputs, strict=True):
        torch.manual_seed(7)  # the same dropout masks: each layer draws one, over its input
        model.train()
        outputs.append(model(given))
        outputs[-1].backward(upstream)
    pairs = {"output": (outputs[0], outputs[1]), "input": (inputs[0].grad, inputs[1].grad)}
    for layer, vectors in vectors_of(theirs).items():
        mine = adapted_layers(ours)[layer].trained_factors()
        pairs |= {f"{layer}.{kind}": (mine[i].grad, vectors[i].grad) for i, kind in enumerate("db")}
    tolerance = FLOAT32_TOLERANCE if case.dtype == torch.float32 else BFLOAT16_TOLERANCE
    differences = {what: difference(*pair) for what, pair in pairs.items()}
    assert max(differences.values()) <= tolerance, differences
    without = nn.Sequential(*(layer.base for layer in vera_layers(ours)))
    assert difference(outputs[0], without(x)) > 2 * tolerance, "the adapter changes too little to be seen"


def test_steps_of_training_are_those_of_peft() -> None:
    ours = make_ours(Case(), VERA)
    theirs = make_peft(Case(), ours)
    before = [parameter.detach().clone() for parameter in ours.parameters() if parameter.requires_grad]
    x, wanted = torch.randn(64, WIDTHS[0]), torch.randn(64, WIDTHS[-1])
    losses = []
    for model in (ours, theirs):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=4e-3)
        for _ in range(10):
            loss = (model(x) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=STEPS_TOLERANCE)
    after = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    assert min(difference(*pair) for pair in zip(before, after, strict=True)) > 10 * STEPS_TOLERANCE
    for name, vectors in vectors_of(theirs).items():
        mine = adapted_layers(ours)[name].trained_factors()
        assert max(difference(*pair) for pair in zip(mine, vectors, strict=True)) <= STEPS_TOLERANCE


def plain_dvora(layer: VeraLinear, x: Tensor, dropped: Tensor) -> Tensor:
    """y of a DVoRA layer, written down from the two papers, in float32."""
    assert layer.magnitude is not None
    weight = nf4.weight_from(layer.base_tensors(), torch.float32).clone()
    a, b = projections(RANK, max(WIDTHS[:2]), max(WIDTHS[1:]), KEY)
    d, vector = layer.trained_factors()
    update = layer.scaling * torch.diag(vector) @ b[: layer.out_features] @ torch.diag(d) @ a[:, : layer.in_features]
    norm = (weight + update).norm(dim=1).detach()
    gain = layer.magnitude / norm
    y = x @ weight.T + (gain - 1) * (dropped @ weight.T) + gain * (dropped @ update.T)
    return y + layer.base.bias  # type: ignore[operator,no-any-return]


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("alpha", [None, 3.0 * RANK])
def test_dvora_agrees_with_plain_arithmetic(quantised: bool, dropout: float, alpha: float | None) -> None:
    model = make_ours(Case(quantised=quantised, dropout=dropout, alpha=alpha), DVORA).train()
    layers = vera_layers(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 6
    x, upstream = torch.randn(40, WIDTHS[0]), torch.randn(40, WIDTHS[-1])
    torch.manual_seed(7)
    ours = model(x)
    gradients = torch.autograd.grad(ours, trained, upstream)
    torch.manual_seed(7)
    theirs = x
    for layer in layers:
        theirs = plain_dvora(layer, theirs, nn.functional.dropout(theirs, dropout))
    expected = torch.autograd.grad(theirs, trained, upstream)
    assert difference(ours, theirs) <= FLOAT32_TOLERANCE
    assert max(difference(*pair) for pair in zip(gradients, expected, strict=True)) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("changed", ["vera_d", "vera_b", "magnitude"])
def test_refresh_follows_every_change(changed: str) -> None:
    model = make_ours(Case(quantised=True), DVORA).eval()
    (first, _), x = vera_layers(model), torch.randn(4, WIDTHS[0])
    before = first(x)
    getattr(first, changed).data.mul_(1.5)
    Refresher([model], torch.float32)(CPU)
    assert difference(first(x), before) > 1e-2
    assert difference(first(x), plain_dvora(first, x, x)) <= FLOAT32_TOLERANCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with biases, its layers of five shapes."""
    return make_model(tmp_path_factory.mktemp("model"), "qwen2")


def saved(folder: Path, to: Path, adapter: AdapterConfig) -> Tensor:
    """Saves a model's adapter that has moved to `to`; its logits."""
    ours = load_ours(folder, adapter)
    perturb({name: parameter for name, parameter in ours.model.named_parameters() if parameter.requires_grad})
    ours.refresh(WORLD.device)
    peft_format.save(ours.model, to, ours.adapter, str(folder), ours.dtype, WORLD)
    return logits_of(ours.model)


@pytest.mark.parametrize("alpha", [None, 3.0 * RANK])
@pytest.mark.parametrize("targets", ["all-linear", "[qv]_proj|.*[.](q|v|up)_proj"])
def test_our_adapter_gives_the_same_logits_in_peft(
    folder: Path, targets: str, alpha: float | None, tmp_path: Path
) -> None:
    adapter = AdapterConfig(method=VERA, rank=RANK, projection_key=KEY, target_modules=targets, alpha=alpha)
    ours = saved(folder, tmp_path, adapter)
    theirs = load_theirs(folder)
    base = logits_of(theirs)
    assert_same_logits(ours, logits_of(PeftModel.from_pretrained(theirs, tmp_path).eval()), base)


@pytest.mark.parametrize("save_projection", [True, False])
def test_peft_adapter_gives_the_same_logits_here(folder: Path, save_projection: bool, tmp_path: Path) -> None:
    theirs = load_theirs(folder)
    base = logits_of(theirs)
    config = VeraConfig(
        r=RANK,
        target_modules=["q_proj", "k_proj", "down_proj"],
        projection_prng_key=KEY,
        save_projection=save_projection,
    )
    adapted = get_peft_model(theirs, config)
    perturb({name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad})
    adapted.eval().save_pretrained(tmp_path)
    assert ("base_model.vera_A" in load_file(tmp_path / peft_format.WEIGHTS)) == save_projection
    ours = load_ours(folder, peft_format.read_config(tmp_path))
    assert_same_logits(logits_of(ours.model), logits_of(adapted), base)


@pytest.mark.parametrize("stored", [True, False])
def test_adapter_of_another_key_takes_the_place_of_one(folder: Path, stored: bool, tmp_path: Path) -> None:
    """Without stored projections they are made anew: those of the adapter before would be wrong in silence."""
    wanted = saved(folder, tmp_path, AdapterConfig(method=VERA, rank=RANK, projection_key=KEY))
    if not stored:
        file = tmp_path / peft_format.WEIGHTS
        kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("base_model.vera")}
        peft_format.write_weights(file, kept)
    other = load_ours(folder, AdapterConfig(method=VERA, rank=RANK, projection_key=KEY + 1))
    peft_format.load(other.model, tmp_path)
    other.refresh(WORLD.device)
    assert torch.equal(logits_of(other.model), wanted)


def test_stored_projections_are_taken_not_those_of_the_key(folder: Path, tmp_path: Path) -> None:
    wanted = saved(folder, tmp_path, AdapterConfig(method=VERA, rank=RANK, projection_key=KEY))
    file = tmp_path / peft_format.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"projection_prng_key": KEY + 1}))
    assert torch.equal(logits_of(load_ours(folder, peft_format.read_config(tmp_path)).model), wanted)


def test_dvora_comes_back_bit_for_bit_and_peft_refuses_it(folder: Path, tmp_path: Path) -> None:
    wanted = saved(folder, tmp_path, AdapterConfig(method=DVORA, rank=RANK, alpha=2.0 * RANK))
    stored = peft_format.read_config(tmp_path)
    assert (stored.method, stored.rank, stored.scaling) == (DVORA, RANK, 1.0), "s is in b"
    assert torch.equal(logits_of(load_ours(folder, stored).model), wanted)
    with pytest.raises((ValueError, KeyError), match="DVORA"):
        PeftModel.from_pretrained(load_theirs(folder), tmp_path)


def test_training_goes_on_only_from_what_was_asked_for(folder: Path, tmp_path: Path) -> None:
    wanted = saved(folder, tmp_path, AdapterConfig(method=VERA, rank=RANK, projection_key=KEY))
    asked = {"method": VERA, "rank": RANK, "projection_key": KEY, "path": str(tmp_path)}
    assert torch.equal(logits_of(load_ours(folder, AdapterConfig(**asked)).model), wanted)  # type: ignore[arg-type]
    for option, value in {"projection_key": 0, "rank": 8, "method": DVORA}.items():
        with pytest.raises(AdapterError, match=f"has {option} .* but the options ask for"):
            load_ours(folder, AdapterConfig(**asked | {option: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("r", "4", "r is '4'"),
        ("projection_prng_key", "x", "projection_prng_key is 'x'"),
        ("vera_dropout", None, "vera_dropout is None"),
        ("bias", "vera_only", "bias='vera_only'"),
        ("peft_type", "DVORA", "is of another method than its adapter_config.json says"),
    ],
)
def test_config_that_cannot_be_meant_is_refused(
    folder: Path, option: str, value: object, message: str, tmp_path: Path
) -> None:
    saved(folder, tmp_path, AdapterConfig(method=VERA, rank=4))
    file = tmp_path / peft_format.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    with pytest.raises(AdapterError, match=message):
        load_ours(folder, peft_format.read_config(tmp_path))
