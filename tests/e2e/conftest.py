"""A tiny model, a small data set, and the options that every run of these tests has."""

from pathlib import Path

import pytest

from tests.support.models import make_model
from tests.support.processes import qdora
from tests.support.runs import QUICK, long_run, write_sums


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of one block."""
    return make_model(tmp_path_factory.mktemp("tiny"), "llama", num_hidden_layers=1)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 sums."""
    return write_sums(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture
def options(tiny: Path, data: Path) -> list[str]:
    """A run of 6 steps over 8 rows a step on one rank."""
    return [
        f"model.path={tiny}",
        f"data.train={data}",
        "data.packing=false",
        "data.max_length=64",
        "adapter.rank=4",
        "optim.learning_rate=1e-2",
        "train.num_steps=6",
        "train.micro_batch_size=2",
        "train.num_accumulation_steps=4",
        "tracker=none",
        *QUICK,
    ]


class _Uninterrupted(dict[int, Path]):
    """Trains on `nproc` ranks when the folder of that number is first asked for."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self._arguments, self._folder = arguments, folder

    def __missing__(self, nproc: int) -> Path:
        folder = self._folder / f"ranks-{nproc}"
        done = qdora("train", *self._arguments, f"output_dir={folder}", nproc=nproc)
        assert done.returncode == 0, done.stderr[-3000:]
        self[nproc] = folder
        return folder


@pytest.fixture(scope="session")
def uninterrupted(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run of 30 steps that was never stopped, by number of ranks."""
    return _Uninterrupted(long_run(tiny, data), tmp_path_factory.mktemp("whole"))
