"""The numbers of the analysis against closed forms, and its weights against those that `qdora merge` writes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file
from torch import Tensor

from qdora.adapter import peft_format
from qdora.adapter.dora import adapted_layers
from qdora.analysis.course import State, find_course
from qdora.analysis.figures import _groups, draw_decomposition, draw_layers, draw_methods
from qdora.analysis.measures import fit, product_singular_values, ranks, row_changes
from qdora.analysis.report import _summary
from qdora.analysis.run import _block, analyze, measure_layer, measure_state, quantisation_error
from qdora.checkpoint import Checkpoints
from qdora.checkpoint_folder import Manifest
from qdora.config import (
    AdapterConfig,
    AdapterMethod,
    AnalyzeConfig,
    DataConfig,
    Dtype,
    MergeConfig,
    MergeFormat,
    ModelConfig,
    ParallelConfig,
    Plan,
    QuantConfig,
    QuantMethod,
    RunConfig,
)
from qdora.config.values import config_values
from qdora.errors import CheckpointError, ConfigError, ModelError
from qdora.merging import merge
from qdora.model import LoadedModel, load_model
from qdora.model.checkpoint_files import CheckpointFiles
from qdora.model.writer import Rows
from qdora.parallel import start_alone
from qdora.run_folder import RunFolder
from tests.support.models import make_model

EXACT = 1e-12
"""Relative; float64 arithmetic over a few hundred values."""
FLOAT32 = 1e-5
"""Relative; singular values that LAPACK computes in float32."""
TINY_TURN = 1e-5
"""An angle whose 1 - cos, 5e-11, is lost in float32's rounding where it is computed as such."""
MERGED = 4e-3
"""Relative; a merged weight is rounded to bfloat16, whose step is 2^-8."""


