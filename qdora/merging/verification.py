"""Whether what was written is the model that was trained: both compute held-out text, and their numbers are compared.

    gain_lost = (loss of what was written - loss of the adapted model) / (loss of the base - loss of the adapted model)

The adapted model computes here, as it was trained; what was written in a process of its own, by plain transformers
(`reload.py`), with the adapted model's logits handed over in files.
"""

import gc
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdora.adapter.dora import switched_off
from qdora.config import DataConfig, DataFormat, MergeBase, MergeFormat, ParallelConfig, Plan, QuantConfig, QuantMethod
from qdora.data.columns import read_rows
from qdora.data.encode import NothingToLearn, detect, encode
from qdora.data.sources import Row
from qdora.errors import DataError, ModelError
from qdora.merging.parts import Parts
from qdora.model import load_model
from qdora.parallel import start_alone

MAX_ROWS = 1024
"""Looked at until there are samples enough."""
MAX_SAMPLES, MAX_TOKENS = 64, 1024
"""Of held-out text at most: some seconds on a GPU, and with a vocabulary of 256 Ki 1 GiB of logits on disk."""
BUILT_IN = Path(__file__).with_name("held_out.txt")
RELOAD = Path(__file__).with_name("reload.py")
SMALLEST_GAIN = 0.1
"""nats; a training that gained less is measured against this, so that rounding is not made much of."""
THRESHOLDS = {
    "exact": {"mean_kl": 0.02, "top1_agreement": 0.95, "gain_lost": 0.02},
    "8bit": {"mean_kl": 0.05, "top1_agreement": 0.9, "gain_lost": 0.05},
    "rounded": {"gain_lost": 0.1},
}
"""What is demanded by how exactly the format holds weights; 4 bits promise nothing but to keep what was learned."""
AT_LEAST = {"top1_agreement"}
"""The others are wanted small."""
CERTAIN = 2.0
"""Standard errors by which a number must be beyond its threshold: with few learned tokens and a small gain, rounding to
bfloat16 alone moves gain_lost by more than 0.02 either way (0.006 nats over the 278 tokens of a SmolLM2-135M run)."""
MOST_DOUBT = 0.1
"""However little text there is: it must not be too little to fail."""
AS_GOOD = 1e-3
"""Share of the loss by which the original base must be better than the one that was trained over."""


