"""The page of a run and of a study: what it says, what it leaves out, and that it cannot be made to do anything."""

import copy
import gzip
import json
import re
import shlex
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qdora.adapter import peft_format
from qdora.adapter.dora import adapted_layers
from qdora.checkpoint_folder import Change
from qdora.commands import COMMANDS, compose, typed
from qdora.config import (
    AdapterConfig,
    AdapterMethod,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Plan,
    QuantConfig,
    QuantMethod,
    ReportConfig,
    RunConfig,
)
from qdora.config.values import config_values, plain
from qdora.errors import ConfigError
from qdora.model import load_model
from qdora.parallel import start_alone
from qdora.reporting.answers import sample_answers
from qdora.reporting.page import DASH, MINUS, Answer, Page, Section, Text, number, render
from qdora.reporting.reproduce import study_command, train_command
from qdora.reporting.run import report
from qdora.reporting.run_page import run_page
from qdora.reporting.study_page import findings, study_page, verdict
from qdora.run_folder import RunFolder
from qdora.run_result import RunResult
from tests.support.models import make_model

HOSTILE = "<script>alert('x')</script> & \"quoted\" ${x} {{ 7 * 7 }} --> </svg> $\\frac{1$"
METRICS = [
    {"step": 0, "eval_loss": 3.25, "memory_gib": 0.5},
    *(
        {"step": step, "loss": 3 - step / 8, "learning_rate": 1e-3 / step, "tokens_per_second": 1000.0 + step}
        | {"memory_gib": 0.75, "num_tokens": 400 * step}
        for step in range(1, 5)
    ),
]
SUMMARY = {
    "status": "finished",
    "steps": 4,
    "num_tokens": 1600,
    "eval_losses": {"0": 3.25, "4": 2.125},
    "tokens_per_second": 2345.6,
    "peak_memory_gib": [1.25, 1.5],
    "weight_bytes_per_rank": [3 * 2**20, 5 * 2**20],
    "weight_bytes_total": 8 * 2**20,
    "num_trainable_parameters": 123456,
    "load_s": 1.5,
    "checkpoint_stall_s": 0.25,
    "device": "cpu",
    "world_size": 2,
    "versions": {"python": "3.11.9", "torch": "2.11.0"},
}
TASK = {"accuracy": 0.4, "standard_error": 0.1, "chance": 0.25, "majority": 0.3, "loss": 1.2345, "num_samples": 1234}
SCORES = {"protocol": "likelihood", "data": ["/d/one.jsonl", "/d/two.jsonl"], **TASK, "accuracy": 0.35}
SCORES["tasks"] = {"one": TASK, "two": {**TASK, "accuracy": 0.3}}


