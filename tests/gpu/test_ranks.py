"""FSDP2 over NCCL on one GPU: one rank, saved and resumed; and two ranks that share the GPU.

Without a GPU the same over gloo, nightly: it shows that the tests can pass.
"""

import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

from tests.support.models import make_model
from tests.support.processes import end, popen, qdora
from tests.support.runs import QUICK, losses_of, metrics_of, summary_of, write_sums
from tests.support.slurm import free_ports

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [] if DEVICE == "cuda" else [pytest.mark.nightly(paths=["qdora/sharding.py", "qdora/parallel.py"])]
STEPS = 6
WAYS = {
    "adapter, shards in host memory": ["parallel=fsdp", "parallel.cpu_offload=true"],
    "all weights": ["parallel=fsdp", "adapter=none", "quant=none"],
}


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Returns options of a short run in float32, in which sums of other orders differ by little."""
    model = make_model(tmp_path / "model", "llama", num_hidden_layers=2)
    return [
        f"model.path={model}", f"data.train={write_sums(tmp_path / 'sums.jsonl')}", "data.max_length=64",
        "model.dtype=float32", "model.attention=sdpa", "optim.learning_rate=1e-3", f"train.num_steps={STEPS}",
        "train.checkpoint_every=3", "tracker=none", *QUICK,
    ]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_one_rank_goes_on_from_its_checkpoint(way: str, given: list[str], tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    done = qdora("train", *given, *WAYS[way], f"output_dir={whole}")
    assert done.returncode == 0, done.stderr
    assert summary_of(whole)["device"] == DEVICE
    losses = losses_of(whole)
    assert losses[-1] < losses[0]
    done = qdora("train", *given, *WAYS[way], f"resume={whole}/checkpoints/step-00000003", f"output_dir={part}")
    assert done.returncode == 0, done.stderr
    after = {line["step"]: line["loss"] for line in metrics_of(part) if "loss" in line}
    assert [after[step] for step in range(4, STEPS + 1)] == pytest.approx(losses[3:], rel=1e-4)


def test_two_ranks_that_share_a_gpu_train_as_one(given: list[str], tmp_path: Path) -> None:
    """As on two machines of one GPU each: NCCL refuses a GPU twice on one, and knows machines by `NCCL_HOSTID`."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    done = qdora("train", *given, "parallel=none", "train.num_accumulation_steps=2", f"output_dir={alone}")
    assert done.returncode == 0, done.stderr
    port, processes = str(free_ports(1)[0]), []
    for rank in range(2):
        environment = {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "NCCL_HOSTID": f"rank{rank}", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo",
            "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        command = [sys.executable, "-m", "qdora", "train", *given, "parallel=fsdp", "train.num_accumulation_steps=1"]
        processes.append(popen([*command, f"output_dir={shared}"], stderr=PIPE, **environment))
    try:
        # Within the part of a session on a GPU; a CPU may have other work, and two cold starts.
        ends = [process.communicate(timeout=80 if torch.cuda.is_available() else 400) for process in processes]
    finally:
        for process in processes:
            end(process)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(stderr for _, stderr in ends)
    assert summary_of(shared)["device"] == DEVICE
    assert losses_of(shared) == pytest.approx(losses_of(alone), rel=1e-3)
