"""Stopping, going on, failing: a run from the outside."""

import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qdora.adapter.trained_over import read_system
from qdora.commands import compose, typed
from qdora.config import RunConfig
from qdora.config.values import config_values, flatten
from qdora.run_folder import RunFolder
from tests.support.marks import nightly
from tests.support.models import make_model, make_tokenizer
from tests.support.processes import ROOT, end, qdora, run, start, wait_for_steps
from tests.support.runs import (
    adapter_of,
    assert_same,
    copy_without_result,
    long_run,
    losses_of,
    metrics_of,
    num_updates,
    summary_of,
)

DIVERGING = ["adapter=lora", "optim.learning_rate=1e25", "optim.max_grad_norm=0", "optim.warmup_ratio=0"]
"""DoRA's norm keeps its outputs finite at any learning rate; LoRA's overflow."""


@pytest.mark.parametrize("nproc", [1, *nightly(2)])
def test_killed_run_goes_on_as_if_it_had_not_been(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path, nproc: int
) -> None:
    arguments = [*long_run(tiny, data), f"output_dir={tmp_path / 'run'}"]
    process = start(arguments, nproc)
    wait_for_steps(tmp_path / "run", 12, process)
    end(process)
    done = qdora("train", *arguments, nproc=nproc)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from step" in done.stdout
    assert_same(tmp_path / "run", uninterrupted[nproc])


@pytest.mark.parametrize(
    ("nproc", "number", "group"),
    [
        pytest.param(1, signal.SIGINT, False, id="ctrl-c"),
        pytest.param(1, signal.SIGUSR1, False, id="sigusr1", marks=pytest.mark.nightly),
        pytest.param(2, signal.SIGINT, True, id="ctrl-c-ranks"),
        pytest.param(2, signal.SIGTERM, False, id="sigterm-launcher", marks=pytest.mark.nightly),
        pytest.param(2, signal.SIGUSR1, False, id="sigusr1-launcher", marks=pytest.mark.nightly),
    ],
)
def test_interrupted_run_saves_says_how_to_go_on_and_does(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path, nproc: int, number: int, group: bool
) -> None:
    arguments = [*long_run(tiny, data), f"output_dir={tmp_path / 'run'}"]
    process = start(arguments, nproc)
    wait_for_steps(tmp_path / "run", 3, process)
    if group:
        os.killpg(process.pid, number)  # what a terminal does
    else:
        process.send_signal(number)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 75, told[-3000:]
    assert "interrupted and saved; go on with the same command" in told
    assert "Traceback" not in told
    assert summary_of(tmp_path / "run")["status"] == "preempted"
    stopped_at = len(losses_of(tmp_path / "run"))
    assert 3 <= stopped_at < 30
    done = qdora("train", *arguments, nproc=nproc)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"going on from step {stopped_at} of 30" in done.stdout
    assert losses_of(tmp_path / "run") == losses_of(uninterrupted[nproc])