def weight(rows: int = 6, width: int = 8, seed: int = 0) -> Tensor:
    """A random matrix."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def turned(matrix: Tensor, angle: float) -> Tensor:
    """Each row turned by an angle, in the plane of pairs of neighbouring columns."""
    cos, sin = math.cos(angle), math.sin(angle)
    pairs = matrix.double().view(matrix.shape[0], -1, 2)
    x, y = pairs[..., 0], pairs[..., 1]
    return torch.stack([cos * x - sin * y, sin * x + cos * y], -1).view_as(matrix)


def state_of(after: Tensor, factors: tuple[Tensor, Tensor] | None = None) -> State:
    """A step with one layer, whose weight is `after`."""

    def start(name: str, base: Rows) -> Rows:
        return lambda first, last: after[first:last]

    return State(7, "checkpoint", start, lambda name: factors)


def test_scaled_rows_change_in_magnitude_alone() -> None:
    before = weight().double()
    scale = torch.tensor([1.0, 2.0, 0.5, 1.1, 0.9, 3.0], dtype=torch.float64)
    magnitude, relative, direction = row_changes(before, before * scale[:, None]).unbind(1)
    torch.testing.assert_close(magnitude, (scale - 1).abs() * before.norm(dim=1), rtol=EXACT, atol=0)
    torch.testing.assert_close(relative, (scale - 1).abs(), rtol=EXACT, atol=EXACT)
    assert direction.max() < 1e-30


@pytest.mark.parametrize("angle", [TINY_TURN, 0.3, math.pi])
def test_turned_rows_change_in_direction_alone(angle: float) -> None:
    before = weight().double()
    magnitude, relative, direction = row_changes(before, turned(before, angle)).unbind(1)
    exact = 2 * math.sin(angle / 2) ** 2  # 1 - cos without its cancellation
    torch.testing.assert_close(direction, torch.full((6,), exact, dtype=torch.float64), rtol=1e-9, atol=0)
    assert magnitude.max() < 1e-14
    assert relative.max() < 1e-14


def test_row_of_zeros_has_no_direction() -> None:
    before = weight()
    before[2] = 0
    after = before.clone()
    after[2, 0] = 3.0
    changes = row_changes(before, after)
    assert changes[2, 0] == 3.0
    assert changes[2, 1:].isnan().all()
    assert not changes[[0, 1, 3, 4, 5]].isnan().any()
    values = measure_state(state_of(after), "q_proj", before, with_ranks=True)
    assert values["magnitude_change"] == pytest.approx(3.0 / 6, rel=EXACT)
    assert values["direction_change"] == 0.0
    assert measure_state(state_of(before), "q_proj", torch.zeros_like(before), False)["direction_change"] is None


def test_effective_and_stable_rank_have_their_closed_forms() -> None:
    assert ranks(torch.ones(5)) == (pytest.approx(5, rel=EXACT), pytest.approx(5, rel=EXACT))
    assert ranks(torch.tensor([2.0, 0.0, 0.0])) == (pytest.approx(1, rel=EXACT), pytest.approx(1, rel=EXACT))
    effective, stable = ranks(torch.tensor([3.0, 1.0]))
    assert effective == pytest.approx(4 / 3**0.75, rel=EXACT)  # exp of the entropy of (3/4, 1/4)
    assert stable == pytest.approx(10 / 9, rel=EXACT)
    assert ranks(torch.zeros(4)) == (None, None)


def test_singular_values_of_a_product_are_those_of_the_matrix() -> None:
    b, a = weight(40, 3, seed=1), weight(3, 30, seed=2)
    expected = torch.linalg.svdvals(b.double() @ a.double())
    torch.testing.assert_close(product_singular_values(b, a), expected[:3], rtol=1e-10, atol=0)
    assert expected[3] < 1e-12 * expected[0]


def test_factors_and_whole_matrix_give_the_same_ranks() -> None:
    before, b, a = weight(40, 30), weight(40, 3, seed=1), weight(3, 30, seed=2)
    after = before + 0.1 * b @ a
    whole = measure_state(state_of(after), "q_proj", before, with_ranks=True)
    factored = measure_state(state_of(after, (0.1 * b, a)), "q_proj", before, with_ranks=True)
    assert factored["stable_rank"] == pytest.approx(whole["stable_rank"], rel=FLOAT32)
    # The matrix has 27 more singular values, of rounding alone.
    assert factored["effective_rank"] == pytest.approx(whole["effective_rank"], rel=1e-3)
    assert factored["effective_rank"] < 3
    assert measure_state(state_of(after), "q_proj", before, with_ranks=False)["effective_rank"] is None


def test_scaled_rows_are_an_update_of_full_rank() -> None:
    values = measure_state(state_of(1.5 * torch.eye(16)), "q_proj", torch.eye(16), with_ranks=True)
    assert values["effective_rank"] == pytest.approx(16, rel=FLOAT32)
    assert values["stable_rank"] == pytest.approx(16, rel=FLOAT32)
    assert values["magnitude_change"] == 0.5


def test_measures_do_not_depend_on_the_rows_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = weight(50, 8), weight(50, 8, seed=4)
    whole = measure_state(state_of(after), "q_proj", before, with_ranks=True)
    error = quantisation_error(before, lambda first, last: after[first:last])
    monkeypatch.setattr("qdora.analysis.run.CHUNK_NUMEL", 7 * 8)
    assert measure_state(state_of(after), "q_proj", before, with_ranks=True) == pytest.approx(whole, rel=EXACT)
    assert quantisation_error(before, lambda first, last: after[first:last]) == pytest.approx(error, rel=EXACT)


def test_quantisation_error_is_relative_to_the_original() -> None:
    original = weight()
    assert quantisation_error(0.9 * original, lambda first, last: original[first:last]) == pytest.approx(0.1, rel=1e-6)
    assert quantisation_error(original, None) is None
    assert quantisation_error(original, lambda first, last: torch.zeros_like(original[first:last])) is None


def test_line_has_the_slope_and_correlation_of_its_points() -> None:
    line = fit([0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 5.0, 7.0])
    assert (line.slope, line.intercept, line.correlation) == (pytest.approx(2), pytest.approx(1), pytest.approx(1))
    falling = fit([0.0, 1.0, 2.0], [1.0, 0.0, 0.5])
    assert falling.slope == pytest.approx(-0.25)
    assert falling.correlation == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("x", "y", "slope"),
    [
        ([], [], None),
        ([1.0, 2.0], [1.0, 5.0], None),  # two points are always on a line
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], None),
        ([1e-16, 3e-16, 2e-16], [1.0, 2.0, 3.0], None),  # nothing turned: rounding alone
        ([1.0, 2.0, 3.0], [4.0, 4.0, 4.0], 0.0),
    ],
)
def test_correlation_is_none_where_it_is_undefined(x: list[float], y: list[float], slope: float | None) -> None:
    line = fit(x, y)
    assert line.correlation is None
    assert line.slope == slope


def test_stretching_with_turning_correlates_and_pulling_back_does_the_opposite() -> None:
    """LoRA's pattern in the paper, and DoRA's."""
    before = weight().double()

    def correlation(stretch: Any) -> float | None:
        changes = [row_changes(before, turned(before, angle) * stretch(angle)) for angle in (0.1, 0.2, 0.3)]
        means = [change.mean(0).tolist() for change in changes]
        return fit([mean[2] for mean in means], [mean[0] for mean in means]).correlation

    assert correlation(lambda angle: 1 + angle**2) == pytest.approx(1, abs=1e-2)
    assert correlation(lambda angle: 1 + 0.2 - angle**2) == pytest.approx(-1, abs=1e-2)


def test_summary_has_means_of_the_last_step_and_the_line_of_all() -> None:
    point = {"relative_magnitude_change": None, "effective_rank": 2.0, "stable_rank": 1.0}
    points = [
        {**point, "step": step, "magnitude_change": m, "direction_change": d}
        for step, m, d in [(1, 1.0, 0.1), (1, 2.0, 0.2), (2, 3.0, 0.3), (2, 5.0, 0.5), (2, 7.0, None)]
    ]
    layers = [{"quantisation_error": 0.1}, {"quantisation_error": None}, {"quantisation_error": 0.3}]
    summary = _summary(layers, points, 2)
    assert summary["magnitude_change"] == pytest.approx(5)
    assert summary["direction_change"] == pytest.approx(0.4)
    assert summary["quantisation_error"] == pytest.approx(0.2)
    assert summary["relative_magnitude_change"] is None
    assert (summary["slope"], summary["correlation"]) == (pytest.approx(10), pytest.approx(1))
    assert summary["last_step_correlation"] is None, "two points have a direction"


@pytest.mark.parametrize(
    ("name", "block"), [("model.layers.12.self_attn.q_proj", 12), ("h.0.mlp.fc1", 0), ("encoder.proj", None)]
)
def test_block_is_the_number_in_the_name(name: str, block: int | None) -> None:
    assert _block(name) == block


@pytest.mark.parametrize("count", [1, 3, 8, 9, 50])
def test_steps_share_markers_in_order(count: int) -> None:
    groups = _groups([*range(count)])
    assert len(groups) == min(8, count)
    assert [step for group in groups for step in group] == [*range(count)]
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


METHODS = [
    (AdapterMethod.dora, QuantMethod.nf4),
    (AdapterMethod.dora, QuantMethod.none),
    (AdapterMethod.lora, QuantMethod.nf4),
    (AdapterMethod.lora, QuantMethod.none),
    (AdapterMethod.dvora, QuantMethod.nf4),
    (AdapterMethod.vera, QuantMethod.none),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of one block."""
    return make_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=1)


