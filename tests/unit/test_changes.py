"""What two starts of a run may differ in: who may go on, what is told, and where it is recorded."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qdora.adapter.trained_over import CONFIG, WEIGHTS
from qdora.changes import changes_since, check_identity, of_learning, over_time, shown
from qdora.checkpoint_folder import MANIFEST, Change, Manifest, read_manifest
from qdora.commands import compose, typed
from qdora.config import (
    AdapterConfig,
    AdapterMethod,
    DataConfig,
    ModelConfig,
    OptimConfig,
    QuantConfig,
    RunConfig,
    Schedule,
    TrackerConfig,
    TrackerKind,
    TrainConfig,
)
from qdora.config.values import config_values
from qdora.errors import CheckpointError, ConfigError, QdoraError
from qdora.planning.length import fitted
from qdora.run_folder import RunFolder
from qdora.training.resume import as_it_was, check_early, check_fingerprints, check_num_steps
from tests.support import ROOT


def run_config(**groups: object) -> RunConfig:
    values = {"model": ModelConfig(path="org/model"), "data": DataConfig(train="org/data"), **groups}
    config = RunConfig(**values)  # type: ignore[arg-type]
    return replace(config, train=fitted(config.train, num_rows=1000, num_ranks=1))  # as after the data are read


def manifest_of(config: RunConfig, step: int, changes: list[Change] | None = None) -> Manifest:
    """Returns that of a run on one rank with 8 rows a step."""
    return Manifest(
        step=step,
        num_tokens=0,
        eval_loss=None,
        loader={},
        guard={},
        rows_per_step=8,
        world_size=1,
        run_id="run",
        tracker_id=None,
        config=config_values(config),
        versions={},
        data_fingerprint="data",
        model_fingerprint="model",
        changes=changes or [],
    )


def save_checkpoint(run: Path, manifest: Manifest) -> Path:
    """Writes a checkpoint without tensors, which `check_early` does not look at."""
    folder = run / "checkpoints" / f"step-{manifest.step:08d}"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


def test_changes_have_both_values_and_the_step_from_which_they_hold() -> None:
    before = manifest_of(run_config(optim=OptimConfig(learning_rate=1e-2)), step=4)
    optim = OptimConfig(learning_rate=1e-3, schedule=Schedule.linear, weight_decay=0.1)
    changes = changes_since(run_config(optim=optim, train=TrainConfig(num_steps=9)), 2, before)
    assert shown(changes) == [
        "from step 5: ranks 1 -> 2, optim.learning_rate 0.01 -> 0.001, optim.schedule cosine -> linear, "
        "optim.weight_decay 0.0 -> 0.1, train.num_steps null -> 9, train.num_epochs 1.0 -> null"
    ]


def test_another_start_of_the_same_run_is_no_change() -> None:
    """Nor is an option that the run did not know yet, at its default."""
    before = manifest_of(run_config(), step=4)
    del before.config["train"]["cuda_graph"], before.config["plan"]
    again = replace(run_config(), run_id="other", output_dir="elsewhere", resume="a/step-00000004", allow_changes=True)
    assert changes_since(again, 1, before) == []
    assert [change.option for change in changes_since(again, 1, before, {"data": ("a", "b")})] == ["data"]


def test_run_of_an_earlier_commit_that_goes_on_has_not_changed() -> None:
    """It gave no length, and had one epoch."""
    before = manifest_of(run_config(), step=4)
    before.config["train"]["num_epochs"] = None
    again = replace(run_config(), train=TrainConfig())
    assert changes_since(as_it_was(again, 1, before), 1, before) == []


@pytest.mark.parametrize("stored", [{}, {"prompt": "q", "completion": "a"}, None])
def test_other_columns_are_another_run(stored: dict[str, str] | None) -> None:
    """None: of a commit that had no such option."""
    data = DataConfig(train="data.jsonl", columns={"prompt": "question", "completion": "answer"})
    values = config_values(run_config(data=DataConfig(train="data.jsonl", columns=stored or {})))
    if stored is None:
        del values["data"]["columns"]
    with pytest.raises(ConfigError, match=r"it has data\.columns=") as refused:
        check_identity(run_config(data=data), values, "run")
    assert "(now {prompt:question,completion:answer})" in str(refused.value).replace("'", "")
    check_identity(run_config(data=data), config_values(run_config(data=data)), "run")


def test_value_that_comes_back_keeps_its_history() -> None:
    rates = [Change(from_step=5, option="optim.learning_rate", before=1e-2, now=1e-3)]
    rates += [Change(from_step=9, option="optim.learning_rate", before=1e-3, now=1e-2)]
    other = Change(from_step=9, option="optim.weight_decay", before=0.0, now=0.1)
    words = "0.01 up to step 4, 0.001 up to step 8, 0.01 from step 9"
    assert over_time("optim.learning_rate", "0.01", [*rates, other]) == words
    assert over_time("optim.schedule", "cosine", [*rates, other]) == "cosine"
    assert len(shown([*rates, other])) == 2


def test_what_only_shows_is_not_of_learning() -> None:
    config = run_config(tracker=TrackerConfig(kind=TrackerKind.none), train=TrainConfig(log_every=2, report=False))
    changes = changes_since(config, 1, manifest_of(run_config(), 4))
    assert [change.option for change in changes] == ["train.log_every", "train.report", "tracker.kind"]
    assert of_learning(changes) == []
    assert of_learning(changes_since(run_config(seed=1), 1, manifest_of(run_config(), 4)))


def test_checkpoint_keeps_its_changes_and_one_of_before_has_none(tmp_path: Path) -> None:
    changes = [Change(from_step=3, option="optim.learning_rate", before=1e-2, now=1e-3)]
    assert read_manifest(save_checkpoint(tmp_path, manifest_of(run_config(), 4, changes))).changes == changes
    before = Path(__file__).with_name("manifest_of_schema_3.json").read_text()
    old = tmp_path / "old"
    old.mkdir()
    (old / MANIFEST).write_text(before)
    manifest = read_manifest(old)
    assert (manifest.changes, manifest.system, manifest.template) == ([], None, None)


def test_config_of_a_run_has_its_changes_and_is_read_without_them(tmp_path: Path) -> None:
    run, config = RunFolder(tmp_path / "run"), run_config(run_id="a")
    changes = [Change(from_step=3, option="adapter.target_modules", before=["q_proj"], now=["all-linear"])]
    run.start(config, 2, changes)
    assert run.read_changes() == changes
    assert run.read_config() == config
    run.start(config, 2)
    assert run.read_changes() == []
    assert "\nchanges:" not in run.config.read_text()


@pytest.mark.parametrize(
    ("now", "words", "back", "can_be_allowed"),
    [
        ({"seed": 1}, "seed=0 (now 1)", "seed=0", True),
        ({"adapter": AdapterConfig(rank=8)}, "adapter.rank=16 (now 8)", "adapter.rank=16", False),
        ({"adapter": AdapterConfig(method=AdapterMethod.lora)}, "adapter.method=dora (now lora)", "method=dora", True),
        ({"adapter": AdapterConfig(method=AdapterMethod.vera)}, "adapter.method=dora (now vera)", "method=dora", False),
        (
            {"adapter": AdapterConfig(target_modules=["q_proj"])},
            "adapter.target_modules=[all-linear] (now [q_proj])",
            "'adapter.target_modules=[all-linear]'",
            True,
        ),
        ({"quant": QuantConfig(double_quant=False)}, "quant.double_quant=true (now false)", "double_quant=true", True),
    ],
    ids=["seed", "rank", "method", "tensors", "modules", "quantisation"],
)
def test_refusal_names_both_values_and_each_way_out(
    now: dict[str, object], words: str, back: str, can_be_allowed: bool
) -> None:
    """`allow_changes=true` only where it helps: a checkpoint has tensors of one shape."""
    stored, config = config_values(run_config()), run_config(**now)
    with pytest.raises(ConfigError) as refused:
        check_identity(config, stored, "RUN")
    text = str(refused.value)
    assert text.startswith(f"RUN belongs to another run: it has {words}. ")
    assert f"{back} goes on with it; output_dir=ANOTHER begins a new run" in text
    assert ("; allow_changes=true goes on all the same" in text) == can_be_allowed
    allowed = replace(config, allow_changes=True)
    if can_be_allowed:
        check_identity(allowed, stored, "RUN")
    else:
        with pytest.raises(ConfigError, match="whose tensors do not fit"):
            check_identity(allowed, stored, "RUN")


def test_old_values_are_overrides_that_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell hands it on, whatever is in a name."""
    monkeypatch.chdir(tmp_path)
    path = "my data/a=b,c.jsonl"
    Path(path).parent.mkdir()
    Path(path).touch()
    stored = config_values(run_config(data=DataConfig(train=path, limit=3)))
    with pytest.raises(ConfigError) as refused:
        check_identity(run_config(), stored, "RUN")
    back = str(refused.value).partition(". ")[2].partition(" goes on with it")[0]
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {back}"], capture_output=True, text=True, check=True).stdout
    values = compose("train", ["model.path=model", *words.splitlines()])
    assert values is not None
    check_identity(typed(values, RunConfig), stored, "RUN")
    assert values.data.train == path


