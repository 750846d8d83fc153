"""`-m`: several runs from one command, as a user starts them; a member that fails, Ctrl-C, Hydra's launchers."""

import importlib.util
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from qdora.commands.members import member_name
from tests.support.marks import nightly
from tests.support.processes import ROOT, launcher, popen, run, wait_for_steps
from tests.support.runs import QUICK, long_run, losses_of, summary_of, wandb_records

TRAIN = str(ROOT / "launch" / "train.sh")
JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


LONG = pytest.mark.nightly(
    paths=["qdora/commands/sweep*.py", "qdora/commands/members.py", "qdora/interrupt.py", "launch/train.sh"]
)
SWEEP = [*launcher(1), "-m", "qdora", "train", "-m"]


def sweep(*arguments: str, nproc: int = 1, by_script: bool = False) -> Any:
    """Runs a sweep to its end, by `qdora train -m ...` or launch/train.sh."""
    command = [TRAIN, "-m"] if by_script else SWEEP
    return run([*command, *arguments], NPROC=str(nproc), timeout_s=540)


def members_of(folder: Path) -> list[dict[str, Any]]:
    """Those of sweep.json."""
    members: list[dict[str, Any]] = json.loads((folder / "sweep.json").read_text())["members"]
    return members


def start_sweep(*arguments: str) -> "subprocess.Popen[str]":
    """A sweep with one rank a run, in a process group of its own, as a terminal has one."""
    return popen([*SWEEP, *arguments], session=True, NPROC="1")


def end_by(process: "subprocess.Popen[str]", number: int) -> str:
    """Ctrl-C as a terminal sends it, any other signal to the sweep alone. Returns what was printed until the end."""
    if number == signal.SIGINT:
        return press_ctrl_c(process)
    process.send_signal(number)
    return process.communicate(timeout=120)[0]


def press_ctrl_c(process: "subprocess.Popen[str]") -> str:
    """What a terminal does: all that was started from it gets SIGINT. Returns what was printed until the end."""
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=120)[0]


