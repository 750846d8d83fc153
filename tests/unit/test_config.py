"""Every configuration composes, and every value is checked."""

from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, get_type_hints

import pytest
from omegaconf import OmegaConf

from qdora import config
from qdora.commands import COMMANDS, compose, conf_folder, typed
from qdora.config import (
    AdapterConfig,
    AdapterMethod,
    DataConfig,
    Dtype,
    EvaluateConfig,
    MergeConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Plan,
    QuantConfig,
    QuantMethod,
    RunConfig,
    TrainConfig,
)
from qdora.config.commands import naming, overlaid
from qdora.config.values import config_from_values, config_values
from qdora.errors import ConfigError

NEEDED = {
    "train": ["model.path=m", "data.train=d"],
    "merge": ["run=r", "output=o"],
    "evaluate": ["run=r", "data.eval=d"],
    "generate": ["run=r", "prompt=p"],
    "chat": ["run=r"],
    "analyze": ["run=r"],
    "report": ["run=r"],
    "study": ["+study=methods", "model.path=m", "data.train=d", "data.eval=e", "tasks=[obqa]", "tasks_path=t"],
    "plan": ["model.path=m"],
    "show": ["model.path=m", "data.train=d"],
    "doctor": [],
}
CONF = conf_folder()
CHOICES = [
    (file.parent.name, file.stem)
    for file in sorted(CONF.glob("*/*.yaml"))
    if file.parent.name not in ("experiment", "study") and (file.parent.name, file.stem) != ("adapter", "none")
]


@cache
def composed(name: str, *overrides: str) -> Any:
    """The typed configuration of a command, not to be changed."""
    values = compose(name, list(overrides))
    assert values is not None
    return typed(values, COMMANDS[name].config_class)


def graphed(*overrides: str) -> Any:
    """A run's configuration with CUDA graphs."""
    return composed("train", *NEEDED["train"], "train.cuda_graph=true", *overrides)


@pytest.mark.parametrize("name", COMMANDS)
def test_command_composes(name: str) -> None:
    assert isinstance(composed(name, *NEEDED[name]), COMMANDS[name].config_class)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_choice_composes_and_is_chosen(group: str, choice: str) -> None:
    overrides = [
        f"{group}={choice}",
        "data.train=d",
        *(["model.path=m"] if choice == "any" or group != "model" else []),
    ]
    made = composed("train", *overrides)
    written = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{choice}.yaml"))
    values = config_values(made)[group]
    for option, value in (written or {}).items():  # type: ignore[union-attr]
        assert values[option] == value or (group, option) == ("model", "path") or option == "train"


def test_full_fine_tuning_composes_without_quantisation() -> None:
    made = composed("train", "model.path=m", "data.train=d", "adapter=none", "quant=none")
    assert (made.adapter.method.name, made.quant.method.name) == ("none", "none")


@pytest.mark.parametrize("name", [file.stem for file in sorted((CONF / "study").glob("*.yaml"))])
def test_study_composes(name: str) -> None:
    given = ["model.path=m", "data.train=d", "data.eval=e", "tasks=[t]", "tasks_path=p"]
    made = composed("study", f"+study={name}", *given)
    assert {"full", "lora", "dora", "full_nf4", "qlora", "qdora"} <= made.methods.keys()
    assert made.tasks == ["t"]


