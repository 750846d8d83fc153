"""`qdora merge` as a user runs it: every format loads elsewhere, interrupted merges go on, and mistakes are told."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qdora.adapter import peft_format
from qdora.adapter.trained_over import NOTE, write_note
from qdora.commands import run as command
from qdora.config import AdapterConfig, AdapterMethod, DataConfig, ModelConfig, QuantConfig, QuantMethod, RunConfig
from qdora.model import writer
from qdora.run_folder import RunFolder
from tests.support import faults
from tests.support.adapters import adapted
from tests.support.models import make_model
from tests.support.processes import popen, qdora

IDS = torch.arange(4, 68).view(2, 32)
Told = pytest.CaptureFixture[str]


def merge(*options: str) -> int:
    """`qdora merge OPTIONS` in this process; its exit status."""
    return command(["merge", *options])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bfloat16 model."""
    return make_model(tmp_path_factory.mktemp("base") / "model", "llama")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished QDoRA run over it."""
    return make_run(base, tmp_path_factory.mktemp("run") / "run", AdapterConfig(rank=4))


def make_run(folder: Path, output: Path, adapter: AdapterConfig, quant: QuantMethod = QuantMethod.nf4) -> Path:
    """What a run over `folder` leaves, with a random adapter and some held-out data."""
    run = RunFolder(output)
    adapted(folder, run.adapter, quant, adapter)
    data = output / "data.jsonl"
    texts = ["the quick brown fox", "jumps over the lazy dog", "0123456789", "qdora merges"]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_note(run.adapter, QuantConfig(method=quant))
    config = RunConfig(
        model=ModelConfig(path=str(folder)),
        quant=QuantConfig(method=quant),
        data=DataConfig(train=str(data), eval=str(data)),
    )
    run.start(config, 0)
    return run.path


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits.float()


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative to the norm."""
    return float((ours - theirs).norm() / theirs.norm())


def test_merge_proves_itself_and_says_how_to_load_it(run: Path, base: Path, tmp_path: Path) -> None:
    done = qdora("merge", f"run={run}", f"output={tmp_path}/merged")
    assert done.returncode == 0, done.stderr
    assert "verified on" in done.stdout
    verification = json.loads((tmp_path / "merged" / "verification.json").read_text())
    assert verification["passed"]
    assert verification["mean_kl"] < 0.02
    assert verification["held_out"] == str(run / "data.jsonl")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert str(base) in card
    assert "**Passed**" in card
    assert "from_pretrained" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"], "something was left beside"


def test_merge_is_made_once_and_can_be_verified_later(run: Path, tmp_path: Path, capsys: Told) -> None:
    arguments = [f"run={run}", f"output={tmp_path}/merged"]
    assert merge(*arguments, "verify=false") == 0
    assert not (tmp_path / "merged" / "verification.json").exists()
    assert "**Not verified**" in (tmp_path / "merged" / "README.md").read_text()
    capsys.readouterr()
    assert merge(*arguments) == 0
    assert "not verified yet" in capsys.readouterr().out
    assert json.loads((tmp_path / "merged" / "verification.json").read_text())["passed"]
    assert "**Passed**" in (tmp_path / "merged" / "README.md").read_text()
    assert merge(*arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path}/merged is this merge already\n"


def test_what_is_not_the_trained_model_ends_with_3_and_is_marked(run: Path, tmp_path: Path, capsys: Told) -> None:
    """NF4 weights quantised to NF4 again are mostly those of before the training."""
    arguments = [f"run={run}", f"output={tmp_path}/merged", "format=nf4", f"held_out={random_text(run, tmp_path)}"]
    assert merge(*arguments) == 3
    told = capsys.readouterr().out
    assert "it is NOT the model that was trained: gain_lost" in told
    assert "try base=original" in told
    assert "gain_lost" in (tmp_path / "merged" / "FAILED_VERIFICATION.txt").read_text()
    assert "**Failed**" in (tmp_path / "merged" / "README.md").read_text()
    assert merge(*arguments) == 3


