"""What a run's surroundings do to it: a launcher that is killed, two runs in a folder, folders that go, terminals."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.faults import fill, ranks_of, small_disk
from tests.support.marks import nightly
from tests.support.processes import end, launcher, qdora, run, start, start_command, wait_for_steps
from tests.support.runs import assert_same, long_run, losses_of, status_of, summary_of, wandb_records

KILLED_AT_EXPORT = """
import os, signal
from qdora.__main__ import main
from qdora.adapter import peft_format

peft_format.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main()
"""


def test_longer_run_that_is_killed_before_its_export_is_not_finished(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path
) -> None:
    """The adapter and the summary of the shorter one are there still."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted[1], folder)
    arguments = ["train", *long_run(tiny, data), "train.num_steps=32", f"output_dir={folder}"]
    done = run([sys.executable, "-c", KILLED_AT_EXPORT, *arguments])
    assert done.returncode == -signal.SIGKILL
    done = qdora(*arguments)
    assert done.returncode == 0, done.stderr
    assert "finished already" not in done.stdout
    assert summary_of(folder)["steps"] == 32
    done = qdora(*arguments)
    assert "finished already" in done.stdout


def test_ranks_whose_launcher_is_killed_save_and_end(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = [*long_run(tiny, data), f"output_dir={folder}"]
    process = start(arguments, 2)
    wait_for_steps(folder, 3, process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    process.kill()
    done = qdora("train", *arguments, nproc=2)  # at once: it waits for their end
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout, "they have trained on to the end"
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    assert_same(folder, uninterrupted[2])


def test_second_run_in_a_folder_is_refused(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDORA_LOCK_PATIENCE_S", "1")
    arguments = [*long_run(tiny, data), "train.num_steps=5000", f"output_dir={tmp_path}/run"]
    process = start(arguments, 1)
    wait_for_steps(tmp_path / "run", 1, process)
    done = qdora("train", *arguments)
    assert done.returncode == 2
    assert f"a run is going on in {tmp_path}/run" in done.stderr
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 75, told


@pytest.mark.parametrize("resume", ["path", *nightly("never")])
def test_same_command_goes_on_whatever_it_resumed_from(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path, resume: str
) -> None:
    folder = tmp_path / "run"
    given = f"{uninterrupted[1]}/checkpoints/step-00000025" if resume == "path" else "never"
    arguments = [*long_run(tiny, data), "train.num_steps=60", f"resume={given}", f"output_dir={folder}"]
    process = start(arguments, 1)
    wait_for_steps(folder, 2, process)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 75, told
    saved = max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
    done = qdora("train", *arguments, "train.num_steps=61")
    assert done.returncode == 0, done.stderr
    assert f"going on from step {saved} of 61" in done.stdout


def test_folder_that_is_removed_during_the_run_is_told_at_the_end(tiny: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start([*long_run(tiny, data), f"output_dir={folder}"], 1)
    wait_for_steps(folder, 2, process)
    shutil.rmtree(folder.rename(tmp_path / "gone"))  # in one go: the run makes files in it
    told, _ = process.communicate(timeout=60)
    assert "Traceback" not in told
    assert process.returncode in (0, 2), told
    assert "metrics.jsonl could not be written" in told


def test_folder_that_cannot_be_written_is_told_before_anything_is_loaded(
    tiny: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for folder in (f"{tmp_path}/file", f"{tmp_path}/file/run", "/proc/x"):
        done = qdora("train", *long_run(tiny, data), f"output_dir={folder}")
        assert done.returncode == 2
        assert f"output_dir={folder} cannot be" in done.stderr
        assert "Traceback" not in done.stderr


def test_start_on_a_full_disk_can_be_made_again(tiny: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "disk" / "run"
    arguments = [*long_run(tiny, data), f"output_dir={folder}"]
    with small_disk(folder.parent, "4m"):
        ballast = fill(folder.parent)
        done = qdora("train", *arguments)
        assert done.returncode == 2
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        ballast.unlink()
        done = qdora("train", *arguments)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("nproc", [1, *nightly(2)])
def test_terminal_that_closes_saves_the_run_and_under_nohup_does_nothing(
    tiny: Path, data: Path, tmp_path: Path, nproc: int
) -> None:
    heard = ["env", "--default-signal=HUP"]  # the tests themselves may run under nohup
    for name, before, expected in (("plain", heard, 75), ("nohup", ["nohup"], 0)):
        folder = tmp_path / name
        command = [*launcher(nproc), "-m", "qdora", "train", *long_run(tiny, data), f"output_dir={folder}"]
        process = start_command([*before, *command])
        wait_for_steps(folder, 3, process)
        os.killpg(process.pid, signal.SIGHUP)
        told, _ = process.communicate(timeout=90)
        assert process.returncode == expected, told
        assert status_of(folder) == ("preempted" if expected else "finished")


@pytest.mark.parametrize("with_wandb", [True, *nightly(False)])
def test_offline_history_of_a_killed_run_has_every_step_once(
    tiny: Path, data: Path, tmp_path: Path, with_wandb: bool
) -> None:
    """Killed with W&B's own process, which holds steps back for seconds; or without it, and it writes them yet."""
    folder = tmp_path / "run"
    arguments = [*long_run(tiny, data), "tracker=wandb", "tracker.mode=offline", f"output_dir={folder}"]
    process = start(arguments, 1)
    wait_for_steps(folder, 12, process)
    if with_wandb:
        end(process)
    else:
        process.kill()
        process.communicate(timeout=240)
    done = qdora("train", *arguments)
    assert done.returncode == 0, done.stderr
    steps = [record["item"]["_step"] for record in wandb_records(folder, "history")]
    assert steps == list(range(1, len(losses_of(folder)) + 1))


def test_wandb_process_that_stands_still_holds_up_neither_steps_nor_the_end(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDORA_WANDB_GRACE_S", "1")
    folder = tmp_path / "run"
    wandb = ["tracker=wandb", "tracker.mode=offline", "tracker.timeout_s=20"]
    process = start([*long_run(tiny, data), *wandb, f"output_dir={folder}"], 1)
    wait_for_steps(folder, 5, process)
    cores = [child for child in psutil.Process(process.pid).children(recursive=True) if child.name() == "wandb-core"]
    assert cores
    for core in cores:
        core.suspend()
    try:
        began = time.monotonic()
        process.wait(timeout=240)
        assert time.monotonic() - began < 120
    finally:
        for core in cores:  # it has the pipe open too
            core.kill()
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert "W&B failed in finish" in told
    assert "Traceback" not in told
    assert status_of(folder) == "finished"
