"""What of a row becomes a conversation, and what is said of the rest: nothing is dropped in silence."""

import json
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from qdora.chat_template import turn_ends
from qdora.config import DataConfig, DataFormat, Reasoning, UnknownKeys
from qdora.data import prepare
from qdora.data.columns import read_rows
from qdora.data.conversation import CHANGES_LEARNING, HARMLESS, Told, conversation
from qdora.data.encode import NothingToLearn, detect, encode
from qdora.data.sources import Row, load_rows
from qdora.errors import DataError
from tests.support.chats import CONVERSATIONS, TOOLS, answer, tokenizer_of, user
from tests.support.models import make_tokenizer

TURNS = [user("2 + 2?"), answer("4")]
WHERE = "a.jsonl line 7"


def learned(values: dict[str, Any], family: str = "qwen2_5", **options: Any) -> str:
    """The learned tokens as text."""
    row, tokenizer = Row(values, WHERE), tokenizer_of(family)
    ids, mask = encode(row, detect(row), tokenizer, DataConfig(**options))
    return "".join(tokenizer.decode([token]) for token, one in zip(ids, mask, strict=True) if one)


def told(values: dict[str, Any], family: str = "qwen2_5", **options: Any) -> list[str]:
    """What is said of the row."""
    row, notes = Row(values, WHERE), Told()
    encode(row, detect(row), tokenizer_of(family), DataConfig(**options), notes)
    return notes.lines()


@pytest.mark.parametrize("flag", ["weight", "train", "training"])
def test_answer_that_its_turn_excludes_is_not_learned(flag: str) -> None:
    turns = [user("France?"), answer("Lyon.", **{flag: 0}), user("Sure?"), answer("No: Paris.", **{flag: 1})]
    assert learned({"messages": turns}) == "No: Paris.<|im_end|>"
    turns = [user("France?"), answer("Lyon.", **{flag: False}), user("Sure?"), answer("Paris.")]
    assert learned({"messages": turns}) == "Paris.<|im_end|>"


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (answer("4", weight=0.5), "weight of a turn is 0 or 1"),
        (user("2 + 2?") | {"train": True}, "only what the assistant says is learned"),
        (answer("4", loss_mask=[1, 0]), r"a turn's loss_mask is not read.*data.ignore_keys=\[loss_mask\]"),
        (answer([{"type": "image_url", "image_url": "x"}]), "a part of a content is a text, and qdora trains on text"),
        (answer("", tool_calls=[{"function": {}}]), "a tool call has a function with a name and arguments"),
        (answer("", tool_calls=["x"]), "tool_calls must be a list of objects"),
        (user("x") | {"content": None}, "a turn has role"),
        ({"role": "assistant"}, "a turn has role"),
    ],
)
def test_turn_that_cannot_be_taken_as_it_is_meant_is_refused(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"line 7: .*{message}"):
        learned({"messages": [user("?"), turn]})


def test_calls_are_learned_with_their_arguments_whether_an_object_or_its_json() -> None:
    expected = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    values = CONVERSATIONS["tools"]
    for arguments in ({"city": "Oslo"}, '{"city": "Oslo"}'):
        for content in ("", None):
            call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": arguments}}
            turns = [values["messages"][0], answer(content, tool_calls=[call]), *values["messages"][2:]]
            assert learned(values | {"messages": turns}) == f"{expected}It is 14:05 in Oslo.<|im_end|>"
    old = [user("Time?"), answer(None, function_call={"name": "get_time", "arguments": '{"city": "Oslo"}'})]
    assert learned({"messages": old, "functions": [TOOLS[0]["function"]]}) == expected
    sharegpt = [
        {"from": "human", "value": "Time?"},
        {"from": "function_call", "value": '{"name": "get_time", "arguments": {"city": "Oslo"}}'},
    ]
    assert learned({"conversations": sharegpt, "tools": json.dumps(TOOLS)}) == expected


def test_call_that_the_template_does_not_show_is_refused() -> None:
    with pytest.raises(DataError, match="line 7: turn 2 calls a tool, and the model's chat template does not show"):
        learned(CONVERSATIONS["tools"], "chatml")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thought_is_learned_in_the_templates_place_or_within_the_words(key: str) -> None:
    values = {"messages": [user("17 + 5?"), answer("22", **{key: "Seventeen."})]}
    assert learned(values, "qwen3") == "<think>\nSeventeen.\n</think>\n\n22<|im_end|>"
    assert learned(values, "chatml") == "<think>\nSeventeen.\n</think>\n\n22<|im_end|>"
    assert "analysis<|message|>Seventeen.<|end|>" in learned(values, "gpt_oss")
    assert learned(values, "chatml", reasoning=Reasoning.drop) == "22<|im_end|>"
    parts = [{"type": "thinking", "thinking": "Seventeen."}, {"type": "text", "text": "22"}]
    assert learned({"messages": [user("17 + 5?"), answer(parts)]}, "qwen3") == learned(values, "qwen3")


