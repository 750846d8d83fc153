"""How samples are scored: a job says how long each sample is and scores some of them at once.

    protocol      measures                                              needs
    loss          mean cross entropy of the learned tokens              any format
    likelihood    which choice the model finds most likely              `choices` and `answer` (text or index), or
                                                                        `Answer format: a/b/c` in the instruction
    generate      whether the greedy answer is right                    `answer`, or the sample's own answer

The likelihood of a choice is that of the sample's answer with that choice in it, without the token that ends it.
Choices that differ in their last token alone, as those of LLM-Adapters do, share one forward.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qdora.config import DataConfig, DataFormat, UnknownKeys
from qdora.config.words import ASKED_KEYS
from qdora.data import prepare
from qdora.data.conversation import Told, check_keys, conversation
from qdora.data.encode import Encoded, detect, encode, encode_prompt, reference, with_answer
from qdora.data.sources import Row
from qdora.errors import DataError, ModelError
from qdora.evaluation.tasks import Question, as_word, gold_of, is_right, question_of
from qdora.model import LoadedModel
from qdora.model.generate import generate_batch
from qdora.model.loss import IGNORED

Record = dict[str, Any]
"""What results.json says of a sample."""


@dataclass(frozen=True, slots=True)
class Job:
    """Samples to score, and how."""

    lengths: list[int]
    """Tokens of each sample, with those that may be generated."""
    fingerprint: str
    """Of all that is asked and how, token by token."""
    score: Callable[[LoadedModel, Sequence[int]], list[Record]]
    """The records of the samples with these numbers; several at a time. *Collective* if the model is sharded."""
    note: str = ""
    """What became of the rows, where some are cut or left out."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A token sequence for the model, and what is asked of it."""

    ids: list[int]
    wanted: list[tuple[int, int]]
    """Place in `ids`, and the token after it whose log-probability is wanted."""


@torch.no_grad()
def _log_likelihoods(loaded: LoadedModel, some: list[Scored], batch_size: int, padding: int) -> list[list[float]]:
    """Returns the log-probabilities of the tokens that each sequence wants; computes `batch_size` of them at a time."""
    device = next(loaded.model.parameters()).device
    found: list[list[float]] = []
    for batch in chunks(some, batch_size):
        length = max(len(sequence.ids) for sequence in batch)
        ids = torch.tensor([sequence.ids + [padding] * (length - len(sequence.ids)) for sequence in batch])
        wanted = [(line, *asked) for line, sequence in enumerate(batch) for asked in sequence.wanted]
        positions = torch.arange(length).expand_as(ids)
        columns = torch.tensor(wanted).T.contiguous()
        values = loaded.model.log_likelihoods(*(tensor.to(device) for tensor in (ids, positions, *columns))).tolist()
        if not all(map(math.isfinite, values)):
            raise ModelError(
                "a log-probability is not finite: the weights do not compute, and no score would mean a thing"
            )
        rest = iter(values)
        found += [[next(rest) for _ in sequence.wanted] for sequence in batch]
    return found


def loss_job(data: DataConfig, source: str, tokenizer: Any, batch_size: int) -> Job:
    """The loss of each sample of `source` on its learned tokens; tokenised, cut and dropped as in training."""
    dataset = prepare(data, source, tokenizer)

    def score(loaded: LoadedModel, numbers: Sequence[int]) -> list[Record]:
        sequences = []
        for number in numbers:
            ids, labels = dataset[number]
            places = (labels != IGNORED).nonzero()[:, 0].tolist()
            sequences.append(Scored(ids.tolist(), [(place, int(labels[place])) for place in places]))
        values = _log_likelihoods(loaded, sequences, batch_size, tokenizer.pad_token_id)
        return [
            {"where": dataset.where(number), "loss": -sum(likely) / len(likely), "num_label_tokens": len(likely)}
            for number, likely in zip(numbers, values, strict=True)
        ]

    report = dataset.report
    changed = report.num_truncated + report.num_dropped_overlong + report.num_dropped_without_labels
    note = report.describe(f" (data.max_length={data.max_length})") if changed or report.notes else ""
    return Job(dataset.lengths.tolist(), dataset.fingerprint, score, note)


def _answer_with(row: Row, form: DataFormat, choice: str, gold: str) -> Row:
    """The row answering `choice`, in the words of its own answer where that names the gold choice."""
    own = reference(row, form)
    *_, named = [None, *re.finditer(as_word(gold), own)]
    return with_answer(row, form, f"{own[: named.start()]}{choice}{own[named.end() :]}" if named else choice)


def _without_end(encoded: Encoded, ends: set[int]) -> list[tuple[int, int]]:
    """Places and tokens of what is learned, without the tokens that end the answer."""
    ids, learned = encoded
    places = [place for place, is_learned in enumerate(learned) if is_learned and place]
    while places and ids[places[-1]] in ends:
        places.pop()
    return [(place - 1, ids[place]) for place in places]


Candidate = tuple[tuple[int, ...], list[tuple[int, int]], int]
"""Of a choice: what the model is given, what is asked of it, and the characters of the answer."""


