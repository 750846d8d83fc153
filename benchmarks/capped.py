"""Two training steps of a large shape on one real GPU, of which a cap leaves some GiB; the weights are random.

    python benchmarks/capped.py benchmarks/shapes/llama3_3_70b parallel.cpu_offload=true --gib 24 --output FILE

The steps are those of simulate.py: the trainer's own sharding, loss, backward and optimiser. The cap holds for what
torch's allocator reserves; what CUDA's context takes (assumed, as by the planner) is taken off it. Without a GPU
nothing is capped, and the bytes are those of the process at its highest.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from provenance import provenance
from simulate import GIB, Asked, assemble, plan, two_steps
from torch import Tensor

from qdora import parallel
from qdora.device_memory import memory_gib
from qdora.model.load import base_modules
from qdora.nf4 import NF4Weight
from qdora.planning.plans import CONTEXT_BYTES
from qdora.sharding import own_rows


@torch.no_grad()
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


def main() -> None:
    """Steps, compares with the planner, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=24)
    asked = Asked.read(parser)
    cap_gib: float = asked.options.gib
    world = parallel.start(asked.config.parallel)
    use_gpu = world.device.type == "cuda"
    if use_gpu:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((cap_gib * GIB - CONTEXT_BYTES["cuda"]) / total)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        loaded = assemble(asked.build(folder), asked.config, asked.kind, world, fill)
        loaded.refresh(world.device)
        load_s = time.perf_counter() - started
        planned = plan(Path(folder), asked.config, asked.kind, ranks=1)
    reserved, step_started = 0, 0.0

    def phase_peak() -> int:
        nonlocal reserved
        if not use_gpu:
            return round(memory_gib(world) * GIB)
        torch.cuda.synchronize()
        reserved = max(reserved, torch.cuda.max_memory_reserved())
        peak: int = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def at_start_of_step() -> int:
        nonlocal step_started
        step_started = time.perf_counter()
        return torch.cuda.memory_allocated() if use_gpu else phase_peak()

    counted = two_steps(loaded, asked.config, world, at_start_of_step, phase_peak)
    step_s = time.perf_counter() - step_started
    measured = {"cap_gib": cap_gib, "reserved_bytes": reserved, "step_s": step_s, "load_s": load_s}
    asked.conclude(counted, planned, provenance() | measured)


if __name__ == "__main__":
    main()
