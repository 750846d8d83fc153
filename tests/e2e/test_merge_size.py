"""A merge of a checkpoint of 8 GB: how much memory it takes, and how long beside copying the files once."""

import json
import os
import shutil
import statistics
import time
from math import prod
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from qdora.adapter.peft_format import tensor_name
from qdora.model.writer import SAFETENSORS_NAMES
from tests.support.models import make_tokenizer
from tests.support.processes import launcher

CONFIG: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 18,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
PATIENCE_S = 1800
NUM_ROUNDS = 3


def shapes() -> dict[str, tuple[int, ...]]:
    """Of every tensor of a Llama of that size."""
    hidden, inner, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 8 * 128
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layers = range(CONFIG["num_hidden_layers"])
    made = {f"model.layers.{layer}.{name}.weight": shape for layer in layers for name, shape in block.items()}
    outside = {"model.embed_tokens.weight": (CONFIG["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    return made | outside | {"lm_head.weight": (CONFIG["vocab_size"], hidden)}


def make_checkpoint(folder: Path) -> int:
    """Random weights, two files a model of this size has; returns their bytes. A tensor at a time."""
    folder.mkdir()
    AutoConfig.for_model("llama", **CONFIG, dtype="bfloat16").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    weight_map, total = {}, 0
    random = (torch.randn(2**24 + 4096, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    names = list(shapes())
    for index, some in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = folder / f"model-{index + 1:05d}-of-00002.safetensors"
        header, offset = {}, 0
        for name in some:
            size = prod(shapes()[name]) * 2
            header[name] = {
                "dtype": SAFETENSORS_NAMES[torch.bfloat16],
                "shape": shapes()[name],
                "data_offsets": [offset, offset + size],
            }
            weight_map[name], offset = file.name, offset + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for place, name in enumerate(some):
                left = prod(shapes()[name])
                while left:
                    piece = random[place % 4096 :][: min(left, 2**24)]
                    stream.write(piece.view(torch.uint8).numpy().data)
                    left -= piece.numel()
            stream.flush()
            os.fsync(stream.fileno())
        total += offset
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def make_adapter(folder: Path) -> None:
    """A DoRA adapter of rank 16 on every linear layer of the blocks."""
    folder.mkdir()
    torch.manual_seed(1)
    tensors = {}
    for name, shape in shapes().items():
        layer = name.removesuffix(".weight")
        if len(shape) == 2 and ".layers." in name:
            tensors[tensor_name(layer, "lora_a")] = torch.randn(16, shape[1]) * 0.01
            tensors[tensor_name(layer, "lora_b")] = torch.randn(shape[0], 16) * 0.01
            tensors[tensor_name(layer, "magnitude")] = torch.full((shape[0],), 0.02 * shape[1] ** 0.5)
    save_file(tensors, folder / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "use_dora": True, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(options))


def forget(folder: Path) -> None:
    """Takes the files out of the page cache, so that they come from the disk."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy_s(source: Path, target: Path) -> float:
    """Seconds to copy the checkpoint's files, to the disk."""
    forget(source)
    started = time.perf_counter()
    target.mkdir()
    for file in source.glob("*.safetensors"):
        shutil.copyfile(file, target / file.name)
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def merge_s(base: Path, adapter: Path, output: Path, *options: str) -> tuple[float, int]:
    """Seconds of `qdora merge` from its start to its end, and the most memory it had resident."""
    forget(base)
    command = [*launcher(1), "-m", "qdora", "merge", f"adapter={adapter}", f"model.path={base}", "quant=nf4"]
    started = time.perf_counter()
    process = psutil.Popen([*command, f"output={output}", "verify=false", *options])
    peak = 0
    while process.poll() is None:
        with process.oneshot():
            if process.status() != psutil.STATUS_ZOMBIE:
                peak = max(peak, process.memory_info().rss)
        time.sleep(0.02)
        assert time.perf_counter() - started < PATIENCE_S
    assert process.returncode == 0
    return time.perf_counter() - started, peak


@pytest.mark.nightly
@pytest.mark.timeout(2 * PATIENCE_S)
@pytest.mark.parametrize("options", [["format=hf"], ["format=gguf", "gguf.type=q8_0"], ["format=nf4"]], ids=" ".join)
def test_merge_of_8_gb_in_little_memory(options: list[str], tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 30e9:
        pytest.skip("needs 30 GB of disk")
    size = make_checkpoint(tmp_path / "base")
    assert size > 8e9
    make_adapter(tmp_path / "adapter")
    ratios, peaks = [], []
    for round_ in range(NUM_ROUNDS):
        copied = copy_s(tmp_path / "base", tmp_path / "copy")
        output = tmp_path / f"merged-{round_}"
        seconds, peak = merge_s(tmp_path / "base", tmp_path / "adapter", output, *options)
        ratios.append(seconds / copied)
        peaks.append(peak)
        print(f"{size / 1e9:.1f} GB: copied in {copied:.1f} s, {options} in {seconds:.1f} s, {peak / 1e9:.2f} GB")
        if options == ["format=hf"]:
            assert sum(file.stat().st_size for file in output.glob("*.safetensors")) > size
        shutil.rmtree(output)
    print(f"median of the ratios {statistics.median(ratios):.2f}, most memory {max(peaks) / 1e9:.2f} GB")
    largest = max(prod(shape) for shape in shapes().values()) * 2
    assert max(peaks) < 1.5e9 + largest
    if options == ["format=hf"]:
        assert statistics.median(ratios) < 2, ratios
    shutil.rmtree(tmp_path)