def finished(run: RunFolder, config: RunConfig) -> None:
    """Makes it look like a run of nine steps that has ended."""
    run.start(config, 0)
    run.write_summary({"status": "finished", "steps": 9})
    run.release()


EACH = pytest.mark.parametrize("run", METHODS, indirect=True, ids=lambda pair: f"{pair[0].name}-{pair[1].name}")
ONE = pytest.mark.parametrize("run", METHODS[:1], indirect=True, ids=[""])


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run with a random adapter and no checkpoint."""
    method, quant = request.param
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "run")
    config = RunConfig(
        model=ModelConfig(path=str(model), dtype=Dtype.bfloat16),
        quant=QuantConfig(method=quant),
        adapter=AdapterConfig(method=method, rank=4),
        data=DataConfig(train="t"),
    )
    save_random_adapter(folder, config)
    finished(folder, config)
    return folder


def save_random_adapter(run: RunFolder, config: RunConfig) -> LoadedModel:
    """Writes it as the result of `run`; returns the model that has it."""
    base, world = Path(str(config.model.path)), start_alone("tests")
    loaded = load_model(base, config.model, config.quant, config.adapter, ParallelConfig(plan=Plan.none), world)
    torch.manual_seed(3)
    for layer in adapted_layers(loaded.model).values():
        layer.trained_factors()[1].data.normal_(std=1.0 if config.adapter.method.is_vera else 0.1)
        if layer.magnitude is not None:
            layer.magnitude.data.mul_(torch.empty_like(layer.magnitude).uniform_(0.8, 1.2))
    peft_format.save(loaded.model, run.adapter, loaded.adapter, str(base), loaded.dtype, world)
    return loaded


@EACH
def test_trained_weight_is_the_one_that_merge_writes(run: RunFolder, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    assert merge(MergeConfig(run=str(run.path), output=str(output), verify=False)) == 0
    merged = load_file(output / "model.safetensors")
    course = find_course(AnalyzeConfig(run=str(run.path)), start_alone("tests"))
    assert [(state.step, state.source) for state in course.states] == [(9, "adapter")]
    assert len(course.layers) == 7
    for name in course.layers:
        base = course.before(name)
        rows = course.shape(name)[0]
        before = base(0, rows).clone()
        trained = course.states[0].rows(name, lambda first, last: before[first:last].clone())(0, rows)  # noqa: B023
        torch.testing.assert_close(trained, merged[f"{name}.weight"].float(), rtol=MERGED, atol=0)
        assert (trained - before).norm() > 0.05 * before.norm(), "a change that rounding does not hide"


@EACH
def test_dora_has_the_magnitudes_that_it_learned_and_lora_none_of_its_own(run: RunFolder) -> None:
    course = find_course(AnalyzeConfig(run=str(run.path)), start_alone("tests"))
    tensors = load_file(run.adapter / peft_format.WEIGHTS)
    for name in course.layers:
        layer, (point,) = measure_layer(course, name, with_ranks=True)
        rows = course.shape(name)[0]
        before = course.before(name)(0, rows)
        if course.config.adapter.method in (AdapterMethod.dora, AdapterMethod.dvora):
            magnitude = tensors[peft_format.tensor_name(name, "magnitude")]
            expected = (magnitude - before.norm(dim=1)).abs().mean()
            assert point["magnitude_change"] == pytest.approx(float(expected), rel=1e-4)
            assert point["effective_rank"] > 8, "rows that are scaled: more than the rank of B A"
        else:
            assert point["effective_rank"] < 4
        assert (layer["quantisation_error"] is not None) == (course.config.quant.method is QuantMethod.nf4)


@pytest.mark.parametrize("method", [AdapterMethod.dora, AdapterMethod.vera, AdapterMethod.dvora])
def test_checkpoint_has_the_weights_of_the_adapter_that_was_made_of_it(
    method: AdapterMethod, model: Path, tmp_path: Path
) -> None:
    """With a scaling, which VeRA's adapter has in b and its checkpoint has not."""
    run = RunFolder(tmp_path / "run")
    config = RunConfig(
        model=ModelConfig(path=str(model)),
        adapter=AdapterConfig(method=method, rank=4, alpha=16),  # s is a power of 2, which rounds nothing
        data=DataConfig(train="t"),
    )
    loaded = save_random_adapter(run, config)
    finished(run, config)
    trained = {f"model.{name}": one for name, one in loaded.model.named_parameters() if one.requires_grad}
    nothing: dict[str, Any] = {"eval_loss": None, "tracker_id": None, "loader": {}, "guard": {}, "versions": {}}
    manifest = Manifest(
        step=4,
        num_tokens=0,
        rows_per_step=1,
        world_size=1,
        run_id="run",
        config=config_values(config),
        data_fingerprint="data",
        model_fingerprint=CheckpointFiles(model).fingerprint(),
        **nothing,
    )
    checkpoints = Checkpoints(run.checkpoints, start_alone("tests"), keep=1)
    checkpoints.save_async(trained, manifest)
    checkpoints.wait()
    course = find_course(AnalyzeConfig(run=str(run.path)), start_alone("tests"))
    assert [(state.step, state.source) for state in course.states] == [(4, "checkpoint"), (9, "adapter")]
    for name in course.layers:
        rows = course.shape(name)[0]
        before = course.before(name)(0, rows).clone()
        weights = [state.rows(name, lambda *_: before.clone())(0, rows) for state in course.states]  # noqa: B023
        assert torch.equal(*weights)
        assert not torch.equal(weights[0], before)
        first, last = (state.factors(name) for state in course.states)
        assert (first is None) == (last is None) == (method is not AdapterMethod.vera)
        if first is not None and last is not None:
            assert all(map(torch.equal, first, last))


