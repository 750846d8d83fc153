"""Samples a second of `qdora evaluate protocol=likelihood` against a loop that scores one choice at a time.

    python benchmarks/evaluation.py MODEL TASK.jsonl OUTPUT.json [SAMPLES]

Both score the same samples with the same weights in the same process, in turn, three rounds; the loop calls plain
transformers with the whole sequence of each choice. Their choices must agree.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from provenance import provenance
from transformers import AutoModelForCausalLM

from qdora import parallel
from qdora.config import AdapterConfig, AdapterMethod, DataFormat, ModelConfig, QuantConfig, QuantMethod
from qdora.data.encode import detect, encode
from qdora.data.sources import Row, load_rows
from qdora.evaluation.ranks import batches_of
from qdora.evaluation.scoring import likelihood_job
from qdora.evaluation.tasks import question_of
from qdora.model import load_tokenizer
from qdora.model.generate import end_tokens
from qdora.subject import Subject

ROUNDS = 3
BATCH_SIZE = 16


@torch.no_grad()
def loop(model: Any, rows: list[Row], form: DataFormat, tokenizer: Any) -> list[str]:
    """The most likely choice of each row."""
    found = []
    for row in rows:
        question = question_of(row)
        assert question is not None
        scores = {}
        for choice in question.choices:
            output = str(row.values["output"]).replace(question.gold, choice)
            ids, learned = encode(Row({**row.values, "output": output}, row.where), form, tokenizer)
            logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().log_softmax(1)
            places = [place for place, is_learned in enumerate(learned) if is_learned][:-1]  # without the end
            scores[choice] = sum(float(logits[place - 1, ids[place]]) for place in places)
        found.append(max(scores, key=lambda choice: scores[choice]))
    return found


def main() -> None:
    """Measures, prints and writes."""
    model_path, task, output = sys.argv[1:4]
    rows = list(load_rows(task, int(sys.argv[4]) if len(sys.argv) > 4 else 64))
    world = parallel.start_alone("the benchmark")
    config = ModelConfig(path=model_path)
    tokenizer = load_tokenizer(Path(model_path), config)
    subject = Subject(config, QuantConfig(method=QuantMethod.none), AdapterConfig(method=AdapterMethod.none))
    loaded = subject.load(Path(model_path), world)
    theirs = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).to(world.device).eval()
    form = detect(rows[0])
    seconds: dict[str, list[float]] = {"loop": [], "qdora": []}
    answers: dict[str, list[str]] = {}
    for _ in range(ROUNDS):
        started = time.perf_counter()
        answers["loop"] = loop(theirs, rows, form, tokenizer)
        seconds["loop"].append(time.perf_counter() - started)
        started = time.perf_counter()
        job = likelihood_job(rows, form, tokenizer, BATCH_SIZE, end_tokens(tokenizer, Path(model_path)))
        answers["qdora"] = [""] * len(rows)
        for batch in batches_of(job, BATCH_SIZE):
            for number, record in zip(batch, job.score(loaded, batch), strict=True):
                answers["qdora"][number] = record["prediction"]
        seconds["qdora"].append(time.perf_counter() - started)
    agreeing = sum(ours == other for ours, other in zip(*answers.values(), strict=True))
    rates = {name: len(rows) / median(some) for name, some in seconds.items()}
    values = {
        "samples": len(rows),
        "samples_per_second": rates,
        "ratio": median(slow / fast for slow, fast in zip(seconds["loop"], seconds["qdora"], strict=True)),
        "seconds": seconds,
        "same_choice": agreeing,
        "task": Path(task).name,
        "model": Path(model_path).name,
        "threads": torch.get_num_threads(),
        **provenance(),
    }
    Path(output).write_text(json.dumps(values, indent=2) + "\n")
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
