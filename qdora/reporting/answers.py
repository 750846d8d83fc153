"""What a run's model answers to held-out prompts, beside what its base does; kept in RUN/answers.json."""

import gc
import hashlib
import json
from dataclasses import asdict
from typing import Any

from qdora import parallel
from qdora.adapter import peft_format
from qdora.adapter.dora import switched_off
from qdora.config import AdapterConfig, AdapterMethod, DataFormat, QuantConfig, QuantMethod, RunConfig
from qdora.data.columns import read_rows
from qdora.data.conversation import conversation
from qdora.data.encode import detect, encode_prompt, reference
from qdora.data.sources import Row
from qdora.errors import QdoraError
from qdora.files import read_json, write_durably
from qdora.model import check_vocabulary, load_tokenizer, model_folder
from qdora.model.checkpoint_files import CheckpointFiles
from qdora.model.folder import context_length
from qdora.model.generate import end_tokens, generate_batch
from qdora.reporting.page import Answer
from qdora.run_result import RunResult
from qdora.subject import Subject, subject_of

ANSWERS = "answers.json"
MAX_NEW_TOKENS = 128


def sample_answers(result: RunResult, count: int) -> list[Answer]:
    """Greedy answers to the first `count` prompts of data.eval that leave room for one; from the file if it has them.

    Raises:
        QdoraError: the data or the model cannot be used.
    """
    folder = result.run
    wanted = _identity(result, count)
    kept = read_json(folder.path / ANSWERS)
    if kept.get("identity") == wanted:
        return [Answer(**answer) for answer in kept["answers"]]
    try:
        answers = _make(result, count)
    except QdoraError as error:
        raise type(error)(f"{error}. num_answers=0 reports without answers") from None
    values = {"identity": wanted, "max_new_tokens": MAX_NEW_TOKENS, "answers": [asdict(answer) for answer in answers]}
    write_durably(folder.path / ANSWERS, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return answers


def _identity(result: RunResult, count: int) -> str:
    """Hashes the weights and what they are asked; a second report needs neither base nor data."""
    config = result.config
    said = [count, MAX_NEW_TOKENS, config.data.eval, config.data.format.name, config.model.path]
    digest = hashlib.sha256(repr(said).encode())
    if result.manifest is not None:
        digest.update(result.digest.encode())
    elif result.adapter is None:
        digest.update(CheckpointFiles(result.run.model).fingerprint().encode())
    else:
        digest.update((result.adapter / peft_format.WEIGHTS).read_bytes())
    return digest.hexdigest()[:16]


def _make(result: RunResult, count: int) -> list[Answer]:
    config, world = result.config, parallel.start_alone("qdora report")
    subject = subject_of(result)
    base = model_folder(config.model)
    tokenizer = load_tokenizer(base, config.model, subject.adapter.path)
    check_vocabulary(base, tokenizer)
    ends = end_tokens(tokenizer, base)
    rows, prompts, form = _prompts(config, tokenizer, count, context_length(base, config.model))
    if not rows:
        return []
    print(f"answering {len(rows)} prompts before and after training; num_answers=0 does without", flush=True)

    def answer(model: Any) -> list[str]:
        return generate_batch(model, prompts, tokenizer, MAX_NEW_TOKENS, ends, world.device)

    if subject.adapter.method is AdapterMethod.none:  # the base is not in the result: one after the other
        before_training = Subject(
            config.model, QuantConfig(method=QuantMethod.none), AdapterConfig(method=AdapterMethod.none)
        )
        before = answer(before_training.load(base, world).model)
        gc.collect()
        after = answer(subject.load(model_folder(subject.model), world).model)
    else:
        model = subject.load(base, world).model
        after = answer(model)
        with switched_off(model):
            before = answer(model)
    asked = [(_shown(row, form), reference(row, form)) for row in rows]
    return [Answer(*texts, *said) for texts, said in zip(asked, zip(before, after, strict=True), strict=True)]


def _prompts(
    config: RunConfig, tokenizer: Any, count: int, context: int | None
) -> tuple[list[Row], list[list[int]], DataFormat]:
    form = DataFormat.auto
    found: list[tuple[Row, list[int]]] = []
    for row in read_rows(config.data, str(config.data.eval)):
        form = detect(row, config.data) if form is DataFormat.auto else form
        prompt = encode_prompt(row, form, tokenizer, config.data)
        if context is None or len(prompt) + MAX_NEW_TOKENS <= context:
            found.append((row, prompt))
        if len(found) == count:
            break
    return [row for row, _ in found], [prompt for _, prompt in found], form


def _shown(row: Row, form: DataFormat) -> str:
    """The prompt as people read it, without the chat template."""
    if form in (DataFormat.completion, DataFormat.text):
        return str(row.values["prompt" if form is DataFormat.completion else "text"])
    turns = conversation(row, form).messages
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
