"""The memory of one rank's training step, counted where there is no GPU: tensors have a device and a size, no values.

    python benchmarks/simulate.py benchmarks/shapes/llama3_3_70b parallel.gather=part --ranks 2 --output FILE

The step is the trainer's own: the model is built, sharded by FSDP2, adapted, and steps twice, of which the second is
counted: AdamW's moments are there by then. In the GPU's place is a device that torch knows by name only, so that host
memory is told apart; in the other ranks' place is torch's fake process group. What lives is counted at every operator,
inside qdora's own too. Not seen is what torch's and bitsandbytes' kernels take for themselves, what an allocator loses
between its blocks, and what CUDA and NCCL take.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from provenance import provenance
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from qdora import nf4
from qdora.adapter import dora
from qdora.adapter.operator import opaque_adapted_linear, opaque_adapted_linear_backward
from qdora.commands import compose, typed
from qdora.config import ActivationCheckpointing, RunConfig
from qdora.config.groups import ACCUMULATION_STEPS
from qdora.model import loss
from qdora.model.build import EmptyModel, build_model, ends
from qdora.model.load import LoadedModel, materialise
from qdora.optim import build_optimizer, clip_gradients
from qdora.parallel import World
from qdora.planning.activations import LiveBytes
from qdora.planning.hardware import find_hardware
from qdora.planning.plans import Choice, Planner
from qdora.sharding import set_gradient_sync, shard

GIB = 2**30
PHASES = ("forward", "backward", "optimiser")
OPERATORS = (
    opaque_adapted_linear,
    opaque_adapted_linear_backward,
    nf4.opaque_frozen_linear,
    nf4.opaque_frozen_linear_backward,
)
aten = torch.ops.aten
READ: dict[Any, Callable[[Tensor], Any]] = {
    aten._local_scalar_dense.default: lambda tensor: tensor.dtype != torch.bool,  # no row's norm cancels
    aten.nonzero.default: lambda tensor: tensor.new_empty(tensor.numel(), tensor.ndim, dtype=torch.int64),
}
"""What is read of a tensor that has no values; every token has a label."""


class DeviceBytes(LiveBytes):
    """Counts the device's bytes, and beside them the host's."""

    def __init__(self) -> None:
        super().__init__()
        self.host = LiveBytes()
        self._bodies = {operator._opoverload: operator._init_fn for operator in OPERATORS}

    def phase_peak(self) -> int:
        """Of the bytes since it was asked last."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if operator in READ:
            return READ[operator](args[0])
        if operator in self._bodies:
            TorchDispatchMode.__enter__(self)
            try:
                return self._bodies[operator](*args, **(kwargs or {}))
            finally:
                TorchDispatchMode.__exit__(self, None, None, None)
        return super().__torch_dispatch__(operator, types, args, kwargs)

    def counter(self, tensor: Tensor) -> LiveBytes:
        """The host's is another."""
        return self.host if tensor.device.type == "cpu" else self

    def __enter__(self) -> Any:
        resize = self._resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._add(storage._cdata, size)
            return result

        torch.UntypedStorage.resize_ = counted  # type: ignore[assignment]  # how FSDP2 frees what it has gathered
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)


def dequantize(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """`nf4.dequantize` without its kernel."""
    return nf4.scratch.get((packed.shape[0], packed.shape[1] * 2), dtype, packed.device)


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """By the kernels that a GPU has; torch would take its reference, which keeps all scores."""
    dropout, causal, scale = options.get("dropout_p", 0.0), options.get("is_causal", False), options.get("scale")
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal, scale=scale)[0]
    bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout, causal, scale=scale)[0]


