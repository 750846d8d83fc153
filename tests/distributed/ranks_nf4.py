"""One rank of test_nf4_ranks: its stored rows, what a forward gathers, and its bytes.

ranks_nf4.py OUTPUT MODEL DOUBLE_QUANT
"""

import json
import os
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qdora import nf4, parallel
from qdora.adapter.dora import AdaptedLinear, adapted_layers
from qdora.config import AdapterConfig, Dtype, ModelConfig, ParallelConfig, QuantConfig
from qdora.model import load_model
from qdora.nf4 import NF4Linear
from qdora.parallel import own_rows, weight_bytes


def reference(weight: Tensor, double_quant: bool) -> tuple[Tensor, Tensor]:
    """Codes and values of the whole tensor by bitsandbytes' own functions."""
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=double_quant)
    return packed.view(weight.shape[0], -1), bnb.dequantize_4bit(packed, state)


def main() -> None:
    """Loads the model over all ranks, and compares every quantised layer."""
    output, folder, double_quant = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "true"
    config = ParallelConfig()
    world = parallel.start(config)
    quant = QuantConfig(double_quant=double_quant)
    loaded = load_model(
        folder, ModelConfig(path=str(folder), dtype=Dtype.float32), quant, AdapterConfig(rank=4), config, world
    )
    weights = load_file(folder / "model.safetensors")
    layers = adapted_layers(loaded.model)
    quantised = {name: layer for name, layer in layers.items() if isinstance(layer.base, NF4Linear)}
    own_equal, rows = {}, {}
    for name, layer in quantised.items():
        packed, first = own_rows(layer.base.packed)  # type: ignore[arg-type]
        expected, _ = reference(weights[f"{name}.weight"], double_quant)
        own_equal[name] = torch.equal(packed, expected[first : first + packed.shape[0]])
        rows[name] = packed.shape[0]

    gathered_equal: dict[str, bool] = {}

    def compare(layer: nn.Module, _: object) -> None:
        assert isinstance(layer, AdaptedLinear)
        name = next(name for name, other in quantised.items() if other is layer)
        codes, values = reference(weights[f"{name}.weight"], double_quant)
        same_codes = torch.equal(layer.base_tensors()[0], codes)
        gathered_equal[name] = same_codes and torch.equal(nf4.weight_from(layer.base_tensors(), torch.float32), values)

    for layer in quantised.values():
        layer.register_forward_pre_hook(compare)
    with torch.no_grad():
        loaded.model(input_ids=torch.arange(8)[None])
    parallel.reshard(loaded.model)
    own, total = weight_bytes(loaded.model)
    result = {
        "own_equal": own_equal,
        "gathered_equal": gathered_equal,
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
    (output / f"rank-{world.rank}.json").write_text(json.dumps(result))
    os._exit(0)  # see docs/design/0004


if __name__ == "__main__":
    main()
