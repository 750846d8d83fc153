"""What the launcher makes of the files that ranks leave."""

import faulthandler
import signal
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from qdora import rank_files
from qdora.commands import run
from qdora.commands.launch import launch
from qdora.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, ConfigError
from qdora.interrupt import interrupt


def fails_in_a_collective() -> None:
    raise RuntimeError("Connection closed by peer")


def test_place_of_a_rank_that_failed_because_the_other_was_gone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(rank_files.FOLDER, str(tmp_path))
    for rank in (0, 1, 2):
        monkeypatch.setenv("RANK", str(rank))
        stack = rank_files.open_stack()
        assert stack is not None
        with stack:
            if rank == 1:
                faulthandler.dump_traceback(stack)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError) as failed:
        fails_in_a_collective()
    assert rank_files.leave_error(failed.value)
    told = str(rank_files.standstill(tmp_path)).splitlines()
    assert told[0].startswith("  rank 0: fails_in_a_collective (test_rank_files.py:")
    assert told[1].startswith("  rank 1: test_place_of_a_rank_that_failed")
    assert told[2] == "  rank 2: did not answer"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ConfigError("model.path=/nowhere: no such folder"), EXIT_USER_ERROR, "model.path=/nowhere: no such folder"),
        (
            RuntimeError("Connection reset by peer"),
            EXIT_PREEMPTED,
            "the other machines, which meet at head:29400, were lost",
        ),
    ],
)
def test_machine_whose_mistake_ended_the_others_first_tells_the_mistake(
    error: Exception, status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others have told it and are gone before the launcher of this one has looked for errors."""

    def run_torchrun(_: Namespace) -> None:
        monkeypatch.setenv("RANK", "1")
        assert rank_files.leave_error(error)
        raise RendezvousConnectionError("the store is gone")

    for name in (rank_files.FOLDER, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, "300")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(torchrun, "run", run_torchrun)
    options = ["--nnodes", "2", "--rdzv-backend", "static", "--rdzv-endpoint", "head:29400", "--max-restarts", "0"]
    assert launch([*options, "-m", "qdora"]) == status
    told = capsys.readouterr().err
    assert told.startswith(f"qdora: {words}")
    assert told.count("\n") == 1


def test_error_is_left_while_signals_are_still_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher ends a rank as soon as another has failed, which one that listens outlives."""
    left = []

    @contextmanager
    def listening() -> Iterator[None]:
        try:
            yield
        finally:
            left.append(rank_files.first_error(tmp_path))

    monkeypatch.setenv(rank_files.FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(interrupt, "listening", listening)
    assert run(["train", "model.path=/nowhere", "data.train=/nowhere", f"output_dir={tmp_path}/run"]) == 2
    assert left[0] is not None
    assert left[0].text.startswith("model.path=/nowhere: no such folder")
