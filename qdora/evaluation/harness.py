"""Tasks of lm-evaluation-harness (an extra: `pip install "qdora[harness]"`), asked and scored by its own code.

output_dir/.scored-IDENTITY/harness-0.jsonl    a line for each answer; gone when results.json is there
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from qdora import parallel
from qdora.config import EvaluateConfig
from qdora.errors import ConfigError, QdoraError, first_line
from qdora.evaluation.ranks import in_step, lines_of
from qdora.model import LoadedModel
from qdora.parallel import World


def find_harness_tasks(config: EvaluateConfig) -> Any:
    """The harness's TaskManager, which has loaded the tasks that are asked for; `tasks_path` holds tasks of one's own.

    Raises:
        ConfigError: it is not installed, there is no such task, or its data cannot be loaded.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f'protocol=harness needs lm-evaluation-harness, which cannot be imported ({error}): pip install "lm-eval"'
        ) from None
    if config.tasks_path is not None and not Path(config.tasks_path).is_dir():
        raise ConfigError(f"tasks_path={config.tasks_path} is no folder: give that of the tasks' YAML files")
    # The harness's own tasks are thousands of files, read in some 4 s: spared where all that are asked for lie in
    # tasks_path. A group may name some of them.
    manager = TaskManager(include_path=config.tasks_path, include_defaults=False)
    if not set(config.tasks) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=config.tasks_path)
    unknown = [task for task in config.tasks if task not in manager.all_tasks]
    if unknown:
        hint = f"; a file of {config.tasks_path} that is no YAML is passed over" if config.tasks_path else ""
        raise ConfigError(f"tasks: lm-evaluation-harness {lm_eval.__version__} has no task {unknown[0]!r}{hint}")
    with _telling(config):
        manager.load(list(config.tasks))
    return manager


@contextmanager
def _telling(config: EvaluateConfig, *passed: type[Exception]) -> Iterator[None]:
    """Turns what a task's YAML, code and data raise into a message; what is no fault of theirs is passed on."""
    try:
        yield
    except passed:
        raise
    except Exception as error:
        told = f"lm-evaluation-harness could not ask {', '.join(config.tasks)}: "
        cause = error.__cause__ or error
        raise ConfigError(f"{told}{type(cause).__name__}: {first_line(cause)}") from None