@contextmanager
def nothing_computed() -> Iterator[None]:
    """Tensors have a device and a size, and no values."""
    with (
        patch.object(nf4, "dequantize", dequantize),
        patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Moves buffers that have values, for which `fully_shard` would write into them; mutates `model`."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer if buffer.is_meta else buffer.to(device))


def simulated_device() -> torch.device:
    """A device that has a GPU's sizes, and a CPU's streams, which do nothing; once a process."""
    module: Any = _DummyBackendModule()
    for name in ("Stream", "Event", "stream", "current_stream"):
        setattr(module, name, getattr(torch.cpu, name))
    module.is_available = lambda: False  # else torch would take tensors with values there
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    _setup_privateuseone_for_python_backend("simulated", module)
    device = torch.device("simulated", 0)
    for sizes in (nf4.PART_NUMEL, loss.CHUNK_NUMEL):
        sizes["simulated"] = sizes["cuda"]
    return device


def simulated_world(config: RunConfig, ranks: int) -> World:
    """Rank 0 of as many, on a simulated device."""
    device = simulated_device()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("simulated", (ranks,), mesh_dim_names=("shard",))
    return World(0, ranks, 0, ranks, device, config.parallel.plan, mesh, timeout_s=86400)


def count(empty: EmptyModel, config: RunConfig, kind: ActivationCheckpointing, ranks: int) -> dict[str, int]:
    """Bytes on the device: what is there between two steps, and at most in each phase of the second; host bytes."""
    world = simulated_world(config, ranks)
    with nothing_computed(), DeviceBytes() as live:
        move_buffers(empty.model, world.device)
        loaded = assemble(empty, config, kind, world)
        counted = two_steps(loaded, config, world, lambda: live.now, live.phase_peak)
        counted["in host memory"] = live.host.peak
    return counted


def assemble(
    empty: EmptyModel,
    config: RunConfig,
    kind: ActivationCheckpointing,
    world: World,
    fill: Callable[[nn.Module], None] | None = None,
) -> LoadedModel:
    """The model as `load_model` makes it, with what `fill` writes in the place of a checkpoint. *Collective*."""
    model, parallel = empty.model, config.parallel
    shard(model, empty.blocks, ends(model), world, parallel, empty.dtype)
    materialise(model, torch.device("cpu") if parallel.cpu_offload else world.device, world.device)
    if fill is not None:
        fill(model)
    dora.reset(model, world.device, seed=0)
    loss.attach_losses(model)
    loaded = LoadedModel(model, empty.blocks, empty.report, empty.dtype, empty.adapter, {}, parallel, 0.0)
    loaded.recompute(kind)
    return loaded


def two_steps(
    loaded: LoadedModel, config: RunConfig, world: World, bytes_now: Callable[[], int], phase_peak: Callable[[], int]
) -> dict[str, int]:
    """Does two optimiser steps; bytes on the device before the second, and at most in each of its phases.

    Args:
        phase_peak: the most bytes since it was asked last.
    """
    model, device = loaded.model, world.device
    rows, length = config.train.micro_batch_size, config.data.max_length
    batches = config.train.num_accumulation_steps or ACCUMULATION_STEPS
    optimizer = build_optimizer(model, config.optim)
    optimizer.register_step_post_hook(lambda *_: loaded.refresh(device, defer=True))
    model.train()
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    positions = torch.arange(length // 2).repeat(rows, 2)  # two samples a row
    batch: Any = SimpleNamespace(input_ids=tokens, position_ids=positions, labels=tokens)
    for _ in range(2):
        phase_peak()
        counted = {"between steps": bytes_now(), "forward": 0, "backward": 0}
        for index in range(batches):
            is_last = index == batches - 1
            set_gradient_sync(model, is_last, keep_gathered=not config.parallel.reshard_after_forward)
            total = loss.batch_loss(model, batch, device)
            counted["forward"] = max(counted["forward"], phase_peak())
            total.backward()
            counted["backward"] = max(counted["backward"], phase_peak())
        clip_gradients(model, config.optim.max_grad_norm, world)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counted["optimiser"] = phase_peak()
    return counted


def plan(folder: Path, config: RunConfig, kind: ActivationCheckpointing, ranks: int) -> dict[str, int]:
    """What the planner counts for the same, by part; without what CUDA and an allocator take."""
    parallel = replace(config.parallel, activation_checkpointing=kind)
    rows, batches = config.train.micro_batch_size, config.train.num_accumulation_steps or ACCUMULATION_STEPS
    choice = Choice(parallel, rows, batches, config.quant.embeddings)
    parts = Planner(config, folder, find_hardware(f"{ranks}x24gb")).plan(choice).parts
    return {name: size for name, size in parts.items() if name not in ("allocator", "context")}


@dataclass(frozen=True, slots=True)
class Asked:
    """The command line, and what follows from it."""

    options: argparse.Namespace
    config: RunConfig
    kind: ActivationCheckpointing
    shape: dict[str, Any]
    """config.json's, with as many layers as are wanted."""

    @classmethod
    def read(cls, parser: argparse.ArgumentParser) -> "Asked":
        """Adds what simulated and real steps have in common to the parser's options, and reads them."""
        parser.add_argument("folder", type=Path, help="of a config.json; weights are not needed")
        parser.add_argument("overrides", nargs="*", help="options of qdora train")
        parser.add_argument("--layers", type=int, help="of the model, in the place of its own number")
        parser.add_argument("--output", type=Path, help="a list in JSON, to which this is added")
        options = parser.parse_intermixed_args()
        values = compose("train", [f"model.path={options.folder}", "data.train=none", *options.overrides])
        assert values is not None
        config: RunConfig = typed(values, RunConfig)
        kind = config.parallel.activation_checkpointing
        shape = json.loads((options.folder / "config.json").read_text())
        shape["num_hidden_layers"] = options.layers or shape["num_hidden_layers"]
        return cls(
            options, config, ActivationCheckpointing.full if kind is ActivationCheckpointing.auto else kind, shape
        )

    def build(self, folder: str) -> EmptyModel:
        """The model, without weights; `folder` is a new one, which then holds its config.json."""
        Path(folder, "config.json").write_text(json.dumps(self.shape))
        config = self.config
        return build_model(Path(folder), config.model, config.quant, config.adapter, with_weights=False)

    def conclude(self, counted: dict[str, int], planned: dict[str, int], more: dict[str, Any]) -> None:
        """Prints what was counted beside what is planned, and adds a record, with `more`, to the output."""
        peak, total = max(counted[phase] for phase in PHASES), sum(planned.values())
        for title, sizes in (("counted", counted), ("planned", planned)):
            print(title, *(f"    {name:22}{size / GIB:8.3f} GiB" for name, size in sizes.items()), sep="\n")
        print(f"peak {peak / GIB:.3f} GiB, planned {total / GIB:.3f} GiB: {total / peak:.3f} of it")
        output = self.options.output
        if output is None:
            return
        record = {
            "date": datetime.now(UTC).date().isoformat(),
            "shape": self.options.folder.name,
            "overrides": self.options.overrides,
            "layers": self.shape["num_hidden_layers"],
            "length": self.config.data.max_length,
            "counted_bytes": counted,
            "peak_bytes": peak,
            "planned_bytes": planned,
            "planned_share": total / peak,
        }
        earlier = json.loads(output.read_text()) if output.exists() else []
        output.write_text(json.dumps([*earlier, more | record], indent=2) + "\n")


def main() -> None:
    """Counts, compares with the planner, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    asked = Asked.read(parser)
    ranks: int = asked.options.ranks
    with tempfile.TemporaryDirectory() as folder:
        counted = count(asked.build(folder), asked.config, asked.kind, ranks)
        planned = plan(Path(folder), asked.config, asked.kind, ranks)
    where = {name: value for name, value in provenance().items() if name in ("commit", "versions")}
    asked.conclude(counted, planned, where | {"ranks": ranks})


if __name__ == "__main__":
    main()