def _candidates(
    row: Row, form: DataFormat, question: Question, tokenizer: Any, ends: set[int], data: DataConfig
) -> list[Candidate]:
    """Returns what is asked of the model for each choice of a row.

    Raises:
        DataError: one has no token of its own.
    """
    candidates = []
    for choice in question.choices:
        answer = _answer_with(row, form, choice, question.gold)
        encoded = encode(answer, form, tokenizer, replace(data, unknown_keys=UnknownKeys.warn))
        wanted = _without_end(encoded, ends)
        if not wanted:
            raise DataError(f"{row.where}: the choice {reference(answer, form)!r} has no token of its own")
        candidates.append((tuple(encoded[0][: wanted[-1][0] + 1]), wanted, len(reference(answer, form))))
    return candidates


def _judged(question: Question, each: list[list[float]], lengths: list[int]) -> Record:
    """What the log-probabilities of each choice's tokens, and the characters of each answer, come to."""
    scores = dict(zip(question.choices, map(sum, each), strict=True))
    normalised = {choice: scores[choice] / length for choice, length in zip(question.choices, lengths, strict=True)}
    of_gold = each[question.place]
    best, best_normalised = (max(some, key=lambda one: some[one]) for some in (scores, normalised))
    return {
        "answer": question.gold,
        "prediction": best,
        "correct": best == question.gold,
        "correct_normalised": best_normalised == question.gold,
        "num_choices": len(question.choices),
        "place": question.place,
        "scores": scores,
        "loss": -sum(of_gold) / len(of_gold),
        "num_label_tokens": len(of_gold),
    }


def _told(rows: list[Row], form: DataFormat, data: DataConfig, system: str | None) -> str:
    """What a reader of the scores should know of the rows.

    Args:
        system: the system turn that every sample of training had.

    Raises:
        DataError: a row has a key that may change what is asked and that nothing reads.
    """
    told = Told()
    for row in rows:
        check_keys(row, form, data, told, ASKED_KEYS)
        if form in (DataFormat.messages, DataFormat.instruction):
            given = conversation(row, form, data, told)
            if system is not None and given.messages[0]["role"] != "system":
                told.add("asked without a system turn, which every sample of training had", row.where)
    return "\n".join(told.lines())


def likelihood_job(
    rows: list[Row], data: DataConfig, tokenizer: Any, batch_size: int, ends: list[int], system: str | None = None
) -> Job:
    """The log-probability of each choice of each row.

    Args:
        ends: tokens that end an answer, beside the tokenizer's special ones.

    Raises:
        DataError: a row has no choices, or one without a token of its own.
    """
    form = detect(rows[0], data)
    note = _told(rows, form, data, system)
    questions, asked = [], []
    for row in rows:
        question = question_of(row)
        if question is None:
            raise DataError(
                f"{row.where} is not multiple choice: protocol=likelihood wants choices and answer, or an instruction "
                f"with `Answer format: a/b/c` and answer; found {[*row.values]}"
            )
        questions.append(question)
        asked.append(_candidates(row, form, question, tokenizer, {*ends, *tokenizer.all_special_ids}, data))

    def score(loaded: LoadedModel, numbers: Sequence[int]) -> list[Record]:
        # Sequences that are the same are computed once, and asked for all that is wanted of them.
        shared: dict[tuple[int, ...], dict[tuple[int, int], None]] = {}
        for number in numbers:
            for ids, wanted, _ in asked[number]:
                shared.setdefault(ids, {}).update(dict.fromkeys(wanted))
        sequences = [Scored(list(ids), list(wanted)) for ids, wanted in shared.items()]
        values = _log_likelihoods(loaded, sequences, batch_size, tokenizer.pad_token_id)
        likely = {
            (tuple(sequence.ids), *one): value
            for sequence, found in zip(sequences, values, strict=True)
            for one, value in zip(sequence.wanted, found, strict=True)
        }
        records = []
        for number in numbers:
            each = [[likely[ids, *one] for one in wanted] for ids, wanted, _ in asked[number]]
            prompt = tokenizer.decode(encode_prompt(rows[number], form, tokenizer, data))
            judged = _judged(questions[number], each, [length for _, _, length in asked[number]])
            records.append({"where": rows[number].where, "prompt": prompt, **judged})
        return records

    lengths = [max(len(ids) for ids, _, _ in candidates) for candidates in asked]
    return Job(lengths, _hash(asked, questions), score, note)


def generate_job(
    rows: list[Row], data: DataConfig, tokenizer: Any, max_new_tokens: int, ends: list[int], system: str | None = None
) -> Job:
    """The greedy answer to each row, and whether it is right."""
    form = detect(rows[0], data)
    note = _told(rows, form, data, system)
    prompts = [encode_prompt(row, form, tokenizer, data) for row in rows]
    golds = [gold_of(row, form) for row in rows]
    questions = [question_of(row) for row in rows]

    def score(loaded: LoadedModel, numbers: Sequence[int]) -> list[Record]:
        device = next(loaded.model.parameters()).device
        asked = [prompts[number] for number in numbers]
        texts = generate_batch(loaded.model, asked, tokenizer, max_new_tokens, ends, device)
        records = []
        for number, text in zip(numbers, texts, strict=True):
            row = rows[number]
            record: Record = {"where": row.where, "prompt": tokenizer.decode(prompts[number]), "answer": golds[number]}
            record |= {"prediction": text, "correct": is_right(row, form, text)}
            question = questions[number]
            if question:
                record |= {"num_choices": len(question.choices), "place": question.place}
            records.append(record)
        return records

    named = ["answer" in row.values for row in rows]
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    return Job(lengths, _hash(prompts, golds, questions, named, ends, max_new_tokens), score, note)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Some items at a time, in their order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
