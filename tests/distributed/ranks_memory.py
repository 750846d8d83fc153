"""One rank of test_loading_memory: peak host memory of `load_model` above what the process had before, and its reads.

ranks_memory.py OUTPUT MODEL
"""

import json
import os
import sys
import time
from pathlib import Path

from qdora import parallel
from qdora.config import AdapterConfig, ModelConfig, ParallelConfig, QuantConfig
from qdora.model import load_model
from qdora.model.build import build_model
from qdora.sharding import weight_bytes
from tests.support.processes import status_bytes


def read_bytes() -> int:
    """Bytes that this process asked the kernel for, whether from a disk or its cache."""
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar: N


def main() -> None:
    """Loads once with a warm process, and measures."""
    output, folder = Path(sys.argv[1]), Path(sys.argv[2])
    config = ParallelConfig()
    world = parallel.start(config)
    model, quant, adapter = ModelConfig(path=str(folder)), QuantConfig(), AdapterConfig(rank=8)
    build_model(folder, model, quant, adapter)  # imports the model's code, which is not its weights
    baseline = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    read_before = read_bytes()
    started = time.perf_counter()
    loaded = load_model(folder, model, quant, adapter, config, world)
    seconds = time.perf_counter() - started
    read = read_bytes() - read_before
    own, total = weight_bytes(loaded.model)
    result = {
        "peak_bytes": status_bytes("VmHWM") - baseline,
        "read_bytes": read,
        "own_bytes": own,
        "total_bytes": total,
        "seconds": seconds,
    }
    (output / f"rank-{world.rank}.json").write_text(json.dumps(result))
    os._exit(0)  # see docs/design/0004


if __name__ == "__main__":
    main()
