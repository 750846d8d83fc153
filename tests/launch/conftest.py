"""The run that is started in all these ways, and its result on one machine."""

from pathlib import Path

import pytest

from tests.support.models import make_model
from tests.support.processes import qdora
from tests.support.runs import long_run, write_sums


@pytest.fixture(scope="session")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """30 steps of a tiny Llama, with dropout and a checkpoint every 5."""
    folder = tmp_path_factory.mktemp("given")
    model = make_model(folder / "model", "llama", num_hidden_layers=1)
    return long_run(model, write_sums(folder / "data.jsonl"))


@pytest.fixture(scope="session")
def one_machine(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run on two ranks of one machine, which was never stopped."""
    folder = tmp_path_factory.mktemp("one") / "run"
    done = qdora("train", *overrides, f"output_dir={folder}", nproc=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