@pytest.mark.parametrize("name", [file.stem for file in sorted((CONF / "experiment").glob("*.yaml"))])
def test_experiment_composes_and_overlays(name: str) -> None:
    plain = config_values(composed("train", "model.path=m", "data.train=d"))
    made = config_values(composed("train", f"+experiment={name}", "model.path=m", "data.train=d", "seed=7"))
    assert made["seed"] == 7
    assert made | {"seed": plain["seed"]} != plain


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdapterConfig(rank=0), r"adapter\.rank is 0"),
        (lambda: AdapterConfig(dropout=1.0), r"adapter\.dropout is 1\.0"),
        (lambda: AdapterConfig(alpha=0), r"adapter\.alpha is 0"),
        (lambda: AdapterConfig(target_modules=3), r"adapter\.target_modules is 3"),
        (lambda: AdapterConfig(method=AdapterMethod.vera, rank_stabilized=True), r"rank_stabilized=true .* for vera"),
        (lambda: AdapterConfig(method=AdapterMethod.dvora, rank_stabilized=True), r"rank_stabilized=true .* for dvora"),
        (lambda: AdapterConfig(projection_key=1), r"adapter\.projection_key goes with vera and dvora, not dora"),
        (lambda: AdapterConfig(method=AdapterMethod.vera, projection_key=-1), r"adapter\.projection_key is -1"),
        (lambda: AdapterConfig(target_modules=[]), r"adapter\.target_modules is \[\]"),
        (lambda: AdapterConfig(target_modules=["("]), "not a valid regular expression"),
        (lambda: DataConfig(max_length=1), r"data\.max_length is 1"),
        (lambda: DataConfig(limit=0), r"data\.limit is 0"),
        (lambda: OptimConfig(learning_rate=0), r"optim\.learning_rate is 0"),
        (lambda: OptimConfig(warmup_ratio=2), r"optim\.warmup_ratio is 2"),
        (lambda: OptimConfig(weight_decay=-1), r"optim\.weight_decay is -1"),
        (lambda: OptimConfig(max_grad_norm=-1), r"optim\.max_grad_norm is -1"),
        (lambda: OptimConfig(beta2=1), r"optim\.beta2 is 1"),
        (lambda: TrainConfig(num_steps=0), r"train\.num_steps is 0"),
        (lambda: TrainConfig(num_epochs=0), r"train\.num_epochs is 0"),
        (lambda: TrainConfig(num_steps=1, num_epochs=1), "contradict each other"),
        (lambda: TrainConfig(log_every=0), r"train\.log_every is 0"),
        (lambda: TrainConfig(keep_checkpoints=1), r"train\.keep_checkpoints is 1"),
        (lambda: ParallelConfig(timeout_s=0), r"parallel\.timeout_s is 0"),
        (lambda: ParallelConfig(shard_size=2), "means something only with parallel=hsdp"),
        (lambda: ParallelConfig(plan=Plan.ddp, cpu_offload=True), r"parallel\.cpu_offload=true needs"),
        (lambda: RunConfig(data=DataConfig(train="d")), r"model\.path is not set"),
        (lambda: RunConfig(model=ModelConfig(path="m")), r"data\.train is not set"),
        (lambda: graphed("data.packing=false"), "leave data.packing=true"),
        (lambda: graphed("adapter.dropout=0.1"), r"adapter\.dropout=0\.1: set one of the two"),
        (lambda: graphed("adapter=none", "quant=none"), "is for adapters"),
        (lambda: graphed("parallel=hsdp"), "parallel=none or ddp"),
        (lambda: graphed("parallel.cpu_offload=true"), "all that it needs on the GPU"),
        (lambda: graphed("parallel.offload_activations=true"), "all that it needs on the GPU"),
        (lambda: MergeConfig(output="o"), "give one of run=DIR"),
        (lambda: MergeConfig(adapter="a", output="o"), r"adapter=DIR needs model\.path"),
        (lambda: MergeConfig(run="r"), "output is not set"),
        (lambda: MergeConfig(run="r", output="o", max_shard_gib=0), "max_shard_gib is 0"),
        (lambda: EvaluateConfig(), "give one of run=DIR"),
        (lambda: EvaluateConfig(run="r", adapter="a"), "a run has its own"),
        (lambda: EvaluateConfig(run="r", model=ModelConfig(path="m", dtype=Dtype.float32)), r"^model\.dtype: run=DIR"),
        (lambda: EvaluateConfig(run="r", quant=QuantConfig()), r"^quant\.method: run=DIR decides that"),
        (lambda: EvaluateConfig(run="r", data=DataConfig(limit=3)), r"^data\.limit: write limit=N"),
        (
            lambda: EvaluateConfig(run="r", data=DataConfig(train="d", packing=False)),
            r"^data\.packing, data\.train: qdora evaluate scores data\.eval",
        ),
        (
            lambda: MergeConfig(
                run="r",
                output="o",
                model=ModelConfig(revision="v"),
                quant=QuantConfig(method=QuantMethod.none, strict=True, double_quant=False),
            ),
            r"^model\.revision, quant\.double_quant, quant\.strict: run=DIR decides that; leave it out",
        ),
        (lambda: EvaluateConfig(model=ModelConfig(path="m")), r"data\.eval is not set"),
        (lambda: EvaluateConfig(run="r", batch_size=0), "batch_size is 0"),
    ],
)
def test_value_that_is_not_allowed_is_told(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "text",
    [
        "What's up, man?",
        "ü 😀 (a) {b} = ; # x",
        "true",
        "null",
        "-",
        "1e5",
        "a\nb",
        '"q"',
        "${y}",
        r"\${y}",
        r"\\${y} \n",
    ],
)
def test_what_people_say_is_taken_as_it_is_written(text: str) -> None:
    config = composed("generate", "run=r", f"prompt={text}", f"system={text}")
    assert (config.prompt, config.system) == (text, text)