@dataclass
class Sample:
    """A text of which every position is compared, and the loss taken where `learned`."""

    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Text to compare on, and where it is from."""

    source: str
    samples: list[Sample]

    @property
    def num_learned(self) -> int:
        return sum(sum(sample.learned[1:]) for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Reference:
    """What the adapted model computes."""

    logits: list[Path]
    """A .npy file a sample, (tokens, vocabulary) float32."""
    adapted_loss: float
    """Mean over the learned tokens, nats."""
    base_loss: float
    """The same without the adapter."""


def find_held_out(parts: Parts, given: str | None, tokenizer: Any) -> HeldOut:
    """What to compare on: the file `given`, or the run's data.eval, or a text that qdora brings.

    Raises:
        DataError: `given` cannot be read, or has nothing to learn.
    """
    if given is not None:
        return _samples(read_rows(parts.data, given), parts.data, given, tokenizer)
    source = parts.data.eval
    if source is not None:
        try:
            return _samples(read_rows(parts.data, source, parts.data.limit), parts.data, source, tokenizer)
        except DataError as error:
            print(f"data.eval={source} cannot be used any more, a text of qdora's own takes its place: {error}")
    paragraphs = BUILT_IN.read_text(encoding="utf-8").split("\n\n")
    rows = (Row({"text": text}, f"{BUILT_IN.name} paragraph {index}") for index, text in enumerate(paragraphs, 1))
    # Not the run's other options: the keys that it ignores or renames are those of its own data.
    as_text = DataConfig(format=DataFormat.text, max_length=parts.data.max_length)
    return _samples(rows, as_text, "qdora's own text", tokenizer)


def _samples(rows: Iterable[Row], data: DataConfig, source: str, tokenizer: Any) -> HeldOut:
    samples: list[Sample] = []
    form, left = DataFormat.auto, MAX_TOKENS
    for row in islice(rows, MAX_ROWS):
        form = detect(row, data) if form is DataFormat.auto else form
        try:
            ids, learned = encode(row, form, tokenizer, data)
        except NothingToLearn:
            continue
        length = min(left, data.max_length)
        if any(learned[1:length]):
            samples.append(Sample(ids[:length], learned[:length]))
            left -= len(samples[-1].ids)
        if left < 2 or len(samples) == MAX_SAMPLES:
            break
    if not samples:
        limit = min(MAX_TOKENS, data.max_length)
        raise DataError(f"{source} has no row with a token to learn among its first {limit} tokens")
    return HeldOut(source, samples)


def verify(
    parts: Parts, quant: QuantConfig, held_out: HeldOut, output: Path, format: MergeFormat, exactness: str
) -> dict[str, Any]:
    """The numbers of `output` beside those of the adapted model over `quant`, and whether they pass.

    `passed` is None, and `unreadable` says why, where transformers has no reader for the format.

    Args:
        quant: of the base that was merged into.
        exactness: what `output` can hold, a key of `THRESHOLDS`.

    Raises:
        ModelError: `output` cannot be loaded or computed with, or there is no room, in memory or for the logits.
    """
    print(f"verifying on {held_out.source}: {len(held_out.samples)} samples", flush=True)
    # Beside the output, where there is room; called so that what a killed process left is found and goes, too.
    scratch = output.with_name(f".{output.name}.verification")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        measured = reference(parts, quant, held_out, scratch)
        reloaded = _reload(parts, quant, held_out.samples, measured, output, format, scratch)
    except OSError as error:
        raise ModelError(f"{output} was written but not verified, {scratch} could not be: {error}") from None
    except (torch.OutOfMemoryError, MemoryError):
        raise ModelError(
            f"{output} was written but not verified: no memory for the adapted model. verify=false ends the merge "
            "without; the same command on a larger machine verifies it later"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    verification: dict[str, Any] = {
        "held_out": held_out.source,
        "num_samples": len(held_out.samples),
        "num_tokens": sum(len(sample.ids) for sample in held_out.samples),
        "num_learned_tokens": held_out.num_learned,
        "thresholds": THRESHOLDS[exactness],
        "versions": reloaded.pop("versions"),
    }
    if "unreadable" in reloaded:
        return verification | {"passed": None, "failed": [], "unreadable": reloaded["unreadable"]}
    merged_loss, loss_error = reloaded.pop("merged_loss"), reloaded.pop("loss_error")
    # Also where the adapter is worse than its base on this text: falling back to the base is a loss then, too.
    change = measured.base_loss - measured.adapted_loss
    change = math.copysign(max(abs(change), SMALLEST_GAIN), change)
    gain_lost = (merged_loss - measured.adapted_loss) / change
    numbers = reloaded | {"gain_lost": gain_lost, "gain_lost_error": loss_error / abs(change)}
    agreement = numbers["top1_agreement"]
    numbers["top1_agreement_error"] = math.sqrt(agreement * (1 - agreement) / verification["num_tokens"])
    losses = {"base": measured.base_loss, "adapted": measured.adapted_loss, "merged": merged_loss}
    perplexity = {kind: _perplexity(loss) for kind, loss in losses.items()}
    failed = _failed(numbers | {f"perplexity of {kind}": value for kind, value in perplexity.items()}, exactness)
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}  # JSON has no NaN
    finite["perplexity"] = {kind: value if math.isfinite(value) else None for kind, value in perplexity.items()}
    return verification | finite | {"passed": not failed, "failed": failed}


def _perplexity(loss: float) -> float:
    return math.exp(loss) if not loss > 700 else math.inf


def _failed(numbers: dict[str, float], exactness: str) -> list[str]:
    """What is not as it should be, in words."""
    odd = [name for name, value in numbers.items() if not math.isfinite(value)]
    failed = [f"not a finite number: {', '.join(odd)}"] if odd else []
    for name, threshold in THRESHOLDS[exactness].items():
        value, wants_more = numbers[name], name in AT_LEAST
        doubt = min(CERTAIN * numbers.get(f"{name}_error", 0.0), MOST_DOUBT)
        if value + doubt < threshold if wants_more else value - doubt > threshold:
            failed.append(f"{name} is {value:.4g}, allowed is at {'least' if wants_more else 'most'} {threshold:g}")
    return failed


def reference(parts: Parts, quant: QuantConfig, held_out: HeldOut, folder: Path) -> Reference:
    """What the adapted model over `quant` and its base compute of `held_out`; logits go to `folder`."""
    model, files = _load(parts, quant), []
    adapted = base = 0.0
    for index, sample in enumerate(held_out.samples):
        logits = _logits(model, sample)
        files.append(folder / f"logits-{index}.npy")
        np.save(files[-1], logits.numpy())
        adapted += _loss(logits, sample)
        with switched_off(model):
            base += _loss(_logits(model, sample), sample)
    del model
    _free()
    return Reference(files, adapted / held_out.num_learned, base / held_out.num_learned)


def better_base(parts: Parts, held_out: HeldOut) -> tuple[MergeBase, dict[str, float]]:
    """The base over which the adapter has the lower loss, and the losses (none where there is no choice)."""
    if parts.quant.method is QuantMethod.none:
        return MergeBase.original, {}
    if parts.is_stored_in_4_bits:
        return MergeBase.nf4, {}
    losses = {}
    for base, quant in ((MergeBase.nf4, parts.quant), (MergeBase.original, QuantConfig(method=QuantMethod.none))):
        model = _load(parts, quant)
        total = sum(_loss(_logits(model, sample), sample) for sample in held_out.samples)
        losses[base.name] = total / held_out.num_learned
        del model
        _free()
    original = losses["original"] < losses["nf4"] * (1 - AS_GOOD)
    return MergeBase.original if original else MergeBase.nf4, losses


def _load(parts: Parts, quant: QuantConfig) -> Any:
    world, plan = start_alone("qdora merge"), ParallelConfig(plan=Plan.none)
    loaded = load_model(parts.base, parts.model, quant, parts.adapter, plan, world, trainable=False)
    return loaded.model.eval()


def _free() -> None:
    """Gives back the memory of a model that nothing refers to: another process will want it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def _logits(model: Any, sample: Sample) -> Tensor:
    """(tokens, vocabulary) float32, on the CPU."""
    device = next(parameter.device for parameter in model.parameters())
    ids = torch.tensor(sample.ids, device=device)[None]
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.float().cpu()


