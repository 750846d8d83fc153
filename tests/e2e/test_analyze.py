"""`qdora analyze` on runs with several checkpoints, against numbers made from the files by other means."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from qdora import checkpoint_folder, commands
from qdora.run_folder import RunFolder
from tests.support.marks import nightly
from tests.support.models import make_model
from tests.support.processes import qdora
from tests.support.runs import QUICK, write_sums

METHODS = {
    "qdora": ["adapter=dora", "quant=nf4"],
    "lora": ["adapter=lora", "quant=none"],
    "full": ["adapter=none", "quant=none", "optim.learning_rate=1e-3"],
}
STEPS = [2, 4, 6]
SCALING = 2.0
"""alpha / rank, by default."""
MEANS = 1e-4
"""Relative; float32 weights here and there, whose small differences from W_0 are compared."""
DIRECTION = 1e-2
"""Relative; here 1 - cos is computed as such, in float64 over float32 weights."""
RANK = 1e-3
"""Relative; numpy's singular values of a matrix that was rounded otherwise."""
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of two blocks."""
    return make_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module", params=["qdora", "full", *nightly("lora")])
def run(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A method, and the folder of its run with three checkpoints, which has been analysed."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    data = write_sums(folder.parent / "data.jsonl")
    done = qdora(
        "train",
        f"model.path={model}",
        f"data.train={data}",
        "data.packing=false",
        "adapter.rank=4",
        "optim.learning_rate=1e-2",
        *METHODS[request.param],
        "train.num_steps=6",
        "train.micro_batch_size=4",
        "train.checkpoint_every=2",
        "train.keep_checkpoints=9",
        "tracker=none",
        *QUICK,
        f"output_dir={folder}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    done = qdora("analyze", f"run={folder}")
    assert done.returncode == 0, done.stderr[-3000:]
    (folder.parent / "told.txt").write_text(done.stdout)
    return request.param, folder


def results_of(folder: Path) -> dict[str, Any]:
    """analysis.json."""
    values: dict[str, Any] = json.loads((folder / "analysis" / "analysis.json").read_text())
    return values


def stored_at(folder: Path, step: int, name: str, kinds: list[str]) -> list[Tensor]:
    """Tensors of a layer in a checkpoint, by torch's own reader."""
    reader = FileSystemReader(folder / "checkpoints" / f"step-{step:08d}")
    known: Any = reader.read_metadata().state_dict_metadata
    tensors = {key: torch.empty(known[key].size) for key in (f"model.{name}.{kind}" for kind in kinds)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_load(tensors, storage_reader=FileSystemReader(reader.path), no_dist=True)
    return list(tensors.values())


def in_nf4_and_back(weight: Tensor) -> Tensor:
    """What bitsandbytes makes of a weight, double quantisation included."""
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return bnb.dequantize_4bit(packed, state).float()


def weights_at(method: str, folder: Path, step: int, name: str, original: Tensor) -> tuple[Tensor, Tensor]:
    """W_0 and W_t of a layer, float64, from the files."""
    if method == "full":
        return original.double(), stored_at(folder, step, name, ["weight"])[0].double()
    kinds = ["lora_a", "lora_b", "magnitude"][: 3 if method == "qdora" else 2]
    a, b, *magnitude = stored_at(folder, step, name, kinds)
    before = (in_nf4_and_back(original.float()) if method == "qdora" else original).double()
    after = before + SCALING * b.bfloat16().double() @ a.bfloat16().double()  # as the forward rounds them
    if magnitude:
        after *= (magnitude[0].double() / after.norm(dim=1))[:, None]
    return before, after


def test_values_are_those_of_the_files(run: tuple[str, Path], model: Path) -> None:
    method, folder = run
    results, originals = results_of(folder), load_file(model / "model.safetensors")
    assert len(results["points"]) == 3 * len(results["layers"]) == 3 * 14
    for point in results["points"]:
        before, after = weights_at(method, folder, point["step"], point["layer"], originals[f"{point['layer']}.weight"])
        m_0, m_t = before.norm(dim=1), after.norm(dim=1)
        cos = (before * after).sum(1) / (m_0 * m_t)
        s = np.linalg.svd((after - before).numpy(), compute_uv=False)
        s = s[s > 1e-9 * s[0]]
        shares = s / s.sum()
        assert point["magnitude_change"] == pytest.approx(float((m_t - m_0).abs().mean()), rel=MEANS)
        assert point["relative_magnitude_change"] == pytest.approx(float((m_t / m_0 - 1).abs().mean()), rel=MEANS)
        assert point["direction_change"] == pytest.approx(float((1 - cos).mean()), rel=DIRECTION)
        assert point["effective_rank"] == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())), rel=RANK)
        assert point["stable_rank"] == pytest.approx(float((s**2).sum() / s[0] ** 2), rel=RANK)


