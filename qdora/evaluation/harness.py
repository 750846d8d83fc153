"""Tasks of lm-evaluation-harness (an extra: `pip install "qdora[harness]"`), asked and scored by its own code."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from qdora import parallel
from qdora.config import EvaluateConfig
from qdora.errors import ConfigError, first_line
from qdora.evaluation.ranks import in_step
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
    manager = TaskManager(include_path=config.tasks_path)
    unknown = [task for task in config.tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(f"tasks: lm-evaluation-harness {lm_eval.__version__} has no task {unknown[0]!r}")
    with _telling(config):
        manager.load(list(config.tasks))
    return manager


@contextmanager
def _telling(config: EvaluateConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        told = f"lm-evaluation-harness could not ask {', '.join(config.tasks)}: {first_line(error)}"
        raise ConfigError(told) from None


def run_harness(
    loaded: LoadedModel, tokenizer: Any, config: EvaluateConfig, manager: Any, world: World
) -> dict[str, Any]:
    """`tasks` with each metric of the harness, and `samples`; empty on other ranks than 0. *Collective*.

    Raises:
        ConfigError: on this rank; a task cannot be asked.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logger = logging.getLogger("lm_eval")
    logger.setLevel(logging.ERROR)  # it warns of ranks that it did not start
    model = HFLM(pretrained=loaded.model, tokenizer=tokenizer, batch_size=config.batch_size)
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(model, name, partial(_shared, loaded, world, getattr(model, name)))
    logger.setLevel(logging.WARNING if world.is_main else logging.ERROR)
    options = {"limit": config.limit, "random_seed": 0, "bootstrap_iters": 0}
    with _telling(config):
        found = lm_eval.simple_evaluate(model, tasks=list(config.tasks), task_manager=manager, **options)
    if not world.is_main:
        return {}
    tasks: dict[str, dict[str, Any]] = {}
    samples: list[dict[str, Any]] = []
    for name, some in found["samples"].items():
        tasks[name] = _scores(found["results"][name], len({sample["doc_id"] for sample in some}))
        samples += [{"task": name, **_sample(sample)} for sample in some]
    return {"harness": lm_eval.__version__, "tasks": tasks, "samples": samples}


def _shared(
    loaded: LoadedModel,
    world: World,
    ask: Callable[..., list[Any]],
    requests: list[Any],
    disable_tqdm: bool = False,
) -> list[Any]:
    """The answers in the order of the requests, of which each rank asks some. *Collective*.

    A document's stay together, as they share its prompt. What is computed together differs with the number of ranks,
    and so do scores by rounding, and answers that are drawn. The harness's own split needs accelerate to have started
    the ranks, and fails where one has no document (0.4.13).
    """
    documents: dict[tuple[str, int], int] = {}
    turns = [documents.setdefault((request.task_name, request.doc_id), len(documents)) for request in requests]
    own = [number for number, turn in enumerate(turns) if turn % world.size == world.rank]
    with in_step(loaded.model, world):
        answers = ask([requests[number] for number in own], disable_tqdm or not world.is_main) if own else []
    answered: dict[int, Any] = {}
    for some in parallel.gather(world, dict(zip(own, answers, strict=True)), world.patient_group):
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
    likely = [answer[0] for answer in sample["filtered_resps"] if isinstance(answer, tuple | list)]
    record = {"where": sample["doc_id"], "prompt": sample["arguments"][0][0], "answer": sample["target"]}
    if likely:
        continuations = [arguments[1] for arguments in sample["arguments"]]
        record["scores"] = dict(zip(continuations, likely, strict=False))
        record["prediction"] = continuations[likely.index(max(likely))]
    else:
        record["prediction"] = sample["filtered_resps"][0] if sample["filtered_resps"] else None
    return record
