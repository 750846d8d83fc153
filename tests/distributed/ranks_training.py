"""One rank of test_training: a whole run, watched from inside.

ranks_training.py OUTPUT MODEL DATA OPTIONS   (OPTIONS: JSON of learning_rate, num_steps, dtype, checkpointing,
method)
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdora import nf4
from qdora.adapter.dora import AdaptedLinear, adapted_layers
from qdora.config import (
    ActivationCheckpointing,
    AdapterConfig,
    AdapterMethod,
    DataConfig,
    Dtype,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrackerConfig,
    TrackerKind,
    TrainConfig,
)
from qdora.sharding import gather_rows, own_rows
from qdora.training import train
from qdora.training.trainer import Trainer

CPU = torch.device("cpu")


def stale_by(trainer: Trainer) -> float:
    """Largest relative difference of a stored gain from m / || W + s B A || computed densely in float64."""
    worst = 0.0
    for layer in adapted_layers(trainer.model).values():
        assert layer.magnitude is not None
        assert layer.gain is not None
        dtype = trainer.loaded.dtype
        trained = (gather_rows([parameter], dtype, CPU)[0] for parameter in layer.trained_factors())
        a, b = (matrix.double() for matrix in layer.factors(*trained, dtype))
        magnitude = gather_rows([layer.magnitude], torch.float32, CPU)[0].double()
        gain = gather_rows([layer.gain], torch.uint8, CPU)[0].contiguous().view(torch.float32).squeeze(1).double()
        whole: list[Tensor] = [
            gather_rows([tensor], torch.uint8, CPU)[0].contiguous() for tensor in layer.base_tensors()[:2]
        ]
        weight = nf4.weight_from([*whole, *layer.base_tensors()[2:]], torch.float32).double()
        dense = magnitude / (weight + layer.scaling * b @ a).norm(dim=1)
        worst = max(worst, float(((gain - dense) / dense).abs().max()))
    return worst


def main() -> None:
    """Trains, and writes what was seen."""
    output, folder, data, options = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
    seen: dict[str, Any] = {"norm_calls": 0, "layers": 0, "stale_by": []}
    started_with: dict[str, Tensor] = {}

    measured = AdaptedLinear.expanded_norm

    def counted(self: AdaptedLinear, trained_a: Tensor) -> tuple[Tensor, Tensor]:
        seen["norm_calls"] += 1
        return measured(self, trained_a)

    AdaptedLinear.expanded_norm = counted  # type: ignore[method-assign]
    original_run, original_step = Trainer.run, Trainer.train_step

    def run(self: Trainer, save: Any) -> str:
        layers = adapted_layers(self.model)
        seen["stale_by"].append(stale_by(self))  # also what a resumed run begins with
        for name, layer in layers.items():
            assert layer.magnitude is not None
            started_with[name] = own_rows(layer.magnitude)[0].clone()
        seen["layers"], seen["norm_calls"] = len(layers), 0
        status = original_run(self, save)
        moved = [own_rows(layer.magnitude)[0] != started_with[name] for name, layer in layers.items()]  # type: ignore[arg-type]
        seen["rows_moved"], seen["rows"] = int(sum(m.sum() for m in moved)), sum(m.numel() for m in moved)
        return status

    def train_step(self: Trainer, batches: Any) -> Any:
        result = original_step(self, batches)
        seen["stale_by"].append(stale_by(self))
        return result

    Trainer.run, Trainer.train_step = run, train_step  # type: ignore[method-assign]
    status = train(
        RunConfig(
            model=ModelConfig(path=folder, dtype=Dtype[options["dtype"]]),
            adapter=AdapterConfig(method=AdapterMethod[options["method"]], rank=4),
            data=DataConfig(train=data, packing=False, cache_dir=str(output / "cache")),
            optim=OptimConfig(learning_rate=options["learning_rate"]),
            train=TrainConfig(num_steps=options["num_steps"], num_accumulation_steps=4, checkpoint_every=2),
            parallel=ParallelConfig(activation_checkpointing=ActivationCheckpointing[options["checkpointing"]]),
            tracker=TrackerConfig(kind=TrackerKind.none),
            output_dir=options["output_dir"],
        )
    )
    assert status == 0
    (output / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    os._exit(0)  # see docs/design/0004


if __name__ == "__main__":
    main()