def test_lines_and_means_are_those_of_the_points(run: tuple[str, Path]) -> None:
    results = results_of(run[1])
    assert results["projections"].keys() == PROJECTIONS
    for name, summary in [*results["projections"].items(), ("all", results["all"])]:
        points = [point for point in results["points"] if name in ("all", point["projection"])]
        x, y = ([point[key] for point in points] for key in ("direction_change", "magnitude_change"))
        slope, intercept = np.polyfit(x, y, 1)
        assert summary["correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9)
        assert summary["slope"] == pytest.approx(slope, rel=1e-6)
        assert summary["intercept"] == pytest.approx(intercept, rel=1e-6)
        last = [point for point in points if point["step"] == 6]
        assert summary["magnitude_change"] == pytest.approx(np.mean([point["magnitude_change"] for point in last]))
        assert summary["num_layers"] == len(last) == (14 if name == "all" else 2)


def test_quantisation_error_is_that_of_bitsandbytes(run: tuple[str, Path], model: Path) -> None:
    method, folder = run
    originals = load_file(model / "model.safetensors")
    for layer in results_of(folder)["layers"]:
        original = originals[f"{layer['layer']}.weight"].float()
        assert layer["shape"] == list(original.shape)
        if method != "qdora":
            assert layer["quantisation_error"] is None
            continue
        expected = (in_nf4_and_back(original) - original).norm() / original.norm()
        assert layer["quantisation_error"] == pytest.approx(float(expected), rel=MEANS)


def test_results_say_what_they_are_of(run: tuple[str, Path]) -> None:
    method, folder = run
    results = results_of(folder)
    assert results["run"] == str(folder)
    assert (results["method"], results["quant"]) == {
        "qdora": ("dora", "nf4"),
        "lora": ("lora", "none"),
        "full": ("full", "none"),
    }[method]
    assert results["config"]["adapter"]["rank"] == 4
    assert [state["step"] for state in results["states"]] == STEPS
    # The last checkpoint is the adapter; full fine-tuning's float32 weights are more than its export has.
    last = "checkpoint" if method == "full" else "adapter"
    assert [state["source"] for state in results["states"]] == ["checkpoint", "checkpoint", last]
    assert {layer["block"] for layer in results["layers"]} == {0, 1}
    told = (folder.parent / "told.txt").read_text()
    assert all(name in told for name in PROJECTIONS)
    assert "checkpoint_every" not in told, "a hint for runs with one step alone"
    for name in ("decomposition.png", "layers.png"):
        image = Image.open(folder / "analysis" / name)
        assert image.size == (1600, 1000)
        assert len(set(image.convert("RGB").getdata())) > 100


def test_checkpoint_that_is_damaged_or_of_other_options_is_left_out_with_a_warning(
    run: tuple[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method, folder = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    manifest = checkpoint_folder.read_manifest(copy / "checkpoints" / "step-00000004")
    manifest.config["adapter"]["alpha"] = 3.0  # as after a start with allow_changes=true
    (copy / "checkpoints" / "step-00000004" / checkpoint_folder.MANIFEST).write_text(manifest.to_json())
    (file,) = (copy / "checkpoints" / "step-00000006").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert commands.run(["analyze", f"run={copy}", f"output_dir={tmp_path / 'out'}"]) == 0
    assert "step-00000004 is left out: it was made under adapter.alpha=3.0" in caplog.text
    assert "step-00000006 is left out: it is damaged" in caplog.text
    results = json.loads((tmp_path / "out" / "analysis.json").read_text())
    source = "model" if method == "full" else "adapter"
    assert results["states"] == [{"step": 2, "source": "checkpoint"}, {"step": 6, "source": source}]
    assert len(results["skipped_checkpoints"]) == 2
    before = {(point["layer"], point["step"]): point for point in results_of(folder)["points"]}
    for point in results["points"]:
        whole = before[point["layer"], point["step"]]
        if point["step"] == 2 or method != "full":
            assert point == whole
        else:  # the export is rounded to bfloat16, which the small change of a weight feels
            assert point["direction_change"] == pytest.approx(whole["direction_change"], rel=0.1)
            assert point["direction_change"] != whole["direction_change"]


def test_moved_or_wrong_base_is_told(
    run: tuple[str, Path], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run[1]
    other = make_model(tmp_path / "other", "llama", seed=5)
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoints"))
    assert commands.run(["analyze", f"run={bare}", f"model.path={other}", f"output_dir={tmp_path / 'out'}"]) == 2
    assert "was trained over another model than the one in" in capsys.readouterr().err
    old = RunFolder(Path(shutil.copytree(folder, tmp_path / "old")))  # its summary knew nothing of the base
    old.write_summary({**json.loads(old.summary.read_text()), "model_fingerprint": None})
    assert commands.run(["analyze", f"run={old.path}", f"model.path={other}", f"output_dir={tmp_path / 'out'}"]) == 2
    assert "was trained over another model than the one in" in capsys.readouterr().err
    moved = shutil.copytree(model, tmp_path / "moved")
    assert commands.run(["analyze", f"run={folder}", f"model.path={moved}", f"output_dir={tmp_path / 'out'}"]) == 0
    again = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert again["points"] == results_of(folder)["points"]


def test_unfinished_run_is_analysed_up_to_its_newest_checkpoint(
    run: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a result of its own it has the points of the finished run, up to a step whose checkpoint is whole."""
    folder = run[1]
    left_out = shutil.ignore_patterns("adapter", "model", "summary.json", "analysis", "step-00000006")
    copy = Path(shutil.copytree(folder, tmp_path / "run", ignore=left_out))
    assert commands.run(["analyze", f"run={copy}"]) == 0
    assert f"run={copy} is not finished: its newest checkpoint is taken, step 4 of 6" in capsys.readouterr().out
    results, whole = results_of(copy), results_of(folder)
    assert results["states"] == [{"step": 2, "source": "checkpoint"}, {"step": 4, "source": "checkpoint"}]
    assert results["last_step"] == 4
    expected = [point for point in whole["points"] if point["step"] < 6]
    assert [point["layer"] for point in results["points"]] == [point["layer"] for point in expected]
    for point, other in zip(results["points"], expected, strict=True):
        assert point == pytest.approx(other)
    shutil.rmtree(copy / "checkpoints")
    assert commands.run(["analyze", f"run={copy}"]) == 2
    told = capsys.readouterr().err
    assert f"run={copy} is not finished, and has no checkpoint yet. Wait for its end, or start it again" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run is not set: give the folder of a run"),
        (["run=./absent"], "run=absent: no run there"),
        (["run=./absent", "model.dtype=float32"], "model.dtype: run=DIR decides that"),
    ],
)
def test_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.run(["analyze", *arguments]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("qdora: ")
    assert message in told
