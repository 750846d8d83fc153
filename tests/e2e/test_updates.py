"""Every trained tensor is moved by training, whatever stays gathered after a forward."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qdora.adapter import peft_format
from qdora.config import AdapterConfig, AdapterMethod, ModelConfig, ParallelConfig, Plan, QuantConfig, QuantMethod
from qdora.model import load_model
from qdora.parallel import start_alone
from tests.support.marks import nightly
from tests.support.processes import qdora


def initial_tensors(model: Path, method: AdapterMethod, quant: QuantMethod, folder: Path) -> dict[str, torch.Tensor]:
    """What the run starts from, under the names of its result."""
    if method is AdapterMethod.none:
        return load_file(model / "model.safetensors")
    world = start_alone("test")
    adapter = AdapterConfig(method=method, rank=4)
    config, plan = ModelConfig(path=str(model)), ParallelConfig(plan=Plan.none)
    loaded = load_model(model, config, QuantConfig(method=quant), adapter, plan, world)
    peft_format.save(loaded.model, folder, adapter, str(model), loaded.dtype, world)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("method", "quant"),
    [("dora", "nf4"), ("none", "none"), *nightly(("dora", "none"), ("lora", "nf4"), ("lora", "none"))],
    ids=["qdora", "full", "dora", "qlora", "lora"],
)
def test_every_trained_tensor_moves_where_weights_stay_gathered(
    method: str, quant: str, tiny: Path, options: list[str], tmp_path: Path
) -> None:
    rate = "optim.learning_rate=1e-3" if method == "none" else "optim.learning_rate=1e-2"
    run = tmp_path / "run"
    arguments = [*options, f"adapter={method}", f"quant={quant}", rate, "parallel.reshard_after_forward=false"]
    done = qdora("train", *arguments, "train.num_steps=3", f"output_dir={run}", nproc=2)
    assert done.returncode == 0, done.stderr[-3000:]
    before = initial_tensors(tiny, AdapterMethod[method], QuantMethod[quant], tmp_path / "initial")
    files = run / "model" / "model.safetensors", run / "adapter" / "adapter_model.safetensors"
    after = load_file(files[0] if method == "none" else files[1])
    assert after.keys() == before.keys()
    assert [name for name, tensor in after.items() if torch.equal(tensor, before[name])] == []
