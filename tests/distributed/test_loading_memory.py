"""Loading holds a rank's own share and little more, whatever the checkpoint's size."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from qdora import parallel
from qdora.config import AdapterConfig, ModelConfig, ParallelConfig, QuantConfig
from qdora.model import load_model
from qdora.model.build import build_model
from qdora.sharding import weight_bytes
from tests.support.models import make_tokenizer
from tests.support.processes import status_bytes
from tests.support.ranks import RankPool

ALLOWANCE_BYTES = 300 * 2**20
"""What loading may hold beside the rank's shard: 2^24 values in bf16 and in float32, and the allocator's rest."""
READ_ALLOWANCE = 0.01
"""Share of the checkpoint that a rank may read beside its own rows: headers, config, tokenizer."""
LAYERS, HIDDEN, INTERMEDIATE = 9, 2048, 8192


def read_bytes() -> int:
    """Bytes that this process asked the kernel for, whether from a disk or its cache."""
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar: N


def load(folder: Path) -> dict[str, float]:
    """Loads once on a rank of several; returns the peak of its memory above what it had before, and its reads."""
    config = ParallelConfig()
    world = parallel.start(config)
    model, quant, adapter = ModelConfig(path=str(folder)), QuantConfig(), AdapterConfig(rank=8)
    build_model(folder, model, quant, adapter)  # imports the model's code, which is not its weights
    baseline = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    read_before = read_bytes()
    loaded = load_model(folder, model, quant, adapter, config, world)
    read = read_bytes() - read_before
    own, total = weight_bytes(loaded.model)
    return {
        "peak_bytes": status_bytes("VmHWM") - baseline,
        "read_bytes": read,
        "own_bytes": own,
        "total_bytes": total,
    }


def _layer_tensors(index: int, noise: Tensor) -> Iterator[tuple[str, Tensor]]:
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    prefix = f"model.layers.{index}"
    for name, (rows, width) in shapes.items():
        yield f"{prefix}.{name}.weight", noise[: rows * width].clone().view(rows, width)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{name}.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)


@pytest.fixture
def large_model(tmp_path: Path) -> Iterator[Path]:
    """A Llama of more than 1 GB in ten files, of random numbers that repeat."""
    folder = tmp_path / "large"
    folder.mkdir()
    noise = torch.randn(HIDDEN * INTERMEDIATE, dtype=torch.bfloat16) * 0.02
    names: dict[str, str] = {}
    rest = {
        "model.embed_tokens.weight": torch.randn(256, HIDDEN, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }
    for index in range(LAYERS + 1):
        tensors = rest if index == LAYERS else dict(_layer_tensors(index, noise))
        file = f"model-{index:05d}.safetensors"
        save_file(tensors, folder / file)
        names |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    yield folder
    for file in folder.iterdir():
        file.unlink()


def test_loading_holds_and_reads_a_ranks_share_and_little_more(large_model: Path, pool: RankPool) -> None:
    size = sum(file.stat().st_size for file in large_model.glob("*.safetensors"))
    assert size >= 10**9
    for found in pool.run(load, large_model, nproc=2, timeout_s=300):
        assert found["own_bytes"] < 0.51 * found["total_bytes"]
        assert found["peak_bytes"] < found["own_bytes"] + ALLOWANCE_BYTES, found
        assert 0.49 * size < found["read_bytes"] < (0.5 + READ_ALLOWANCE) * size, found