def test_checkpoint_in_nf4_has_no_original(model: Path, tmp_path: Path) -> None:
    """The same weights once more, stored in NF4: the analysis is the same but for the error, which nobody knows."""
    run = RunFolder(tmp_path / "run")
    config = RunConfig(model=ModelConfig(path=str(model)), adapter=AdapterConfig(rank=4), data=DataConfig(train="t"))
    world = start_alone("tests")
    loaded = load_model(model, config.model, config.quant, config.adapter, ParallelConfig(plan=Plan.none), world)
    peft_format.save(loaded.model, run.adapter, loaded.adapter, str(model), loaded.dtype, world)
    finished(run, config)
    stored = tmp_path / "nf4"
    options: dict[str, Any] = {"verify": False, "format": MergeFormat.nf4}
    assert merge(MergeConfig(run=str(run.path), output=str(stored), **options)) == 0
    for base, known in ((model, True), (stored, False)):
        course = find_course(AnalyzeConfig(run=str(run.path), model=ModelConfig(path=str(base))), world)
        errors = [measure_layer(course, name, with_ranks=False)[0]["quantisation_error"] for name in course.layers]
        assert [error is not None for error in errors] == [known] * 7


def test_full_fine_tuning_starts_from_the_weights_as_they_are_stored(tmp_path: Path) -> None:
    """In float32 here, though the run computes in bfloat16."""
    stored = make_model(tmp_path / "model", "llama", num_hidden_layers=1, dtype=torch.float32)
    config = RunConfig(
        model=ModelConfig(path=str(stored)),
        quant=QuantConfig(method=QuantMethod.none),
        adapter=AdapterConfig(method=AdapterMethod.none),
        data=DataConfig(train="t"),
    )
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.model.symlink_to(stored)
    finished(run, config)
    course = find_course(AnalyzeConfig(run=str(run.path)), start_alone("tests"))
    tensors = load_file(stored / "model.safetensors")
    assert len(course.layers) == 7
    for name in course.layers:
        before = course.before(name)(0, course.shape(name)[0])
        assert torch.equal(before, tensors[f"{name}.weight"])
        assert not torch.equal(before, before.bfloat16().float())


