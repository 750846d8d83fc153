"""Columns of other names: mapped, refused with what is there, and proposed for a file whose keys are not known."""

import csv
import json
import random
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from qdora.commands import compose, run_hydra, typed
from qdora.commands.spelling import in_grammar
from qdora.config import (
    AdapterMethod,
    DataConfig,
    DataFormat,
    MethodConfig,
    ModelConfig,
    RunConfig,
    StudyConfig,
    UnknownKeys,
)
from qdora.data import prepare
from qdora.data.columns import form_of, read_rows
from qdora.data.encode import detect, encode, reference
from qdora.data.guess import as_option, propose
from qdora.data.sources import Row
from qdora.errors import ConfigError, DataError
from qdora.reporting.answers import _prompts
from qdora.study.cells import shared_options
from tests.support.chats import answer, user
from tests.support.models import make_tokenizer

ROWS = [{"question": f"{number} + 1?", "answer": f"It is {number + 1}."} for number in range(4)]
OWN = [{"prompt": row["question"], "completion": row["answer"]} for row in ROWS]
COLUMNS = {"prompt": "question", "completion": "answer"}


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    """A file (or saved folder) of the rows, by the kind that its name says."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(file)
    return str(file)


def given(*overrides: str) -> DataConfig:
    """The options of a command line."""
    values = compose("train", ["model.path=m", "data.train=d", *overrides])
    assert values is not None
    config: RunConfig = typed(values, RunConfig)
    return config.data


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "saved"])
def test_mapped_columns_are_learned_as_if_they_had_these_names(tmp_path: Path, name: str) -> None:
    source, own = written(tmp_path / "theirs", name, ROWS), written(tmp_path / "own", name, OWN)
    cache = str(tmp_path / "cache")
    mapped = prepare(DataConfig(train=source, columns=COLUMNS, cache_dir=cache), source, make_tokenizer())
    plain = prepare(DataConfig(train=own, cache_dir=cache), own, make_tokenizer())
    assert mapped.fingerprint == plain.fingerprint
    assert (mapped.report.format, mapped.report.notes) == ("completion", [])


@pytest.mark.parametrize(
    ("values", "columns", "form"),
    [
        ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}, "completion"),
        (
            {"id": "7", "Question": "a", "Best Answer": "b"},
            {"prompt": "Question", "completion": "Best Answer"},
            "completion",
        ),
        ({"input": "a", "output": "b"}, {"prompt": "input", "completion": "output"}, "completion"),
        ({"prompt": "a", "response": "b"}, {"completion": "response"}, "completion"),
        ({"instruction": "a", "response": "b"}, {"output": "response"}, "instruction"),
        ({"instruction": "a", "input": "c", "response": "b"}, {"output": "response"}, "instruction"),
        (
            {"context": "c", "question": "a", "answer": "b"},
            {"instruction": "question", "output": "answer", "input": "context"},
            "instruction",
        ),
        (
            {"system_prompt": "c", "question": "a", "response": "b"},
            {"instruction": "question", "output": "response", "system": "system_prompt"},
            "instruction",
        ),
        ({"conversation": [user("a"), answer("b")]}, {"messages": "conversation"}, "messages"),
        ({"source": "web", "frage": "a", "antwort": "b"}, {"prompt": "frage", "completion": "antwort"}, "completion"),
        ({"frage, kurz": "a", "it's": "b"}, {"prompt": "frage, kurz", "completion": "it's"}, "completion"),
        ({"content": "ab", "url": "x"}, {"text": "content"}, "text"),
        (
            {
                "id": "1",
                "title": "t",
                "context": "c",
                "question": "a",
                "answers": {"text": ["b", "d"], "answer_start": [1, 2]},
            },
            {"instruction": "question", "output": "answers.text", "input": "context"},
            "instruction",
        ),
        ({"q": {"question": "a"}, "answer": "b"}, {"prompt": "q.question", "completion": "answer"}, "completion"),
        (
            {"question": "a", "answers": [{"text": "b", "votes": 2}, {"text": "c", "votes": 1}]},
            {"prompt": "question", "completion": "answers.text"},
            "completion",
        ),
        (
            {"dialog": [{"speaker": "user", "utterance": "a"}, {"speaker": "assistant", "utterance": "b"}]},
            {"messages": "dialog", "role": "speaker", "content": "utterance"},
            "messages",
        ),
        (
            {"messages": [{"author": "Customer", "text": "a"}, {"author": "Agent", "text": "b"}]},
            {"role": "author", "content": "text", "user": "Customer", "assistant": "Agent"},
            "messages",
        ),
        (
            {"conversations": [{"from": "human", "text": "a"}, {"from": "gpt", "text": "b"}]},
            {"content": "text"},
            "messages",
        ),
        (
            {"conversations": [{"from": "Anna", "value": "a"}, {"from": "Bo Li", "value": "b"}]},
            {"user": "Anna", "assistant": "Bo Li"},
            "messages",
        ),
        (
            {"userQuestion": "a", "modelReply": "b", "n": 3},
            {"prompt": "userQuestion", "completion": "modelReply"},
            "completion",
        ),
    ],
)
def test_what_a_refusal_proposes_reads_the_file(
    tmp_path: Path, values: dict[str, Any], columns: dict[str, str], form: str
) -> None:
    """The line is taken from the message and given to a shell, as a user does."""
    source, tokenizer = written(tmp_path, "a.jsonl", [values]), make_tokenizer()
    config = DataConfig(train=source, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"line 1(: a turn has role| has the keys)") as refused:
        prepare(config, source, tokenizer)
    line = str(refused.value).partition("For other names: ")[2]
    said = subprocess.run(["bash", "-c", rf"printf '%s\0' {line}"], capture_output=True, text=True, check=True).stdout
    config = given(*said.split("\0")[:-1])
    assert config.columns == columns
    config.train, config.cache_dir = source, str(tmp_path / "cache")
    assert prepare(config, source, tokenizer).report.format == form


def test_any_proposal_makes_a_format_and_keeps_what_has_its_name(tmp_path: Path) -> None:
    names = [
        "question",
        "query",
        "input",
        "output",
        "answer",
        "response",
        "reply",
        "context",
        "system",
        "system_prompt",
        "text",
        "body",
        "topic",
    ]
    names += ["instruction", "prompt", "completion", "title", "frage", "antwort", "id", "source"]
    draw, num_proposed, tokenizer = random.Random(0), 0, make_tokenizer()
    for _ in range(300):
        row = Row({name: name for name in draw.sample(names, draw.randint(1, 6))}, "a.jsonl line 1")
        columns = propose(row)
        if form_of(row, row.values) is not None or not columns:
            continue
        num_proposed += 1
        with pytest.raises(DataError, match=re.escape(as_option(columns))):
            detect(row)
        source = written(tmp_path, "a.jsonl", [row.values])
        config = DataConfig(train=source, columns=columns, unknown_keys=UnknownKeys.warn)
        (renamed,) = read_rows(config, source)
        _, mask = encode(renamed, detect(renamed, config), tokenizer, config)
        assert any(mask)
    assert num_proposed > 100


def test_column_that_is_known_for_another_thing_is_not_proposed() -> None:
    assert propose(Row({"answer": "a", "response": "b"}, "x")) == {}
    assert propose(Row({"title": "a", "response": "b"}, "x")) == {"prompt": "title", "completion": "response"}


def test_format_that_is_wanted_is_proposed() -> None:
    row = Row({"question": "a", "context": "c", "answer": "b"}, "a.jsonl line 1")
    with pytest.raises(DataError, match=re.escape("data.columns={prompt:question,completion:answer}")):
        encode(row, DataFormat.completion, make_tokenizer())
    assert propose(Row({"prompt": 3, "id": "x"}, "a")) == {}


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            ROWS,
            {"prompt": "questionn", "completion": "answer"},
            r"line 1 does not have the column 'questionn' of .*; there are \['answer', 'question'\]",
        ),
        ([*ROWS, {"question": "a"}], COLUMNS, r"line 5 does not have the column 'answer'"),
        (
            ROWS,
            {"instruction": "question", "output": "answer", "input": "context"},
            r"no row of .* up to .* line 4, has the column 'context'",
        ),
        (
            [{"prompt": "a", **ROWS[0]}],
            COLUMNS,
            r"line 1 has 'prompt' already, where .* puts 'question': data.ignore_keys=\[prompt\]",
        ),
    ],
)
def test_column_that_cannot_be_mapped_is_refused_with_what_is_there(
    tmp_path: Path, rows: list[dict[str, Any]], columns: dict[str, str], message: str
) -> None:
    source = written(tmp_path, "a.jsonl", rows)
    with pytest.raises(DataError, match=message):
        list(read_rows(DataConfig(train=source, columns=columns), source))


def test_key_that_is_there_already_is_left_out_or_mapped_as_the_refusal_says(tmp_path: Path) -> None:
    source = written(tmp_path, "a.jsonl", [{"prompt": "what is 1?", **ROWS[0]}])
    cache = str(tmp_path / "cache")
    config = DataConfig(train=source, columns=COLUMNS, ignore_keys=["prompt"], cache_dir=cache)
    assert prepare(config, source, make_tokenizer()).report.format == "completion"
    (row,) = read_rows(config, source)
    assert row.values == OWN[0]
    swapped = {"prompt": "question", "completion": "prompt"}
    (row,) = read_rows(DataConfig(train=source, columns=swapped), source)
    assert row.values == {"prompt": "0 + 1?", "completion": "what is 1?", "answer": "It is 1."}


def test_key_that_a_row_may_lack_need_not_be_in_each(tmp_path: Path) -> None:
    source = written(tmp_path, "a.jsonl", [ROWS[0], {**ROWS[1], "context": "c"}])
    columns = {"instruction": "question", "output": "answer", "input": "context"}
    rows = [row.values for row in read_rows(DataConfig(train=source, columns=columns), source)]
    assert rows[0] == {"instruction": "0 + 1?", "output": "It is 1."}
    assert rows[1] == {"instruction": "1 + 1?", "output": "It is 2.", "input": "c"}


def test_mapped_keys_say_the_format_whatever_else_a_row_has(tmp_path: Path) -> None:
    source = written(tmp_path, "a.jsonl", [{**ROWS[0], "text": "a long text", "messages": None}])
    config = DataConfig(train=source, columns=COLUMNS, cache_dir=str(tmp_path / "cache"))
    report = prepare(config, source, make_tokenizer()).report
    assert report.format == "completion"
    assert [note.partition(" (")[0] for note in report.notes] == ["text is not read"]


def test_held_out_file_is_read_by_its_own_names_and_one_of_training_is_not(tmp_path: Path) -> None:
    theirs, own = written(tmp_path, "theirs.jsonl", ROWS), written(tmp_path, "own.jsonl", OWN)
    cache = str(tmp_path / "cache")
    config = DataConfig(train=theirs, eval=own, columns=COLUMNS, cache_dir=cache)
    held_out = prepare(config, own, make_tokenizer())
    assert held_out.fingerprint == prepare(config, theirs, make_tokenizer()).fingerprint
    (note,) = held_out.report.notes
    assert note.startswith("has no column of data.columns, and is read by its own names")
    with pytest.raises(DataError, match="line 1 does not have the column 'question'"):
        prepare(DataConfig(train=own, columns=COLUMNS, cache_dir=cache), own, make_tokenizer())


@pytest.mark.parametrize(
    ("columns", "values", "form"),
    [
        (COLUMNS, {"messages": [user("a"), answer("b")]}, "messages"),
        (COLUMNS, {"instruction": "a", "output": "b"}, "instruction"),
        ({"messages": "chat"}, {"instruction": "a", "output": "b"}, "instruction"),
        ({"instruction": "question", "output": "answer"}, {"text": "a b"}, "text"),
        ({"text": "body"}, {"prompt": "a", "completion": "b"}, "completion"),
    ],
)
def test_held_out_file_of_another_format_is_learned_as_it_is_without_columns(
    tmp_path: Path, columns: dict[str, str], values: dict[str, Any], form: str
) -> None:
    own, cache = written(tmp_path, "own.jsonl", [values]), str(tmp_path / "cache")
    held_out = prepare(DataConfig(train="theirs", eval=own, columns=columns, cache_dir=cache), own, make_tokenizer())
    assert held_out.report.format == form
    assert held_out.fingerprint == prepare(DataConfig(eval=own, cache_dir=cache), own, make_tokenizer()).fingerprint


def test_nested_columns_and_turns_of_other_words_are_learned_as_if_they_had_qdoras_names(tmp_path: Path) -> None:
    """Also through parquet, and with what a row may lack."""
    squad = [
        {"question": f"{n}?", "about": {"context": "c", "n": n}, "answers": {"text": [str(n), "x"], "at": [n, n]}}
        for n in range(2)
    ]
    talk = [
        {"chat": {"turns": [{"who": "Kim", "line": "a"}, {"who": "Bot", "line": str(n)}], "id": "7"}} for n in range(2)
    ]
    cases = (
        (
            squad,
            {"instruction": "question", "input": "about.context", "output": "answers.text"},
            [{"instruction": f"{n}?", "input": "c", "output": str(n)} for n in range(2)],
            ["answers.text has several values, of which the first is read", "about.n is not read", "answers.at is not"],
        ),
        (
            talk,
            {"messages": "chat.turns", "role": "who", "content": "line", "user": "Kim", "assistant": "Bot"},
            [{"messages": [user("a"), answer(str(n))]} for n in range(2)],
            ["chat.id is not read"],
        ),
    )
    for index, (rows, columns, own, notes) in enumerate(cases):
        for name in ("a.jsonl", "a.parquet"):
            source = written(tmp_path / f"{index}", name, rows)
            plain = written(tmp_path / f"own-{index}", "a.jsonl", own)
            config = DataConfig(train=source, columns=columns, cache_dir=str(tmp_path / "cache"))
            found = prepare(config, source, make_tokenizer())
            config = DataConfig(train=plain, cache_dir=str(tmp_path / "cache"))
            assert found.fingerprint == prepare(config, plain, make_tokenizer()).fingerprint
            assert len(found.report.notes) == len(notes)
            assert all(any(note.startswith(start) for note in found.report.notes) for start in notes)


def test_answer_that_a_nested_column_lacks_is_left_out_and_a_column_that_is_misspelt_is_told(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "a", "answers": {"text": ["b"]}},
        {"question": "c", "answers": {"text": []}},
        {"question": "d", "answers": None},
    ]
    source = written(tmp_path, "a.jsonl", rows)
    config = DataConfig(train=source, columns={"prompt": "question", "completion": "answers.text"})
    report = prepare(replace(config, cache_dir=str(tmp_path)), source, make_tokenizer()).report
    assert (report.num_samples, report.num_dropped_without_labels) == (1, 2)
    config = DataConfig(train=source, columns={"prompt": "question", "completion": "answers.txt"})
    with pytest.raises(
        DataError, match=r"does not have the column 'answers.txt' .*; there are \['answers.text', 'question'"
    ):
        [*read_rows(config, source)]
    turns = written(tmp_path, "b.jsonl", [{"messages": [{"who": "user", "line": "a"}, {"line": "b"}]}])
    with pytest.raises(DataError, match=r"a turn does not have the column 'who' .*; there are \['line'\]"):
        [*read_rows(DataConfig(train=turns, columns={"role": "who", "content": "line"}), turns)]


def test_word_for_a_role_that_is_missing_is_proposed_with_the_columns_that_are_given(tmp_path: Path) -> None:
    """The line takes the place of the one that was refused."""
    turns = [{"speaker": "Customer", "utterance": "a"}, {"speaker": "Agent", "utterance": "b"}]
    source = written(tmp_path, "a.jsonl", [{"dialog": turns}])
    given = {"messages": "dialog", "role": "speaker", "content": "utterance", "user": "Customer"}
    config = DataConfig(train=source, columns=given, cache_dir=str(tmp_path))
    with pytest.raises(DataError, match="this is") as refused:
        prepare(config, source, make_tokenizer())
    columns = {**given, "assistant": "Agent"}
    assert str(refused.value).endswith(f". For other names: {as_option(columns)}")
    assert prepare(replace(config, columns=columns), source, make_tokenizer()).report.num_samples == 1


def test_index_takes_one_of_a_list(tmp_path: Path) -> None:
    rows = [{"q": "a", "choices": [{"message": {"content": "b"}}, {"message": {"content": "c"}}]}]
    source = written(tmp_path, "a.jsonl", rows)
    columns = {"prompt": "q", "completion": "choices.1.message.content"}
    (row,) = read_rows(DataConfig(train=source, columns=columns), source)
    assert row.values == {"prompt": "a", "completion": "c"}


def test_object_alone_in_a_file_under_foreign_names_is_refused_with_its_columns(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({**ROWS[0], "tags": ["x"]}, "data.columns={prompt:question,completion:answer}"),
        ({"chat": [user("a"), answer("b")]}, "data.columns={messages:chat}"),
    ]
    for index, (values, columns) in enumerate(cases):
        file = tmp_path / f"{index}.json"
        file.write_text(json.dumps(values, indent=1))
        with pytest.raises(DataError, match=re.escape(f"For other names: {columns}")):
            prepare(DataConfig(train=str(file), cache_dir=str(tmp_path)), str(file), make_tokenizer())


def test_object_alone_in_a_file_is_a_row_by_mapped_names(tmp_path: Path) -> None:
    """Also where it holds a list, which could be one of rows."""
    chat = {"chat": [user("a"), answer("b")]}
    cases = (({**ROWS[0], "tags": ["x", "y"]}, COLUMNS, "completion"), (chat, {"messages": "chat"}, "messages"))
    for index, (values, columns, form) in enumerate(cases):
        file = tmp_path / f"{index}.json"
        file.write_text(json.dumps(values, indent=1))
        (row,) = read_rows(DataConfig(train=str(file), columns=columns), str(file))
        assert detect(row, DataConfig(columns=columns)).name == form
    holder = tmp_path / "holder.json"
    holder.write_text(json.dumps({"chat": ROWS}, indent=1))
    assert len([*read_rows(DataConfig(train=str(holder), columns=COLUMNS), str(holder))]) == len(ROWS)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.columns={prompt:question,completion:answer}"],
        ["data.columns={prompt: question, completion: answer}"],
        ["data.columns=prompt:question", "data.columns=completion:answer"],
        ["data.columns.prompt=question", "data.columns.completion=answer"],
        ["data.columns={text:body}", "data.columns={prompt:'question',completion:\"answer\"}"],
    ],
)
def test_columns_are_given_in_each_way_that_people_write(overrides: list[str]) -> None:
    assert given(*overrides).columns == COLUMNS


@pytest.mark.parametrize(
    "column",
    ["问题", "Frage (kurz)", "a, b", "it's", 'say "x"', "a:b", "{x}", "back\\slash", "at the end\\", "\\'\\\\", "7"],
)
def test_names_of_columns_are_taken_as_they_are_written(column: str) -> None:
    option = as_option({"prompt": column, "completion": "b"})
    said = subprocess.run(["bash", "-c", rf"printf '%s\0' {option}"], capture_output=True, text=True, check=True)
    assert given(*said.stdout.split("\0")[:-1]).columns == {"prompt": column, "completion": "b"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.columns={prompd:question}",
            "no key 'prompd' of a row, did you mean 'prompt'.; there are: answer, chat_template_kwargs, choices",
        ),
        ("data.columns={prompt:a,prompt:b}", "prompt is named twice, for 'a' and 'b'"),
        ("data.columns={prompt:a,completion:a}", "'a' is given to prompt and completion"),
        ("data.columns={prompt:}", "give the name of the column"),
        ("data.columns={prompt:", "write names and texts in braces, and quotes around it all"),
        ("data.columns=question", "write names and texts in braces"),
    ],
)
def test_columns_that_mean_nothing_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        given(override)


def test_last_columns_replace_those_before() -> None:
    assert given("data.columns={text:body}", "data.columns={}").columns == {}
    assert given("data.columns={text:body}", "data.columns=null").columns == {}


def test_columns_given_whole_replace_a_recipes_and_single_ones_are_added(tmp_path: Path) -> None:
    """The line that a refusal proposes has to work over any recipe."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndata:\n  columns: {prompt: frage, completion: antwort}\n"
    )
    recipe = [f"hydra.searchpath=[{tmp_path}]", "+experiment=mine"]
    assert given(*recipe).columns == {"prompt": "frage", "completion": "antwort"}
    assert given(*recipe, "data.columns={text:body}").columns == {"text": "body"}
    assert given(*recipe, "data.columns=text:body").columns == {"text": "body"}
    assert given(*recipe, "data.columns={}").columns == {}
    assert given(*recipe, "data.columns.completion=reply").columns == {"prompt": "frage", "completion": "reply"}


