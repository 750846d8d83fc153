"""Every kind of adapter, base, format and checkpoint: what is written, loaded by plain transformers, is the model."""

import json
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qdora.adapter import peft_format
from qdora.config import (
    AdapterConfig,
    AdapterMethod,
    Dtype,
    GgufConfig,
    GgufType,
    MergeBase,
    MergedDtype,
    MergeFormat,
    ModelConfig,
    ParallelConfig,
    Plan,
    QuantConfig,
    QuantMethod,
)
from qdora.errors import ConfigError
from qdora.merging import merge
from qdora.merging.reload import load as reload
from qdora.model import load_model
from tests.support.adapters import WORLD, adapted, logits_of, merge_config
from tests.support.marks import nightly_but, pairwise
from tests.support.models import make_model

CHECKPOINTS = {
    "sharded": ("llama", {"max_shard_size": "200KB"}),
    "tied": ("llama-tied", {}),
    "bias": ("qwen2", {}),
    "gemma3": ("gemma3", {}),
    "window": ("mistral", {}),
    "quantised": ("llama", {}),
}
TOLERANCES = {
    MergeFormat.hf: 1e-4,
    MergeFormat.gguf: 3e-3,
    MergeFormat.lora: 1e-3,
    MergeFormat.nf4: 0.35,
}
"""Relative to the norm of the logits: float32, f16, a low-rank change of full rank, and 4 bits, which a model of random
weights feels most."""
_FORMATS_AND_BASES = [*MergeFormat], [MergeBase.nf4, MergeBase.original]
MATRIX = [*CHECKPOINTS], *_FORMATS_AND_BASES, [AdapterMethod.dora, AdapterMethod.lora]
OF_VERA = *_FORMATS_AND_BASES, [AdapterMethod.vera, AdapterMethod.dvora]


def _in_4_bits(folder: Path) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


@cache
def _made(kind: str, root: Path) -> Path:
    family, changes = CHECKPOINTS[kind]
    folder = make_model(root / kind, family, dtype=torch.float32, **changes)
    if kind == "quantised":
        model = _in_4_bits(folder)
        for file in folder.glob("*.safetensors"):
            file.unlink()
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def reference(folder: Path, adapter: Path, quant: QuantMethod) -> Tensor:
    """The logits of the adapted model over its base."""
    config, plan = ModelConfig(path=str(folder), dtype=Dtype.float32), ParallelConfig(plan=Plan.none)
    stored = peft_format.read_config(adapter)
    loaded = load_model(folder, config, QuantConfig(method=quant), stored, plan, WORLD, trainable=False)
    return logits_of(loaded.model.eval())


def served(output: Path, folder: Path, format: MergeFormat, quantise: bool) -> Any:
    """What was written, as a user's program loads it."""
    request = {
        "folder": str(output),
        "format": format.name,
        "base": str(folder),
        "dtype": "float32",
        "quantise": quantise,
        "double_quant": True,
        "trust_remote_code": False,
    }
    return reload(request)


@pytest.mark.parametrize(("checkpoint", "format", "base", "method"), nightly_but(pairwise(*MATRIX), product(*MATRIX)))
def test_what_is_written_is_the_adapted_model(
    checkpoint: str, format: MergeFormat, base: MergeBase, method: AdapterMethod, root: Path, tmp_path: Path
) -> None:
    _assert_written(checkpoint, format, base, method, root, tmp_path)


@pytest.mark.parametrize(("format", "base", "method"), nightly_but(pairwise(*OF_VERA), product(*OF_VERA)))
def test_what_is_written_of_vera_is_the_adapted_model(
    format: MergeFormat, base: MergeBase, method: AdapterMethod, root: Path, tmp_path: Path
) -> None:
    _assert_written("bias", format, base, method, root, tmp_path)


def _assert_written(
    checkpoint: str, format: MergeFormat, base: MergeBase, method: AdapterMethod, root: Path, tmp_path: Path
) -> None:
    folder = _made(checkpoint, root)
    quantised = checkpoint == "quantised"
    adapted(folder, tmp_path / "adapter", QuantMethod.nf4, AdapterConfig(method=method, rank=4))
    options: dict[str, Any] = {"format": format, "base": base}
    if format is MergeFormat.gguf:
        options |= {"gguf": GgufConfig(type=GgufType.f16), "dtype": MergedDtype.bfloat16}
    if format is MergeFormat.lora:
        options |= {"lora_rank": 128}  # the whole of every layer
    config = merge_config(folder, tmp_path / "adapter", tmp_path / "merged", QuantMethod.nf4, **options)
    if quantised and base is MergeBase.original:
        with pytest.raises(ConfigError, match="is stored in 4 bits; give the checkpoint that it was made from"):
            merge(config)
        return
    assert merge(config) == 0
    quant = QuantMethod.nf4 if base is MergeBase.nf4 else QuantMethod.none
    wanted = reference(folder, tmp_path / "adapter", quant)
    ours = logits_of(served(tmp_path / "merged", folder, format, quant is QuantMethod.nf4 and not quantised))
    tolerance = TOLERANCES[format]
    if format is MergeFormat.lora and quant is QuantMethod.nf4:
        tolerance = 1.5e-2  # bitsandbytes computes in bfloat16 on a CPU
    assert (ours - wanted).norm() <= tolerance * wanted.norm()
    if format is MergeFormat.nf4:  # the tolerance is wide: it is what bitsandbytes makes of the merged model
        exact = merge_config(folder, tmp_path / "adapter", tmp_path / "exact", QuantMethod.nf4, base=base)
        assert merge(exact) == 0
        assert (ours - logits_of(_in_4_bits(tmp_path / "exact"))).norm() <= 1.5e-2 * wanted.norm()
    if format is MergeFormat.hf:
        assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize(
    ("checkpoint", "method"),
    [*product(CHECKPOINTS, [AdapterMethod.dora]), *product(["bias"], [AdapterMethod.vera, AdapterMethod.dvora])],
)
def test_adapter_changes_logits_by_more_than_what_formats_may(
    checkpoint: str, method: AdapterMethod, root: Path, tmp_path: Path
) -> None:
    """Else the tests above would pass without it."""
    folder = _made(checkpoint, root)
    adapted(folder, tmp_path / "adapter", QuantMethod.nf4, AdapterConfig(method=method, rank=4))
    config, plan = ModelConfig(path=str(folder), dtype=Dtype.float32), ParallelConfig(plan=Plan.none)
    none = AdapterConfig(method=AdapterMethod.none)
    plain = load_model(folder, config, QuantConfig(), none, plan, WORLD, trainable=False)
    wanted = reference(folder, tmp_path / "adapter", QuantMethod.nf4)
    assert (logits_of(plain.model.eval()) - wanted).norm() > 0.2 * wanted.norm()