@pytest.mark.parametrize("method", ["lora", "none"])
def test_system_turn_of_every_conversation_stands_beside_what_was_trained(
    tiny: Path, tmp_path: Path, method: str
) -> None:
    """And beside what is merged of it."""
    rows = [{"instruction": f"{number}?", "output": f"{number}!", "system": "Be brief."} for number in range(4)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "run"
    given = [*long_run(tiny, data), "adapter.dropout=0", "quant=none", f"adapter={method}", "train.num_steps=1"]
    done = qdora("train", *given, f"output_dir={output}")
    assert done.returncode == 0, done.stderr[-3000:]
    folders = [output / ("model" if method == "none" else "adapter")]
    if method == "lora":
        folders.append(tmp_path / "merged")
        done = qdora("merge", f"run={output}", f"output={folders[-1]}", "verify=false")
        assert done.returncode == 0, done.stderr[-3000:]
    assert [read_system(folder) for folder in folders] == ["Be brief."] * len(folders)


def test_length_that_was_chosen_is_recorded_and_kept(tiny: Path, data: Path, tmp_path: Path) -> None:
    """48 rows make 24 steps of 2 rows on one rank, and go on as steps of 2 rows on two."""
    given = [option for option in long_run(tiny, data) if not re.match(r"train\.num_", option)]
    given += ["data.packing=false", f"output_dir={tmp_path / 'run'}"]
    done = qdora("train", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    said = "train.num_accumulation_steps=2 train.num_epochs=1 by the size of the data, 48 rows"
    assert f"length: 24 steps; {said}" in done.stdout
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]
    assert (kept["num_steps"], kept["num_epochs"], kept["num_accumulation_steps"]) == (None, 1, 2)
    assert summary_of(tmp_path / "run")["steps"] == 24
    assert "is finished already" in qdora("train", *given, nproc=2).stdout
    done = qdora("train", *given, "train.num_epochs=2", nproc=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from step 24 of 48" in done.stdout
    assert "length:" not in done.stdout
    assert summary_of(tmp_path / "run")["num_tokens"] == 2 * metrics_of(tmp_path / "run")[23]["num_tokens"]


@pytest.mark.parametrize("nproc", [2, *nightly(1)])
def test_full_fine_tuning_with_evaluations_resumes_bit_for_bit(
    tiny: Path, data: Path, tmp_path: Path, nproc: int
) -> None:
    """An evaluation gathers embedding and head: the checkpoint after it must hold the shards all the same."""
    arguments = [*long_run(tiny, data), f"data.eval={data}", "adapter=none", "quant=none", "adapter.dropout=0"]
    arguments += ["optim.learning_rate=1e-3", "train.num_steps=6", "train.checkpoint_every=3", "train.eval_every=3"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert qdora("train", *arguments, f"output_dir={whole}", nproc=nproc).returncode == 0
    checkpoint = whole / "checkpoints" / "step-00000003"
    done = qdora("train", *arguments, f"output_dir={part}", f"resume={checkpoint}", nproc=nproc)
    assert "going on from step 3 of 6" in done.stdout, done.stderr
    models = [load_file(folder / "model" / "model.safetensors") for folder in (whole, part)]
    start = load_file(tiny / "model.safetensors")
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name
        assert not torch.equal(tensor, start[name]), f"{name} did not move"


def test_finished_run_is_left_as_it_is(uninterrupted: dict[int, Path], tiny: Path, data: Path) -> None:
    folder = uninterrupted[1]
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    done = qdora("train", *long_run(tiny, data), f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "is finished already" in done.stdout
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_more_steps_go_on_from_the_end(uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path) -> None:
    checkpoint = sorted((uninterrupted[1] / "checkpoints").iterdir())[-1]
    arguments = [*long_run(tiny, data), "train.num_steps=32", f"resume={checkpoint}", f"output_dir={tmp_path / 'run'}"]
    done = qdora("train", *arguments)
    assert done.returncode == 0, done.stderr
    assert "going on from step 30 of 32" in done.stdout
    assert summary_of(tmp_path / "run")["steps"] == 32


def test_run_whose_result_was_lost_is_finished_again(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path
) -> None:
    folder = copy_without_result(uninterrupted[1], tmp_path / "run")
    assert qdora("train", *long_run(tiny, data), f"output_dir={folder}").returncode == 0
    assert_same(folder, uninterrupted[1])


def test_checkpoint_of_another_run_does_not_overwrite_this_one(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert qdora("train", *long_run(tiny, data), "adapter.rank=8", f"output_dir={folder}").returncode == 0
    before = (folder / "config.yaml").read_bytes()
    checkpoint = sorted((uninterrupted[1] / "checkpoints").iterdir())[-1]
    done = qdora("train", *long_run(tiny, data), f"resume={checkpoint}", f"output_dir={folder}")
    assert done.returncode == 2
    assert f"{folder} belongs to another run: it has adapter.rank=8 (now 4)" in done.stderr
    assert (folder / "config.yaml").read_bytes() == before


def test_going_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path
) -> None:
    """Else the run's own newest would be one of the other course, and its own old ones would be removed first."""
    folder = copy_without_result(uninterrupted[1], tmp_path / "run")
    earlier, later = (folder / "checkpoints" / f"step-{step:08d}" for step in (25, 30))
    resume = f"resume={earlier}"
    done = qdora("train", *long_run(tiny, data), resume, "train.num_steps=27", f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    assert not later.exists()
    assert later.with_suffix(".superseded").exists()
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000027\n"
    done = qdora("train", *long_run(tiny, data), f"resume={folder}/checkpoints/latest", f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "going on from step 27 of 30" in done.stdout
    assert len(losses_of(folder)) == 30


def test_config_of_a_run_that_is_damaged_is_told(
    uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted[1], folder)
    for content in ("", "a: [", "\x00"):
        (folder / "config.yaml").write_text(content)
        done = qdora("train", *long_run(tiny, data), f"output_dir={folder}")
        assert done.returncode == 2
        assert f"{folder}/config.yaml is damaged" in done.stderr
        assert "Traceback" not in done.stderr


def test_folder_of_another_run_is_refused(uninterrupted: dict[int, Path], tiny: Path, data: Path) -> None:
    before = (uninterrupted[1] / "config.yaml").read_bytes()
    done = qdora("train", *long_run(tiny, data), "adapter.rank=8", f"output_dir={uninterrupted[1]}", nproc=2)
    assert done.returncode == 2
    assert "belongs to another run: it has adapter.rank=4 (now 8)" in done.stderr
    assert done.stderr.count("qdora:") == 1
    assert (uninterrupted[1] / "config.yaml").read_bytes() == before


def test_resume_never_wants_a_new_folder(uninterrupted: dict[int, Path], tiny: Path, data: Path) -> None:
    done = qdora("train", *long_run(tiny, data), "resume=never", f"output_dir={uninterrupted[1]}")
    assert done.returncode == 2
    assert "resume=never wants a new folder" in done.stderr


def test_seed_fixes_the_run(
    options: list[str], uninterrupted: dict[int, Path], tiny: Path, data: Path, tmp_path: Path
) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        arguments = [*long_run(tiny, data), f"output_dir={tmp_path / name}", f"seed={seed}"]
        assert qdora("train", *arguments).returncode == 0
    assert losses_of(tmp_path / "same") == losses_of(uninterrupted[1])
    assert losses_of(tmp_path / "other") != losses_of(uninterrupted[1])


@pytest.mark.parametrize("nproc", [1, *nightly(2)])
def test_loss_that_is_not_finite_stops_and_goes_on_from_the_last_good_checkpoint(
    options: list[str], data: Path, tmp_path: Path, nproc: int
) -> None:
    """Three good steps, a fourth that overflows the weights, and a checkpoint of each."""
    folder = tmp_path / "run"
    arguments = [*options, "adapter=lora", f"output_dir={folder}", "train.checkpoint_every=1", "train.num_steps=3"]
    assert qdora("train", *arguments, nproc=nproc).returncode == 0
    arguments[-1] = "train.num_steps=6"
    done = qdora("train", *arguments, *DIVERGING, nproc=nproc)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("qdora:")]
    assert re.match(r"qdora: step 5: the loss is (nan|inf)", told), told
    assert re.search(rf"on {re.escape(str(data))} line \d+, .* line \d+.* and \d+ more samples", told), told
    assert "step-00000004 holds these weights and was renamed to step-00000004.suspect" in told
    assert f"goes on from {folder}/checkpoints/step-00000003" in told
    assert summary_of(folder)["status"] == "failed"
    done = qdora("train", *arguments, nproc=nproc)
    assert done.returncode == 0, done.stderr
    assert "going on from step 3 of 6" in done.stdout
    assert all(math.isfinite(loss) for loss in losses_of(folder))


@pytest.fixture
def broken_row(options: list[str], tiny: Path, tmp_path: Path) -> list[str]:
    """One token has an embedding of NaN, and one row of the data, which one rank has, uses it."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][make_tokenizer().convert_tokens_to_ids("@")].fill_(torch.nan)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    rows = [{"prompt": f"{n}", "completion": "a@b" if n == 12 else "ab"} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [*options, f"model.path={broken}", f"data.train={tmp_path}/rows.jsonl", f"output_dir={tmp_path}/run"]
    return [*arguments, "train.micro_batch_size=1"]


@pytest.mark.parametrize("nproc", [2, *nightly(1)])
def test_row_that_breaks_the_loss_is_named(broken_row: list[str], tmp_path: Path, nproc: int) -> None:
    done = qdora("train", *broken_row, f"train.num_accumulation_steps={16 // nproc}", nproc=nproc)
    assert done.returncode == 2, done.stderr
    assert f"the loss is nan and the gradient norm nan, on {tmp_path}/rows.jsonl line 13. Nothing" in done.stderr
    assert "There is no earlier checkpoint" in done.stderr


@pytest.mark.parametrize("nproc", [2, *nightly(1)])
def test_bad_step_is_left_out_if_wanted(broken_row: list[str], tmp_path: Path, nproc: int) -> None:
    """Of the four steps of each epoch one has the row; the run ends, and so does one that was resumed in between.

    With dropout: a run that went on without it after the first bad step would not be the one that was resumed.
    """
    arguments = [*broken_row, "train.on_bad_step=skip", f"train.num_accumulation_steps={4 // nproc}"]
    arguments += ["train.num_steps=8", "train.checkpoint_every=3", "adapter.dropout=0.1"]
    done = qdora("train", *arguments, nproc=nproc)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"on {tmp_path}/rows.jsonl line 13. Nothing was updated; going on without it") == 2
    records = metrics_of(tmp_path / "run")
    assert [("loss" in record, record.get("skipped", False)) for record in records].count((False, True)) == 2
    assert [("loss" in record, record.get("skipped", False)) for record in records].count((True, False)) == 6
    assert summary_of(tmp_path / "run")["num_skipped_steps"] == 2
    assert num_updates(tmp_path / "run") == 6
    whole = adapter_of(tmp_path / "run")
    assert all(bool(tensor.isfinite().all()) for tensor in whole.values())
    resume = [f"output_dir={tmp_path}/part", f"resume={tmp_path}/run/checkpoints/step-00000006"]
    assert qdora("train", *arguments, *resume, nproc=nproc).returncode == 0
    assert summary_of(tmp_path / "part")["num_skipped_steps"] == 2
    part = adapter_of(tmp_path / "part")
    assert all(torch.equal(tensor, part[name]) for name, tensor in whole.items())


def test_steps_that_are_all_bad_stop_though_they_may_be_left_out(broken_row: list[str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "a@b"}) + "\n")
    arguments = ["train.on_bad_step=skip", "train.num_accumulation_steps=1", "train.num_steps=20"]
    done = qdora("train", *broken_row, *arguments)
    assert done.returncode == 2, done.stderr
    assert "qdora: step 11: the loss is nan" in done.stderr
    assert "and 10 steps before it were left out" in done.stderr


def test_spike_stops_the_run_or_is_left_out(options: list[str], tmp_path: Path) -> None:
    """One row of another kind, at step 67: steps are compared from 64 on, with a window that a checkpoint keeps."""
    rows = [{"prompt": "1+1=", "completion": "so so so" if n != 70 else "@~@~@~@~"} for n in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [*options, f"data.train={tmp_path}/rows.jsonl", f"output_dir={tmp_path}/run", "train.num_steps=68"]
    arguments += ["train.micro_batch_size=1", "train.num_accumulation_steps=1", "train.checkpoint_every=65"]
    arguments += ["optim.learning_rate=1e-6", "train.spike_deviations=6"]
    done = qdora("train", *arguments)
    assert done.returncode == 2, done.stderr
    spike = (
        r"step 67: the (loss|gradient norm) is [\d.]+, more than train\.spike_deviations=6 standard deviations .* "
        rf"above the .* of the 66 steps before, on {re.escape(str(tmp_path))}/rows\.jsonl line 71\. Nothing was updated"
    )
    assert re.search(spike, done.stderr), done.stderr
    assert f"goes on from {tmp_path}/run/checkpoints/step-00000065" in done.stderr
    assert summary_of(tmp_path / "run")["status"] == "failed"
    done = qdora("train", *arguments, "train.on_bad_step=skip")
    assert done.returncode == 0, done.stderr
    assert "going on from step 65 of 68" in done.stdout
    assert re.search(f"{spike}; going on without it", done.stderr), done.stderr
    assert summary_of(tmp_path / "run")["num_skipped_steps"] == 1
    assert [record["step"] for record in metrics_of(tmp_path / "run") if record.get("skipped")] == [67]
    assert num_updates(tmp_path / "run") == 67, "of 68 steps"


def test_config_of_a_run_has_every_option(uninterrupted: dict[int, Path], tiny: Path, data: Path) -> None:
    """Also those that nobody gave, with the values that the command line resolves to."""
    stored = yaml.safe_load((uninterrupted[1] / "config.yaml").read_text())
    values = compose("train", [*long_run(tiny, data), f"output_dir={uninterrupted[1]}", f"run_id={stored['run_id']}"])
    assert values is not None
    config: RunConfig = typed(values, RunConfig)
    assert flatten(stored) == flatten(config_values(config))
    assert RunFolder(uninterrupted[1]).read_config() == config


def test_seconds_that_steps_waited_for_checkpoints_are_recorded(uninterrupted: dict[int, Path]) -> None:
    """With each step; the sum in the summary has the last checkpoint's too."""
    stalls = {record["step"]: record["checkpoint_stall_s"] for record in metrics_of(uninterrupted[1])}
    waited = {step for step, seconds in stalls.items() if seconds > 0}
    assert {step + 1 for step in range(5, 30, 5)} <= waited, "a checkpoint begins when its step has been recorded"
    assert 1 not in waited
    total = summary_of(uninterrupted[1])["checkpoint_stall_s"]
    assert sum(stalls.values()) < total < 60


def test_weights_that_are_not_finite_stop_at_the_first_step(options: list[str], tmp_path: Path) -> None:
    broken = make_model(tmp_path / "broken", "llama", num_hidden_layers=1)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(torch.nan)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    done = qdora("train", *options, f"model.path={broken}", f"output_dir={tmp_path}/run")
    assert done.returncode == 2
    assert "nan" in done.stderr
    assert "Traceback" not in done.stderr


def test_accelerate_launch_starts_the_ranks(options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "qdora", "train"]
    done = run([*command, *options, f"output_dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache"], cold=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert summary_of(tmp_path / "run")["world_size"] == 2


def test_train_script_uses_two_ranks_without_a_gpu(options: list[str], tmp_path: Path) -> None:
    done = run(
        [str(ROOT / "launch" / "train.sh"), *options, f"output_dir={tmp_path}/run"],
        PYTHON=sys.executable,
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert summary_of(tmp_path / "run")["world_size"] == 2


@pytest.mark.parametrize("nproc", ["0", "many"])
def test_train_script_wants_a_number_of_ranks(nproc: str) -> None:
    done = run([str(ROOT / "launch" / "train.sh")], PYTHON=sys.executable, NPROC=nproc)
    assert (done.returncode, done.stderr) == (2, f"qdora: NPROC={nproc} is not a number of ranks: give 1 or more\n")


PLANS = {
    "ddp": (2, ["parallel=ddp"]),
    "hsdp": (4, ["parallel=hsdp", "parallel.shard_size=2"]),
    "gathered": (2, ["parallel.reshard_after_forward=false"]),
    "offload": (2, ["parallel.cpu_offload=true", "parallel.activation_checkpointing=selective"]),
    "compiled": (2, ["train.compile=true", "parallel.activation_checkpointing=full"]),
}


@pytest.mark.nightly
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_trains_and_resumes_bit_for_bit(options: list[str], data: Path, tmp_path: Path, plan: str) -> None:
    """Losses as on one rank; what goes on from a checkpoint is what was never stopped."""
    nproc, extra = PLANS[plan]
    common = [*options, f"data.eval={data}", "model.dtype=float32", "train.checkpoint_every=3"]
    alone, whole, part = (tmp_path / name for name in ("alone", "whole", "part"))
    assert qdora("train", *common, f"output_dir={alone}").returncode == 0
    arguments = [*common, *extra, f"train.num_accumulation_steps={4 // nproc}"]
    done = qdora("train", *arguments, f"output_dir={whole}", nproc=nproc)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(whole) == pytest.approx(losses_of(alone), rel=1e-4)
    checkpoint = whole / "checkpoints" / "step-00000003"
    done = qdora("train", *arguments, f"output_dir={part}", f"resume={checkpoint}", nproc=nproc)
    assert "going on from step 3 of 6" in done.stdout, done.stderr
    adapters = [adapter_of(folder) for folder in (whole, part)]
    for name, tensor in adapters[0].items():
        assert torch.equal(tensor, adapters[1][name]), name
