"""`qdora show`: what is printed is what is trained on, and all of it can be seen."""

import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from qdora.commands import COMMANDS, compose, conf_folder, run, typed
from qdora.config import DataConfig, DataFormat, ModelConfig, RunConfig
from qdora.data import prepare
from qdora.data.encode import encode
from qdora.data.loader import Batch, num_rows
from qdora.data.sources import Row
from qdora.model import load_tokenizer, model_folder
from qdora.model.folder import load_tokenizer_alone
from qdora.parallel import start_alone
from qdora.planning.length import fitted
from qdora.show.lengths import Lengths, histogram
from qdora.show.run import numbers_of
from qdora.show.spelling import Run, Spelling
from qdora.show.terminal import NEW_LINE, painted, shown, wants_colours
from qdora.training.run import _loader
from tests.support.chats import CONVERSATIONS, TEMPLATES, tokenizer_of
from tests.support.models import byte_fallback, make_tokenizer
from tests.unit.test_golden_chats import shown as golden
from tests.unit.test_model_sources import gguf

__all__ = ["gguf"]
ESCAPE = re.compile(r"\x1b\[[\d;]*m")
TEXTS = [
    "Name a tree, or two.\n\n\tOak  and birch. ",
    "\u00e9t\u00e9 \u0414\u0443\u0431 \u6728\u3001\u65e5 \U0001f333 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\ufffd is a character, \u2581 too; <0x0A> is text",
]


def write(file: Path, *rows: dict[str, Any]) -> Path:
    """A jsonl file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colours but where a test asks for them."""
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's config and tokenizer, a token a character, without weights."""
    model = tmp_path / "model"
    tokenizer_of("chatml").save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return model


