"""One rank of test_families: two optimiser steps of every family, one run after the other.

ranks_families.py OUTPUT MODELS DATA   (MODELS: JSON of family to folder)
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from qdora import parallel
from qdora.config import (
    AdapterConfig,
    DataConfig,
    Dtype,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrackerConfig,
    TrackerKind,
    TrainConfig,
)
from qdora.training import train

ROWS_A_STEP = 8


def losses_of(folder: Path) -> dict[str, list[float]]:
    """Training and evaluation losses of a run, in order."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {kind: [line[kind] for line in lines if kind in line] for kind in ("loss", "eval_loss", "grad_norm")}


def main() -> None:
    """Trains each family, and writes its losses."""
    parallel.stop = lambda: None  # ranks that have left cannot meet again on torchrun's store
    output, models, data = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
    found = {}
    for family, folder in models.items():
        status = train(
            RunConfig(
                model=ModelConfig(path=folder, dtype=Dtype.float32),
                adapter=AdapterConfig(rank=4),
                data=DataConfig(train=data, eval=data, packing=False, max_length=96, cache_dir=str(output / "cache")),
                optim=OptimConfig(learning_rate=1e-2),
                train=TrainConfig(
                    num_steps=2,
                    micro_batch_size=2,
                    num_accumulation_steps=ROWS_A_STEP // 2 // int(os.environ["WORLD_SIZE"]),
                ),
                tracker=TrackerConfig(kind=TrackerKind.none),
                output_dir=str(output / family),
            )
        )
        assert status == 0
        found[family] = losses_of(output / family)
    (output / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    os._exit(0)  # see docs/design/0004


if __name__ == "__main__":
    main()