def test_system_and_history_are_turns() -> None:
    values = {"system": "Be a botanist.", "history": [["A tree?", "Oak."]], "instruction": "Another?", "output": "Elm."}
    given = conversation(Row(values, WHERE), DataFormat.instruction)
    assert [(turn["role"], turn["content"]) for turn in given.messages] == [
        ("system", "Be a botanist."),
        ("user", "A tree?"),
        ("assistant", "Oak."),
        ("user", "Another?"),
        ("assistant", "Elm."),
    ]
    assert learned(values) == "Oak.<|im_end|>Elm.<|im_end|>"
    beside = conversation(Row({"messages": TURNS, "system": "Be brief."}, WHERE), DataFormat.messages)
    assert beside.messages[0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(DataError, match="a system turn and another text in system"):
        learned({"messages": [{"role": "system", "content": "Be long."}, *TURNS], "system": "Be brief."})
    with pytest.raises(DataError, match="history must be a list"):
        learned(values | {"history": "Oak."})


def test_prompt_and_completion_of_turns_learn_the_completion_alone() -> None:
    values = {"prompt": [user("A tree?"), answer("Oak."), user("Another?")], "completion": [answer("Elm.")]}
    assert learned(values) == "Elm.<|im_end|>"


def test_developer_is_a_system_turn_and_parts_are_one_text() -> None:
    values = {"messages": [{"role": "developer", "content": "Be brief."}, *TURNS]}
    assert conversation(Row(values, WHERE), DataFormat.messages).messages[0]["role"] == "system"
    parts = [{"type": "text", "text": "The Elbe."}, {"type": "text", "text": "The Rhine."}]
    assert learned({"messages": [user("Rivers?"), answer(parts)]}) == "The Elbe.\nThe Rhine.<|im_end|>"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": TURNS, "weights": [1, 0]}, "weights is not read, and it may change what is to be learned"),
        ({"prompt": "a", "completion": "b", "label": False}, "label is not read"),
        ({"text": "a", "images": ["x"]}, "images is not read"),
        ({"instruction": "a", "output": "b", "tools": [1]}, "tools is not read"),
    ],
)
def test_key_that_changes_what_is_learned_is_refused_or_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        learned(values)
    key = message.partition(" ")[0]
    (line,) = told(values, unknown_keys=UnknownKeys.warn)
    assert line.startswith(f"{key} is not read")
    assert line.endswith("(1 time, first in a.jsonl line 7)")
    assert told(values, ignore_keys=[key]) == []


def test_preferences_are_refused_but_beside_other_answers(tmp_path: Path) -> None:
    values = {"messages": TURNS, "chosen": [], "rejected": []}
    with pytest.raises(DataError, match=r"data\.ignore_keys=\[chosen,rejected\] trains on what else the row has"):
        learned(values)
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(values) + "\n")
    (row,) = read_rows(DataConfig(train=str(file), ignore_keys=["chosen", "rejected"]), str(file))
    assert learned(row.values) == "4<|im_end|>"
    with pytest.raises(DataError, match="learns from answers, not from preferences"):
        detect(Row({"prompt": "a", "chosen": "b", "rejected": "c"}, WHERE))


def test_ignored_keys_are_left_out_also_where_they_would_be_read(tmp_path: Path) -> None:
    values = {"messages": [user("2 + 2?"), answer("4", weight=0)], "system": "Be brief."}
    file, tokenizer = tmp_path / "a.jsonl", tokenizer_of("qwen2_5")
    file.write_text(json.dumps(values) + "\n")
    config = DataConfig(train=str(file), ignore_keys=["system", "weight"])
    (row,) = read_rows(config, str(file))
    plain = encode(Row({"messages": TURNS}, WHERE), DataFormat.messages, tokenizer)
    assert encode(row, DataFormat.messages, tokenizer, config) == plain
    file.write_text(json.dumps({"messages": TURNS, "text": "a"}) + "\n")
    config = DataConfig(train=str(file), ignore_keys=["messages"], cache_dir=str(tmp_path / "cache"))
    assert prepare(config, str(file), make_tokenizer()).report.format == "text"