@pytest.fixture(scope="module")
def trained(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """The folder of a sweep of 2 x 2 runs, the options it was started with, and what it printed."""
    folder = tmp_path_factory.mktemp("sweeps") / "grid"
    arguments = [
        *(f"model.path={tiny}", f"data.train={data}", f"data.eval={data}", "data.packing=false", "train.num_steps=3"),
        *("tracker=none", *QUICK, "optim.learning_rate=1e-3,1e-2", "adapter.rank=2,4", f"output_dir={folder}"),
    ]
    done = sweep(*arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder, arguments, done.stdout


@pytest.fixture
def grid(trained: tuple[Path, list[str], str]) -> Iterator[tuple[Path, list[str], str]]:
    """The same for each test: its table is put back, whatever other sweeps the test made there."""
    file = trained[0] / "sweep.json"
    table = file.read_bytes()
    yield trained
    file.write_bytes(table)


@LONG
def test_sweep_trains_each_combination(grid: tuple[Path, list[str], str]) -> None:
    folder, _, _ = grid
    members = members_of(folder)
    assert [(one["overrides"]["optim.learning_rate"], one["overrides"]["adapter.rank"]) for one in members] == [
        ("0.001", "2"),
        ("0.001", "4"),
        ("0.01", "2"),
        ("0.01", "4"),
    ]
    for member in members:
        name = member_name(member["overrides"])
        assert member["folder"] == str(folder / name)
        summary = summary_of(folder / name)
        adapter = json.loads((folder / name / "adapter" / "adapter_config.json").read_text())
        assert adapter["r"] == int(member["overrides"]["adapter.rank"])
        assert (member["status"], member["exit_status"], member["steps"]) == ("finished", 0, 3)
        assert member["eval_loss"] == summary["eval_losses"]["3"]
        assert member["last_loss"] == summary["last_loss"]
        assert member["tokens_per_second"] == summary["tokens_per_second"]
        assert member["seconds"] > 0
    assert len({member["eval_loss"] for member in members}) == 4


@LONG
def test_sweep_ends_in_a_table_and_a_figure(grid: tuple[Path, list[str], str]) -> None:
    folder, _, told = grid
    assert (folder / "sweep.png").stat().st_size > 10_000
    best = min(members_of(folder), key=lambda member: float(member["eval_loss"]))
    assert json.loads((folder / "sweep.json").read_text())["best"] == best["folder"]
    table = told.rpartition("sweep ")[2]
    for member in members_of(folder):
        assert f"{member['eval_loss']:.4f}" in table
    assert f"best: {best['folder']}" in told


@LONG
def test_sweep_again_trains_only_what_is_new(grid: tuple[Path, list[str], str]) -> None:
    folder, arguments, _ = grid
    known = members_of(folder)[0]
    done = sweep(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("is finished already") == 4
    assert "step 1/3" not in done.stdout
    assert members_of(folder)[0] == known
    done = sweep(*arguments, "optim.learning_rate=1e-3,3e-3", "adapter.rank=choice(2)")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("is finished already") == 1
    old, new = members_of(folder)
    assert old == known
    assert (new["overrides"]["optim.learning_rate"], new["status"]) == ("0.003", "finished")


@LONG
def test_sweep_does_not_take_a_run_of_other_options_for_its_own(grid: tuple[Path, list[str], str]) -> None:
    folder, arguments, _ = grid
    done = sweep(*arguments, "optim.learning_rate=1e-3,1e-2", "adapter.rank=choice(2)", "train.num_steps=5")
    assert done.returncode == 2
    assert done.stderr.count("is finished and has train.num_steps=3 (now 5): use those values") == 2
    assert [(one["status"], one["exit_status"]) for one in members_of(folder)] == [("failed", 2)] * 2


@LONG
def test_each_run_has_the_ranks_of_train_sh_and_all_are_a_group_in_wandb(options: list[str], tmp_path: Path) -> None:
    arguments = [*options, "train.num_accumulation_steps=2", "tracker=wandb", "seed=0,1", f"output_dir={tmp_path}/s"]
    done = sweep(*arguments, nproc=2, by_script=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for seed in ("0", "1"):
        folder = tmp_path / "s" / f"seed-{seed}"
        summary = summary_of(folder)
        assert (summary["status"], summary["world_size"]) == ("finished", 2)
        (record,) = wandb_records(folder, "run")
        assert (record["run_group"], record["display_name"]) == ("s", f"s-seed-{seed}")
    first, second = members_of(tmp_path / "s")
    assert first["last_loss"] != second["last_loss"]


def test_runs_that_fail_do_not_keep_a_sweep_from_the_others(options: list[str], data: Path, tmp_path: Path) -> None:
    """One contradicts itself, which is seen before it starts; one has no data, which it sees itself."""
    (tmp_path / "missing.jsonl").touch()
    data_files = f"data.train={tmp_path}/missing.jsonl,{data}"
    done = sweep(*options, "adapter=none,lora", data_files, f"output_dir={tmp_path}/s")
    assert done.returncode == 2, done.stderr[-3000:]
    statuses = [(one["status"], one["exit_status"]) for one in members_of(tmp_path / "s")]
    assert statuses == [("failed", 2), ("failed", 2), ("failed", 2), ("finished", 0)]
    assert done.stderr.count("qdora: adapter=none is full fine-tuning") == 2
    assert sum(line.startswith("qdora: ") and "missing.jsonl" in line for line in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "failed (2)" in done.stdout
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["best"] == members_of(tmp_path / "s")[3]["folder"]


def test_mistake_that_all_runs_share_starts_none(options: list[str], tmp_path: Path) -> None:
    done = sweep(*options, "adapter.rank=4,many", f"output_dir={tmp_path}/s")
    assert done.returncode == 2
    assert done.stderr.startswith("qdora: adapter.rank: Value 'many' of type 'str' could not be converted to Integer")
    assert len(done.stderr.splitlines()) == 1
    assert "==" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, *nightly(signal.SIGTERM)], ids=lambda number: number.name)
def test_signal_saves_the_run_under_way_and_the_same_command_goes_on(
    tiny: Path, data: Path, uninterrupted: dict[int, Path], tmp_path: Path, number: signal.Signals
) -> None:
    arguments = [*long_run(tiny, data), "optim.learning_rate=1e-2,1e-3", f"output_dir={tmp_path}/s"]
    first = tmp_path / "s" / "learning_rate-0.01"
    process = start_sweep(*arguments)
    wait_for_steps(first, 3, process)
    told = end_by(process, number)
    assert process.returncode == 75, told[-3000:]
    assert "interrupted; the same command goes on with what is left" in told
    assert "Traceback" not in told
    assert [member["status"] for member in members_of(tmp_path / "s")] == ["preempted", "not started"]
    assert not (tmp_path / "s" / "learning_rate-0.001").exists()
    done = sweep(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from step" in done.stdout
    assert [member["status"] for member in members_of(tmp_path / "s")] == ["finished", "finished"]
    assert losses_of(first) == losses_of(uninterrupted[1])


@pytest.mark.nightly
def test_run_of_a_killed_sweep_saves_and_ends(tiny: Path, data: Path, tmp_path: Path) -> None:
    process = start_sweep(*long_run(tiny, data), "seed=0,1", f"output_dir={tmp_path}/s")
    first = tmp_path / "s" / "seed-0"
    wait_for_steps(first, 3, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert children
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert summary_of(first)["status"] == "preempted"


@pytest.mark.skipif(importlib.util.find_spec("joblib") is None, reason="hydra-joblib-launcher is not installed")
@pytest.mark.nightly
def test_joblib_trains_side_by_side_and_ctrl_c_reaches_all(tiny: Path, data: Path, tmp_path: Path) -> None:
    arguments = [*long_run(tiny, data), "seed=0,1,2", *JOBLIB, f"output_dir={tmp_path}/s"]
    process = start_sweep(*arguments)
    for seed in (0, 1):
        wait_for_steps(tmp_path / "s" / f"seed-{seed}", 2, process)
    started = psutil.Process(process.pid).children(recursive=True)
    told = press_ctrl_c(process)
    assert process.returncode == 75, told[-3000:]
    assert "Traceback" not in told
    assert [one["status"] for one in members_of(tmp_path / "s")] == ["preempted", "preempted", "not started"]
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive, "a worker is left"
    done = sweep(*arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert [one["status"] for one in members_of(tmp_path / "s")] == ["finished"] * 3


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="hydra-submitit-launcher is not installed")
@pytest.mark.nightly
def test_submitit_trains_in_jobs_of_its_own(options: list[str], tmp_path: Path) -> None:
    done = sweep(*options, "adapter.rank=2,4", "hydra/launcher=submitit_local", f"output_dir={tmp_path}/s")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert [one["status"] for one in members_of(tmp_path / "s")] == ["finished"] * 2
    logs = [file.read_text() for file in (tmp_path / "s" / ".submitit").rglob("*_log.out")]
    assert sum("step 6/6" in log for log in logs) == 2