def test_answers_of_a_report_are_asked_under_mapped_names(tmp_path: Path) -> None:
    source, own = written(tmp_path, "a.jsonl", ROWS), written(tmp_path, "b.jsonl", OWN)
    tokenizer = make_tokenizer()
    _, plain, _ = _prompts(run_of(own, DataConfig(train="d")), tokenizer, 2, None)
    rows, mapped, form = _prompts(run_of(source, DataConfig(train="d", columns=COLUMNS)), tokenizer, 2, None)
    assert (mapped, form) == (plain, DataFormat.completion)
    assert reference(rows[1], form) == "It is 2."


def run_of(held_out: str, data: DataConfig) -> RunConfig:
    """A run with held-out data."""
    return RunConfig(model=ModelConfig(path="m"), data=replace(data, eval=held_out))


def test_study_hands_columns_on_to_its_runs() -> None:
    """By Hydra's own command line, as its runs are members of a sweep."""
    methods = {"lora": MethodConfig(adapter=AdapterMethod.lora, learning_rates=[1e-3])}
    data = DataConfig(train="d", eval="e", columns={"prompt": "a, b", "completion": "it's"})
    model = ModelConfig(path="m")
    config = StudyConfig(model=model, data=data, methods=methods, tasks=["t"], tasks_path="t")
    composed: list[Any] = []
    run_hydra("train", ["model.path=m", *shared_options(config)], composed.append)
    assert composed[0].data.columns == data.columns


def test_sweep_takes_columns_and_several_of_them() -> None:
    both = "data.columns={prompt:a,completion:b},{prompt:c,completion:d}"
    assert in_grammar([both], RunConfig, sweep=True) == [f"++{both}"]
    expanded = ["data.columns=prompt:a", "data.columns=completion:b c"]
    assert in_grammar(expanded, RunConfig, sweep=True) == ["++data.columns={prompt:'a',completion:'b c'}"]