def test_other_keys_are_told_and_harmless_or_empty_ones_are_not() -> None:
    values = {"messages": TURNS, "id": 3, "source": "web", "images": [], "weights": None, "mood": "good", "system": ""}
    (line,) = told(values)
    assert line.startswith("mood is not read (data.ignore_keys=[mood] silences this)")
    assert not HARMLESS & CHANGES_LEARNING


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [user("?"), answer("")]},
        {"messages": [user("?"), answer("Lyon.", weight=0)]},
        {"messages": [user("?")]},
        {"instruction": "a", "output": ""},
        {"instruction": "a", "output": " "},
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": None},
        {"prompt": "a", "completion": "\n "},
        {"text": ""},
        {"text": None},
    ],
)
def test_row_without_an_answer_is_left_out_counted_and_named(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(NothingToLearn):
        learned(values)
    good = {"text": "b"} if "text" in values else {"prompt": "a", "completion": "b"} if "prompt" in values else None
    good = good or ({"messages": TURNS} if "messages" in values else {"instruction": "a", "output": "b"})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (good, values, values)), encoding="utf-8")
    config = DataConfig(train=str(file), cache_dir=str(tmp_path / "cache"))
    report = prepare(config, str(file), make_tokenizer()).report
    assert (report.num_rows, report.num_samples, report.num_dropped_without_labels) == (3, 1, 2)
    (note,) = report.notes
    assert note.startswith("left out: ")
    assert note.endswith(f"(2 times, first in {file} line 2)")
    assert note in report.describe()
    file.write_text(json.dumps(values) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"none of its 1 rows has a token left to learn.*left out: .*line 1"):
        prepare(config, str(file), make_tokenizer())


def test_rows_are_the_same_through_every_kind_of_file(tmp_path: Path) -> None:
    """Also where a column of structs has each key in each of its rows."""
    calls = [{"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": {"city": "Oslo"}}}]
    others = [{"id": "c2", "type": "function", "function": {"name": "get_time", "arguments": {"zone": "CET"}}}]
    rows = [
        {"messages": [user("Time?"), answer("", tool_calls=some)], "id": number, "tools": TOOLS}
        for number, some in enumerate((calls, others))
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "list.jsonl").write_text(json.dumps(rows), encoding="utf-8")
    saved = datasets.Dataset.from_list(rows)
    saved.to_parquet(tmp_path / "a.parquet")
    saved.save_to_disk(tmp_path / "saved")
    tokenizer = tokenizer_of("qwen2_5")
    encoded = {}
    for name in ("a.jsonl", "lines.json", "list.json", "list.jsonl", "a.parquet", "saved"):
        given = [*load_rows(str(tmp_path / name))]
        encoded[name] = [encode(row, DataFormat.messages, tokenizer, DataConfig()) for row in given]
        assert len(given) == 2
    assert all(some == encoded["a.jsonl"] for some in encoded.values())


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "row", [{"messages": TURNS}, {"text": "a"}, {"instruction": "i", "output": "o", "history": [["a", "b"]]}]
)
def test_a_row_alone_in_a_json_file_is_a_row(tmp_path: Path, row: dict[str, Any], indent: int | None) -> None:
    file = tmp_path / "one.json"
    file.write_text(json.dumps(row, indent=indent) + "\n", encoding="utf-8")
    assert [found.values for found in load_rows(str(file))] == [row]
    file.write_text(json.dumps({"conversations": [row, row]}, indent=indent), encoding="utf-8")
    assert [found.values for found in load_rows(str(file))] == [row, row]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_list_of_rows_may_begin_with_a_mark_of_its_encoding(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + json.dumps([{"text": "a"}, {"text": "b"}]).encode())
    assert [row.values["text"] for row in load_rows(str(tmp_path / name))] == ["a", "b"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("value", ["9" * 5000, "[" * 200_000])
def test_json_that_python_does_not_read_is_told(tmp_path: Path, name: str, value: str) -> None:
    (tmp_path / name).write_text('{"text": ' + value + "}\n")
    with pytest.raises(DataError, match=name):
        [*load_rows(str(tmp_path / name))]


def test_saved_folder_is_read_without_what_was_computed_in_it(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).save_to_disk(tmp_path / "saved")
    datasets.load_from_disk(tmp_path / "saved").map(lambda row: {"text": row["text"] * 2})
    assert len([*(tmp_path / "saved").glob("*.arrow")]) == 2
    assert [row.values["text"] for row in load_rows(str(tmp_path / "saved"))] == ["a", "b"]


def test_folder_is_read_without_what_is_hidden_or_about_it(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".cache/b.jsonl", ".c.jsonl", "dataset_infos.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")
    assert [row.values["text"] for row in load_rows(str(tmp_path))] == ["a.jsonl"]
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list([{"text": name}]) for name in ("test", "train")})
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"several splits: name one of them \(.*test, .*train\)"):
        load_rows(str(tmp_path / "splits")).__next__()
    assert [row.values for row in load_rows(str(tmp_path / "splits/train"))] == [{"text": "train"}]


