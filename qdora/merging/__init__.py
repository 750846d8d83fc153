"""From a base model and an adapter to one ordinary checkpoint, a layer in memory at a time.

    W' = (m / n) (W + s B A)

with W the dequantised NF4 weight that was trained over; layers without an adapter are dequantised too.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdora import nf4, parallel
from qdora.adapter import peft_format
from qdora.adapter.dora import adapted_layers
from qdora.config import MergeConfig, ModelConfig, QuantConfig, QuantMethod
from qdora.config.commands import overlaid
from qdora.errors import ConfigError
from qdora.model import model_folder
from qdora.model.build import EmptyModel, build_model
from qdora.model.export import write_checkpoint
from qdora.model.load import base_modules, fill, materialise
from qdora.nf4 import NF4Linear
from qdora.parallel import World
from qdora.run_folder import RunFolder

RECORD = "merge.json"
"""What was merged; written with the checkpoint, so that the same merge is not made twice."""


def merge(config: MergeConfig) -> int:
    """Writes the checkpoint that `config` asks for; returns the exit status.

    Raises:
        QdoraError: the run, the adapter or the base do not fit, or `output` holds something else.
    """
    started = time.perf_counter()
    world = parallel.start_alone("qdora merge")
    model_config, quant, adapter_folder = _parts(config)
    adapter = peft_format.read_config(adapter_folder)
    output = Path(str(config.output))
    weights = (adapter_folder / peft_format.WEIGHTS).read_bytes()
    record = {
        "base": str(model_config.path),
        "base_weights": "as stored" if quant.method is QuantMethod.none else f"dequantised {config.base.name}",
        "adapter": hashlib.sha256(weights).hexdigest(),
        "dtype": model_config.dtype.name,
    }
    if output.exists():
        _check_same(output, record)
        print(f"{output} is this merge already")
        return 0
    base = model_folder(model_config)
    empty = build_model(base, model_config, quant, adapter)
    tensors = merged_tensors(empty, adapter_folder, world)
    write_checkpoint(tensors, output, base, int(config.max_shard_gib * 2**30), {RECORD: record})
    adapted = len(empty.report.adapted)
    print(f"merged {adapted} layers into {output} in {time.perf_counter() - started:.1f} s; load it with transformers")
    return 0


def merged_tensors(empty: EmptyModel, adapter_folder: Path, world: World) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the merged model under its name in the base checkpoint, one layer in memory at a time.

    Raises:
        AdapterError: the adapter is of another model.
    """
    layers = adapted_layers(empty.model)
    for layer in layers.values():
        for kind, parameter in [*layer.named_parameters(recurse=False)]:
            setattr(layer, kind, nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False))
    peft_format.load(empty.model, adapter_folder)
    names = empty.sources.keys | {name: name for name in empty.sources.conversions}
    for name, module in base_modules(empty.model):
        kinds = [kind for kind, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]]
        kinds += ["weight"] if isinstance(module, NF4Linear) else []
        wanted = {kind: names[f"{name}.{kind}"] for kind in kinds if f"{name}.{kind}" in names}
        if not wanted:
            continue
        materialise(module, world.device, world.device)
        fill(empty, name, module, world)
        for kind, stored_as in wanted.items():
            if kind == "weight" and name in layers:
                layers[name].measure(world.device)
                tensor = layers[name].merged_weight(world.device, empty.dtype)
            elif kind == "weight" and isinstance(module, NF4Linear):
                tensor = nf4.weight_from(module.tensors(), empty.dtype)
            else:
                tensor = getattr(module, kind)
            # A copy: the dequantised weight lies in a buffer that the next layer reuses.
            yield stored_as, tensor.detach().to("cpu", copy=True)
        module.to("meta")


def _parts(config: MergeConfig) -> tuple[ModelConfig, QuantConfig, Path]:
    if config.run is None:
        return config.model, config.quant, Path(str(config.adapter))
    folder = RunFolder(Path(config.run))
    run = folder.read_config()
    # model.dtype=float32 spares the merged weights the rounding to bfloat16.
    return overlaid(run.model, config.model), run.quant, folder.finished_adapter()


def _check_same(output: Path, record: dict[str, Any]) -> None:
    found = output / RECORD
    if not found.exists():
        raise ConfigError(f"output={output} exists and is not a merge: give another folder")
    if json.loads(found.read_text(encoding="utf-8")) != record:
        raise ConfigError(f"output={output} holds the merge of something else: remove it, or give another folder")
