"""The same arithmetic on a GPU: bits of NF4, the layer's gradients, and a run as a user starts it."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qdora import nf4, parallel
from qdora.adapter import operator
from qdora.adapter.dora import AdaptedLinear
from qdora.adapter.refresh import Refresher
from qdora.config import (
    ActivationCheckpointing,
    AdapterConfig,
    Attention,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    QuantConfig,
)
from qdora.data import Batch
from qdora.model import load_model, varlen
from qdora.model.activations import compile_blocks
from qdora.model.loss import LogitTransform, Rows, check_token_loss, chunked_cross_entropy, label_places, mean_loss
from qdora.optim import build_optimizer, clip_gradients
from qdora.sharding import own_rows
from qdora.training.graph import GraphedGradients, check_model
from qdora.training.trainer import accumulate_gradients
from tests.support.batches import BATCHES, LENGTH, ROWS
from tests.support.models import make_model
from tests.support.processes import qdora

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
    Refresher([nn.Sequential(layer)], torch.bfloat16)(device)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("is_scaled", [True, False])
def test_one_launch_dequantises_to_the_bits_of_four(dtype: torch.dtype, double_quant: bool, is_scaled: bool) -> None:
    torch.manual_seed(0)
    packed, absmax = nf4.quantize((torch.randn(300, 1536) * torch.rand(300, 1)).cuda())
    stored = nf4.nest(absmax, 300) if double_quant else (absmax.view(torch.uint8), None, None)
    row_scale = torch.rand(300, 1, device="cuda") + 0.5 if is_scaled else None
    kernel = nf4.working_kernel(packed.device)
    assert kernel is not None
    for rows in (slice(0, 300), slice(37, 299)):
        some = None if row_scale is None else row_scale[rows]
        scales = nf4.unnest(stored[0][rows], *stored[1:], rows.start)  # type: ignore[misc]
        expected = nf4.dequantize(packed[rows], scales if some is None else scales * some, dtype)
        found = torch.full_like(expected, torch.nan)
        given = [packed[rows], stored[0][rows], *(one for one in stored[1:] if one is not None)]
        kernel(given, some, rows.start, found, nf4.nested_code(found.device), nf4.nf4_code(found.device))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(4096, 14336), (1024, 512), (1000, 100), (1, 64)])
def test_one_launch_makes_the_gradient_of_magnitudes(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    dy, y = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    inverse_m = torch.rand(shape[1], device="cuda")
    assert operator.working_magnitude_kernel(dy.device) is not None
    expected = (dy.double() * y.double()).sum(0) * inverse_m
    torch.testing.assert_close(operator.magnitude_gradient(dy, y, inverse_m).double(), expected, rtol=1e-4, atol=1e-2)


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


@pytest.mark.parametrize("double_quant", [True, False])
def test_embedding_and_head_on_cuda_have_the_values_of_the_cpu(double_quant: bool) -> None:
    torch.manual_seed(0)
    head = nf4.NF4Head(256, 1000, bias=False, double_quant=double_quant, dtype=torch.float32)
    embedding = nf4.NF4Embedding(1000, 256, double_quant, torch.float32, None)
    packed, scales = nf4.quantize(torch.randn(1000, 256))
    head.packed.data, head.absmax.data = packed, scales.view(torch.uint8)
    if double_quant:
        head.absmax.data, head.absmax_scale, head.absmax_mean = nf4.nest(scales, 1000)
    embedding.share(head)
    ids = torch.randint(0, 1000, (3, 17))
    on_cpu = embedding(ids)
    hidden, labels = torch.randn(3, 17, 256), torch.randint(0, 1000, (3, 17))
    losses = []
    for device in ("cpu", "cuda"):
        head.to(device)
        given = hidden.to(device).requires_grad_()
        places, targets = (tensor.to(device) for tensor in label_places(labels))
        loss = chunked_cross_entropy(given, head.tensors(), None, places, targets, LogitTransform())
        loss.backward()
        losses.append([loss.detach().cpu(), given.grad.cpu()])  # type: ignore[union-attr]
    embedding.share(head)  # `to` gives parameters new data and buffers new tensors
    assert torch.equal(embedding.cuda()(ids.cuda()).cpu(), on_cpu)
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)  # TF32 is off; sums in another order


def _trained(folder: Path, config: ParallelConfig, recomputation: ActivationCheckpointing) -> tuple[list[Tensor], int]:
    """Gradients of two micro-batches, and the most bytes that were allocated in the second."""
    world = parallel.start(config)
    model = ModelConfig(
        path=str(folder), attention=Attention.eager
    )  # flash attention's gradients are of no fixed order
    loaded = load_model(folder, model, QuantConfig(), AdapterConfig(rank=4), config, world)
    loaded.recompute(recomputation)
    loaded.model.train()
    tokens = torch.randint(4, 200, (4, 1024), generator=torch.Generator().manual_seed(0))
    rows = Rows.of(tokens, torch.arange(1024).expand(tokens.shape), tokens, world.device)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loaded.model.token_loss(rows).backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    gradients = [own_rows(p.grad)[0].cpu() for p in loaded.model.parameters() if p.grad is not None]
    assert gradients
    return gradients, peak


def test_hidden_states_in_host_memory_leave_room_on_the_gpu(tmp_path: Path) -> None:
    blocks = 24
    folder = make_model(tmp_path, "llama", num_hidden_layers=blocks, hidden_size=512, max_position_embeddings=2048)
    full = ActivationCheckpointing.full
    plain, peak = _trained(folder, ParallelConfig(), full)
    offloaded, less = _trained(folder, ParallelConfig(offload_activations=True, activation_checkpointing=full), full)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(offloaded, plain, strict=True))
    hidden = 4 * 1024 * 512 * 2
    assert peak - less > (blocks - 6) * hidden


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_attention_by_samples_agrees_with_the_cpu(kv_heads: int, head_size: int) -> None:
    """Values and gradients, with and without a window."""
    assert varlen.agrees(torch.device("cuda"), torch.bfloat16, 8, kv_heads, head_size)


@pytest.mark.parametrize("kind", [ActivationCheckpointing.none, ActivationCheckpointing.full])
def test_gradients_of_packed_rows_wait_for_nothing(kind: ActivationCheckpointing, tmp_path: Path) -> None:
    """torch raises where the host would wait; the first step allocates, and builds what is cached."""
    folder = make_model(tmp_path, "llama", num_hidden_layers=2)
    world = parallel.start(ParallelConfig())
    model = ModelConfig(path=str(folder))
    loaded = load_model(folder, model, QuantConfig(), AdapterConfig(rank=4), ParallelConfig(), world)
    assert loaded.model.config._attn_implementation == varlen.NAME
    check_token_loss(loaded.model, world.device, packing=True)
    loaded.recompute(kind)
    loaded.model.train()
    tokens = torch.randint(4, 200, (2, 32), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, torch.arange(16).repeat(2, 2), tokens, tokens.numel(), tokens.numel())
    optimizer = build_optimizer(loaded.model, OptimConfig())
    optimizer.register_step_post_hook(lambda *_: loaded.refresh(world.device, defer=True))
    accumulate_gradients(loaded.model, [batch, batch], world)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, counts = accumulate_gradients(loaded.model, [batch, batch], world)
        sums = clip_gradients(loaded.model, 1.0, world, loss)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.isfinite().all()
    assert counts.tolist() == [2 * batch.num_label_tokens, 2 * batch.num_tokens]


def test_compiled_blocks_take_any_number_of_samples_in_few_graphs(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama", num_hidden_layers=2)
    world = parallel.start(ParallelConfig())
    model = ModelConfig(path=str(folder))
    loaded = load_model(folder, model, QuantConfig(), AdapterConfig(rank=4), ParallelConfig(), world)
    tokens = torch.randint(4, 200, (2, 64), generator=torch.Generator().manual_seed(0))
    samples = [Rows.of(tokens, torch.arange(64 // n).repeat(2, n), tokens, world.device) for n in (1, 2, 4, 8, 16)]
    loaded.model.train()
    plain = [float(loaded.model.token_loss(rows)) for rows in samples]
    torch._dynamo.utils.counters.clear()
    compile_blocks(loaded.blocks, world.device)
    for rows, loss in zip(samples, plain, strict=True):
        compiled = loaded.model.token_loss(rows)
        compiled.backward()
        assert float(compiled) == pytest.approx(loss, rel=BFLOAT16_TOLERANCE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in ActivationCheckpointing if kind is not ActivationCheckpointing.auto])
def test_a_graph_a_micro_batch_trains_as_single_launches_do(
    kind: ActivationCheckpointing, is_compiled: bool, tmp_path: Path
) -> None:
    """Steps of two micro-batches, most of graphs that are there already, and an evaluation between."""
    folder = make_model(tmp_path, "llama", num_hidden_layers=2)
    world, losses = parallel.start(ParallelConfig()), []
    for is_graph in (False, True):
        model = ModelConfig(path=str(folder), attention=Attention.varlen)
        loaded = load_model(folder, model, QuantConfig(), AdapterConfig(rank=4), ParallelConfig(), world)
        check_model(loaded.model)
        loaded.recompute(kind, keep_random_state=not is_graph)
        if is_compiled:
            compile_blocks(loaded.blocks, world.device)
        loaded.model.train()
        add = GraphedGradients(loaded.model, world, ROWS, LENGTH) if is_graph else None
        optimizer = build_optimizer(loaded.model, OptimConfig(learning_rate=1e-2))
        optimizer.register_step_post_hook(lambda *_, loaded=loaded: loaded.refresh(world.device))
        steps = [["full", "short rows"], ["many samples", "one row"]] * 4
        found = []
        for names in steps:
            loss, _ = accumulate_gradients(loaded.model, [BATCHES[name] for name in names], world, add=add)
            clip_gradients(loaded.model, 1.0, world)
            optimizer.step()
            optimizer.zero_grad(set_to_none=not is_graph)
            found.append(float(loss))
            mean_loss(loaded.model, [[BATCHES["one row"]]], world)
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=BFLOAT16_TOLERANCE)
    assert losses[1][-1] < 0.9 * losses[1][1], "nothing was learned"


def test_shards_in_host_memory_train_as_those_on_the_gpu(tmp_path: Path) -> None:
    """One GPU: FSDP2 with a shard axis of one. In a process of its own, which no group is to outlive."""
    model = make_model(tmp_path / "model", "llama", num_hidden_layers=4)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}: ", "completion": "yes"}) + "\n" for n in range(16)))
    found = {}
    for name, more in {"gpu": [], "host": ["parallel.cpu_offload=true", "parallel.gather=block"]}.items():
        run = tmp_path / name
        options = [f"model.path={model}", f"data.train={data}", f"output_dir={run}", "tracker=none"]
        done = qdora("train", *options, "train.num_steps=4", "model.dtype=float32", *more)
        assert done.returncode == 0, done.stderr
        found[name] = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["host"] == pytest.approx(found["gpu"], rel=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_each_way_of_gathering_learns_the_same(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", num_hidden_layers=4)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}: ", "completion": "yes"}) + "\n" for n in range(16)))
    losses = {}
    for gather in ("ahead", "block", "part"):
        run = tmp_path / gather
        options = [f"model.path={model}", f"data.train={data}", f"output_dir={run}", "tracker=none"]
        done = qdora(
            "train", *options, "train.num_steps=4", "quant.embeddings=true", f"parallel.gather={gather}", nproc=2
        )
        assert done.returncode == 0, done.stderr
        losses[gather] = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses["block"] == losses["ahead"]
    assert losses["part"] == losses["ahead"]
