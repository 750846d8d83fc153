"""What a step keeps is what was said before it, and the recomputation follows from the memory that is free."""

import gc
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from qdora import parallel
from qdora.config import (
    ActivationCheckpointing,
    AdapterConfig,
    AdapterMethod,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)
from qdora.model import LoadedModel, load_model
from qdora.parallel import World
from qdora.training import memory
from tests.support.models import make_model
from tests.support.processes import run

ROWS, LENGTH = 4, 256
TOLERANCE = 0.04
"""Between counted bytes and the allocator's, a block: positions and mask are kept once and counted in each."""
NONE, SELECTIVE, FULL = memory.FASTEST_FIRST


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Models of 4 and of 8 blocks."""
    folder = tmp_path_factory.mktemp("models")
    return {blocks: make_model(folder / str(blocks), "llama", num_hidden_layers=blocks) for blocks in (4, 8)}


def load(
    folder: Path, method: AdapterMethod = AdapterMethod.dora, dropout: float = 0.0, rank: int = 4
) -> tuple[LoadedModel, World]:
    """The model on this process alone, in training mode."""
    world = parallel.start_alone("test")
    adapter = AdapterConfig(method=method, rank=rank, dropout=dropout)
    loaded = load_model(folder, ModelConfig(path=str(folder)), QuantConfig(), adapter, ParallelConfig(), world)
    loaded.model.train()
    return loaded, world


def bytes_alive_after_forward(loaded: LoadedModel) -> int:
    """Bytes that the allocator gave out during a forward pass of the blocks, less those that came back."""
    tokens = torch.randint(4, 200, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH).expand(tokens.shape)
    gc.collect()  # models of other tests, whose buffers would come back meanwhile
    for _ in range(2):  # the second time all buffers are there
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            hidden = loaded.model.get_decoder()(input_ids=tokens, position_ids=positions, use_cache=False)
        del hidden
    return sum(event.self_cpu_memory_usage for event in profiled.events())


COUNTED = ["qdora/training/memory.py", "qdora/model/activations.py", "qdora/adapter/*.py"]


@pytest.mark.parametrize(
    ("method", "rank"),
    [
        (AdapterMethod.dora, 4),
        *(
            pytest.param(
                method, rank, marks=pytest.mark.nightly(paths=["qdora/training/memory.py", "qdora/adapter/*.py"])
            )
            for method, rank in ((AdapterMethod.dora, 64), (AdapterMethod.lora, 4), (AdapterMethod.dvora, 4))
        ),
    ],
)
def test_what_a_block_keeps_is_what_the_allocator_gave(
    folders: dict[int, Path], method: AdapterMethod, rank: int
) -> None:
    """What a refresh makes of the adapters is there already, and is not kept by a block."""
    counted, alive = {}, {}
    for blocks, folder in folders.items():
        loaded, world = load(folder, method, rank=rank)
        kept = memory.activation_bytes(loaded, world, ROWS, LENGTH)
        assert len(kept) == blocks
        for kind in memory.FASTEST_FIRST:
            counted[blocks, kind] = sum(block[kind] for block in kept)
            loaded, _ = load(folder, method, rank=rank)
            loaded.recompute(kind)
            alive[blocks, kind] = bytes_alive_after_forward(loaded)
    for kind in memory.FASTEST_FIRST:
        given = alive[8, kind] - alive[4, kind]
        assert counted[8, kind] - counted[4, kind] == pytest.approx(given, rel=TOLERANCE), kind


def test_measuring_changes_nothing(folders: dict[int, Path]) -> None:
    """Neither the random state, with dropout, nor the mode, nor the blocks, nor a gradient."""
    loaded, world = load(folders[4], dropout=0.5)
    loaded.model.eval()
    forwards = [block.forward for block in loaded.blocks]
    state = torch.get_rng_state()
    memory.activation_bytes(loaded, world, ROWS, LENGTH)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.model.training
    assert [block.forward for block in loaded.blocks] == forwards
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


@pytest.mark.parametrize("kind", memory.FASTEST_FIRST)
def test_fastest_kind_that_fits_is_chosen(folders: dict[int, Path], kind: ActivationCheckpointing) -> None:
    """With exactly the room that `kind` needs; with too little for any it is `full`. Another rank needs less."""
    loaded, world = load(folders[4])
    need = memory.step_bytes(loaded, world, ROWS, LENGTH)
    less = replace(need, kept=dict.fromkeys(memory.FASTEST_FIRST, 0), largest=0, loss=0)
    needed = {some: need.total(some, keep_gathered=False) for some in memory.FASTEST_FIRST}
    assert needed[NONE] > needed[SELECTIVE] > needed[FULL] > 0
    for share, expected in ((1.001, kind), (0.5, FULL)):
        free = int(share * needed[kind] / memory.USABLE["cpu"])
        chosen, told = memory.choose_recomputation([less, need], free, keep_gathered=False, device=world.device)
        assert chosen is expected
        assert ("may not fit" in told) == (share == 0.5)


def test_a_graph_counts_what_a_trial_takes_beside_it(folders: dict[int, Path]) -> None:
    loaded, world = load(folders[4])
    need = memory.step_bytes(loaded, world, ROWS, LENGTH)
    for kind in memory.FASTEST_FIRST:
        with_graph, without = (some.total(kind, keep_gathered=False) for some in (need.with_graph(), need))
        assert with_graph - without == without - need.optimizer - need.gathered
    graph = RunConfig(
        model=ModelConfig(path="m"), data=DataConfig(train="d"), train=TrainConfig(cuda_graph=True, micro_batch_size=2)
    )
    told = memory.remedies(need.with_graph(), NONE, graph, world, own_bytes=0)
    assert re.search(r"train\.cuda_graph=false \(-\d", told), told


def test_an_embedding_or_a_head_counts_where_it_is_more_than_a_block() -> None:
    """They are gathered when no block computes; kept gathered, all of them are there while one does."""
    need = memory.StepBytes(
        kept=dict.fromkeys(memory.FASTEST_FIRST, 1000),
        largest=50,
        hidden=5,
        gathered=200,
        gathered_all=4000,
        gathered_end=300,
        optimizer=7,
        loss=3,
    )
    assert need.total(FULL, keep_gathered=False) == 1000 + (2 * 50 + 5 + 200) + 7 + 3
    assert need.total(FULL, keep_gathered=False, share=0.5) == 500 + 300 + 7 + 3
    assert need.total(FULL, keep_gathered=True) == 1000 + (2 * 50 + 5 + 4000) + 7 + 3


def test_remedies_say_what_each_option_saves(folders: dict[int, Path]) -> None:
    loaded, world = load(folders[8])
    need = memory.step_bytes(loaded, world, ROWS, LENGTH)
    config = RunConfig(
        model=ModelConfig(path=str(folders[8])),
        data=DataConfig(train="data.jsonl", max_length=LENGTH),
        train=TrainConfig(micro_batch_size=ROWS),
    )
    told = memory.remedies(need, NONE, config, world, 0)
    for option, rows, length, kind in (
        ("parallel.activation_checkpointing=selective", ROWS, LENGTH, SELECTIVE),
        ("parallel.activation_checkpointing=full", ROWS, LENGTH, FULL),
        ("train.micro_batch_size=2", 2, LENGTH, NONE),
        ("data.max_length=128", ROWS, 128, NONE),
    ):
        found = re.search(rf"{re.escape(option)} \(-([0-9.]+) GiB\)", told)
        assert found, told
        then = memory.step_bytes(loaded, world, rows, length).total(kind, keep_gathered=False)
        saved = (need.total(NONE, keep_gathered=False) - then) / 2**30
        assert float(found[1]) == pytest.approx(saved, rel=0.05, abs=0.006)


def test_memory_is_of_this_program_and_not_of_what_started_it() -> None:
    ballast = torch.ones(3 * 2**27)
    program = "from qdora import device_memory, parallel; print(device_memory.memory_gib(parallel.start_alone('test')))"
    done = run([sys.executable, "-c", program])
    assert done.returncode == 0, done.stderr
    assert 0.05 < float(done.stdout) < ballast.nbytes / 2**30