def test_held_out_file_in_the_folder_is_not_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")
    config = DataConfig(train=str(folder), eval=str(folder / "test.jsonl"), cache_dir=str(tmp_path / "cache"))
    report = prepare(config, str(folder), make_tokenizer()).report
    assert report.num_rows == 1
    assert report.notes == [f"not trained on, as data.eval holds it out (1 time, first in {folder / 'test.jsonl'})"]
    for link in ("symlink_to", "hardlink_to"):  # as the hub's cache has it
        outside = tmp_path / f"{link}.jsonl"
        outside.write_text(json.dumps({"text": "test"}) + "\n", encoding="utf-8")
        (folder / "test.jsonl").unlink()
        getattr(folder / "test.jsonl", link)(outside)
        for named in (folder / "test.jsonl", outside):
            config = DataConfig(train=str(folder), eval=str(named), cache_dir=str(tmp_path / link))
            assert prepare(config, str(folder), make_tokenizer()).report.num_rows == 1
    whole = DataConfig(train=f"{folder}#all", cache_dir=config.cache_dir)
    assert prepare(whole, f"{folder}#all", make_tokenizer()).report.num_rows == 2
    (folder / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"holds nothing but what data\.eval holds out"):
        prepare(config, str(folder), make_tokenizer())


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("mistral_v0_3", "system", "does not show a system turn"),
        ("qwen3", "reasoning", "does not show the thought of an assistant turn"),
        ("deepseek_r1", "thoughts within the words", "does not show all that an assistant turn says"),
    ],
)
def test_what_the_template_leaves_out_is_told(family: str, name: str, expected: str) -> None:
    (line,) = told(CONVERSATIONS[name], family)
    assert expected in line


def test_tools_that_the_template_leaves_out_are_told() -> None:
    (line,) = told({"messages": TURNS, "tools": TOOLS}, "chatml")
    assert "does not show the tools" in line


@pytest.mark.parametrize("family", ["llama3_1", "gpt_oss"])
def test_result_that_the_template_writes_as_json_is_shown(family: str) -> None:
    values = CONVERSATIONS["tools"]
    result = values["messages"][2] | {"content": '{"time": "14:05"}\n'}
    assert told(values | {"messages": [*values["messages"][:2], result, values["messages"][3]]}, family) == []


def test_absent_values_are_absent() -> None:
    padded = {"role": None, "from": "human", "content": None, "value": "2 + 2?"}
    assert learned({"messages": [padded, answer("4")], "tools": "null"}) == "4<|im_end|>"
    assert learned({"messages": [user("?"), answer(None), user("??"), answer("4")]}) == "4<|im_end|>"


def test_other_forms_of_a_written_call_are_calls_or_told() -> None:
    expected = '<tool_call>\n{"name": "w", "arguments": {}}\n</tool_call><|im_end|>'
    turns = [{"from": "human", "value": "?"}, {"from": "function_call", "value": '{"function": {"name": "w"}}'}]
    assert learned({"conversations": turns}) == expected
    turns[1]["value"] = "{'name': 'w'}"
    (line,) = told({"conversations": turns})
    assert line.startswith("a function_call turn that is not the JSON of calls is learned as a text")