def test_way_back_does_not_lead_to_what_was_moved() -> None:
    stored = config_values(run_config(data=DataConfig(train="gone.jsonl"), model=ModelConfig(path="/gone")))
    with pytest.raises(ConfigError) as refused:
        check_identity(run_config(seed=1), stored, "RUN")
    text = str(refused.value)
    assert "it has seed=0 (now 1), data.train=gone.jsonl (now org/data), model.path=/gone (now org/model). " in text
    assert ". seed=0 goes on with it; " in text


@pytest.mark.parametrize("is_there", [True, False])
def test_other_tokenizer_is_traced_to_an_adapter_that_is_gone(tmp_path: Path, is_there: bool) -> None:
    """A run that began from an adapter with a template of its own, and whose data are as they were."""
    adapter = tmp_path / "adapter"
    if is_there:
        adapter.mkdir()
        (adapter / CONFIG).write_text("{}")
    config = run_config(adapter=AdapterConfig(path=str(adapter)))
    with pytest.raises(CheckpointError) as refused:
        check_fingerprints(config, Path("STEP"), manifest_of(config, 4), {"data": "other", "model": "model"})
    back = f"adapter.path={adapter}, whose tokenizer and chat template it had" if not is_there else "what data.train="
    assert f"another chat template. {back}" in str(refused.value)
    assert "put back there, goes on with it" in str(refused.value)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"seed": 1}, r"belongs to another run: it has seed=0 \(now 1\)\. seed=0 goes on with it"),
        ({"train": TrainConfig(num_accumulation_steps=4)}, r"has 8 rows a step, .* are 4: .*_steps=8 goes on with it"),
        (
            {"train": TrainConfig(num_steps=3)},
            r"is of step 4, .* to have 3\. train\.num_steps=4 or more, or resume=.*2 ",
        ),
    ],
    ids=["option", "rows", "steps"],
)
def test_early_check_needs_the_manifest_alone(tmp_path: Path, now: dict[str, object], words: str) -> None:
    """In the run's folder, and in another that goes on from its checkpoint: where that is no way out by itself."""
    config = run_config(output_dir=str(tmp_path))
    for step in (2, 4):
        newest = save_checkpoint(tmp_path, manifest_of(config, step))
    RunFolder(tmp_path).start(config, 4)
    check_early(config)
    changed = replace(config, **now)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{words}.*; output_dir=ANOTHER begins a new run"):
        check_early(changed)
    elsewhere = replace(changed, output_dir=str(tmp_path / "other"), resume=str(newest))
    without = f"; output_dir=ANOTHER, without resume={newest}, begins a new run"
    with pytest.raises(ConfigError, match=f"{words}.*{without}"):
        check_early(elsewhere)


