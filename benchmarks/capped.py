"""Two training steps of a large shape on one real GPU, of which a cap leaves some GiB; the weights are random.

    python benchmarks/capped.py benchmarks/shapes/llama3_3_70b parallel.cpu_offload=true --gib 24 --output FILE

The steps are those of simulate.py: the trainer's own sharding, loss, backward and optimiser. The cap holds for what
torch's allocator reserves; what CUDA's context takes (assumed, as by the planner) is taken off it.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from simulate import GIB, PHASES, plan, two_steps
from torch import Tensor

from qdora import parallel
from qdora.adapter import dora
from qdora.commands import compose, typed
from qdora.config import ActivationCheckpointing, RunConfig
from qdora.model import loss
from qdora.model.build import build_model, ends
from qdora.model.load import LoadedModel, base_modules, materialise
from qdora.nf4 import NF4Weight
from qdora.parallel import World, own_rows, shard
from qdora.planning.plans import CONTEXT_BYTES


def fill(model: torch.nn.Module) -> None:
    """Random codes, and scales of a trained model's size; norms are ones."""
    for _, module in base_modules(model):
        quantised = [*module.buffers(recurse=False)] if isinstance(module, NF4Weight) else []
        for tensor in [*module.parameters(recurse=False), *quantised]:
            own: Tensor = own_rows(tensor)[0]
            if own.dtype == torch.uint8:
                own.random_(0, 256)
            elif quantised:
                own.fill_(0.02)  # the scales' scales, and their mean
            elif own.ndim == 2:
                own.normal_(std=0.02)
            else:
                own.fill_(1)


def load(folder: Path, config: RunConfig, kind: ActivationCheckpointing, world: World) -> LoadedModel:
    """The model as `load_model` builds it, without a checkpoint. *Collective*."""
    empty = build_model(folder, config.model, config.quant, config.adapter, with_weights=False)
    shard(empty.model, empty.blocks, ends(empty.model), world, config.parallel, empty.dtype)
    materialise(empty.model, torch.device("cpu") if config.parallel.cpu_offload else world.device, world.device)
    with torch.no_grad():
        fill(empty.model)
    dora.reset(empty.model, world.device, seed=0)
    loss.attach_token_loss(empty.model)
    loaded = LoadedModel(empty.model, empty.blocks, empty.report, empty.dtype, empty.adapter, {}, config.parallel, 0.0)
    loaded.refresh(world.device)
    loaded.recompute(kind)
    return loaded


def main() -> None:
    """Steps, compares with the planner, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a config.json; weights are not needed")
    parser.add_argument("overrides", nargs="*", help="options of qdora train")
    parser.add_argument("--gib", type=float, default=24)
    parser.add_argument("--layers", type=int, help="of the model, in the place of its own number")
    parser.add_argument("--output", type=Path, help="a list in JSON, to which this is added")
    options = parser.parse_intermixed_args()
    values = compose("train", [f"model.path={options.folder}", "data.train=none", *options.overrides])
    assert values is not None
    config: RunConfig = typed(values, RunConfig)
    kind = config.parallel.activation_checkpointing
    kind = ActivationCheckpointing.full if kind is ActivationCheckpointing.auto else kind
    shape = json.loads((options.folder / "config.json").read_text())
    shape["num_hidden_layers"] = options.layers or shape["num_hidden_layers"]
    world = parallel.start(config.parallel)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((options.gib * GIB - CONTEXT_BYTES["cuda"]) / total)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(shape))
        started = time.perf_counter()
        loaded = load(folder, config, kind, world)
        load_s = time.perf_counter() - started
        planned = plan(folder, config, kind, ranks=1)
    print(f"loaded in {load_s:.0f} s", flush=True)

    reserved = 0

    def phase_peak() -> int:
        nonlocal reserved
        torch.cuda.synchronize()
        reserved = max(reserved, torch.cuda.max_memory_reserved())
        peak: int = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    times = [time.perf_counter()]

    def now() -> int:
        times.append(time.perf_counter())
        return torch.cuda.memory_allocated()

    counted = two_steps(loaded, config, world, now, phase_peak)
    step_s = time.perf_counter() - times[-1]
    peak, sizes = max(counted[phase] for phase in PHASES), sum(planned.values())
    record: dict[str, Any] = provenance() | {
        "shape": options.folder.name,
        "overrides": options.overrides,
        "layers": shape["num_hidden_layers"],
        "length": config.data.max_length,
        "cap_gib": options.gib,
        "counted_bytes": counted,
        "peak_bytes": peak,
        "reserved_bytes": reserved,
        "planned_bytes": planned,
        "planned_share": sizes / peak,
        "step_s": step_s,
        "load_s": load_s,
    }
    print(f"peak {peak / GIB:.3f} GiB, planned {sizes / GIB:.3f} GiB: {sizes / peak:.3f} of it; {step_s:.1f} s a step")
    if options.output:
        earlier = json.loads(options.output.read_text()) if options.output.exists() else []
        options.output.write_text(json.dumps([*earlier, record], indent=2) + "\n")


if __name__ == "__main__":
    main()