def _loss(logits: Tensor, sample: Sample) -> float:
    """Sum over the learned tokens, nats."""
    wanted = torch.tensor(sample.learned[1:]).nonzero()[:, 0]
    targets = torch.tensor(sample.ids)[wanted + 1]
    return float(torch.nn.functional.cross_entropy(logits[wanted], targets, reduction="sum"))


def _reload(
    parts: Parts,
    quant: QuantConfig,
    samples: list[Sample],
    measured: Reference,
    output: Path,
    format: MergeFormat,
    folder: Path,
) -> dict[str, Any]:
    """What `reload.py` finds."""
    request = {
        "folder": str(output),
        "format": format.name,
        "base": str(parts.base),
        "dtype": parts.model.dtype.name,
        "quantise": quant.method is QuantMethod.nf4 and not parts.is_stored_in_4_bits,
        "double_quant": quant.double_quant,
        "trust_remote_code": parts.model.trust_remote_code,
        "samples": [
            {**asdict(sample), "logits": str(file)} for sample, file in zip(samples, measured.logits, strict=True)
        ],
        "result": str(folder / "result.json"),
    }
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    # -P: else the script's folder comes first on the path, and its neighbours could stand in for packages.
    command = [sys.executable, "-P", str(RELOAD), str(folder / "request.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    if done.returncode:
        raise ModelError(
            f"{output} was written but not verified, transformers could not load it and compute: {_last_words(done)}"
        )
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The message at the end of a traceback, or what ended the process."""
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}" + (" (out of memory?)" if done.returncode == -9 else "")
    message: list[str] = []
    for line in reversed([line for line in done.stderr.splitlines() if line.strip()]):
        if line.startswith("    "):  # a line of code
            break
        message.insert(0, line.strip())
    return " ".join(message)[:600] or f"exit status {done.returncode}"
