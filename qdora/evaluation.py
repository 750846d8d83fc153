"""Scores of a run, or of a model with or without an adapter, on held-out data.

    protocol      measures                                              needs
    loss          mean cross entropy of the learned tokens              any format
    likelihood    which choice the model finds most likely              `choices` and `answer` (text or index), or
                                                                        `Answer format: a/b/c` in the instruction
    generate      whether the greedy answer is right                    `answer`, or the sample's own answer

A generated answer is right if the first choice named in it is the gold one; without choices, if `answer` occurs in it;
without `answer`, if it equals the sample's answer.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qdora import parallel
from qdora.config import DataConfig, DataFormat, EvaluateConfig, Protocol
from qdora.config.commands import overlaid
from qdora.data import BatchLoader, prepare
from qdora.data.encode import detect, encode, encode_prompt, reference, with_answer
from qdora.data.sources import Row, load_rows
from qdora.errors import ConfigError, DataError
from qdora.model import LoadedModel, load_tokenizer, model_folder
from qdora.model.generate import end_tokens, generate_batch
from qdora.model.loss import IGNORED, log_likelihoods, mean_loss
from qdora.parallel import World
from qdora.subject import Subject, find_subject

RESULTS = "results.json"


def evaluate(config: EvaluateConfig) -> int:
    """Scores as `config` says, prints the score and writes results.json; returns the exit status.

    Raises:
        QdoraError: the run, the model, the adapter or the data cannot be used.
    """
    world = parallel.start_alone("qdora evaluate")
    subject = find_subject(config, "scored")
    data, output = _data(config, subject), _output(config, subject)
    base = model_folder(subject.model)
    tokenizer = load_tokenizer(base, subject.model)
    # Before the model is loaded: mistakes in the data show within a second.
    rows = [] if config.protocol is Protocol.loss else _rows(data)
    loaded = subject.load(base, world)
    if config.protocol is Protocol.loss:
        scores = _loss(loaded, data, tokenizer, config, world)
    elif config.protocol is Protocol.likelihood:
        scores = _likelihood(loaded, rows, data.format, tokenizer, config, world)
    else:
        scores = _generate(loaded, rows, data.format, tokenizer, config, world, base)
    results = {
        "protocol": config.protocol.name,
        "model": subject.model.path,
        "quant": subject.quant.method.name,
        "adapter": subject.adapter.path,
        "data": data.eval,
        **scores,
    }
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    (output / RESULTS).write_text(text + "\n", encoding="utf-8")
    told = {name: value for name, value in scores.items() if name != "samples"}
    print(
        "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in told.items()
        )
    )
    print(f"written to {output / RESULTS}")
    return 0


def _data(config: EvaluateConfig, subject: Subject) -> DataConfig:
    """The run's own data options but those given."""
    data = config.data if subject.run is None else overlaid(subject.run.read_config().data, config.data)
    if data.eval is None:
        raise ConfigError("data.eval is not set: give the file to score on")
    return replace(data, limit=config.limit)


def _output(config: EvaluateConfig, subject: Subject) -> Path:
    if config.output_dir:
        return Path(config.output_dir)
    return Path(str(config.run or config.adapter or subject.model.path)) / "evaluation"


def _rows(data: DataConfig) -> list[Row]:
    rows = list(load_rows(str(data.eval), data.limit))
    if not rows:
        raise DataError(f"{data.eval} is empty: it has no row")
    return rows


def _loss(
    loaded: LoadedModel, data: DataConfig, tokenizer: Any, config: EvaluateConfig, world: World
) -> dict[str, Any]:
    dataset = prepare(data, str(data.eval), tokenizer)
    loader = BatchLoader(
        dataset,
        micro_batch_size=config.batch_size,
        num_accumulation_steps=1,
        max_length=data.max_length,
        packing=False,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    loss = mean_loss(loaded.model, loader.epoch(), world)
    report = dataset.report
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "num_samples": report.num_samples,
        "num_label_tokens": report.num_label_tokens,
    }


def choices_of(row: Row) -> tuple[list[str], str] | None:
    """The choices of a row and the gold one, or None where it is not multiple choice.

    Raises:
        DataError: the answer is none of the choices.
    """
    choices, answer = row.values.get("choices"), row.values.get("answer")
    if choices is None:
        listed = re.search(r"Answer format:\s*(\S+(?:/\S+)+)", str(row.values.get("instruction", "")))
        choices = listed[1].split("/") if listed else None
    if not choices or answer is None:
        return None
    gold = choices[answer] if isinstance(answer, int) and 0 <= answer < len(choices) else answer
    if gold not in choices:
        raise DataError(f"{row.where}: the answer {answer!r} is none of the choices {choices}")
    return list(choices), str(gold)