def random_text(run: Path, folder: Path, *options: str) -> Path:
    """What the adapted model itself says, so that it is better than its base there."""
    merged = folder / "for-text"
    assert merge(f"run={run}", f"output={merged}", "verify=false", *options) == 0
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    torch.manual_seed(0)
    start = torch.randint(4, 100, (8, 2))
    said = model.generate(
        start, do_sample=True, max_new_tokens=60, pad_token_id=0, suppress_tokens=[0, 1, 2, 3, *range(101, 256)]
    )
    characters = [chr(code) for code in range(32, 127)] + ["\n", "\t"]
    lines = ["".join(characters[token - 4] for token in row if 4 <= token < 101) for row in said.tolist()]
    file = folder / "sampled.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("base_weights", ["nf4", "original"])
def test_nf4_checkpoint_loads_in_plain_transformers_as_bitsandbytes_would_make_it(
    base_weights: str, run: Path, tmp_path: Path
) -> None:
    options = [f"run={run}", "verify=false", f"base={base_weights}"]
    assert merge(*options, f"output={tmp_path}/nf4", "format=nf4") == 0
    assert merge(*options, f"output={tmp_path}/exact", "dtype=float32") == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    layer = loaded.get_submodule("model.layers.0.mlp.down_proj")
    assert type(layer).__name__ == "Linear4bit"
    exact = load_file(tmp_path / "exact" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    packed, state = bnb.quantize_4bit(exact, quant_type="nf4", blocksize=64, compress_statistics=True)
    assert torch.equal(layer.weight.data.view(-1), packed.view(-1))
    theirs = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(theirs.float(), bnb.dequantize_4bit(packed, state).float(), rtol=1e-2, atol=1e-5)
    assert type(loaded.get_submodule("lm_head")).__name__ == "Linear"
    assert torch.isfinite(logits_of(loaded)).all()


@pytest.mark.parametrize("method", [AdapterMethod.lora, AdapterMethod.dora])
def test_lora_format_is_the_trained_change(method: AdapterMethod, base: Path, tmp_path: Path) -> None:
    run = make_run(base, tmp_path / "run", AdapterConfig(rank=4, method=method), QuantMethod.none)
    rank = [] if method is AdapterMethod.lora else ["lora_rank=128"]  # whole: hidden size is 128
    options = [f"run={run}", "verify=false", "dtype=float32"]
    assert merge(*options, f"output={tmp_path}/lora", "format=lora", *rank) == 0
    assert merge(*options, f"output={tmp_path}/merged") == 0
    record = json.loads((tmp_path / "lora" / "merge.json").read_text())
    assert record["relative_error"] < 1e-3
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits_of(plain)
    served = PeftModel.from_pretrained(plain, tmp_path / "lora")
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert distance(logits_of(served), wanted) < 1e-3
    assert distance(before, wanted) > 0.05


def test_lora_of_a_dora_adapter_is_the_best_of_its_rank(base: Path, tmp_path: Path) -> None:
    run = make_run(base, tmp_path / "run", AdapterConfig(rank=4), QuantMethod.none)
    options = [f"run={run}", "verify=false", "dtype=float32"]
    assert merge(*options, f"output={tmp_path}/lora", "format=lora") == 0
    assert merge(*options, f"output={tmp_path}/merged") == 0
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    lost = total = best = 0.0
    for name in [key for key in written if key.endswith("lora_A.weight")]:
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        change = (after[f"{layer}.weight"] - before[f"{layer}.weight"].float()).double()
        ours = written[name.replace("lora_A", "lora_B")].double() @ written[name].double()
        lost += float((change - ours).square().sum())
        best += float(torch.linalg.svdvals(change)[8:].square().sum())
        total += float(change.square().sum())
    assert lost <= best * 1.02
    record = json.loads((tmp_path / "lora" / "merge.json").read_text())
    assert record["lora_rank"] == 8
    assert record["relative_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("base_weights", ["nf4", "original"])
def test_base_auto_takes_the_better_one(base_weights: str, run: Path, tmp_path: Path, capsys: Told) -> None:
    """Held-out text that the adapter over one of the bases has said itself is likelier there."""
    held_out = random_text(run, tmp_path, f"base={base_weights}")
    arguments = [f"run={run}", "base=auto", f"held_out={held_out}"]
    assert merge(*arguments, f"output={tmp_path}/merged") == 0
    assert f"base=auto takes {base_weights}: loss on" in capsys.readouterr().out
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["base_weights"] == base_weights
    assert merge(*arguments, f"output={tmp_path}/merged") == 0
    assert capsys.readouterr().out.endswith("is this merge already\n")


def slow_merge(
    run: Path, output: Path, *options: str, rest_s: float = 0.02, stdout: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """A merge that takes a rest before each piece of a tensor."""
    script = (
        "import time; from qdora.model import writer; import qdora.__main__ as q; from qdora.merging import weights\n"
        "writer.CHUNK_NUMEL = 4096; start = weights.Weights.start\n"
        "def slow(*arguments):\n"
        "    rows = start(*arguments)\n"
        f"    return lambda first, last: (time.sleep({rest_s}), rows(first, last))[1]\n"
        "weights.Weights.start = slow; q.main()"
    )
    command = [sys.executable, "-c", script, "merge", f"run={run}", f"output={output}", "verify=false", *options]
    return popen(command, stdout=stdout)


def journal(output: Path) -> list[str]:
    file = output.with_name(output.name + ".partial") / "journal.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("format", ["hf", "nf4"])
def test_killed_merge_goes_on_and_ends_the_same(
    format: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole" / "merged", tmp_path / "killed" / "merged"
    options = [f"format={format}", "max_shard_gib=2e-4"]
    assert merge(f"run={run}", f"output={whole}", "verify=false", *options) == 0
    for done in (3, 12):
        process = slow_merge(run, killed, *options)
        wait_for(lambda done=done: len(journal(killed)) > done, process)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not killed.exists()
    partial = killed.with_name("merged.partial")
    begun = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    done = {json.loads(line) for line in journal(killed)[1:]}
    written: list[str] = []
    usual = writer._write_one
    monkeypatch.setattr(
        writer, "_write_one", lambda place, *rest: (written.append(place.job.name), usual(place, *rest))[1]
    )
    assert merge(f"run={run}", f"output={killed}", "verify=false", *options) == 0
    assert done, "nothing was done before it was killed"
    assert written, "nothing was left to do"
    assert done.isdisjoint(written), "a tensor that was done was written again"
    assert begun == {path.name: path.stat().st_ino for path in killed.glob("*.safetensors")}
    ours, theirs = files_of(killed), files_of(whole)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours if name.endswith((".safetensors", ".json")))
    assert [path.name for path in killed.parent.iterdir()] == ["merged"]


def test_journal_of_before_a_restart_of_the_machine_counts_for_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it names had been written, but to the disk nobody knows."""
    output = tmp_path / "merged"
    process = slow_merge(run, output)
    wait_for(lambda: len(journal(output)) > 5, process)
    process.kill()
    process.wait()
    done = {json.loads(line) for line in journal(output)[1:]}
    written: list[str] = []
    usual = writer._write_one
    monkeypatch.setattr(
        writer, "_write_one", lambda place, *rest: (written.append(place.job.name), usual(place, *rest))[1]
    )
    monkeypatch.setattr(writer, "_boot_id", lambda: "another start of the machine")
    assert merge(f"run={run}", f"output={output}", "verify=false") == 0
    assert done
    assert done < set(written) == load_file(output / "model.safetensors").keys()


def test_merge_begun_for_something_else_is_not_gone_on_with(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    process = slow_merge(run, output)
    wait_for(lambda: len(journal(output)) > 5, process)
    process.kill()
    process.wait()
    assert merge(f"run={run}", f"output={output}", "verify=false", "dtype=float16") == 0
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.float16}
    assert json.loads((output / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("format", ["hf", "lora"])
def test_folder_of_somebody_else_is_not_removed(format: str, run: Path, tmp_path: Path, capsys: Told) -> None:
    (tmp_path / "merged.partial").mkdir()
    (tmp_path / "merged.partial" / "precious").write_text("mine")
    assert merge(f"run={run}", f"output={tmp_path}/merged", "verify=false", f"format={format}") == 2
    assert "is in the way and not of a merge" in capsys.readouterr().err
    assert (tmp_path / "merged.partial" / "precious").read_text() == "mine"


@pytest.mark.parametrize("output", ["x" * 300, "dangling", "nope/.."])
def test_output_that_cannot_be_made_is_told_at_once(output: str, run: Path, tmp_path: Path, capsys: Told) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    assert merge(f"run={run}", f"output={tmp_path}/{output}", "verify=false") == 2
    assert "can be made" in capsys.readouterr().err.replace("cannot", "can")


def test_terminal_shows_how_far_the_merge_is(run: Path, tmp_path: Path) -> None:
    leader, terminal = pty.openpty()
    process = slow_merge(run, tmp_path / "merged", rest_s=0.05, stdout=terminal)
    os.close(terminal)
    shown = b""
    while b"MB/s" not in shown and b"kB/s" not in shown:
        shown += os.read(leader, 65536)
    assert process.wait(240) == 0
    os.close(leader)
    assert re.search(rb"writing.*\d\.\d.*/.*B", shown), shown[-500:]


def test_merge_that_was_killed_at_its_very_end_is_whole(run: Path, tmp_path: Path, capsys: Told) -> None:
    arguments = [f"run={run}", f"output={tmp_path}/merged", "verify=false"]
    assert merge(*arguments) == 0
    (tmp_path / "merged" / "journal.jsonl").write_text("{}\n")
    assert merge(*arguments) == 0
    assert "is this merge already" in capsys.readouterr().out
    assert not (tmp_path / "merged" / "journal.jsonl").exists()


def test_lora_adapter_has_nothing_of_a_merge_that_was_killed(run: Path, tmp_path: Path) -> None:
    partial = tmp_path / "merged.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half of it")
    (partial / "journal.jsonl").write_text("{}\n")
    assert merge(f"run={run}", f"output={tmp_path}/merged", "verify=false", "format=lora") == 0
    assert not list((tmp_path / "merged").glob("*model.safetensors.*"))
    assert not (tmp_path / "merged" / "model.safetensors").exists()


def test_same_output_for_another_scaling_or_quantisation_is_refused(
    run: Path, base: Path, tmp_path: Path, capsys: Told
) -> None:
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    arguments = [f"adapter={adapter}", f"model.path={base}", f"output={tmp_path}/merged", "verify=false"]
    assert merge(*arguments) == 0
    assert merge(*arguments, "quant.double_quant=false") == 2
    assert "holds another merge: double_quant True (now False)" in capsys.readouterr().err
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 3}))
    assert merge(*arguments) == 2
    assert "holds another merge: adapter" in capsys.readouterr().err


def test_adapter_is_merged_into_what_it_was_trained_over_where_that_is_known(
    base: Path, tmp_path: Path, capsys: Told
) -> None:
    """By its note, by what is said, or by a base in 4 bits; else into the base as it is stored, and that is told."""
    weights = {}
    for quant in (QuantMethod.nf4, QuantMethod.none):
        run = make_run(base, tmp_path / f"run-{quant.name}", AdapterConfig(method=AdapterMethod.lora, rank=4), quant)
        over = [f"adapter={run}/adapter", f"model.path={base}", "verify=false"]
        assert merge(*over, f"output={tmp_path}/noted-{quant.name}") == 0
        assert "nothing says" not in capsys.readouterr().out
        (run / "adapter" / NOTE).unlink()
        assert merge(*over, f"output={tmp_path}/said-{quant.name}", f"quant={quant.name}") == 0
        assert "nothing says" not in capsys.readouterr().out
        assert merge(*over, f"output={tmp_path}/unknown-{quant.name}") == 0
        told = capsys.readouterr().out
        assert "nothing says what the adapter in" in told
        assert "quant=nf4 merges it into what it was trained over" in told
        for name in ("noted", "said", "unknown"):
            output = tmp_path / f"{name}-{quant.name}"
            weights[name, quant] = load_file(output / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
            card = (output / "README.md").read_text()
            known = {"noted": quant.name, "said": quant.name, "unknown": "unknown"}[name]
            over_what = {"nf4": "NF4, block scales in 8 bits", "none": "as stored", "unknown": "not known"}[known]
            assert f"| Base weights while training | {over_what} |" in card
        assert torch.equal(weights["noted", quant], weights["said", quant])
    # The two runs have the same adapter.
    assert torch.equal(weights["unknown", QuantMethod.nf4], weights["noted", QuantMethod.none])
    assert not torch.equal(weights["noted", QuantMethod.nf4], weights["noted", QuantMethod.none])


def test_base_that_failed_its_own_verification_marks_nothing_else(run: Path, base: Path, tmp_path: Path) -> None:
    marked = shutil.copytree(base, tmp_path / "marked")
    (marked / "FAILED_VERIFICATION.txt").write_text("of another time\n")
    arguments = [f"adapter={run}/adapter", f"model.path={marked}", f"output={tmp_path}/merged", "verify=false"]
    assert merge(*arguments) == 0
    assert not (tmp_path / "merged" / "FAILED_VERIFICATION.txt").exists()
    assert merge(*arguments) == 0


def test_second_merge_into_the_same_folder_is_refused(run: Path, tmp_path: Path, capsys: Told) -> None:
    process = slow_merge(run, tmp_path / "merged", rest_s=0.1)
    wait_for(lambda: len(journal(tmp_path / "merged")) > 1, process)
    assert merge(f"run={run}", f"output={tmp_path}/merged", "verify=false") == 2
    assert "another process merges into" in capsys.readouterr().err
    assert process.wait(240) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with faults.small_disk(tmp_path / "disk", "1m"):
        yield tmp_path / "disk"


def test_full_disk_is_told_before_anything_is_computed(run: Path, small_disk: Path, capsys: Told) -> None:
    (small_disk / "full").write_bytes(b"0" * 500_000)
    assert merge(f"run={run}", f"output={small_disk}/merged", "dtype=float32") == 2
    told = capsys.readouterr().err
    assert "No space left on device" in told
    assert "GiB are needed" in told
    assert [path.name for path in small_disk.iterdir()] == ["full"]


def test_disk_that_fills_up_beside_the_weights_is_told_and_gone_on_from(
    run: Path, base: Path, small_disk: Path, capsys: Told
) -> None:
    arguments = [f"run={run}", f"output={small_disk}/merged", "verify=false"]
    room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "full").write_bytes(b"0" * (room - (base / "model.safetensors").stat().st_size - 16384))
    assert merge(*arguments) == 2
    told = capsys.readouterr().err
    assert "No space left on device" in told
    assert "the same command goes on" in told
    (small_disk / "full").unlink()
    assert merge(*arguments) == 0


def test_mistakes_are_one_line(run: Path, base: Path, tmp_path: Path, capsys: Told) -> None:
    other = make_model(tmp_path / "other", "llama", intermediate_size=256)
    lacking = shutil.copytree(base, tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    adapter = run / "adapter"
    cut = shutil.copytree(adapter, tmp_path / "cut")
    file = cut / peft_format.WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    output = f"output={tmp_path}/merged"
    capsys.readouterr()
    for arguments, message in (
        ([f"adapter={adapter}", f"model.path={other}"], "the model wants"),
        ([f"adapter={adapter}", f"model.path={lacking}"], "lacks 1 tensors that LlamaForCausalLM needs"),
        ([f"adapter={cut}", f"model.path={base}"], "is damaged or cut short"),
        ([f"adapter={tmp_path}", f"model.path={base}"], "no adapter_config.json in"),
        ([f"run={tmp_path}"], "no run there"),
        ([f"run={run}", "gguf.type=q4_0"], "it goes with format=gguf"),
        ([f"run={run}", "lora_rank=4"], "it goes with format=lora"),
        ([f"run={run}", "format=lora", "lora_rank=1000000"], "128 is the whole of the largest layer"),
        ([f"run={run}", "max_shard_gib=inf"], "must be above 0 and finite"),
        ([f"adapter={adapter}/{peft_format.WEIGHTS}", f"model.path={base}"], "no adapter_config.json in"),
        ([f"run={run}", "format=gguf", "dtype=float16"], "it is gguf.type that says"),
        ([f"run={run}", f"held_out={tmp_path}/none.jsonl"], "none.jsonl"),
        ([f"run={run}", "base=nf5"], "base"),
    ):
        assert merge(*arguments, output) == 2, arguments
        told = capsys.readouterr().err
        assert message in told
        assert len(told.strip().splitlines()) == 1, told
    left = [path.name for path in tmp_path.iterdir() if "merged" in path.name]
    assert not left, left
