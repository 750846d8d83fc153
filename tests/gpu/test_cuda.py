"""The same arithmetic on a GPU: bits of NF4, the layer's gradients, and a run as a user starts it."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from qdora import nf4
from qdora.adapter.dora import AdaptedLinear, refresh
from tests.support import make_model, qdora

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BFLOAT16_TOLERANCE = 2e-2
"""Relative to the largest value: two roundings of 2^-8 and another order of summation."""


def _layer(device: torch.device) -> AdaptedLinear:
    torch.manual_seed(0)
    base = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    quantised = nf4.NF4Linear(256, 128, bias=False, double_quant=True, dtype=torch.bfloat16)
    packed, scales = nf4.quantize(base.weight.data)
    codes, absmax_scale, absmax_mean = nf4.nest(scales, 128)
    quantised.packed.data, quantised.absmax.data = packed, codes
    quantised.absmax_scale, quantised.absmax_mean = absmax_scale, absmax_mean
    layer = AdaptedLinear(quantised, in_features=256, out_features=128, rank=8, scaling=2.0, dropout=0.0, dora=True)
    layer.lora_a.data.normal_(std=0.1)
    layer.lora_b.data.normal_(std=0.1)
    layer.to(device)
    layer.measure(device)
    assert layer.magnitude is not None
    assert layer.base_norm_squared is not None
    layer.magnitude.data.copy_(layer.base_norm_squared.sqrt() * 1.05)
    refresh([nn.Sequential(layer)], device, torch.bfloat16)
    return layer


def test_quantize_on_cuda_gives_the_bits_of_the_cpu() -> None:
    rows = torch.randn(96, 512, dtype=torch.bfloat16)
    for ours, theirs in zip(nf4.quantize(rows.cuda()), nf4.quantize(rows), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_dequantize_on_cuda_gives_the_values_of_the_cpu() -> None:
    packed, scales = nf4.quantize(torch.randn(96, 512, dtype=torch.bfloat16))
    on_cpu = nf4.dequantize(packed, scales, torch.bfloat16).clone()
    on_gpu = nf4.dequantize(packed.cuda(), scales.cuda(), torch.bfloat16)
    assert torch.equal(on_gpu.cpu(), on_cpu)


def test_layer_on_cuda_agrees_with_the_cpu_in_outputs_and_gradients() -> None:
    x = torch.randn(64, 256, dtype=torch.bfloat16)
    results = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        layer = _layer(device)
        given = x.to(device).requires_grad_()
        y = layer(given)
        y.float().square().mean().backward()
        gradients = [given.grad, *(parameter.grad for parameter in layer.parameters() if parameter.requires_grad)]
        results.append([y, *gradients])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert on_cpu is not None
        assert on_gpu is not None
        difference = (on_gpu.cpu().float() - on_cpu.float()).abs().max()
        assert difference <= BFLOAT16_TOLERANCE * on_cpu.float().abs().max()


@pytest.mark.parametrize(
    "nproc", [1, pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"))]
)
def test_training_on_cuda_lowers_the_loss(tmp_path: Path, nproc: int) -> None:
    model = make_model(tmp_path / "model", "llama")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}: ", "completion": "yes"}) + "\n" for n in range(16)))
    run = tmp_path / "run"
    options = [f"model.path={model}", f"data.train={data}", f"output_dir={run}", "tracker=none", "train.num_steps=8"]
    done = qdora("train", *options, "optim.learning_rate=1e-2", nproc=nproc)
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["device"] == "cuda"
    assert summary["last_loss"] < summary["first_loss"]


@pytest.mark.parametrize("options", [["format=hf"], ["format=hf", "base=original"], ["format=gguf"], ["format=lora"]])
def test_merge_on_cuda_is_the_trained_model(tmp_path: Path, options: list[str]) -> None:
    model = make_model(tmp_path / "model", "llama")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} and {n} are {n + n}"}) + "\n" for n in range(64)))
    run = f"{tmp_path}/run"
    trained = qdora(
        "train", f"model.path={model}", f"data.train={data}", f"data.eval={data}", f"output_dir={run}",
        "train.num_steps=20", "optim.learning_rate=1e-2", "data.max_length=64", "tracker=none",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    merged = qdora("merge", f"run={run}", f"output={tmp_path}/merged", *options)
    assert merged.returncode == 0, merged.stdout + merged.stderr
    assert "verified on" in merged.stdout
    answered = qdora("generate", f"run={run}", "prompt=1 and 1", "chat_template=false", "max_new_tokens=8")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()
