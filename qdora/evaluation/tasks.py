"""What is asked: the files of tasks, the choices of a row, and when a generated answer is right.

task            rows (LLM-Adapters form, as in the DoRA paper, section 5.1)      an answer
commonsense     boolq piqa siqa hellaswag winogrande arc_easy arc_challenge obqa one of `Answer format: a/b/c`
arithmetic      gsm8k svamp addsub multiarith mawps                              a number
                aqua                                                             one of `Answer Choices: (A) ...`
any other name  a file of that name
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdora.config import DataFormat
from qdora.data.encode import reference
from qdora.data.sources import SUFFIXES, Row
from qdora.errors import ConfigError, DataError, nearest

GROUPS = {
    "commonsense": ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "obqa"],
    "arithmetic": ["gsm8k", "svamp", "addsub", "multiarith", "mawps", "aqua"],
}
"""Of `tasks=[...]`. LLM-Adapters' own mean of arithmetic has SingleEq instead of MAWPS."""
_OTHER_NAMES = {
    "siqa": "socialiqa",
    "obqa": "openbookqa",
    "arce": "arceasy",
    "arcc": "arcchallenge",
}
"""Names of the same task, without case and punctuation."""
NUMBER_TOLERANCE = 1e-3
"""Two numbers so close are the same answer, as in LLM-Adapters."""
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def find_tasks(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """The file of each task: `folder/TASK.jsonl` (or another suffix), or `folder/TASK/test.json`; any case.

    Raises:
        ConfigError: a task has no file there.
    """
    if not folder.is_dir():
        raise ConfigError(f"tasks_path={folder} is no folder")
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        stem, suffix = Path(file.name.removesuffix(".gz")).stem, Path(file.name.removesuffix(".gz")).suffix
        if suffix in SUFFIXES and file.is_file():
            files.setdefault(_plain(file.parent.name if stem == "test" else stem), []).append(file)
    found = {}
    for name in (one for group in names for one in GROUPS.get(group, [group])):
        own = files.get(_plain(name), [])
        if not own:
            raise ConfigError(
                f"tasks: there is no file for {name!r} in {folder}, such as {name}.jsonl or {name}/test.json"
                f"{nearest(name, files)}; it has {', '.join(files) or 'no such file at all'}"
            )
        if len(own) > 1:
            raise ConfigError(f"tasks: {name!r} may be {own[0]} or {own[1]}; give a tasks_path that has one of them")
        found[name] = own[0]
    return found


def _plain(name: str) -> str:
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return _OTHER_NAMES.get(plain, plain)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked by a row with choices."""

    choices: list[str]
    gold: str

    @property
    def place(self) -> int:
        """Returns the index of the gold choice."""
        return self.choices.index(self.gold)


def question_of(row: Row) -> Question | None:
    """The choices of a row and the gold one, or None where it is not multiple choice.

    Raises:
        DataError: the answer is none of the choices.
    """
    choices, answer = row.values.get("choices"), row.values.get("answer")
    text = str(row.values.get("instruction", ""))
    if choices is None and (listed := re.search(r"Answer format:\s*(\S+(?:/\S+)+)", text)):
        choices = listed[1].split("/")
    elif choices is None and (listed := re.search(r"Answer Choices:(.*)", text, re.DOTALL)):
        choices = re.findall(r"\(([A-Z])\)", listed[1])
    if not choices or answer is None:
        return None
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise DataError(f"{row.where}: choices must be a list of texts, this is {choices!r:.60}")
    is_index = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
    if is_index and str(answer) in choices and choices[answer] != str(answer):
        raise DataError(
            f"{row.where}: answer {answer} may be the choice {str(answer)!r} or a place in the list: write it as text"
        )
    gold = choices[answer] if is_index else answer
    if gold not in choices:
        raise DataError(f"{row.where}: the answer {answer!r} is none of the choices {choices}")
    return Question(choices, str(gold))


def is_right(row: Row, form: DataFormat, text: str) -> bool:
    """Whether a generated answer is the row's.

    With choices, if the first one named is the gold one. With a number as `answer`, if the last number in the text is
    it; with another `answer`, if that occurs in the text. Else the text must equal the row's own answer.
    """
    question = question_of(row)
    if question is not None:
        choices = sorted(question.choices, key=len, reverse=True)
        named = re.search("|".join(map(as_word, choices)), text)
        return named is not None and named[0] == question.gold
    if "answer" not in row.values:
        return " ".join(text.split()) == " ".join(reference(row, form).split())
    gold = str(row.values["answer"])
    if _NUMBER.fullmatch(gold.strip()):
        numbers = _NUMBER.findall(text)
        return bool(numbers) and abs(_value(numbers[-1]) - _value(gold)) <= NUMBER_TOLERANCE
    return re.search(as_word(gold), text, re.IGNORECASE) is not None


def as_word(text: str) -> str:
    """A pattern of `text` where it is no part of a longer word: `I know` names no choice `no`."""
    return rf"(?<![A-Za-z0-9_]){re.escape(text)}(?![A-Za-z0-9_])"


def _value(number: str) -> float:
    return float(number.strip().replace(",", ""))


def gold_of(row: Row, form: DataFormat) -> str:
    """The right answer, as results show it."""
    question = question_of(row)
    return question.gold if question else str(row.values.get("answer", reference(row, form)))


def summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What the samples of a task come to; of several tasks, see `overall`.

    Accuracy with its standard error; beside it what guessing and always the most frequent answer, by its text or its
    place among the choices, would reach. The loss is that of the answers, a token.
    """
    scores: dict[str, Any] = {}
    count = len(samples)
    if "correct" in samples[0]:
        right = sum(sample["correct"] for sample in samples)
        accuracy = right / count
        error = math.sqrt(accuracy * (1 - accuracy) / count)
        scores |= {"accuracy": accuracy, "standard_error": error, "num_correct": right}
    if "correct_normalised" in samples[0]:
        scores["accuracy_normalised"] = sum(sample["correct_normalised"] for sample in samples) / count
    choices = [sample["num_choices"] for sample in samples if "num_choices" in sample]
    if choices:
        scores["chance"] = sum(1 / number for number in choices) / len(choices)
        asked = [sample for sample in samples if "num_choices" in sample]
        counts = [Counter(sample[key] for sample in asked) for key in ("answer", "place")]
        scores["majority"] = max(max(count.values()) for count in counts) / len(choices)
    if "loss" in samples[0]:
        num_label_tokens = sum(sample["num_label_tokens"] for sample in samples)
        loss = sum(sample["loss"] * sample["num_label_tokens"] for sample in samples) / num_label_tokens
        scores |= {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "num_label_tokens": num_label_tokens}
    return scores | {"num_samples": count}


def overall(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the mean over tasks, whatever their size (as published), with its standard error; counts add up."""
    some = list(tasks.values())
    names = [name for name in some[0] if all(name in scores for scores in some)]
    result = {}
    for name in names:
        values = [scores[name] for scores in some]
        if name == "standard_error":
            result[name] = math.sqrt(sum(value**2 for value in values)) / len(values)
        else:
            result[name] = sum(values) if name.startswith("num_") else sum(values) / len(values)
    if "perplexity" in result:
        result["perplexity"] = math.exp(min(result["loss"], 700.0))
    return result