def run_harness(
    loaded: LoadedModel, tokenizer: Any, config: EvaluateConfig, manager: Any, world: World, kept: Path
) -> dict[str, Any]:
    """`tasks` with each metric of the harness, and `samples`; empty on other ranks than 0. *Collective*.

    Args:
        kept: folder of answers that the same model gave already; goes on from there.

    Raises:
        ConfigError: on this rank; a task cannot be asked.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logger = logging.getLogger("lm_eval")
    logger.setLevel(logging.ERROR)  # it warns of ranks that it did not start
    model = HFLM(pretrained=loaded.model, tokenizer=tokenizer, batch_size=config.batch_size)
    answers = Answers(kept, world)
    model.set_cache_hook(answers)
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(model, name, partial(_shared, loaded, world, answers, name, getattr(model, name)))
    logger.setLevel(logging.WARNING if world.is_main else logging.ERROR)
    options = {"limit": config.limit, "random_seed": 0, "bootstrap_iters": 0}
    with closing(answers), _telling(config, QdoraError, OSError, RuntimeError, MemoryError):
        found = lm_eval.simple_evaluate(model, tasks=list(config.tasks), task_manager=manager, **options)
    if not world.is_main:
        return {}
    tasks: dict[str, dict[str, Any]] = {}
    samples: list[dict[str, Any]] = []
    for name, some in found["samples"].items():
        tasks[name] = _scores(found["results"][name], len({sample["doc_id"] for sample in some}))
        samples += [{"task": name, **_sample(sample)} for sample in some]
    return {"harness": lm_eval.__version__, "tasks": tasks, "samples": samples}


class Answers:
    """What was answered, by requests; the harness hands on each answer as it comes (its `CacheHook`)."""

    def __init__(self, folder: Path, world: World) -> None:
        self._known: dict[str, Any] = {}
        for file in sorted(folder.glob("harness-*.jsonl")):
            for line in lines_of(file):
                self._known |= line
        self._file = (folder / f"harness-{world.rank}.jsonl").open("a", encoding="utf-8")
        self._file.write("\n")  # ends a line that was left torn

    def close(self) -> None:
        """No more is kept."""
        self._file.close()

    def find(self, kind: str, arguments: tuple[Any, ...]) -> Any:
        """None if it is not there."""
        answer = self._known.get(_key(kind, arguments))
        match kind, answer:
            case "loglikelihood", [float(), bool()]:
                return tuple(answer)
            case ("loglikelihood_rolling", float()) | ("generate_until", str()):
                return answer
        return None

    def add_partial(self, kind: str, arguments: tuple[Any, ...], answer: Any) -> None:
        """Keeps an answer, unless it is drawn anew each time."""
        if kind == "generate_until" and _is_drawn(arguments[1]):
            return
        self._file.write(json.dumps({_key(kind, arguments): answer}) + "\n")
        self._file.flush()


def _is_drawn(options: dict[str, Any]) -> bool:
    return bool(options.get("do_sample", options.get("temperature", 0.0)))


def _key(kind: str, arguments: tuple[Any, ...]) -> str:
    return hashlib.sha256(json.dumps([kind, *arguments], sort_keys=True, default=str).encode()).hexdigest()


def _shared(
    loaded: LoadedModel, world: World, kept: Answers, kind: str, ask: Callable[..., list[Any]], requests: list[Any]
) -> list[Any]:
    """The answers in the order of the requests, of which each rank asks some. *Collective*.

    A document's stay together, as they share its prompt. What is computed together differs with the number of ranks,
    and so do scores by rounding, and answers that are drawn. The harness's own split needs accelerate to have started
    the ranks, and fails where one has no document (0.4.13).
    """
    documents: dict[tuple[str, int], int] = {}
    turns = [documents.setdefault((request.task_name, request.doc_id), len(documents)) for request in requests]
    own = {
        number: kept.find(kind, requests[number].args)
        for number, turn in enumerate(turns)
        if turn % world.size == world.rank
    }
    asked = [number for number, answer in own.items() if answer is None]
    with in_step(loaded.model, world):
        answers = ask([requests[number] for number in asked], disable_tqdm=not world.is_main) if asked else []
    answered: dict[int, Any] = {}
    for some in parallel.gather(world, own | dict(zip(asked, answers, strict=True)), world.patient_group):
        answered |= some
    return [answered[number] for number in range(len(requests))]


def _scores(metrics: dict[str, Any], count: int) -> dict[str, Any]:
    """Its metrics under its names (`acc`, `acc_norm`); `accuracy` and its error as the other protocols say it."""
    values = {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, int | float)}
    scores: dict[str, Any] = {"num_samples": count}
    if "acc" in values:
        accuracy = float(values["acc"])
        scores |= {"accuracy": accuracy, "standard_error": math.sqrt(accuracy * (1 - accuracy) / count)}
    if "acc_norm" in values:
        scores["accuracy_normalised"] = float(values["acc_norm"])
    return scores | {"harness": values}


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """What results.json says of a document; choices go by their text, or with their prompt where only that differs."""
    arguments, answers = sample["arguments"], sample["filtered_resps"]
    record = {"where": sample["doc_id"], "prompt": arguments[0][0], "answer": sample["target"]}
    if answers and isinstance(answers[0], tuple | list) and answers[0] and isinstance(answers[0][0], float):
        # acc_mutual_info asks for each choice without its prompt too, after the others.
        asked = [*zip(arguments, answers, strict=False)]
        asked = [one for one in asked if one[0][0]] or asked
        texts = [continuation for (_, continuation, *_), _ in asked]
        if len({*texts}) < len(texts):
            texts = [prompt + continuation for (prompt, continuation, *_), _ in asked]
        record["scores"] = dict(zip(texts, (answer[0] for _, answer in asked), strict=True))
        record["prediction"] = max(record["scores"], key=record["scores"].__getitem__)
    else:
        record["prediction"] = answers[0] if answers else None
    return record