def test_steps_beyond_the_end_name_ways_that_can_be_gone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, manifest_of(run_config(), 2))
    late = save_checkpoint(tmp_path, manifest_of(run_config(), 6))
    by_epochs = run_config(train=TrainConfig(num_epochs=1))
    for config, way in ((by_epochs, "train.num_epochs=null train.num_steps=6"), (run_config(), "train.num_steps=6")):
        with pytest.raises(ConfigError, match=f" {way} or more, or resume=.*step-00000002 "):
            check_num_steps(config, late, read_manifest(late), 3)
    again = replace(by_epochs, resume=str(late.with_name("step-00000002")))
    with pytest.raises(ConfigError) as refused:
        check_num_steps(again, late, read_manifest(late), 3)
    assert "(the later ones are set aside)" not in str(refused.value)


def test_early_check_leaves_to_the_full_one_what_it_cannot_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged checkpoint is not renamed, a finished run may have fewer steps, and machines are asked together."""
    config = run_config(output_dir=str(tmp_path), train=TrainConfig(num_steps=4))
    newest = save_checkpoint(tmp_path, manifest_of(config, 4))
    run = RunFolder(tmp_path)
    run.start(config, 4)
    fewer = replace(config, train=TrainConfig(num_steps=3))
    with pytest.raises(ConfigError):
        check_early(fewer)
    run.write_summary({"status": "finished"})
    run.adapter.mkdir()
    (run.adapter / WEIGHTS).write_bytes(b"weights")
    check_early(fewer)
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    check_early(replace(config, seed=1))
    monkeypatch.undo()
    (newest / MANIFEST).write_text("{")
    check_early(config)
    assert newest.exists()


def written_inputs(folder: Path) -> RunConfig:
    """Returns a run in `folder` whose model, data, held-out data and adapter lie beside it."""
    for name in ("model", "adapter"):
        (folder / name).mkdir()
    (folder / "adapter" / CONFIG).write_text("{}")
    for name in ("train.jsonl", "eval.jsonl"):
        (folder / name).touch()
    return run_config(
        model=ModelConfig(path=str(folder / "model")),
        data=DataConfig(train=str(folder / "train.jsonl"), eval=str(folder / "eval.jsonl")),
        adapter=AdapterConfig(path=str(folder / "adapter")),
        output_dir=str(folder / "run"),
    )


@pytest.mark.parametrize(
    ("name", "first", "later"),
    [
        ("model", "model: no such folder, and not a hub id", r"moved or renamed, model\.path=NEW goes on"),
        ("train.jsonl", "no such data file or folder: .*train", r"moved or renamed, data\.train=NEW goes on"),
        ("eval.jsonl", "no such data file or folder: .*eval", r"data\.eval=NEW goes on with the run, and .*=null"),
        ("adapter", "no adapter_config.json there: give the folder of an adapter", None),
    ],
    ids=["model", "data", "held-out", "adapter"],
)
def test_what_is_not_there_is_told_with_each_way_out(tmp_path: Path, name: str, first: str, later: str | None) -> None:
    """Of a first start, and of a run that goes on, which needs no adapter any more; before torch is imported."""
    config = written_inputs(tmp_path)
    check_early(config)
    (tmp_path / name).rename(tmp_path / "moved")
    with pytest.raises(QdoraError, match=first) as refused:
        check_early(config)
    assert "goes on" not in str(refused.value)
    save_checkpoint(tmp_path / "run", manifest_of(config, 4))
    RunFolder(tmp_path / "run").start(config, 4)
    if later is None:
        check_early(config)
        return
    with pytest.raises(QdoraError, match=f"{first}.*{later}"):
        check_early(config)
    moved = str(tmp_path / "moved")
    ways = {
        "model": [replace(config, model=ModelConfig(path=moved))],
        "train.jsonl": [replace(config, data=replace(config.data, train=moved))],
        "eval.jsonl": [replace(config, data=replace(config.data, eval=way)) for way in (moved, None)],
    }
    for way in ways[name]:
        check_early(way)


def test_refusal_comes_before_torch_is_imported(tmp_path: Path) -> None:
    """Which takes seconds, and transformers more; tokenisation and the model come after these."""
    config = run_config(output_dir=str(tmp_path))
    save_checkpoint(tmp_path, manifest_of(config, 4))
    RunFolder(tmp_path).start(config, 4)
    code = "import sys; from qdora.commands import run; print(run(sys.argv[1:]), {'torch', 'psutil'} & {*sys.modules})"
    options = ["train", "model.path=org/model", "data.train=org/data", f"output_dir={tmp_path}", "seed=1"]
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "2 {'psutil'}\n", done.stderr
    assert "seed=0 goes on with it" in done.stderr