def results_of(run: RunFolder, output: Path, **options: Any) -> dict[str, Any]:
    """analysis.json."""
    assert analyze(AnalyzeConfig(run=str(run.path), output_dir=str(output), **options)) == 0
    values: dict[str, Any] = json.loads((output / "analysis.json").read_text())
    return values


@ONE
def test_final_state_alone_is_analysed_with_a_hint(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = results_of(run, tmp_path / "out")
    told = capsys.readouterr().out
    assert "train.checkpoint_every=N" in told
    assert "train.keep_checkpoints" in told
    assert results["states"] == [{"step": 9, "source": "adapter"}]
    assert results["projections"]["q_proj"]["correlation"] is None
    assert results["all"]["correlation"] is not None
    assert results["all"]["effective_rank"] > 0
    assert len(results["points"]) == len(results["layers"]) == 7
    assert results_of(run, tmp_path / "again") == results


@ONE
def test_effective_rank_can_be_left_out(run: RunFolder, tmp_path: Path) -> None:
    results = results_of(run, tmp_path, effective_rank=False)
    assert {point["effective_rank"] for point in results["points"]} == {None}
    assert results["all"]["magnitude_change"] > 0
    assert (tmp_path / "layers.png").stat().st_size > 10_000


def test_figures_are_drawn_of_odd_results(tmp_path: Path) -> None:
    """Twenty types of layers outside blocks at twenty steps, one without a direction."""
    names, steps = [f"part{index}" for index in range(20)], [*range(1, 21)]
    point = {"block": None, "effective_rank": None, "magnitude_change": 1e-3}
    summary = {"correlation": None, "slope": None, "intercept": None}
    results = {
        "run_id": "x",
        "method": "full",
        "quant": "none",
        "last_step": 20,
        "states": [{"step": step} for step in steps],
        "points": [
            {**point, "projection": name, "step": step, "direction_change": None if name == "part3" else 1e-3 * step}
            for name in names
            for step in steps
        ],
        "layers": [{"projection": name, "block": None, "quantisation_error": None} for name in names],
        "projections": dict.fromkeys(names, summary),
        "all": summary,
    }
    draw_decomposition(results, tmp_path / "decomposition.png")
    draw_layers(results, tmp_path / "layers.png")
    draw_methods([results] * 4, "four alike", tmp_path / "methods.png")
    heights = {name: imread(tmp_path / f"{name}.png").shape[0] for name in ("decomposition", "methods")}
    assert heights["decomposition"] > 1.5 * heights["methods"], "21 panels have room"


def test_every_point_of_every_run_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where runs have other steps, as after an interruption."""
    drawn: list[Any] = []
    monkeypatch.setattr("qdora.analysis.figures.save", lambda canvas, output: drawn.append(canvas.figure))
    summary = {"correlation": None, "slope": None, "intercept": None}
    runs = [
        {
            "method": "lora",
            "quant": "none",
            "states": [{"step": step} for step in steps],
            "points": [{"step": step, "block": 0, "magnitude_change": 1.0, "direction_change": 1.0} for step in steps],
            "all": summary,
        }
        for steps in ([6, 12, 30], [8, 12, 24, 30])
    ]
    draw_methods(runs, "two", tmp_path / "methods.png")
    panels = [axes for axes in drawn[0].axes if axes.get_title(loc="left") == "lora over the weights"]
    counts = [sum(len(points.get_offsets()) for points in axes.collections) for axes in panels]
    assert counts == [3, 4]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [f"step {n}" for n in (6, 8, 12, 24, 30)]


@ONE
def test_mistakes_are_told(run: RunFolder, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run there"):
        analyze(AnalyzeConfig(run=str(tmp_path)))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output_dir=.*file cannot be made"):
        analyze(AnalyzeConfig(run=str(run.path), output_dir=str(tmp_path / "file")))
    moved = RunFolder(tmp_path / "moved")
    moved.path.mkdir()
    moved.adapter.symlink_to(run.adapter)
    finished(moved, replace(run.read_config(), model=ModelConfig(path="./gone")))
    with pytest.raises(ModelError, match=r"\./gone: no such folder.*if it was moved, give model\.path=DIR"):
        analyze(AnalyzeConfig(run=str(moved.path)))
    assert analyze(AnalyzeConfig(run=str(moved.path), model=ModelConfig(path=str(model)))) == 0
    moved.write_summary({"status": "preempted", "steps": 4})
    with pytest.raises(ConfigError, match=r"is not finished: wait for its end, or start it again to go on"):
        analyze(AnalyzeConfig(run=str(moved.path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "run is not set"),
        ({"run": "r", "output_dir": ""}, "output_dir is empty"),
        ({"run": "r", "model": ModelConfig(path="m", dtype=Dtype.float32)}, r"model\.dtype: run=DIR decides that"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AnalyzeConfig(**options)


def test_value_that_is_not_finite_is_told() -> None:
    after = weight()
    after[3, 1] = torch.inf
    with pytest.raises(CheckpointError, match=r"q_proj has values at step 7 that are not finite"):
        measure_state(state_of(after), "q_proj", weight(), with_ranks=True)