def _answer_with(row: Row, form: DataFormat, choice: str, gold: str) -> Row:
    """The row answering `choice`, in the words of its own answer where that names the gold choice."""
    own = reference(row, form)
    before, found, after = own.rpartition(gold)
    return with_answer(row, form, f"{before}{choice}{after}" if found else choice)


@torch.no_grad()
def _likelihood(
    loaded: LoadedModel, rows: list[Row], form: DataFormat, tokenizer: Any, config: EvaluateConfig, world: World
) -> dict[str, Any]:
    form = detect(rows[0]) if form is DataFormat.auto else form
    questions = []
    for row in rows:
        asked = choices_of(row)
        if asked is None:
            raise DataError(
                f"{row.where} is not multiple choice: protocol=likelihood wants choices and answer, or an instruction "
                f"with `Answer format: a/b/c` and answer; found {[*row.values]}"
            )
        questions.append(asked)
    candidates = [
        (place, choice, *encode(_answer_with(rows[place], form, choice, gold), form, tokenizer))
        for place, (choices, gold) in enumerate(questions)
        for choice in choices
    ]
    scores: list[dict[str, float]] = [{} for _ in rows]
    candidates.sort(key=lambda candidate: -len(candidate[2]))
    for some in _chunks(candidates, config.batch_size):
        length = max(len(ids) for _, _, ids, _ in some)
        ids = torch.full((len(some), length), tokenizer.pad_token_id)
        labels = torch.full_like(ids, IGNORED)
        for line, (_, _, tokens, learned) in enumerate(some):
            ids[line, : len(tokens)] = own = torch.tensor(tokens)
            labels[line, : len(tokens) - 1] = torch.where(torch.tensor(learned[1:]), own[1:], IGNORED)
        positions = torch.arange(length).expand_as(ids)
        totals = log_likelihoods(loaded.model, *(tensor.to(world.device) for tensor in (ids, positions, labels)))
        for (place, choice, _, _), total in zip(some, totals.tolist(), strict=True):
            scores[place][choice] = total
    samples = []
    for row, (_, gold), score in zip(rows, questions, scores, strict=True):
        predicted = max(score, key=lambda choice: score[choice])
        samples.append({"answer": gold, "prediction": predicted, "correct": predicted == gold, "scores": score})
        samples[-1] |= {"where": row.where}
    return _accuracy(samples, questions)


@torch.no_grad()
def _generate(
    loaded: LoadedModel,
    rows: list[Row],
    form: DataFormat,
    tokenizer: Any,
    config: EvaluateConfig,
    world: World,
    base: Path,
) -> dict[str, Any]:
    form = detect(rows[0]) if form is DataFormat.auto else form
    prompts = [encode_prompt(row, form, tokenizer) for row in rows]
    answers: list[str] = [""] * len(rows)
    places = sorted(range(len(rows)), key=lambda place: -len(prompts[place]))
    ends = end_tokens(tokenizer, base)
    for some in _chunks(places, config.batch_size):
        asked_now = [prompts[place] for place in some]
        texts = generate_batch(loaded.model, asked_now, tokenizer, config.max_new_tokens, ends, world.device)
        for place, text in zip(some, texts, strict=True):
            answers[place] = text
    questions = [choices_of(row) for row in rows]
    samples = []
    for row, text, asked in zip(rows, answers, questions, strict=True):
        gold = asked[1] if asked else row.values.get("answer", reference(row, form))
        samples.append({"answer": gold, "prediction": text, "correct": _right(row, text, str(gold), asked)})
        samples[-1] |= {"where": row.where}
    return _accuracy(samples, [asked for asked in questions if asked])


def _right(row: Row, text: str, gold: str, asked: tuple[list[str], str] | None) -> bool:
    if asked:
        named = re.search("|".join(re.escape(choice) for choice in sorted(asked[0], key=len, reverse=True)), text)
        return named is not None and named[0] == gold
    if "answer" in row.values:
        return gold.lower() in text.lower()
    return " ".join(text.split()) == " ".join(gold.split())


def _accuracy(samples: list[dict[str, Any]], questions: list[tuple[list[str], str]]) -> dict[str, Any]:
    """Accuracy with its standard error; beside it what guessing and always the most frequent answer would reach."""
    count, right = len(samples), sum(sample["correct"] for sample in samples)
    accuracy = right / count
    scores: dict[str, Any] = {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / count),
        "num_correct": right,
        "num_samples": count,
    }
    if questions:
        scores["chance"] = sum(1 / len(choices) for choices, _ in questions) / len(questions)
        scores["majority"] = max(Counter(gold for _, gold in questions).values()) / len(questions)
    return scores | {"samples": samples}


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
