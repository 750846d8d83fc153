"""A run that is killed, whose disk is full, or whose checkpoint is damaged, ends as the one that never was."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from qdora.run_folder import RunFolder
from tests.support.faults import fill, kill, ranks_of, small_disk
from tests.support.marks import nightly, nightly_but
from tests.support.models import make_model
from tests.support.processes import launcher, qdora, read_until, run, start, start_command, wait_for_run, wait_for_steps
from tests.support.runs import assert_same, copy_without_result, long_run, metrics_of, status_of

STEPS = 30


def being_written(folder: Path, since: float) -> bool:
    """Whether there is half a checkpoint, not one that an earlier kill left."""
    with suppress(FileNotFoundError):  # renamed between the two
        return any(file.stat().st_ctime >= since for file in (folder / "checkpoints").glob("*.partial"))
    return False


def sweep(arguments: list[str], folder: Path, nproc: int, points: int, seed: int) -> int:
    """Kills the run so often, each time somewhere else, then lets it end; how often it was killed while writing.

    Half of the kills are by the clock, half while a checkpoint is being written.
    """
    choose = random.Random(seed)
    inside = 0
    for point in range(points):
        began = time.time()
        process = start(arguments, nproc)
        if point % 2 == 0:
            for rest_s in (choose.uniform(0, 0.02), 0):  # the next one, should this one be written meanwhile
                while process.poll() is None and not being_written(folder, since=began):
                    time.sleep(0.0005)
                time.sleep(rest_s)
            inside += process.poll() is None and being_written(folder, since=began)
        else:
            with suppress(subprocess.TimeoutExpired):
                process.wait(choose.uniform(0.5, 6))
        if process.poll() is None:
            kill(process, nproc > 1 and choose.random() < 0.5, choose)
    done = qdora("train", *arguments, nproc=nproc)
    assert done.returncode == 0, done.stderr[-3000:]
    return inside


@pytest.mark.parametrize("nproc", [2, *nightly(1)])
def test_run_killed_anywhere_ends_the_same(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path, nproc: int
) -> None:
    arguments = [*long_run(tiny, data), "train.checkpoint_every=1", f"output_dir={tmp_path}/run"]
    inside = sweep(arguments, tmp_path / "run", nproc, points=2, seed=nproc)
    assert inside, "no kill was inside a checkpoint's write"
    assert_same(tmp_path / "run", uninterrupted[nproc])


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_run_killed_at_fifty_points_ends_the_same(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path
) -> None:
    inside = 0
    for seed in range(7):
        nproc = 1 + seed % 2
        arguments = [*long_run(tiny, data), "train.checkpoint_every=1", f"output_dir={tmp_path}/{seed}"]
        inside += sweep(arguments, tmp_path / str(seed), nproc, points=8, seed=100 + seed)
        assert_same(tmp_path / str(seed), uninterrupted[nproc])
    assert inside >= 10


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {"cut": cut, "flipped bit": flip, "missing": Path.unlink}
FILES = ("__0_0.distcp", ".metadata", "manifest.json")
ONCE = [*zip(FILES, DAMAGE, strict=True)]
"""Each file and each damage; the other pairs are nightly."""


@pytest.mark.parametrize(("name", "kind"), nightly_but(ONCE, product(FILES, DAMAGE)))
def test_damaged_checkpoint_falls_back_to_the_one_before(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path, name: str, kind: str
) -> None:
    folder = copy_without_result(uninterrupted[1], tmp_path / "run")
    newest = folder / "checkpoints" / f"step-{STEPS:08d}"
    DAMAGE[kind](newest / name)
    done = qdora("train", *long_run(tiny, data), f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    assert f"going on from step {STEPS - 5} of {STEPS}" in done.stdout
    assert f"{newest} is damaged" in done.stderr
    assert newest.with_suffix(".damaged").is_dir()
    assert_same(folder, uninterrupted[1])


def test_only_damaged_checkpoints_are_an_error(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted[1], folder)
    for file in (folder / "checkpoints").glob("step-*/__0_0.distcp"):
        flip(file)
    newest = f"resume={folder}/checkpoints/latest"
    done = qdora("train", *long_run(tiny, data), f"output_dir={tmp_path}/other", newest)
    assert done.returncode == 2
    assert f"{newest} is damaged: __0_0.distcp is not what was written" in done.stderr
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    messages = []
    for _ in range(2):  # had the first start renamed them, the second one would find no checkpoint and begin anew
        done = qdora("train", *long_run(tiny, data), f"output_dir={folder}")
        assert done.returncode == 2
        messages.append(done.stderr)
    assert "every checkpoint in" in messages[0]
    assert messages[1] == messages[0]
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.fixture
def full_disk(uninterrupted: dict[int, Path], tmp_path: Path) -> Iterator[Path]:
    """A run that has five steps left, and whose checkpoints are on a file system of their own, which is full."""
    folder = copy_without_result(uninterrupted[1], tmp_path / "run")
    kept = folder / "checkpoints" / "step-00000025"
    kept.rename(tmp_path / kept.name)
    shutil.rmtree(folder / "checkpoints")
    with small_disk(folder / "checkpoints", "2m"):
        shutil.copytree(tmp_path / kept.name, kept)
        fill(folder / "checkpoints")
        yield folder


def test_run_on_a_full_disk_ends_without_its_last_checkpoint(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, full_disk: Path
) -> None:
    done = qdora("train", *long_run(tiny, data), "train.checkpoint_every=1", f"output_dir={full_disk}")
    assert done.returncode == 0, done.stderr
    for step in range(26, 31):
        assert f"the checkpoint of step {step} could not be written: " in done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert status_of(full_disk) == "completed_without_last_checkpoint"
    assert [path.name for path in (full_disk / "checkpoints").glob("step*")] == ["step-00000025"]
    assert_same(full_disk, uninterrupted[1])


@pytest.mark.parametrize("nproc", [2, *nightly(1)])
def test_run_whose_whole_folder_is_on_a_full_disk_goes_on_when_there_is_room(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path, nproc: int
) -> None:
    """Neither checkpoints nor the result can be written, and metrics for some time; then all of it is."""
    folder = tmp_path / "disk" / "run"
    arguments = [*long_run(tiny, data), "train.checkpoint_every=1", f"output_dir={folder}"]
    with small_disk(folder.parent, "4m"):
        process = start(arguments, nproc)
        wait_for_steps(folder, 3, process)
        while process.poll() is None:  # a checkpoint that failed leaves room
            ballast = fill(folder.parent)
            time.sleep(0.01)
        told, _ = process.communicate()
        assert process.returncode == 2, told
        assert "Traceback" not in told
        assert told.count(f"qdora: the results could not be written to {folder}: ") == 1, told
        assert "Make room; the same command goes on from" in told
        ballast.unlink()
        done = qdora("train", *arguments, nproc=nproc)
        assert done.returncode == 0, done.stderr
        assert status_of(folder) == "finished"
        assert_same(folder, uninterrupted[nproc])


def test_lines_that_a_full_disk_did_not_take_come_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", "1m"):
        folder = RunFolder(tmp_path / "disk")
        folder.metrics.touch()
        folder.log({"step": 1})
        ballast = fill(folder.path)
        for step in range(2, 9):  # more than what is left of the file's page
            folder.log({"step": step, "words": "a" * 1000})
        ballast.unlink()
        folder.log({"step": 9})
        assert [record["step"] for record in folder.read_metrics()] == list(range(1, 10))
        assert folder.metrics.read_text().count("\n") == 9
    assert caplog.text.count("its lines are kept for later") == 1


def test_checkpoint_is_tried_again_when_there_is_room(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, full_disk: Path
) -> None:
    """The next regular one would be at step 30; the retries at 26 + 1, + 2."""
    arguments = [*long_run(tiny, data), "train.checkpoint_every=13", f"output_dir={full_disk}"]
    process = start(arguments, 1, rest_s=0.5)
    told = read_until(process, "the checkpoint of step 26 could not be written")
    (full_disk / "checkpoints" / "ballast").unlink()
    told += process.communicate()[0]
    assert process.returncode == 0, told
    assert status_of(full_disk) == "finished"
    names = {path.name for path in (full_disk / "checkpoints").glob("step*")}
    assert names & {"step-00000027", "step-00000028", "step-00000029"}, names
    assert "step-00000030" in names
    assert_same(full_disk, uninterrupted[1])


@pytest.mark.parametrize(("before", "after"), [(2, 1), *nightly((1, 2), (2, 4))])
def test_another_number_of_ranks_goes_on_with_the_same_rows(
    tiny: Path, data: Path, tmp_path: Path, before: int, after: int
) -> None:
    """Each row of an epoch once; losses as if the number had not changed, to the rounding of another order of sums."""
    arguments = [*long_run(tiny, data), "adapter.dropout=0", "model.dtype=float32", "train.num_steps=10"]
    arguments += ["train.num_accumulation_steps=4"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert qdora("train", *arguments, f"output_dir={whole}", nproc=before).returncode == 0
    resume = f"resume={whole}/checkpoints/step-00000005"
    done = qdora("train", *arguments, resume, f"output_dir={part}", nproc=after)
    assert done.returncode == 0, done.stderr
    assert "going on from step 5 of 10" in done.stdout
    assert f"changed from step 6: ranks {before} -> {after}\n" in done.stdout
    records = {folder: metrics_of(folder) for folder in (whole, part)}
    then = [record for record in records[whole] if record["step"] > 5]
    now = [record for record in records[part] if "loss" in record]
    assert [record["num_tokens"] for record in now] == [record["num_tokens"] for record in then]
    assert [record["loss"] for record in now] == pytest.approx([record["loss"] for record in then], rel=1e-5)


def test_what_changes_results_is_refused_unless_allowed(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path
) -> None:
    """Refused with both values; data and model that were only moved are the same."""
    folder = tmp_path / "run"
    another = make_model(tmp_path / "another", "llama", num_hidden_layers=1, seed=1)
    shutil.copytree(uninterrupted[1], folder)
    shutil.copytree(tiny, tmp_path / "model")
    moved = shutil.copy(data, tmp_path / "moved.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    common = [*long_run(tiny, data), "train.num_steps=32", f"output_dir={folder}"]
    fingerprints = r"\(fingerprint (\w+), then (?!\1)\w+\)"
    for change, words in (
        ("train.micro_batch_size=3", r"the run has 2 rows a step, but .* on 1 ranks are 6"),
        (f"data.train={other}", f"the data is not that of .* {fingerprints}"),
        (f"model.path={another}", f"the model is not that of .* {fingerprints}"),
        ("quant.double_quant=false", r"it has quant\.double_quant=true \(now false\)"),
        ("seed=1", r"it has seed=0 \(now 1\)"),
    ):
        done = qdora("train", *common, change)
        assert done.returncode == 2
        assert re.search(words, done.stderr), done.stderr
        assert "allow_changes=true" in done.stderr
    done = qdora("train", *common, f"data.train={moved}", f"model.path={tmp_path}/model", "train.log_every=2")
    assert done.returncode == 0, done.stderr
    done = qdora("train", *common, "train.num_steps=34", f"data.train={other}", "seed=1", "allow_changes=true")
    assert done.returncode == 0, done.stderr
    assert "going on from step 32 of 34" in done.stdout


FAILING_RANK = Path(__file__).parent / "failing_rank.py"
TIMEOUT_S = 10
RANKS_END_S = 30
"""Until torchrun kills ranks that do not end when they are told to, which is what a stopped one does."""


def run_with_rank(kind: str, arguments: list[str], nproc: int = 2, timeout_s: float = 180) -> Any:
    """Runs qdora with the last rank failing as `kind` says.

    Where memory is limited, a freed tensor's addresses go back at once: no part of the heap is left in which a limit on
    addresses is not felt.
    """
    command = [*launcher(nproc), str(FAILING_RANK), kind, "train", *arguments]
    variables = {"MALLOC_MMAP_THRESHOLD_": "65536"} if kind == "memory" else {}
    return run(command, timeout_s=timeout_s, **variables)


def seconds_after_step(folder: Path, step: int, ended: float) -> float:
    """Between the record of a step and the end."""
    steps = [line["step"] for line in metrics_of(folder)]
    assert max(steps) == step, steps
    return ended - (folder / "metrics.jsonl").stat().st_mtime


def test_rank_that_is_killed_is_named_and_not_what_followed(tiny: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start([*long_run(tiny, data), f"output_dir={folder}"], 2)
    wait_for_steps(folder, 3, process)
    ranks_of(process)[1].kill()
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGKILL, told
    assert told.count("qdora: rank 1 was ended by SIGKILL (out of host memory?)") == 1, told
    assert "Traceback" not in told


def test_interrupted_run_that_cannot_be_saved_says_so(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, full_disk: Path
) -> None:
    arguments = [*long_run(tiny, data), "train.num_steps=3000", f"output_dir={full_disk}"]
    process = start(arguments, 1)
    told = read_until(process, "could not be written")
    process.send_signal(signal.SIGTERM)
    told += process.communicate(timeout=240)[0]
    assert process.returncode == 75, told
    assert "interrupted and not saved ([Errno 28] No space left on device)" in told
    assert f"it goes on from {full_disk}/checkpoints/step-00000025" in told


def test_rank_that_raises_ends_all_with_its_message_once(tiny: Path, data: Path, tmp_path: Path) -> None:
    arguments = [*long_run(tiny, data), f"parallel.timeout_s={10 * TIMEOUT_S}", f"output_dir={tmp_path}/run"]
    done = run_with_rank("raise", arguments)
    seconds = seconds_after_step(tmp_path / "run", 2, time.time())
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert done.stderr.count("ZeroDivisionError: a mistake that nobody foresaw") == 1
    assert "qdora: rank 1 failed, which is a mistake in qdora:" in done.stderr
    assert seconds < 10 * TIMEOUT_S


@pytest.mark.parametrize("nproc", [1, *nightly(2)])
def test_batch_that_does_not_fit_names_what_lowers_memory(tiny: Path, tmp_path: Path, nproc: int) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text((json.dumps({"prompt": "so", "completion": " so" * 1000}) + "\n") * 256)
    arguments = [*long_run(tiny, data), "data.max_length=1024", "train.micro_batch_size=32", "train.checkpoint_every=0"]
    arguments += ["train.num_accumulation_steps=1", f"output_dir={tmp_path}/run"]
    done = run_with_rank("memory", arguments, nproc, timeout_s=400)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(re.findall(r"ran out of memory in step \d+: its weights take", done.stderr)) == 1, done.stderr
    assert f"qdora: rank {nproc - 1} of {nproc}" in done.stderr
    for option in ("parallel.activation_checkpointing=full", "train.micro_batch_size=16", "data.max_length=512"):
        assert re.search(rf"{option} \(-0\.\d\d GiB\)", done.stderr), done.stderr


def test_evaluation_that_does_not_fit_names_what_lowers_memory(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text((json.dumps({"prompt": "so", "completion": " so" * 1000}) + "\n") * 64)
    arguments = [f"model.path={tiny}", f"data.eval={data}", "data.max_length=1024", "batch_size=64"]
    command = [*launcher(1), str(FAILING_RANK), "memory", "evaluate", *arguments, f"output_dir={tmp_path}/scores"]
    done = run(command, MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"qdora: rank 0 of 1 ran out of memory while it scored {tiny}: lower batch_size=64" in done.stderr
    assert "or let several ranks share one copy of the model, sharded=true, or quant=nf4" in done.stderr


def test_rank_that_hangs_ends_all_and_says_where_each_was(tiny: Path, data: Path, tmp_path: Path) -> None:
    arguments = [*long_run(tiny, data), f"parallel.timeout_s={TIMEOUT_S}", f"output_dir={tmp_path}/run"]
    done = run_with_rank("hang", arguments)
    seconds = seconds_after_step(tmp_path / "run", 2, time.time())
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("nothing went on for parallel.timeout_s") == 1, done.stderr
    told = {line.strip().partition(":")[0]: line for line in done.stderr.splitlines() if "  rank " in line}
    assert "go_wrong (failing_rank.py" in told["rank 1"], done.stderr
    assert "(trainer.py" in told["rank 0"], done.stderr
    assert seconds < TIMEOUT_S + RANKS_END_S - 5, "no rank had to be killed"


@pytest.mark.nightly
def test_rank_that_is_stopped_does_not_answer(tiny: Path, data: Path, tmp_path: Path) -> None:
    """A stopped process cannot report; the launcher reports it as not answering."""
    process = start([*long_run(tiny, data), f"output_dir={tmp_path}/run", f"parallel.timeout_s={TIMEOUT_S}"], 2)
    wait_for_steps(tmp_path / "run", 3, process)
    started = time.monotonic()
    ranks_of(process)[1].suspend()
    told, _ = process.communicate(timeout=240)
    assert time.monotonic() - started < TIMEOUT_S + RANKS_END_S + 30
    assert process.returncode == 1
    assert "nothing went on for parallel.timeout_s" in told, told
    assert "rank 1: did not answer" in told
    assert "(trainer.py" in told


@pytest.mark.parametrize("nproc", [2, *nightly(1)])
def test_second_signal_ends_at_once_even_in_a_step_that_never_ends(
    tiny: Path, data: Path, tmp_path: Path, nproc: int
) -> None:
    """The step would take an hour."""
    command = [str(FAILING_RANK), "hang", "train", *long_run(tiny, data), f"output_dir={tmp_path}/run"]
    process = start_command([*launcher(nproc), *command])
    told = read_until(process, "hangs in step 3")
    process.send_signal(signal.SIGTERM)
    told += read_until(process, "another signal ends at once")
    time.sleep(2)
    assert process.poll() is None, "the first one waits for the step"
    process.send_signal(signal.SIGTERM)
    told += process.communicate(timeout=60)[0]
    assert process.returncode == 130, told
    assert told.count("interrupted at once; nothing new was saved") == 1
    assert "Traceback" not in told


@pytest.mark.parametrize("module", ["qdora.commands.launch", *nightly("torch.distributed.run")])
def test_torchrun_restarts_pick_the_run_up(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path, module: str
) -> None:
    """With no output_dir given: it is the same run all the same."""
    torchrun = [sys.executable, "-m", module, "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    paced = ["-m", "tests.support.paced_qdora", "0.1"]
    process = start_command([*torchrun, *paced, "train", *long_run(tiny, data)], cwd=tmp_path)
    for steps in (11, 20):  # the checkpoint of step 5 is there when that of step 10 begins
        folder = wait_for_run(tmp_path / "outputs", process)
        wait_for_steps(folder, steps, process)
        ranks_of(process)[1].kill()
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert told.count("going on from step") == 2, told
    assert len(list((tmp_path / "outputs").iterdir())) == 1
    assert_same(folder, uninterrupted[2])