def test_a_moved_base_goes_with_a_run() -> None:
    assert composed("merge", *NEEDED["merge"], "model.path=m", "dtype=float32", "base=nf4").model.path == "m"
    assert composed("evaluate", *NEEDED["evaluate"], "model.path=m", "data.max_length=9").model.path == "m"


def test_options_of_a_run_stay_where_none_is_given() -> None:
    stored = DataConfig(train="t", eval="e", max_length=9, packing=False)
    assert overlaid(stored, DataConfig(eval="other")) == replace(stored, eval="other")
    assert overlaid(stored, DataConfig()) == stored


def test_what_is_given_counts_also_where_it_is_the_default() -> None:
    stored = DataConfig(train="t", max_length=9)
    with naming(["data.max_length", "model.dtype"]):
        assert overlaid(stored, DataConfig(eval="other")) == replace(stored, eval="other", max_length=1024)
        with pytest.raises(ConfigError, match=r"model\.dtype: run=DIR decides that"):
            EvaluateConfig(run="r", data=DataConfig(eval="e"))
    assert overlaid(stored, DataConfig(eval="other")) == replace(stored, eval="other")


def test_4_bit_weights_cannot_be_trained() -> None:
    with pytest.raises(ConfigError, match="adapter=none quant=none"):
        composed("train", *NEEDED["train"], "adapter=none")


@pytest.mark.parametrize(
    ("alpha", "stabilized", "scaling"), [(None, False, 2.0), (8, False, 0.5), (8, True, 2.0), (None, True, 8.0)]
)
def test_scaling_is_alpha_over_rank_or_its_root(alpha: float | None, stabilized: bool, scaling: float) -> None:
    assert AdapterConfig(rank=16, alpha=alpha, rank_stabilized=stabilized).scaling == scaling


@pytest.mark.parametrize("method", [AdapterMethod.vera, AdapterMethod.dvora])
def test_scaling_of_vera_is_1_at_any_rank_unless_alpha_is_given(method: AdapterMethod) -> None:
    assert [AdapterConfig(method=method, rank=rank).scaling for rank in (4, 1024)] == [1, 1]
    assert AdapterConfig(method=method, rank=16, alpha=8).scaling == 0.5


def test_unknown_attribute_is_not_swallowed() -> None:
    with pytest.raises(AttributeError):
        AdapterConfig().rnak = 3  # type: ignore[attr-defined]


def test_config_comes_back_from_its_yaml_values() -> None:
    made = composed("train", "+experiment=smollm2_identity", "seed=3", "adapter.alpha=4")
    assert config_from_values(RunConfig, config_values(made)) == made


def test_config_of_another_version_is_told() -> None:
    values = config_values(composed("train", *NEEDED["train"])) | {"later_option": 1}
    with pytest.raises(ConfigError, match="has no option later_option"):
        config_from_values(RunConfig, values)


def test_all_groups_of_conf_are_dataclasses() -> None:
    groups = {path.name for path in CONF.iterdir() if path.is_dir()} - {"experiment", "study"}
    groups |= {"plan"}  # which has no choices
    assert groups == {item.name for item in fields(RunConfig) if is_dataclass(get_type_hints(RunConfig)[item.name])}
    assert {"RunConfig", "AdapterMethod"} <= set(config.__all__)
