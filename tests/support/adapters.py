"""Adapters over a tiny model: ours, PEFT's, and the logits of both."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qdora.adapter import peft_format
from qdora.adapter.dora import adapted_layers
from qdora.config import (
    AdapterConfig,
    Dtype,
    MergeConfig,
    MergedDtype,
    ModelConfig,
    ParallelConfig,
    Plan,
    QuantConfig,
    QuantMethod,
)
from qdora.model import LoadedModel, load_model
from qdora.parallel import start_alone

IDS = torch.arange(4, 68).view(2, 32)
WORLD = start_alone("tests")
LOGIT_TOLERANCE = 1e-3
"""Relative to the norm of the logits, in float32: through SmolLM2's 30 perturbed layers ours and PEFT's are 0.8e-4 and
0.6e-4 from float64 arithmetic and 1.45e-4 from each other (another CPU's kernels: 1e-5); a gain rounded to bfloat16
makes 1.2e-2. In bfloat16 two equal models differ by a third, so nothing could be told apart."""
FLOAT32_TOLERANCE = 1e-5
"""Relative to the norm: sums of some hundred float32 products in another order."""
BFLOAT16_TOLERANCE = 1.5e-2
"""Relative to the norm: bfloat16 has 8 bits (4e-3), rounded three times on the way (A x, the update, the output).

The largest difference of all cases, dropout's included, is 6e-3.
"""
SEEN = 0.01
"""The adapter must change the logits by more than this, ten times the tolerance, else agreement says nothing."""


def load_ours(folder: Path, adapter: AdapterConfig) -> LoadedModel:
    """Our model over NF4."""
    plan = ParallelConfig(plan=Plan.none)
    loaded = load_model(folder, ModelConfig(path=str(folder), dtype=Dtype.float32), QuantConfig(), adapter, plan, WORLD)
    loaded.model.eval()
    return loaded


def load_theirs(folder: Path) -> Any:
    """transformers' model over the same NF4 bytes."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # else repacked in place at the first evaluation
    model.is_loaded_in_4bit = True
    return model.eval()


def perturb(tensors: dict[str, Tensor]) -> None:
    """Random values for B, or for VeRA's d and b, and magnitudes that have moved."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in sorted(tensors.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if "lora_B" in name or "lora_b" in name:
            tensor.data.copy_(0.02 * noise)
        elif "vera" in name:
            tensor.data.add_(0.05 * noise if name.rpartition("_")[2].startswith("d") else noise)
        elif "magnitude" in name:
            tensor.data.mul_(1 + 0.05 * noise)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """(rows, length, vocabulary) float32."""
    logits: Tensor = model(input_ids=IDS).logits
    return logits.float()


def adapted(folder: Path, output: Path, quant: QuantMethod, adapter: AdapterConfig) -> LoadedModel:
    """A float32 model with a random adapter, which is also saved to `output`."""
    config = ModelConfig(path=str(folder), dtype=Dtype.float32)
    plan = ParallelConfig(plan=Plan.none)
    loaded = load_model(folder, config, QuantConfig(method=quant), adapter, plan, WORLD)
    torch.manual_seed(3)
    for layer in adapted_layers(loaded.model).values():
        # VeRA's d is 0.1, and its A and B are of another size: so much of b changes the logits as much.
        layer.trained_factors()[1].data.normal_(std=2.0 if adapter.method.is_vera else 0.05)
        if layer.magnitude is not None:
            layer.magnitude.data.mul_(1 + 0.05 * torch.randn(layer.out_features))
    loaded.refresh(WORLD.device)
    peft_format.save(loaded.model, output, loaded.adapter, str(folder), loaded.dtype, WORLD)
    loaded.model.eval()
    return loaded


def merge_config(folder: Path, adapter: Path, output: Path, quant: QuantMethod, **changes: Any) -> MergeConfig:
    """Merging in float32."""
    return MergeConfig(
        adapter=str(adapter),
        model=ModelConfig(path=str(folder), dtype=Dtype.float32),
        quant=QuantConfig(method=quant),
        output=str(output),
        **{"dtype": MergedDtype.float32, "verify": False, **changes},
    )


def assert_same_logits(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    """Equal to rounding, and not because the adapter does nothing."""
    assert (theirs - base).norm() > SEEN * theirs.norm(), "the adapter changes too little to be seen"
    assert (ours - theirs).norm() <= LOGIT_TOLERANCE * theirs.norm()