class Reader(HTMLParser):
    """The elements of a page, and the text that a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"
        self.text += " "

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def headings(self) -> list[str]:
        return [str(attributes["id"]) for tag, attributes in self.tags if tag == "h2"]

    def addresses(self) -> list[str]:
        names = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
        return [str(attributes[name]) for _, attributes in self.tags for name in names if name in attributes]


def make_run(folder: Path, **changes: Any) -> RunFolder:
    """The files of a run, without any weights that could be loaded."""
    values = {
        "model": ModelConfig(path="m"),
        "data": DataConfig(train="train.jsonl", eval="eval.jsonl"),
        "run_id": "my-run",
        "output_dir": str(folder),
        **changes,
    }
    folder.mkdir()
    text = yaml.safe_dump(config_values(RunConfig(**values)))
    (folder / "config.yaml").write_text(text)
    return RunFolder(folder)


def finish(run: RunFolder) -> None:
    """What a run leaves at its end."""
    run.adapter.mkdir()
    run.summary.write_text(json.dumps(SUMMARY))
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in METRICS))


def read(page: Page) -> Reader:
    return Reader(render(page))


def arm(method: str, rank: int | None, loss: float, accuracy: float) -> dict[str, Any]:
    """An arm of study.json, with two seeds."""
    training = {"steps": 3, "num_tokens": 4567, "tokens_per_second": 789.4, "num_trainable_parameters": 98765}
    return {
        "arm": method if rank is None else f"{method} r={rank}",
        "method": method,
        "rank": rank,
        "quant": "none",
        "learning_rate": 0.003,
        "learning_rate_at_edge": method == "dora",
        "loss": loss,
        "accuracy": accuracy,
        "seeds": {"loss": [loss - 0.01, loss + 0.01], "accuracy": [accuracy, accuracy]},
        "training": [{**training, "peak_memory_gib": peak, "eval_loss": loss} for peak in (1.11, 2.22)],
    }


def pair(label: str, mean: float, half: float) -> dict[str, Any]:
    one = {"mean": mean, "low": mean - half, "high": mean + half, "seeds": [mean, mean]}
    return {"label": label, "rank": 4, "loss": one, "accuracy": {**one, "mean": -mean, "low": -mean, "high": -mean}}


@pytest.fixture
def study() -> dict[str, Any]:
    """study.json of three methods, of which DoRA was better than LoRA."""
    overrides = ["model.path=m", "data.train=t", "data.eval=e", "tasks=[one]", "tasks_path=d", "ranks=[4]"]
    both = [f"{name}:{{adapter:{name},learning_rates:[1e-3,3e-3]}}" for name in ("lora", "dora")]
    overrides += [f"+methods={{full:{{adapter:none,learning_rates:[1e-4]}},{','.join(both)}}}", "seeds=[0,1]"]
    values = compose("study", overrides)
    assert values is not None
    config = typed(values, COMMANDS["study"].config_class)
    arms = [arm("full", None, 2.1, 0.5), arm("lora", 4, 2.2, 0.4), arm("dora", 4, 2.05, 0.6)]
    tried = [
        {
            "arm": f"{name} r=4",
            "learning_rate": rate,
            "folder": f"{name}-rank-4-rate-{rate:g}-seed-0",
            "eval_loss": loss,
        }
        for name in ("lora", "dora")
        for rate, loss in ((0.001, 2.5), (0.003, 2.4), (0.01, None))
    ]
    return {
        "config": _as_json(config),
        "arms": arms,
        "bases": {"base-none": {"loss": 2.9, "accuracy": 0.31, "chance": 0.25, "majority": 0.45}},
        "search": tried,
        "differences": [pair("dora r=4 - lora r=4", -0.15, 0.05), pair("lora r=4 - full", 0.1, 0.2)],
        "interval": "95%, 10000 draws of seeds and samples",
        "missing": [],
    }


def _as_json(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = plain(asdict(config))
    return values


def write_study(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps(values))
    runs = [
        {"name": f"{method}-rank-4-rate-0.003-seed-{seed}", "summary": SUMMARY, "metrics": METRICS}
        for method in ("lora", "dora")
        for seed in (0, 1)
    ]
    lines = "".join(json.dumps(run) + "\n" for run in runs)
    (folder / "runs.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for tried in values["search"]:
        (folder / tried["folder"]).mkdir()
    return folder


def test_run_page_has_the_numbers_of_its_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    finish(run)
    (run.path / "evaluation-one").mkdir()
    (run.path / "evaluation-one" / "results.json").write_text(json.dumps(SCORES))
    text = " ".join(read(run_page(run, [Answer("2+2=", "4", "five", "four")])).text.split())
    for said in ("QDoRA", "1,600", "3.2500 → 2.1250", "1.50 GiB", "2,346", "123,456", "1.5 s", "0.2 s", "torch 2.11.0"):
        assert said in text, said
    for said in ("one 0.400 ± 0.196 0.250 0.300 1.2345 1,234", "two 0.300 ± 0.196", "mean 0.350 ± 0.196"):
        assert said in text, said
    for said in ("rank 0 1.25 3.00 MiB", "rank 1 1.50 5.00 MiB", "all 1.50 8.00 MiB 2,346"):
        assert said in text, said
    for said in ("2+2=", "five", "four"):
        assert said in text, said


def test_damaged_scores_and_analysis_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    finish(run)
    for folder, name, left in (("evaluation", "results", "scores"), ("analysis", "analysis", "analysis")):
        (run.path / folder).mkdir()
        (run.path / folder / f"{name}.json").write_text('{"protocol": ')
        run_page(run, [])
        assert f"{run.path / folder / name}.json holds no {left} that can be read" in capsys.readouterr().out


def test_scores_of_the_harness_keep_its_names(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    finish(run)
    tasks = {
        "arc": {"num_samples": 50, "accuracy": 0.4, "standard_error": 0.05, "harness": {"acc": 0.4, "acc_norm": 0.41}},
        "gsm8k": {"num_samples": 60, "harness": {"exact_match,strict": 0.125, "exact_match_stderr,strict": 0.01}},
    }
    (run.path / "evaluation").mkdir()
    results = {"protocol": "harness", "data": ["arc", "gsm8k"], "harness": "0.4.9", "tasks": tasks}
    (run.path / "evaluation" / "results.json").write_text(json.dumps(results))
    text = " ".join(read(run_page(run, [])).text.split())
    assert f"task accuracy samples exact_match,strict arc 0.400 ± 0.098 50 {DASH} gsm8k {DASH} 60 0.125 " in text
    assert "'tasks=[arc,gsm8k]'" in text


def test_parts_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    begun = make_run(tmp_path / "run")
    assert read(run_page(begun, [])).headings() == ["overview", "options", "commands"]
    assert "has not finished" in read(run_page(begun, [])).text
    finish(begun)
    page = read(run_page(begun, []))
    assert page.headings() == ["overview", "curves", "weights", "memory", "options", "commands", "versions"]
    assert f"qdora analyze run={begun.path}" in page.text
    assert "has not finished" not in page.text
    begun.metrics.write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    labels = [str(attributes["aria-label"]) for tag, attributes in read(run_page(begun, [])).tags if tag == "svg"]
    assert labels == ["Loss over 1 logged steps: from 2 to 2"]


def test_text_cannot_leave_its_place(tmp_path: Path) -> None:
    data = DataConfig(train=HOSTILE, eval=HOSTILE)
    run = make_run(tmp_path / "run", model=ModelConfig(path=HOSTILE), data=data, run_id=HOSTILE)
    finish(run)
    (run.path / "e").mkdir()
    hostile = {"protocol": HOSTILE, "data": HOSTILE, **TASK, "tasks": {HOSTILE: TASK}}
    (run.path / "e" / "results.json").write_text(json.dumps(hostile))
    html = render(run_page(run, [Answer(HOSTILE, HOSTILE, HOSTILE, HOSTILE)]))
    page = Reader(html)
    assert not page.open
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "form")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert('x')</script>") >= 10
    assert "{{ 7 * 7 }}" in page.text
    assert "<!--" not in html


def test_study_text_cannot_leave_its_place(tmp_path: Path, study: dict[str, Any]) -> None:
    study = json.loads(json.dumps(study).replace("lora", "<script>lora"))
    study["config"]["methods"]["<script>lora"]["adapter"] = "lora"
    page = read(study_page(write_study(tmp_path / "study", study), tmp_path))
    assert not page.open
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert "<script>lora r=4" in page.text


def test_page_asks_for_nothing_outside(tmp_path: Path, study: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", model=ModelConfig(path="https://example.com/model"))
    finish(run)
    folder = write_study(tmp_path / "study", study)
    for page in (run_page(run, []), study_page(folder, folder)):
        html = render(page)
        addresses = Reader(html).addresses()
        assert addresses
        assert all(one.startswith(("#", "data:", "./")) for one in addresses), addresses
        assert not re.search(r"@import|url\((?!#)", html)
        assert "default-src 'none'" in html
    links = [one for one in Reader(html).addresses() if one.startswith("./")]
    assert links == [f"./{name}/" for name in sorted(tried["folder"] for tried in study["search"])]
    assert all((folder / link).is_dir() for link in links)


def test_links_lead_to_the_runs_from_where_the_page_lies(tmp_path: Path, study: dict[str, Any]) -> None:
    folder = write_study(tmp_path / "study", study)
    elsewhere = tmp_path / "pages"
    elsewhere.mkdir()
    links = [one for one in read(study_page(folder, elsewhere)).addresses() if one.startswith("./")]
    assert links
    assert all((elsewhere / link).is_dir() for link in links)


def test_every_id_is_there_once_and_every_reference_leads_to_one(tmp_path: Path, study: dict[str, Any]) -> None:
    folder = write_study(tmp_path / "study", study)
    html = render(study_page(folder, folder))
    ids = [attributes["id"] for _, attributes in Reader(html).tags if "id" in attributes]
    assert len(ids) == len({*ids})
    wanted = {*re.findall(r"url\(#([^)]+)\)", html), *(one[1:] for one in Reader(html).addresses() if one[0] == "#")}
    assert wanted
    assert wanted <= {*ids}


def test_study_page_has_the_numbers_of_its_files(tmp_path: Path, study: dict[str, Any]) -> None:
    folder = write_study(tmp_path / "study", study)
    page = read(study_page(folder, folder))
    text = " ".join(page.text.split())
    for said in ("dora r=4 0.003 2.0500 ± 0.0141 2.0400, 2.0600 0.600 ± 0.000", "base-none 2.9000 0.310 0.250 0.450"):
        assert said in text, said
    assert f"dora r=4 {MINUS} lora r=4 {MINUS}0.1500 {MINUS}0.2000 to {MINUS}0.1000 +0.150" in text
    assert "lora r=4 98,765 4,567 2.22 789" in text
    assert page.headings() == [
        *("overview", "reading", "results", "differences", "search", "curves"),
        *("cost", "runs", "options", "commands", "versions"),
    ]
    labels = [str(attributes["aria-label"]) for tag, attributes in page.tags if tag == "svg"]
    assert "Held-out loss over learning rate, lora. lora r=4: 2.5 at 0.001, 2.4 at 0.003" in labels
    assert f"Loss, rank 4. dora {MINUS} lora: -0.15 (-0.2 to -0.1); lora {MINUS} full: 0.1 (-0.1 to 0.3)" in labels


def test_study_without_choices_has_no_accuracy(tmp_path: Path, study: dict[str, Any]) -> None:
    for one in [*study["arms"], *study["differences"]]:
        del one["accuracy"]
    study["bases"] = {"base-none": {"loss": 2.9}}
    study["search"] = [{**tried, "eval_loss": None} for tried in study["search"]]
    folder = write_study(tmp_path / "study", study)
    (folder / "runs.jsonl.gz").write_bytes(b"damaged")
    page = read(study_page(folder, folder))
    assert "accuracy" not in page.text.lower()
    assert {"search", "curves", "versions"}.isdisjoint(page.headings())


@pytest.mark.parametrize(
    ("low", "mean", "high", "loss", "accuracy"),
    [
        (-2.0, -1.0, -0.5, "better", "worse"),
        (0.5, 1.0, 2.0, "worse", "better"),
        (-1.0, 0.5, 2.0, "same", "same"),
        (-2.0, -0.5, 1.0, "same", "same"),
        (0.0, 1.0, 2.0, "same", "same"),
        (0.0, 0.0, 0.0, "same", "same"),
    ],
)
def test_verdict_is_that_of_the_interval(low: float, mean: float, high: float, loss: str, accuracy: str) -> None:
    one = {"low": low, "mean": mean, "high": high}
    assert (verdict(one, True), verdict(one, False)) == (loss, accuracy)


def test_reading_says_what_differs_and_what_limits_it(study: dict[str, Any]) -> None:
    told = [(one.tone, one.text) for one in findings(study, ["loss", "accuracy"])]
    assert [tone for tone, _ in told] == ["better", "better", *["note"] * 5]
    assert told[0][1].startswith("dora r=4 against lora r=4, loss: better (")
    notes = " ".join(text for _, text in told[2:])
    assert "With 2 seeds they are wide where seeds differ" in notes
    assert "The first seed also found the learning rates" in notes
    assert "may lie beyond: dora r=4." in notes
    assert "most frequent answer (0.450): lora r=4." in notes
    dvora = copy.deepcopy(study)
    dvora["config"]["methods"] |= {"dora": {"adapter": "dvora"}, "lora": {"adapter": "vera"}}
    assert findings(dvora, ["loss"])[0].text == told[0][1], "DVoRA against VeRA is told, too"
    unclear = copy.deepcopy(study)
    unclear["differences"] = [pair("dora r=4 - lora r=4", -0.15, 0.5)]
    unclear["missing"] = ["lora-rank-4-rate-0.003-seed-1"]
    first, *_, last = findings(unclear, ["loss"])
    assert (first.tone, "no difference that the interval shows" in first.text) == ("same", True)
    assert "lora-rank-4-rate-0.003-seed-1" in last.text


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "seed": 3,
            "adapter": AdapterConfig(method=AdapterMethod.lora, rank=4, target_modules=["q_proj", "up.*[a,b]"]),
        },
        {"adapter": AdapterConfig(method=AdapterMethod.none), "quant": QuantConfig(method=QuantMethod.none)},
        {"data": DataConfig(train="name:sub#train[:5]", eval='it\'s a "file".jsonl'), "optim": OptimConfig(beta2=0.95)},
        {"model": ModelConfig(path="null"), "optim": OptimConfig(learning_rate=1e-5, warmup_steps=2)},
        {"data": DataConfig(train="a.jsonl", columns={"prompt": "the question", "completion": "答え"})},
    ],
)
def test_train_command_makes_the_same_config(changes: dict[str, Any], tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run", **changes)
    config = run.read_config()
    words = shlex.split(train_command(config, 1).replace("\\\n", " "))
    assert words[:2] == ["qdora", "train"]
    values = compose("train", words[2:])
    assert values is not None
    again = typed(values, RunConfig)
    assert {**config_values(again), "run_id": "my-run"} == config_values(config)


def test_study_command_makes_the_same_config(study: dict[str, Any]) -> None:
    study["config"]["launcher"] = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    study["config"]["output_dir"] = "outputs/a study"
    study["config"]["data"]["columns"] = {"prompt": "the question", "completion": "a"}
    words = shlex.split(study_command(study["config"]).replace("\\\n", " "))
    values = compose("study", words[2:])
    assert values is not None
    assert _as_json(typed(values, COMMANDS["study"].config_class)) == study["config"]


def test_follow_up_commands_are_those_of_what_was_made(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    finish(run)
    (run.path / "evaluation").mkdir()
    (run.path / "evaluation" / "results.json").write_text(json.dumps(SCORES))
    text = " ".join(read(run_page(run, [])).text.replace("\\\n", " ").split())
    assert "torchrun --standalone --nproc-per-node=2 -m qdora train model.path=m" in text
    assert f"qdora merge run={run.path} output={run.path}/merged" in text
    where = f"output_dir={run.path}/evaluation"
    assert f"qdora evaluate run={run.path} 'tasks=[one,two]' tasks_path=/d protocol=likelihood {where}" in text


def test_report_writes_beside_the_run_and_makes_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    finish(run)
    assert report(ReportConfig(run=str(run.path), num_answers=0)) == 0
    assert report(ReportConfig(run=str(run.path), num_answers=0, output=str(tmp_path / "a" / "b.html"))) == 0
    assert (run.path / "report.html").read_bytes() == (tmp_path / "a" / "b.html").read_bytes()
    assert not (run.path / "answers.json").exists()
    assert "written to" in capsys.readouterr().out


def test_answers_are_made_anew_where_the_adapter_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdora.reporting.answers.MAX_NEW_TOKENS", 8)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n")
    run = make_run(
        tmp_path / "run",
        model=ModelConfig(path=str(make_model(tmp_path / "model", "llama", num_hidden_layers=1))),
        quant=QuantConfig(method=QuantMethod.none),
        adapter=AdapterConfig(method=AdapterMethod.lora, rank=4),
        data=DataConfig(train="t", eval=str(tmp_path / "eval.jsonl")),
    )
    config, world = run.read_config(), start_alone("tests")
    base, plan = Path(str(config.model.path)), ParallelConfig(plan=Plan.none)
    loaded = load_model(base, config.model, config.quant, config.adapter, plan, world)
    peft_format.save(loaded.model, run.adapter, config.adapter, str(base), loaded.dtype, world)
    result = RunResult(run, config, [], run.adapter)
    (first,) = sample_answers(result, 1)
    assert first.before == first.after, "a new adapter changes nothing"
    torch.manual_seed(3)
    for layer in adapted_layers(loaded.model).values():
        layer.lora_b.data.normal_()
    peft_format.save(loaded.model, run.adapter, config.adapter, str(base), loaded.dtype, world)
    (second,) = sample_answers(result, 1)
    assert second.before == first.before
    assert second.after != first.after


def test_report_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no run there"):
        report(ReportConfig(run=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"no study\.json"):
        report(ReportConfig(study=str(tmp_path)))
    for options in ({}, {"run": "a", "study": "b"}, {"run": "a", "num_answers": -1}, {"study": "a", "num_answers": 2}):
        with pytest.raises(ConfigError):
            ReportConfig(**options)
    run = make_run(tmp_path / "run")
    finish(run)
    output = str(run.metrics / "x.html")
    with pytest.raises(ConfigError, match=re.escape(f"output={output} cannot be written")):
        report(ReportConfig(run=str(run.path), num_answers=0, output=output))
    run.summary.unlink()
    assert report(ReportConfig(run=str(run.path))) == 0
    assert "without sample answers: the run is not finished" in capsys.readouterr().out
    run.adapter.rmdir()
    assert report(ReportConfig(run=str(run.path))) == 0
    told = capsys.readouterr().out
    assert f"without sample answers: run={run.path} is not finished, and has no checkpoint yet. Wait for" in told


def test_numbers_are_for_people() -> None:
    assert number(-1.5e-7, ".1e") == f"{MINUS}1.5e{MINUS}7"
    assert number(None, ".3f") == number(float("nan"), ".3f") == DASH
    assert number(1234567, ",") == "1,234,567"


def test_empty_section_has_no_heading() -> None:
    page = Page("t", "s", [Section("a", "A", []), Section("b", "B", [Text("here")])])
    assert read(page).headings() == ["b"]


def test_run_page_says_what_was_otherwise_before_the_run_was_resumed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    words = "Changed when the run was resumed"
    assert words not in read(run_page(run, [])).text
    change = Change(from_step=7, option="optim.learning_rate", before=0.0123, now=0.0456)
    run.start(run.read_config(), 6, [change])
    text = " ".join(read(run_page(run, [])).text.split())
    assert words in text
    assert "from step" in text
    assert "optim.learning_rate" in text
    assert "0.0123" in text
    assert "0.0456" in text
