"""Variables of chat templates: as defaults within a template for a run, and of single rows over them."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from qdora.commands import compose, run, typed
from qdora.config import DataConfig, DataFormat, ModelConfig, RunConfig
from qdora.data import prepare
from qdora.data.conversation import Told
from qdora.data.encode import detect, encode, encode_prompt, with_answer
from qdora.data.sources import Row
from qdora.errors import ConfigError, DataError
from qdora.model.folder import load_tokenizer
from qdora.template_variables import fixed, refusal, variables_of, with_defaults
from tests.support.chats import TEMPLATES, answer, tokenizer_of, user
from tests.support.models import make_model, make_tokenizer

TURNS = [user("2 + 2?"), answer("4")]
SHOWS = "{%- macro shown() %}{{ x }}{% endmacro %}{% generation %}{{ shown() }}{% endgeneration %}|{{ x is defined }}"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def rendered(template: str, **variables: Any) -> str:
    """What transformers makes of a question."""
    tokenizer = make_tokenizer(template)
    text: str = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True, **variables)
    return text


@pytest.mark.parametrize(
    "value",
    [
        *(
            True,
            False,
            3,
            -1,
            0.5,
            1e30,
            "low",
            "",
            "26 Jul, 2024",
            "it's",
            '"x"',
            "a\\",
            "a\nb\r\\n",
            "河🙂é",
            "%}{{ 1 }}",
        ),
        *([1, "a", [True]], {"a b": {"c": None}}, "{#", "-%}\n", "\t"),
    ],
)
def test_default_within_the_template_renders_as_the_variable_does(value: Any) -> None:
    assert refusal({"x": value}) is None
    template = with_defaults(SHOWS, {"x": value})
    assert rendered(template) == rendered(SHOWS, x=value)
    assert rendered(template, x="theirs") == rendered(SHOWS, x="theirs"), "who asks otherwise is given that"


@pytest.mark.parametrize("begins", ["", "\n", "  \n\n", " {% if true %}a{% endif %}", "{#- c -#}\n ", "x\n"])
def test_template_itself_begins_as_it_did(begins: str) -> None:
    template = f"{begins}{{{{ x }}}}"
    assert rendered(with_defaults(template, {"x": 1})) == rendered(template, x=1)


def test_default_is_set_once_replaced_and_taken_back() -> None:
    template = TEMPLATES["qwen3"]
    off = with_defaults(template, {"enable_thinking": False})
    assert with_defaults(off, {"enable_thinking": False}) == off
    assert with_defaults(off, {"enable_thinking": True}) == with_defaults(template, {"enable_thinking": True})
    assert with_defaults(off, {"enable_thinking": None}) == template
    both = with_defaults(with_defaults("{{ x }}{{ y }}", {"x": 1}), {"y": 2})
    assert rendered(both) == "12"


def test_several_templates_have_the_default_each() -> None:
    named = with_defaults({"default": "{{ x }}", "tool_use": "t{{ x }}"}, {"x": 1})
    assert [rendered(text) for text in named.values()] == ["1", "t1"]


def test_fixed_default_holds_whatever_is_given() -> None:
    template = fixed(with_defaults(TEMPLATES["qwen3"], {"enable_thinking": False}))
    assert rendered(template, enable_thinking=True) == rendered(TEMPLATES["qwen3"], enable_thinking=False)
    assert fixed(TEMPLATES["qwen3"]) == TEMPLATES["qwen3"]


def test_variables_are_what_nobody_but_the_user_sets() -> None:
    assert variables_of(TEMPLATES["qwen3"]) == ("enable_thinking",)
    assert variables_of(TEMPLATES["chatml"]) == ()
    template = (
        "{% if not today is defined %}{% set today = strftime_now('%d') %}{% endif %}{% set n = namespace(a=1) %}"
        "{% if messages[0].role == 'system' %}{% set content = messages[0].content %}{% endif %}{{ content }}"
        "{{ today }}"
        "{% set effort = effort | default('low') %}{{ effort }}{{ bos_token }}{{ own }}{% if tools %}{{ n.a }}"
        "{% endif %}{% for m in messages %}{% if m.x is defined %}{% break %}{% endif %}{% endfor %}"
    )
    assert variables_of(template) == ("effort", "own", "today")
    assert variables_of("{% if %}") == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"x": "false"}, "x is the text 'false', which templates take for true: write it without quotes"),
        ({"x": "None"}, "x is the text 'None'"),
        ({"x": float("nan")}, "x must be true, false, a number, a text, or a list or mapping of those, not nan"),
        ({"x": [b"a"]}, "x must be true"),
        ({"x": {1: 2}}, "x must be true"),
        ({"messages": []}, "messages is no variable: the rows and the tokenizer say it"),
        ({"tokenize": True}, "tokenize is no variable"),
        ({"a b": 1}, "'a b' is no name of a variable"),
        ({3: 1}, "3 is no name of a variable"),
        ([1], "must be variables of the chat template by name, such as {enable_thinking: false}, not [1]"),
        ("yes", "must be variables of the chat template by name"),
        (True, "must be variables of the chat template by name"),
    ],
)
def test_what_is_no_variable_is_refused_of_runs_and_rows(values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ModelConfig(chat_template_kwargs=values)
    assert str(refused.value).startswith(f"model.chat_template_kwargs: {message}")
    row = Row({"messages": TURNS, "chat_template_kwargs": values}, "a.jsonl line 7")
    with pytest.raises(DataError) as refused_row:
        encode(row, DataFormat.messages, tokenizer_of("qwen3"))
    assert str(refused_row.value).startswith(f"a.jsonl line 7: chat_template_kwargs: {message}")
    assert str(refused_row.value).endswith("data.ignore_keys=[chat_template_kwargs] leaves it out")


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["model.chat_template_kwargs.enable_thinking=false"], {"enable_thinking": False}),
        (["+model.chat_template_kwargs.enable_thinking=false"], {"enable_thinking": False}),
        (["model.chat_template_kwargs={enable_thinking: false}"], {"enable_thinking": False}),
        (
            ['model.chat_template_kwargs={"enable_thinking": false, "a": "b, c"}'],
            {"enable_thinking": False, "a": "b, c"},
        ),
        (
            ["model.chat_template_kwargs=enable_thinking:false", "model.chat_template_kwargs=n:3"],
            {"enable_thinking": False, "n": 3},
        ),
        (["model.chat_template_kwargs.date=26 Jul, 2024 (Fri)"], {"date": "26 Jul, 2024 (Fri)"}),
        (
            ["model.chat_template_kwargs.effort=low", "model.chat_template_kwargs.x=[1,a]"],
            {"effort": "low", "x": [1, "a"]},
        ),
        (["model.chat_template_kwargs.x=null"], {"x": None}),
        (["model.chat_template_kwargs={}"], {}),
    ],
)
def test_variables_are_taken_as_they_are_written(words: list[str], values: dict[str, Any]) -> None:
    composed = compose("train", ["model.path=m", "data.train=d", *words])
    assert composed is not None
    made = typed(composed, RunConfig)
    assert made.model.chat_template_kwargs == values
    assert [type(value) for value in made.model.chat_template_kwargs.values()] == [*map(type, values.values())]


@pytest.mark.parametrize("value", ["null", "false", "[a]", "{a}", "{enable_thinking:", "enable_thinking", "a b:c"])
def test_variables_that_are_written_otherwise_are_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "model.path=m", "data.train=d", f"model.chat_template_kwargs={value}"]) == 2
    said = "names and values stand in braces: 'model.chat_template_kwargs={enable_thinking: false}'"
    assert capsys.readouterr().err == f"qdora: model.chat_template_kwargs={value}: {said}\n"


def test_tokenizer_has_the_variables_of_the_run_or_says_which_there_are(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "llama", vocab_size=300)
    tokenizer_of("qwen3").save_pretrained(base)
    config = ModelConfig(path=str(base), chat_template_kwargs={"enable_thinking": False})
    asked = load_tokenizer(base, config).apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert asked.endswith(f"assistant\n{EMPTY_THOUGHT}")
    with pytest.raises(ConfigError) as refused:
        load_tokenizer(base, ModelConfig(path=str(base), chat_template_kwargs={"enable_thoughts": False}))
    assert str(refused.value) == (
        "model.chat_template_kwargs: the model's chat template has no variable enable_thoughts, did you mean "
        "'enable_thinking'?; it has enable_thinking"
    )
    make_tokenizer().save_pretrained(base)
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no variable enable_thinking; it has none"):
        load_tokenizer(base, config)


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.decode([token]) for token in ids)


def learned(values: dict[str, Any], family: str = "qwen3") -> str:
    row, tokenizer = Row(values, "a.jsonl line 7"), tokenizer_of(family)
    ids, mask = encode(row, detect(row), tokenizer, DataConfig())
    return text_of(tokenizer, [token for token, one in zip(ids, mask, strict=True) if one])


ROWS = {
    "messages": {"messages": TURNS},
    "instruction": {"instruction": "2 + 2?", "output": "4"},
    "prompt and completion": {"prompt": TURNS[:1], "completion": TURNS[1:]},
}


@pytest.mark.parametrize("form", ROWS)
def test_row_is_rendered_with_its_variables_over_those_of_the_run(form: str) -> None:
    """With thinking off the empty thought belongs to the prompt, and is not learned."""
    on, off = ({"chat_template_kwargs": {"enable_thinking": value, "other": None}} for value in (True, False))
    for family, usual in (("qwen3", EMPTY_THOUGHT), ("qwen3_thinking_off", "")):
        assert learned(ROWS[form], family) == f"{usual}4<|im_end|>"
        assert learned(ROWS[form] | on, family) == f"{EMPTY_THOUGHT}4<|im_end|>"
        assert learned(ROWS[form] | off, family) == "4<|im_end|>"
        assert (
            learned(ROWS[form] | {"chat_template_kwargs": json.dumps({"enable_thinking": False})}, family)
            == "4<|im_end|>"
        )
        for nothing in (None, "", {}, {"enable_thinking": None}):
            assert learned(ROWS[form] | {"chat_template_kwargs": nothing}, family) == f"{usual}4<|im_end|>"


def test_row_is_asked_with_its_variables() -> None:
    row = Row({"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False}}, "the row")
    for asked in (row, with_answer(row, DataFormat.messages, "5")):
        ids = encode_prompt(asked, DataFormat.messages, tokenizer_of("qwen3"))
        assert text_of(tokenizer_of("qwen3"), ids).endswith(EMPTY_THOUGHT)


def test_variable_of_a_row_that_the_template_does_not_have_is_told() -> None:
    told = Told()
    for variable in ("enable_thoughts", "enable_thinking"):
        row = Row({"messages": TURNS, "chat_template_kwargs": {variable: True}}, "a.jsonl line 7")
        encode(row, DataFormat.messages, tokenizer_of("qwen3"), DataConfig(), told)
    assert told.lines() == [
        "chat_template_kwargs: the model's chat template has no variable enable_thoughts, did you mean "
        "'enable_thinking'?; it has enable_thinking (1 time, first in a.jsonl line 7)"
    ]


def test_variables_of_a_text_or_a_completion_are_refused() -> None:
    for values in ({"text": "a"}, {"prompt": "a", "completion": "b"}):
        row = Row(values | {"chat_template_kwargs": {"x": 1}}, "the row")
        with pytest.raises(DataError, match="chat_template_kwargs is not read"):
            encode(row, detect(row), tokenizer_of("qwen3"), DataConfig())


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_rows_of_every_kind_of_file_keep_their_variables_apart(tmp_path: Path, name: str) -> None:
    """Parquet writes each variable into each row, null where the row has none; csv has the JSON of an object."""
    variables: list[dict[str, Any] | None] = [
        {"enable_thinking": False},
        {"enable_thinking": True},
        {"effort": "low"},
        None,
    ]
    rows = [{"instruction": "2 + 2?", "output": "4", "chat_template_kwargs": one} for one in variables]
    file = tmp_path / name
    if name == "a.jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name == "a.parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        for row in rows:
            row["chat_template_kwargs"] = json.dumps(row["chat_template_kwargs"] or {})
        datasets.Dataset.from_list(rows).to_csv(file)
    tokenizer = tokenizer_of("qwen3")
    config = DataConfig(train=str(file), cache_dir=str(tmp_path / "cache"), format=DataFormat.instruction)
    samples = prepare(config, str(file), tokenizer)
    shown = []
    for index in range(len(samples)):
        _, labels = samples.arrays(index)
        shown.append(text_of(tokenizer, [label for label in labels if label >= 0]))
    assert shown == ["4<|im_end|>", *[f"{EMPTY_THOUGHT}4<|im_end|>"] * 3]
    (note,) = samples.report.notes
    assert "no variable effort" in note