@pytest.fixture
def told(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command and returns what it prints; stderr where it must end with another `status` than 0."""

    def show(*options: str, status: int = 0) -> str:
        assert run(["show", f"model.path={folder}", *options]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    return show


TALK = [
    {"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Oak."}]},
    {"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": ""}]},
    {
        "messages": [
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Left out.", "weight": 0},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Birch.\nElm."},
        ]
    },
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_tokens_spell_the_text_that_they_were_made_of(kind: str, text: str, smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2) if kind == "byte-level" else byte_fallback()
    text = text if kind == "byte-level" else text.replace("\u2581", "").replace("<0x0A>", "")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spelling = Spelling(tokenizer)
    assert len(ids) > len(spelling.runs(ids, [False] * len(ids)))
    assert spelling.text(ids) == text
    assert "".join(part.text for part in spelling.runs(ids, [True] * len(ids))) == text


def test_character_of_several_tokens_is_learned_where_a_part_of_it_is(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer("a\U0001f333b")["input_ids"]
    assert len(ids) > 4
    for place in range(1, len(ids) - 1):
        learned = [index == place for index in range(len(ids))]
        runs = Spelling(tokenizer).runs(ids, learned)
        assert [(part.text, part.learned) for part in runs] == [("a", False), ("\U0001f333", True), ("b", False)]


def test_bytes_of_half_a_character_are_written(smollm2: Path) -> None:
    """Where a sample was cut within one."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer("a\U0001f333")["input_ids"][:-1]
    runs = Spelling(tokenizer).runs(ids, [False] * len(ids))
    assert painted(runs, colours=False) == "a<0xF0><0x9F><0x8C>\n"
    assert runs[-1].plain == "\ufffd" * 3


@pytest.mark.parametrize("family", TEMPLATES)
def test_brackets_are_where_the_golden_files_have_them(family: str) -> None:
    """Of all kinds of conversation: tools, thoughts, system turns."""
    tokenizer, num_shown = tokenizer_of(family), 0
    for values in CONVERSATIONS.values():
        expected = golden(family, values).partition("\ntold: ")[0]
        if expected.startswith("refused"):
            continue
        ids, learned = encode(Row(values, "the row"), DataFormat.messages, tokenizer)
        text = painted(Spelling(tokenizer).runs(ids, learned), colours=False)
        assert text.replace(f"{NEW_LINE}\n", "\n").rstrip("\n") == expected.rstrip("\n")
        num_shown += 1
    assert num_shown > 3


def test_colours_say_what_is_learned_and_which_tokens_are_no_text() -> None:
    runs = [Run("<s>", False, True), Run("a\nb", False, False), Run("c\nd", True, False), Run("</s>", True, True)]
    assert painted(runs, colours=True) == (
        f"\x1b[36m<s>\x1b[0m\x1b[2ma{NEW_LINE}\x1b[0m\n\x1b[2mb\x1b[0m"
        f"\x1b[32mc{NEW_LINE}\x1b[0m\n\x1b[32md\x1b[0m\x1b[1;32m</s>\x1b[0m\n"
    )


def test_nothing_invisible_reaches_the_terminal() -> None:
    """Of any character there is something to see, and none moves the cursor or turns the writing around."""
    seen = {"\t": "\u2409", "\x1b": "\u241b", "\r": "\u240d", "\u00a0": "<U+00A0>", "\u202e": "<U+202E>"}
    assert {character: shown(character) for character in seen} == seen
    for number in range(0x30000):
        text = shown(chr(number)).replace("\n", "")
        assert text, hex(number)
        allowed = number in (0x200C, 0x200D)
        assert allowed or all(unicodedata.category(one) not in ("Cc", "Cf", "Zl", "Zp", "Cs") for one in text)


def test_names_in_the_data_do_not_reach_the_terminal_as_they_are(told: Callable[..., str], tmp_path: Path) -> None:
    file = write(tmp_path / "a\x1b[2Jb.jsonl", TALK[0] | {"k\x1b[31m": 1})
    text = told(f"data.train={file}")
    assert "a\u241b[2Jb.jsonl:1  sample 1 of 1" in text
    assert "k\u241b[31m is not read" in text
    assert "\x1b" not in text


def test_brackets_in_the_text_are_not_taken_for_marks() -> None:
    assert painted([Run("\u27e6a\u27e7", True, False)], colours=False) == "\u27e6<U+27E6>a<U+27E7>\u27e7\n"


@pytest.mark.parametrize(
    ("environment", "is_terminal", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "0"}, True, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_colours_are_for_terminals_unless_told(
    environment: dict[str, str], is_terminal: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    assert wants_colours() is expected


def test_page_has_place_counts_and_text(told: Callable[..., str], tmp_path: Path) -> None:
    file = write(tmp_path / "talk.jsonl", *TALK)
    text = told(f"data.train={file}")
    assert text.startswith(
        f"{file}:1  sample 1 of 2: 28 tokens, 5 learned\n"
        f"<|im_start|>user{NEW_LINE}\nHm?<|im_end|>{NEW_LINE}\n"
        f"<|im_start|>assistant{NEW_LINE}\n\u27e6Oak.<|im_end|>\u27e7{NEW_LINE}\n"
    )
    assert f"assistant{NEW_LINE}\nLeft out.<|im_end|>{NEW_LINE}\n" in text
    assert f"\u27e6Birch.{NEW_LINE}\nElm.<|im_end|>\u27e7" in text
    lines = [line.strip() for line in text.splitlines()]
    assert {"3  rows read", "1  left out without a token to learn", "2  samples"} <= {*lines}
    assert any(
        re.fullmatch(rf"left out: .*, so there is nothing to learn \(1 time, .*{file} line 2\)", s) for s in lines
    )


def test_tokens_are_listed_with_ids(told: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "talk.jsonl", *TALK)
    text = told(f"data.train={file}", "num=1", "tokens=true").partition("\n\n")[0]
    lines = [re.fullmatch(r" *(\d+) +(\d+)  (-|learned) +\u2502(.*)\u2502", line) for line in text.splitlines()[2:]]
    ids, labels = prepare(DataConfig(), str(file), AutoTokenizer.from_pretrained(folder))[0]
    assert [int(line[1]) for line in lines if line] == [*range(len(ids))]
    assert [int(line[2]) for line in lines if line] == ids.tolist()
    assert [line[3] == "learned" for line in lines if line] == [False, *(labels[:-1] != -100).tolist()]
    assert "".join(line[4] for line in lines if line).startswith(f"<|im_start|>user{NEW_LINE}Hm?<|im_end|>")


def sums(number: int) -> list[dict[str, Any]]:
    """Completions of all lengths."""
    return [{"prompt": f"{n} + 1 = ", "completion": "x" * (1 + n * 7 % 90)} for n in range(number)]


CASES: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "messages": (TALK, []),
    "messages unpacked": (TALK, ["data.packing=false"]),
    "tools": ([CONVERSATIONS["tools"], *TALK], []),
    "thoughts": ([CONVERSATIONS["reasoning"], *TALK], []),
    "thoughts dropped": ([CONVERSATIONS["reasoning"], *TALK], ["data.reasoning=drop"]),
    "cut": (sums(40), ["data.max_length=64"]),
    "left out": (sums(40), ["data.max_length=64", "data.overlong=drop"]),
    "text in pieces": ([{"text": "word " * n} for n in range(1, 60, 7)], ["data.max_length=32"]),
    "instructions": ([{"instruction": "Add", "input": f"{n}", "output": "2"} for n in range(9)], []),
    "some rows": (sums(40), ["data.limit=7"]),
}


def test_readme_has_what_is_printed(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """All lines that it prints, in their order."""
    monkeypatch.chdir(root)
    readme = (root / "README.md").read_text(encoding="utf-8")
    command, _, text = readme.partition("$ qdora show ")[2].partition("```")[0].partition("\n")
    assert run(["show", *command.split()]) == 0
    printed, position = capsys.readouterr().out, 0
    pieces = text.split("...\n")
    assert len(pieces) == 3
    for piece in pieces:
        assert piece in printed[position:]
        position = printed.index(piece, position) + len(piece)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_what_is_shown_is_what_is_trained_on(
    case: str, packed: bool, told: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    """Ids, labels, positions and order are those of the trainer's batches, of training data and of held-out data.

    The training data is a folder of two files, in which the held-out one lies, too.
    """
    rows, options = CASES[case]
    if case.startswith(("tools", "thoughts")):
        tokenizer_of("qwen3").save_pretrained(folder)
    if packed and "data.packing=false" in options:
        options = []
    write(tmp_path / "data" / "a.jsonl", *rows[1:])
    write(tmp_path / "data" / "b.jsonl", *rows[:1])
    held_out = write(tmp_path / "data" / "held_out.jsonl", *rows)
    options = [*options, f"data.train={tmp_path / 'data'}", f"data.eval={held_out}", "seed=3"]
    values = json.loads(told(*options, f"packed={str(packed).lower()}", "num=1000", "report=json"))

    composed = compose("train", [*options, f"model.path={folder}", f"data.cache_dir={tmp_path / 'cache'}"])
    assert composed is not None
    config: RunConfig = typed(composed, RunConfig)
    tokenizer = load_tokenizer(model_folder(config.model), config.model)
    for name, path in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        dataset = prepare(config.data, str(path), tokenizer)
        num_rows_an_epoch = num_rows(dataset.lengths, config.data.packing, config.data.max_length)
        run = replace(config, train=fitted(config.train, num_rows_an_epoch, num_ranks=1))
        loader = _loader(run, start_alone("test"), dataset, tokenizer.pad_token_id, shuffle=name == "data.train")
        assert values[name]["report"] == asdict(dataset.report)
        assert values[name]["steps_per_epoch"] == loader.steps_per_epoch
        steps = iter(loader)
        batches = [batch for _ in range(loader.steps_per_epoch) for batch in next(steps)]
        trained = [row for batch in batches for row in rows_of(batch, tokenizer.pad_token_id)]
        printed = [joined(row["samples"]) for row in values[name]["rows"]]
        assert len(singles(trained)) == len(dataset)
        assert (printed if packed else sorted(printed)) == (trained if packed else sorted(singles(trained)))


Tokens = list[tuple[int, int, int]]


def joined(samples: list[dict[str, Any]]) -> Tokens:
    """Id, label and position of each token of a row that is shown."""
    tokens: Tokens = []
    for sample in samples:
        assert sample["first_position"] == len(tokens)
        tokens += zip(sample["input_ids"], sample["labels"], range(sample["num_tokens"]), strict=True)
        assert sample["num_label_tokens"] == sum(label != -100 for label in sample["labels"])
    return tokens


def rows_of(batch: Batch, pad: int) -> list[Tokens]:
    """The same of the rows of a batch without padding, which no text of these tests has."""
    rows = []
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        tokens = [one for one in zip(ids.tolist(), labels.tolist(), positions.tolist(), strict=True) if one[0] != pad]
        rows += [tokens] if tokens else []
    return rows


def singles(rows: list[Tokens]) -> list[Tokens]:
    """The samples of rows."""
    found: list[Tokens] = []
    for row in rows:
        for token in row:
            if token[2] == 0:
                found.append([])
            found[-1].append(token)
    return found


def test_samples_are_picked_by_length_by_chance_and_by_words(told: Callable[..., str], tmp_path: Path) -> None:
    file = write(tmp_path / "sums.jsonl", *sums(40))
    data = f"data.train={file}"

    def lines(*options: str) -> list[int]:
        rows = json.loads(told(data, "report=json", *options))["data.train"]["rows"]
        return [int(sample["where"].rpartition(":")[2]) for row in rows for sample in row["samples"]]

    by_length = sorted(range(1, 41), key=lambda line: -len("".join(sums(40)[line - 1].values())))
    assert lines("pick=longest") == by_length[:3]
    assert lines("pick=shortest", "num=1") == by_length[-1:]
    assert lines("num=2") == [1, 2]
    chance = [lines("pick=random", f"seed={seed}", "num=5") for seed in (0, 0, 1)]
    assert chance[0] == chance[1] != chance[2]
    assert len({*chance[0]}) == 5
    assert lines("find=7 + 1 = x", "num=9") == [8, 18, 28, 38]
    assert lines("at=12,sums.jsonl:3") == [3, 12]
    assert [lines(f"at={path}:4") for path in (file, f"./{file.name}", os.path.relpath(file))] == [[4]] * 3
    assert lines("num=0") == []
    assert "no sample of data.train has 'absent'" in told(data, "find=absent")


def test_row_that_was_left_out_is_explained(told: Callable[..., str], tmp_path: Path) -> None:
    first, second = write(tmp_path / "a" / "one.jsonl", *TALK), write(tmp_path / "a" / "two.jsonl", *TALK[:1])
    text = told(f"data.train={tmp_path / 'a'}", "at=2,two.jsonl:1")
    assert text.startswith(f"{second}:1  sample 3 of 3: ")
    assert f"\n{first} line 2: left out: no assistant turn says anything that counts" in text
    text = told(f"data.train={first}", "at=3", "data.max_length=60", "data.overlong=drop")
    assert text.startswith(f"{first} line 3: left out: longer than data.max_length=60")
    text = told(f"data.train={first}", "at=9", status=2)
    assert text == (
        "qdora: at=9: no such line or row in data.train (3 rows); they are counted from 1 in each file, as messages "
        "name them\n"
    )


def test_parts_of_a_text_are_counted(told: Callable[..., str], tmp_path: Path) -> None:
    file = write(tmp_path / "text.jsonl", {"text": "a"}, {"text": "b" * 70})
    text = told(f"data.train={file}", "data.max_length=32", "at=2")
    headings = [line for line in text.splitlines() if line.startswith(f"{file}:")]
    assert [line.partition("  ")[2].partition(":")[0] for line in headings] == [
        f"sample {number + 1} of 4, part {number} of 3 of a row of 71 tokens" for number in (1, 2, 3)
    ]
    assert "1 of 2 rows above it, cut" in text
    file = write(tmp_path / "long.jsonl", {"prompt": "a", "completion": "b" * 70})
    assert told(f"data.train={file}", "data.max_length=32").startswith(
        f"{file}:1  sample 1 of 1, cut from 72 tokens: 32 tokens, 31 learned\n"
    )


def test_packed_row_says_where_its_samples_begin(told: Callable[..., str], tmp_path: Path) -> None:
    file = write(tmp_path / "text.jsonl", {"text": "a" * 20}, {"text": "b" * 30})
    text = told(f"data.train={file}", "data.max_length=64", "packed=true", "tokens=true")
    assert text.startswith("row 1 of 1, in step 1: 2 samples, 52 of 64 tokens, 50 learned\n")
    assert f"{file}:1  sample 1 of 2, from token 31 of the row on: 21 tokens, 20 learned" in text
    assert re.search(r"^ +31 +0 +\d+  - +\u2502a\u2502$", text, re.MULTILINE)


def test_model_without_a_chat_template_is_told(told: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    text = told(f"data.train={write(tmp_path / 'talk.jsonl', *TALK)}", "num=1")
    assert f"### Assistant:{NEW_LINE}\n\u27e6Oak.</s>\u27e7" in text
    assert "(messages, qdora's headings, as the model has no chat template)" in text


def test_tokenizer_of_the_adapter_that_training_goes_on_from_is_shown(
    told: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    tokenizer_of("llama3_1").save_pretrained(tmp_path / "adapter")
    write(tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    options = [f"data.train={write(tmp_path / 'talk.jsonl', *TALK)}", "num=1"]
    assert "<|im_start|>" in told(*options)
    text = told(*options, f"adapter.path={tmp_path / 'adapter'}")
    assert "<|start_header_id|>assistant" in text
    assert "<|im_start|>" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "data.train is not set: give a file, a folder or a hub id (or data.eval, for held-out data)"),
        (["data.train=absent.jsonl"], "no such data file or folder: absent.jsonl"),
        (["data.train={empty}"], "empty.jsonl is empty: it has no row"),
        (["data.train={silent}"], "silent.jsonl: none of its 1 rows has a token left to learn"),
        (["data.train={good}", "model.path=./absent"], "model.path=./absent: no such folder"),
        (["data.train={good}", "num=-1"], "num is -1; it must be at least 0"),
        (["data.train={good}", "at=first"], "at=first: write the number of a line or row (7)"),
        (["data.train={good}", "figure=lengths.jpg"], "figure=lengths.jpg: give the name of a file that ends in"),
        (["data.train={good}", "figure={good}/lengths.png"], "lengths.png cannot be written"),
        (["data.train={good}", "packed=true", "data.packing=false"], "with data.packing=false a row is a sample"),
        (["data.train={good}", "pick=middle"], "pick"),
    ],
)
def test_mistake_is_one_message(options: list[str], message: str, told: Callable[..., str], tmp_path: Path) -> None:
    files = {
        "good": write(tmp_path / "good.jsonl", *TALK),
        "empty": write(tmp_path / "empty.jsonl"),
        "silent": write(tmp_path / "silent.jsonl", TALK[1]),
    }
    text = told(*(option.format_map(files) for option in options), status=2)
    assert text.startswith("qdora: ")
    assert message in text
    assert text.count("\n") == 1


def test_histogram_counts_each_row_once_and_bins_end_at_the_limit() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        spread = random.choice([0.0, 0.5, 2.0, 4.0])
        tokens = random.lognormal(random.uniform(0, 7), spread, int(random.integers(1, 200))).astype(np.int64) + 1
        lengths = Lengths("data.train", tokens, int(random.integers(2, 3000)), "cut")
        values = lengths.numbers()
        assert sum(count for _, _, count in values["bins"]) == len(tokens)
        assert sum(n for first, _, n in values["bins"] if first > lengths.limit) == values["above_max_length"]
        assert all(last <= lengths.limit or first > lengths.limit for first, last, _ in values["bins"])
        assert len(values["bins"]) <= 18
        lines = histogram(lengths, 80)
        assert all(len(line) <= 80 for line in lines)
        (rule,) = [place for place, line in enumerate(lines) if "data.max_length" in line]
        assert rule == sum(first <= lengths.limit for first, _, _ in values["bins"])


def test_histogram_in_plain_characters() -> None:
    lengths = Lengths("data.train", np.asarray([10, 10, 30, 200]), 100, "left out")
    text = "\n".join(histogram(lengths, 60, blocks=False))
    assert text.isascii()
    assert "--- data.max_length=100: 1 of 4 rows above it, left out ---" in text
    assert re.search(r"0 - +19 #+ 2$", text, re.MULTILINE)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_lengths_are_drawn(suffix: str, told: Callable[..., str], tmp_path: Path) -> None:
    figure, file = tmp_path / "new" / f"lengths.{suffix}", write(tmp_path / "sums.jsonl", *sums(40))
    told(f"data.train={file}", f"data.eval={file}", "data.max_length=64", f"figure={figure}")
    assert [one.name for one in figure.parent.iterdir()] == [figure.name]
    if suffix == "svg":
        assert figure.read_text().count("<svg") == 1
        return
    with Image.open(figure) as image:
        assert image.size[0] > 1000
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**20) or ()}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours  # within data.max_length, and above it


@pytest.mark.parametrize("recipe", sorted(file.stem for file in (conf_folder() / "experiment").glob("*.yaml")))
def test_command_of_a_run_can_be_shown(recipe: str) -> None:
    """With every option of `qdora train`."""
    given = [f"+experiment={recipe}", "model.path=m", "data.train=d"]
    composed = {name: compose(name, given) for name in ("train", "show")}
    made, trained = (typed(composed[name], COMMANDS[name].config_class) for name in ("show", "train"))  # type: ignore[arg-type]
    assert made.data == trained.data
    assert made.train == trained.train


def test_yaml_file_of_a_run_can_be_shown(told: Callable[..., str], tmp_path: Path) -> None:
    file = write(tmp_path / "talk.jsonl", *TALK)
    own = f"defaults: [train, _self_]\ndata:\n  train: {file}\ntrain:\n  micro_batch_size: 3\n"
    write(tmp_path / "conf" / "mine.yaml").write_text(own)
    text = told("at=3", "--config-dir", str(tmp_path / "conf"), "--config-name", "mine")
    assert text.startswith(f"{file}:3  sample 2 of 2: ")
    assert "1 step of 3 rows on one rank" in text
    assert typed(compose("train", ["model.path=m", "data.train=d"]), RunConfig).__class__ is RunConfig  # type: ignore[arg-type]


def test_unknown_text_is_counted_and_told(told: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(folder)
    file = write(tmp_path / "texts.jsonl", {"text": "plain"}, {"text": "größer, süß"}, {"text": "ä"})
    text = told(f"data.train={file}", "num=0")
    assert re.search(r"^ +5  that the tokenizer does not know: <unk>$", text, re.MULTILINE)
    assert f"has text that the tokenizer does not know, as <unk> (2 times, first in {file} line 2)" in text
    known = write(tmp_path / "known.jsonl", {"text": "plain"})
    assert "does not know" not in told(f"data.train={known}", "num=0")


@pytest.mark.parametrize(
    ("environment", "steps"),
    [
        ({}, "5 steps of 8 rows on one rank"),
        ({"NPROC": "2"}, "3 steps of 16 rows on 2 ranks"),
        ({"WORLD_SIZE": "4", "RANK": "0"}, "2 steps of 32 rows on 4 ranks"),
        ({"WORLD_SIZE": "4", "RANK": "1"}, None),
    ],
)
def test_steps_are_those_of_the_ranks_and_rank_0_alone_prints(
    told: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    steps: str | None,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = write(tmp_path / "texts.jsonl", *({"text": f"{n}"} for n in range(40)))
    fixed = ["data.packing=false", "train.num_accumulation_steps=8", "train.micro_batch_size=1", "num=1"]
    text = told(f"data.train={file}", *fixed)
    assert (text == "") if steps is None else (f"; {steps}" in text)


def test_numbers_of_lines_are_read() -> None:
    assert numbers_of("7") == [("", 7)]
    assert numbers_of("a:b.jsonl:7,12,c, d.jsonl:3") == [("a:b.jsonl", 7), ("", 12), ("c, d.jsonl", 3)]


def test_tokenizer_of_a_gguf_file_needs_no_conversion(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(path=str(gguf))
    with monkeypatch.context() as patch:
        patch.setattr("qdora.model.folder.convert_gguf", lambda *_: pytest.fail("converted"))
        alone = load_tokenizer_alone(config)
    trained = load_tokenizer(model_folder(config), config)
    assert alone.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()
    assert alone.get_vocab() == trained.get_vocab()
    assert alone.special_tokens_map == trained.special_tokens_map
    assert alone.chat_template == trained.chat_template
