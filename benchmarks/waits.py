"""Where a training step waits for its GPU, found where there is none.

    python benchmarks/waits.py benchmarks/shapes/llama3_2_1b model.attention=varlen parallel=none --layers 2

The trainer's own gradients of two micro-batches of packed rows, and its update, on a device of which torch knows the
name only (`simulate.py`). What makes the host wait is an operator that reads a tensor of the device: a number, the
places of numbers, a copy. The trainer's own reading, once a step between the two, is not among them. Copies of the
batches to a GPU are from pinned memory, and are not seen here.
"""

import argparse
import json
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from simulate import READ, Asked, assemble, move_buffers, nothing_computed, simulated_world
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

import qdora
from qdora.config import Plan
from qdora.data import Batch
from qdora.model.build import EmptyModel
from qdora.optim import build_optimizer, clip_gradients
from qdora.training.trainer import accumulate_gradients

aten = torch.ops.aten
READS = {*READ, aten.masked_select.default, aten.equal.default}
ROWS, LENGTH = 2, 16


class Waits(TorchDispatchMode):
    """Notes what is read from the device, and which function of qdora has asked for it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        on_device = any(isinstance(arg, Tensor) and arg.device == self.device for arg in args)
        by_mask = operator is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if on_device and (operator in READS or by_mask):
            self._note(operator)
        if operator in READ:
            return READ[operator](args[0])
        result = operator(*args, **(kwargs or {}))
        if on_device and isinstance(result, Tensor) and result.device.type == "cpu":
            self._note(operator)
        return result

    def _note(self, operator: Any) -> None:
        package = str(Path(qdora.__file__).parent)
        names = [frame.name for frame in traceback.extract_stack() if frame.filename.startswith(package)]
        self.found.append(f"{operator.overloadpacket.__name__} in {names[-1]}")


def waits_of(empty: EmptyModel, asked: Asked) -> dict[str, list[str]]:
    """Steps twice; the waits of the second, by phase."""
    config = asked.config
    empty.model.set_attn_implementation(config.model.attention.name)
    world = simulated_world(config, ranks=1 if config.parallel.plan is Plan.none else 2)
    if config.parallel.plan is Plan.none:
        world = replace(world, mesh=None)
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    batch = Batch(tokens, torch.arange(LENGTH // 2).repeat(ROWS, 2), tokens, tokens.numel(), tokens.numel())
    found: dict[str, list[str]] = {}
    # transformers looks less at tensors without values.
    with (
        patch.object(masking_utils, "is_tracing", lambda *_: False),
        nothing_computed(),
        Waits(world.device) as waits,
    ):
        move_buffers(empty.model, world.device)
        loaded = assemble(empty, config, asked.kind, world)
        optimizer = build_optimizer(loaded.model, config.optim)
        optimizer.register_step_post_hook(lambda *_: loaded.refresh(world.device, defer=True))
        loaded.model.train()
        for _ in range(2):
            waits.found = found["gradients"] = []
            loss, _ = accumulate_gradients(loaded.model, [batch, batch], world)
            clip_gradients(loaded.model, config.optim.max_grad_norm, world, loss)
            waits.found = found["update"] = []
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return found


def main() -> None:
    """Looks and prints JSON."""
    asked = Asked.read(
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    )
    with tempfile.TemporaryDirectory() as folder:
        empty = asked.build(folder)
    json.dump(waits_of(empty, asked), sys.stdout, indent=2)


if __name__ == "__main__":
    main()
