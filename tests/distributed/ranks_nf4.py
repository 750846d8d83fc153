"""One rank of test_nf4_ranks: its stored rows, what a forward gathers, and its bytes, of some cases.

ranks_nf4.py OUTPUT CASES   (CASES: JSON of name to folder, double_quant and dtype)
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qdora import nf4, parallel
from qdora.adapter.dora import AdaptedLinear, adapted_layers
from qdora.config import AdapterConfig, Dtype, ModelConfig, ParallelConfig, QuantConfig
from qdora.model import load_model
from qdora.nf4 import NF4Linear, NF4Weight
from qdora.parallel import World
from qdora.sharding import gather_rows, own_rows, reshard, weight_bytes

DRIFT = 1.0015
"""Of the magnitudes: a gain near this is 1 once it is rounded to bfloat16."""


ENDS = ("model.embed_tokens", "lm_head")


def reference(weights: dict[str, Tensor], name: str, double_quant: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Codes, values and stored scales of the whole tensor by bitsandbytes, or as the checkpoint holds them."""
    weight = weights[f"{name}.weight"]
    if f"{name}.weight.absmax" in weights:
        prefix = f"{name}.weight."
        parts = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
        state = bnb.QuantState.from_dict(dict(parts), device=torch.device("cpu"))
        state.dtype = dtype
        packed, scales = weight, parts["absmax"]
    else:
        packed, state = bnb.quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=double_quant)
        scales = state.absmax
    rows = state.shape[0]
    return packed.view(rows, -1), bnb.dequantize_4bit(packed, state), scales.view(torch.uint8).view(rows, -1)


def run_case(folder: Path, double_quant: bool, dtype_name: str, world: World) -> dict[str, Any]:
    """Loads the model over all ranks, and compares every quantised layer."""
    dtype = getattr(torch, dtype_name)
    # Of a stored checkpoint the option says the opposite: what counts is how it is stored.
    stored = "quantization_config" in json.loads((folder / "config.json").read_text())
    quant = QuantConfig(double_quant=double_quant is not stored, embeddings=not stored)
    model = ModelConfig(path=str(folder), dtype=Dtype[dtype_name])
    loaded = load_model(folder, model, quant, AdapterConfig(rank=4), ParallelConfig(), world)
    weights = load_file(folder / "model.safetensors")
    layers = adapted_layers(loaded.model)
    quantised = {name: layer for name, layer in layers.items() if isinstance(layer.base, NF4Linear)}
    bare: dict[str, NF4Weight] = {name: layer.base for name, layer in quantised.items()}  # type: ignore[misc]
    if quant.embeddings:
        bare |= {name: loaded.model.get_submodule(name) for name in ENDS}
    references = {name: reference(weights, name, double_quant, dtype) for name in bare}
    own_equal, rows = {}, {}
    for name, base in bare.items():
        packed, first = own_rows(base.packed)
        absmax, _ = own_rows(base.absmax)
        codes, _, scales = references[name]
        some = slice(first, first + packed.shape[0])
        own_equal[name] = torch.equal(packed, codes[some]) and torch.equal(absmax, scales[some])
        rows[name] = packed.shape[0]
    for layer in quantised.values():
        assert layer.magnitude is not None
        own_rows(layer.magnitude)[0].mul_(DRIFT)
    loaded.refresh(world.device)
    gains = {
        name: gather_rows([layer.gain], torch.uint8, world.device)[0].clone()  # type: ignore[list-item]
        for name, layer in quantised.items()
    }

    gathered_equal: dict[str, bool] = {}
    adapter_dtypes: set[str] = set()

    def compare(name: str, module: nn.Module, _: object) -> None:
        codes, values, scales = references[name]
        packed, absmax = bare[name].tensors()[:2]
        same = torch.equal(packed, codes) and torch.equal(absmax, scales)
        if isinstance(module, AdaptedLinear):
            same = same and torch.equal(module.gain, gains[name])  # type: ignore[arg-type]
            adapter_dtypes.add(str(module.lora_a.dtype))
        gathered_equal[name] = same and torch.equal(nf4.weight_from(bare[name].tensors(), dtype), values)

    for name, base in bare.items():
        quantised.get(name, base).register_forward_pre_hook(partial(compare, name))
    with torch.no_grad():
        loaded.model(input_ids=torch.arange(8)[None])
    reshard(loaded.model)
    own, total = weight_bytes(loaded.model)
    return {
        "stored": stored,
        "own_equal": own_equal,
        "gathered_equal": gathered_equal,
        "gains_are_one": sum(int((gain.view(torch.float32) == 1).sum()) for gain in gains.values()),
        "adapter_was_rounded": adapter_dtypes == {str(dtype)},
        "rows": rows,
        "own_bytes": own,
        "total_bytes": total,
        "unsharded": [
            name for name, parameter in loaded.model.named_parameters() if not isinstance(parameter, DTensor)
        ],
        "widest_row_bytes": max(
            parameter[0].numel() * parameter.element_size() for parameter in loaded.model.parameters()
        ),
        "num_parameters": len(list(loaded.model.parameters())),
        "not_quantised": list(loaded.report.not_quantised),
    }


def main() -> None:
    """Runs the cases and writes what was found."""
    output, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    world = parallel.start(ParallelConfig())
    results = {
        name: run_case(Path(case["folder"]), case["double_quant"], case["dtype"], world) for name, case in cases.items()
    }
    (output / f"rank-{world.rank}.json").write_text(json.dumps(results))
    os._exit(0)  # see docs/design/0004


if __name__ == "__main__":
    main()