def with_template(template: str | dict[str, str]) -> Any:
    """A tokenizer whose turns end with `</s>`."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def shown(tokenizer: Any, turns: list[dict[str, Any]]) -> str:
    """The learned characters."""
    ids, mask = encode(Row({"messages": turns}, WHERE), DataFormat.messages, tokenizer)
    return "".join(tokenizer.decode([token]) for token, one in zip(ids, mask, strict=True) if one)


BODY = "{% for m in messages %}{{ m.role + ': ' }}WORDS{{ '</s>' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
PLAIN = BODY.replace("WORDS", "{{ m.content }}") + ASK


def test_tokenizer_with_several_templates_has_the_default_one_read() -> None:
    tokenizer = with_template({"default": PLAIN, "tool_use": "{{ 'tools' }}" + PLAIN})
    assert shown(tokenizer, TURNS) == "4</s>"
    assert {*turn_ends(tokenizer)} == {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # The words are marked; what is between them and the end is not; everything is.
        (
            BODY.replace("WORDS", "{% generation %}{{ m.content }}{% endgeneration %}{{ m.tool_calls or '' }}") + ASK,
            "4</s>",
        ),
        (BODY.replace("WORDS", "{% generation %}{{ m.content }}{% endgeneration %}{{ ' end' }}") + ASK, "4 end</s>"),
        ("{% generation %}" + PLAIN + "{% endgeneration %}", "4</s>"),
        ("{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN, "4</s>"),
        (PLAIN.replace("m.content", "m.content | trim | capitalize"), "4</s>"),
        (PLAIN.replace("{{ m.content", "{{ m.role == 'assistant' and '<t></t>' or '' }}{{ m.content"), "<t></t>4</s>"),
    ],
)
def test_odd_templates_learn_what_follows_the_prompt_and_the_end(template: str, expected: str) -> None:
    tokenizer = with_template(template)
    turns = [{"role": "system", "content": "s"}, user("2 + 2?"), answer("3", weight=0), user("sure?"), answer("4")]
    assert shown(tokenizer, turns) == expected
    assert turn_ends(tokenizer) == {tokenizer.eos_token_id}


def test_turn_without_a_mark_is_learned_whole() -> None:
    call = "{% for c in m.tool_calls or [] %}<{{ c.function.name }}{{ c.function.arguments | tojson }}>{% endfor %}"
    words = "{% if m.content and m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
    tokenizer = with_template(BODY.replace("WORDS", words + "{{ m.content }}{% endif %}" + call) + ASK)
    calls = [{"id": "c1", "type": "function", "function": {"name": "w", "arguments": {}}}]
    turns = [
        user("?"),
        answer("", tool_calls=calls),
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
        answer("ok"),
    ]
    assert shown(tokenizer, turns) == "<w{}></s>ok</s>"


@pytest.mark.parametrize(
    "code", ["{{ '{x}'.format() }}", "{{ 1 // 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"]
)
def test_template_whose_code_fails_is_one_message(code: str) -> None:
    with pytest.raises(DataError, match="line 7 does not fit the model's chat template"):
        shown(with_template(code), TURNS)


def test_end_that_is_no_token_is_told() -> None:
    notes, tokenizer = Told(), with_template(PLAIN.replace("</s>", "\n\n"))
    encode(Row({"messages": TURNS}, WHERE), DataFormat.messages, tokenizer, DataConfig(), notes)
    (line,) = notes.lines()
    assert line.startswith("no token ends a turn in the model's chat template")


def test_long_conversations_take_time_in_proportion() -> None:
    """Also where all answers begin alike, and what the template leaves out is searched."""
    tokenizer, seconds = tokenizer_of("mistral_v0_3"), []
    for number in (500, 2000):
        turns = [{"role": "system", "content": "s" * 200 + " end"}]
        for index in range(number):
            turns += [user(f"q{index} " + "a" * 200), answer("a" * 200 + f" {index}")]
        row = Row({"messages": turns}, WHERE)
        encode(row, DataFormat.messages, tokenizer)
        started = time.process_time()
        encode(row, DataFormat.messages, tokenizer)
        seconds.append(time.process_time() - started)
    assert seconds[1] < 10 * seconds[0], "four times the turns"


@pytest.mark.parametrize(
    ("systems", "template", "expected"),
    [
        (["Be brief.", "Be brief."], None, "Be brief."),
        (["Be brief.", "Be kind."], None, None),
        (["Be brief.", None], None, None),
        ([None, None], None, None),
        (["Be brief.", "Be brief."], "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", None),
    ],
)
def test_system_turn_is_known_where_every_sample_has_and_shows_it(
    systems: list[str | None], template: str | None, expected: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"messages": TURNS} | ({} if system is None else {"system": system}) for system in systems]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(file), cache_dir=str(tmp_path / "cache"))
    for _ in range(2):  # tokenised, and from the cache
        assert prepare(config, str(file), make_tokenizer(template)).report.system == expected
