"""The command line: what Hydra says becomes one line that helps."""

import logging
import shutil
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given as whatever
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qdora import commands
from qdora.commands import compose, run, typed
from qdora.commands.explain import _OTHER_WORDS, option_names
from qdora.commands.help import field_docs
from qdora.commands.spelling import in_grammar
from qdora.config import OptimConfig, RunConfig
from qdora.config.commands import quoted
from tests.support.processes import run as run_process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tarin"],
            "unknown command 'tarin', did you mean 'train'?; there are: train, merge, evaluate, study",
        ),
        (["train", "adapter.rnak=3"], "there is no option adapter.rnak, did you mean 'adapter.rank'?"),
        (["train", "+adapter.rnak=3"], "there is no option adapter.rnak, did you mean 'adapter.rank'?"),
        (["train", "optimm.learning_rate=3"], "there is no option optimm, did you mean 'optim'?"),
        (["train", "+foo=3"], "there is no option foo"),
        (
            ["train", "adapter=dorra"],
            "adapter=dorra: no such choice, did you mean 'dora'?; there are: dora, dvora, lora, none",
        ),
        (["train", "adapter.rank=abc"], "adapter.rank: Value 'abc' of type 'str' could not be converted to Integer"),
        (["train", "adapter.method=foo"], "adapter.method: Invalid value 'foo', expected one of [dora, lora, vera"),
        (["train", "experiment=smollm2_identity"], "a recipe is added with a plus sign: +experiment=smollm2_identity"),
        (["train", "+experiment=smollm2"], "did you mean 'smollm2_identity'?"),
        (["train", "x=["], "'x=[' is not an option: write name=value"),
        (["train", "train.num_steps=3", "train.num_epochs=2"], "contradict each other"),
        (["train"], "model.path is not set"),
        (["study", "methods={a:{adapter:dora}}"], "methods has no a: a new one is added whole, as +methods={a:{"),
        (["study", "methods.a.adapter=dora"], "methods has no a: a new one is added whole, as +methods={a:{"),
        (["study", "+methods={a:{adapter:dora,learning_rates:[1e-3]}}"], "model.path is not set"),
        (["merge", "run=a"], "output is not set"),
        (["evaluate", "run=a", "data.limit=3"], "data.limit: write limit=N, the option of qdora evaluate"),
        (["merge", "run=a", "output=o", "quant=none"], "quant.method: run=DIR decides that; leave it out, or give"),
        (["evaluate", "run=a", "protocol=guess"], "expected one of [loss, likelihood, generate, harness]"),
    ],
)
def test_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where OmegaConf is asked for causes, as it is under a debugger: then an error is its own cause."""
    for causes in ("0", "1"):
        monkeypatch.setenv("OC_CAUSE", causes)
        assert run(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("qdora: ")
        assert message in line


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("lr=1e-3", "optim.learning_rate"),
        ("optim.lr=1e-3", "optim.learning_rate"),
        ("batch_size=4", "train.micro_batch_size"),
        ("num_train_epochs=3", "train.num_epochs"),
        ("lora_r=8", "adapter.rank"),
        ("max_seq_length=512", "data.max_length"),
    ],
)
def test_other_programs_words_lead_to_the_option(given: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "model.path=m", "data.train=d", given]) == 2
    assert f"there is no option {given.partition('=')[0]}, did you mean {wanted!r}?" in capsys.readouterr().err
    values = compose("train", ["model.path=m", "data.train=d", f"{wanted}={given.partition('=')[2]}"])
    assert float(OmegaConf.select(values, wanted)) == float(given.partition("=")[2])


def test_words_of_other_programs_stand_for_options_that_there_are() -> None:
    assert {*_OTHER_WORDS.values()} <= {*option_names(RunConfig)}


def test_several_values_are_told_as_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["model.path=m", "data.train=d"]
    assert run(["train", *given, "adapter.target_modules=q_proj,v_proj"]) == 2
    told = capsys.readouterr().err
    assert told.rstrip().endswith("written as a list, adapter.target_modules=[q_proj,v_proj]")
    values = compose("train", [*given, "adapter.target_modules=[q_proj,v_proj]"])
    assert values is not None
    assert values.adapter.target_modules == ["q_proj", "v_proj"]


NAMES = [
    "train(1).jsonl", "Modèles/x.jsonl", "数据.jsonl", "lr=0.1.jsonl", "a,b.jsonl", "my data.jsonl", "org/name#test",
    "name:subset#split", "[old] x.jsonl", "100%.jsonl", "a{1}.jsonl", "~/x.jsonl", "C:\\x.jsonl", "007", "1e5", "true",
    "a'b",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_are_taken_as_they_are_written(name: str) -> None:
    values = compose("train", [f"model.path={name}", "data.train=before", f"data.train={name}", f"output_dir={name}"])
    assert values is not None
    config = typed(values, RunConfig)
    assert (config.model.path, config.data.train, config.output_dir) == (name, name, name)
    listed = f"'{name}'" if "," in name else name
    values = compose("train", ["model.path=m", "data.train=d", f"data.ignore_keys=[{listed}, other]"])
    assert values is not None
    assert values.data.ignore_keys == [name, "other"]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_sweep_reach_its_runs_as_they_are_written(name: str) -> None:
    value = f"'{name}'" if "," in name else name
    options = in_grammar(
        [f"data.train={value},other.jsonl", f"data.ignore_keys=[{value}],[a,b]"], RunConfig, sweep=True
    )
    train, ignored = ([*OverridesParser.create().parse_override(text).sweep_string_iterator()] for text in options)
    runs = [[f"data.train={one}", f"data.ignore_keys={two}"] for one, two in zip(train, ignored, strict=True)]
    values = [compose("train", ["model.path=m", *run_options]) for run_options in runs]
    read = [(one.data.train, [*one.data.ignore_keys]) for one in values if one is not None]
    assert read == [(name, [name]), ("other.jsonl", ["a", "b"])]


@pytest.mark.parametrize("value", ["choice(a,b)", "glob(*)", "a,b", "qwen3,'x y'"])
def test_values_of_a_sweep_stay_as_they_are_where_hydra_reads_them(value: str) -> None:
    assert in_grammar([f"data.train={value}"], RunConfig, sweep=True) == [f"data.train={value}"]


@whatever(st.text(max_size=12))
def test_hydra_reads_what_is_quoted(text: str) -> None:
    assert OverridesParser.create().parse_override(f"x={quoted(text)}").value() == text


def test_names_are_taken_as_they_are_written_beside_hydras_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "model.path=m", "data.train=train (1).jsonl", "--cfg", "job"]) == 0
    assert OmegaConf.create(capsys.readouterr().out).data.train == "train (1).jsonl"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("'my data'", "my data"),
        ('"a,b"', "a,b"),
        ("null", None),
        ("NULL", None),
        ("${output_dir}/x", "here/x"),
        (r"a\,b", "a,b"),
        (r"my\ data", "my data"),
    ],
)
def test_what_hydra_means_something_by_stays_hydras(given: str, expected: str | None) -> None:
    values = compose("train", ["model.path=m", "data.train=d", "output_dir=here", f"data.eval={given}"])
    assert values is not None
    assert values.data.eval == expected


OWN = "defaults: [train, _self_]\n"


@pytest.mark.parametrize(
    ("yaml", "arguments", "message"),
    [
        ("optim: {learning_rate: 1e-3}", ["own"], "begins with 'defaults: [train, _self_]'"),
        ("optim: {learning_rate: 1e-3}", ["own", "data.train=d"], "begins with 'defaults: [train, _self_]'"),
        (OWN + "optim: {learning_rat: 1e-3}", ["own"], "learning_rat"),
        (OWN, ["own", "optim.lr=1"], "there is no option optim.lr, did you mean 'optim.learning_rate'?"),
        (OWN, ["other"], "--config-name: there is no other.yaml in the folder of --config-dir"),
    ],
)
def test_mistake_in_a_yaml_of_ones_own_is_one_line(
    yaml: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text(yaml, encoding="utf-8")
    assert run(["train", "--config-dir", str(tmp_path), "--config-name", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_yaml_of_ones_own_is_under_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN + "optim: {learning_rate: 1e-3, beta1: 0.8}", encoding="utf-8")
    given = ["data.train=d", "optim.learning_rate=1e-2"]
    values = compose("train", ["model.path=m", "--config-dir", str(tmp_path), "--config-name", "own", *given])
    assert values is not None
    config = typed(values, RunConfig)
    assert (config.optim.learning_rate, config.optim.beta1, config.adapter.rank) == (1e-2, 0.8, 16)


def test_the_last_of_several_values_counts() -> None:
    for first, last in (("a,b", "'c,d'"), ("'c,d'", "a,b")):
        values = compose("train", ["model.path=m", f"data.train={first}", f"data.train={last}"])
        assert values is not None
        assert values.data.train == last.strip("'")


@pytest.mark.parametrize("command", ["merge", "evaluate"])
@pytest.mark.parametrize("given", ["a/b", "'a/b'", '"a/b"'])
def test_folder_of_an_adapter_is_no_choice_of_a_group(command: str, given: str) -> None:
    values = compose(command, [f"adapter={given}", "model.path=m"])
    assert values is not None
    assert values.adapter == "a/b"


def test_other_ranks_stay_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(["train"]) == 2
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_describes_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 100
    options, flowing = [line.strip() for line in told.splitlines()], " ".join(told.split())
    classes = {"": commands.COMMANDS[name].config_class}
    for option in option_names(classes[""]):
        group, _, field = option.rpartition(".")
        kind = classes.setdefault(group, get_type_hints(classes[""])[group] if group else classes[""])
        place = next(number for number, line in enumerate(options) if line.startswith(f"{option}="))
        described = " ".join(options[place + 1 :])
        description = " ".join(field_docs(kind).get(field, "").split())
        assert described.startswith(description), option
        hint = get_type_hints(kind)[field]
        if hasattr(hint, "__members__"):
            assert f"{description} One of: {', '.join(hint.__members__)}" in flowing, option


def test_help_shows_groups_recipes_and_the_values_that_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "+experiment=smollm2_identity", "adapter.alpha=3", "-h"]) == 0
    told = capsys.readouterr().out
    assert "  adapter: dora, dvora, lora, none, vera\n" in told
    assert "  +experiment=smollm2_identity\n      Teach SmolLM2-135M its new name" in told
    assert "For example: qdora train model.path=" in told
    for shown in ("adapter.alpha=3.0", "train.num_steps=36", "train.num_epochs=null", "data.packing=false"):
        assert f"  {shown}\n" in told
    assert "  adapter.target_modules=[q_proj,k_proj,v_proj,up_proj,down_proj]\n" in told


def test_help_is_shown_by_one_rank_and_mistakes_before_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["train", "adapter.rnak=3", "--help"]) == 2
    assert "did you mean 'adapter.rank'?" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert run(["train", "--help"]) == 0
    assert not capsys.readouterr().out


def test_help_into_a_reader_that_stops_early_ends_quietly() -> None:
    done = run_process(["bash", "-c", f"set -o pipefail; {sys.executable} -m qdora train --help | true"])
    assert (done.returncode, done.stderr) == (0, "")


def test_field_docs_are_those_of_the_field_above() -> None:
    assert field_docs(OptimConfig)["learning_rate"] == "Peak learning rate of AdamW."
    docs = field_docs(RunConfig)
    assert docs["seed"].startswith("Fixes initialisation")
    assert "model" not in docs


def test_cfg_job_prints_the_configuration_instead_of_running(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--cfg", "job", "adapter.rank=5"]) == 0
    assert "rank: 5" in capsys.readouterr().out


def test_help_has_all_that_a_recipe_says_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "LLaMA-7B, or model=llama_13b, llama2_7b, llama3_8b: one learning rate for all; give data.train" in shown
    assert "AGI-Edgerunners" not in shown


def test_waiting_threads_sleep_however_qdora_was_started() -> None:
    arguments = [sys.executable, "-m", "qdora", "generate", "run=nowhere", "prompt=x"]
    passive = run_process(arguments, OMP_DISPLAY_ENV="VERBOSE")
    assert "GOMP_SPINCOUNT = '10000'" not in passive.stderr, "the user's own choice"
    plain = run_process(["env", "-u", "OMP_WAIT_POLICY", *arguments], OMP_DISPLAY_ENV="VERBOSE")
    assert "GOMP_SPINCOUNT = '10000'" in plain.stderr


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "evaluate" in capsys.readouterr().out
    assert run(["--help"]) == 0


def test_hydra_leaves_no_files_and_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose("train", ["model.path=m", "data.train=d"])
    assert Path.cwd() == tmp_path
    assert not list(tmp_path.iterdir())


def test_hydra_leaves_logging_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    logger, handlers = logging.getLogger("made.before"), list(logging.getLogger().handlers)
    compose("train", ["model.path=m", "data.train=d"])
    logger.warning("still heard")
    assert "still heard" in caplog.text
    assert logging.getLogger().handlers == handlers
    assert logging.getLogger().level == logging.WARNING


def test_conf_is_found_inside_an_installed_package(tmp_path: Path, root: Path) -> None:
    """The wheel holds conf/ as qdora/conf; a copy laid out so runs away from the checkout."""
    shutil.copytree(root / "qdora", tmp_path / "qdora", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root / "conf", tmp_path / "qdora" / "conf")
    arguments = [sys.executable, "-m", "qdora", "train", "--cfg", "job"]
    done = run_process(arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "learning_rate" in done.stdout


def test_targets_of_the_commands_exist() -> None:
    for command in commands.COMMANDS.values():
        module, function = command.target.split(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))
