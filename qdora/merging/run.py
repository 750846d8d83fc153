"""`qdora merge`: from a base model and an adapter to something that other programs load, and the proof of what it is.

Everything is written beside and gets its name when it is whole and compared with the model that was trained. The same
command goes on with what a killed one has left, and does nothing where all is done.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qdora import parallel
from qdora.adapter import peft_format
from qdora.adapter.trained_over import read_system, write_note
from qdora.card import CARD, model_card
from qdora.config import MergeBase, MergeConfig, MergeFormat, QuantConfig, QuantMethod
from qdora.errors import EXIT_NOT_VERIFIED, ConfigError
from qdora.files import NO_ROOM, lock, write_durably
from qdora.merging.formats import exactness, write
from qdora.merging.lora import lora_rank
from qdora.merging.parts import Parts
from qdora.merging.verification import HeldOut, better_base, find_held_out, verify
from qdora.model import check_vocabulary, load_tokenizer
from qdora.model.checkpoint_files import CheckpointFiles
from qdora.model.companions import tokenizer_fingerprint
from qdora.model.writer import JOURNAL, finish

RECORD = "merge.json"
"""What was merged; written with the checkpoint, so that the same merge is not made twice."""
VERIFICATION = "verification.json"
MARK = "FAILED_VERIFICATION.txt"


def merge(config: MergeConfig) -> int:
    """Writes what `config` asks for; returns the exit status, `EXIT_NOT_VERIFIED` where it is not what was trained.

    Raises:
        QdoraError: the run, the adapter or the base do not fit, there is no room, or `output` holds something else.
    """
    world = parallel.start_alone("qdora merge")
    parts = Parts.of(config, world)
    output = Path(str(config.output))
    wanted = _wanted(config, parts)
    with _alone(output):
        if output.exists():
            return _there_already(config, parts, output, wanted)
        started = time.perf_counter()
        # Before anything is written: a mistake in the data shows at once.
        held_out = _held_out(config, parts) if config.verify or config.base is MergeBase.auto else None
        base = _base(config, parts, held_out)
        quant = _quant(parts, base.name)
        partial = output.with_name(output.name + ".partial")
        with _room_is_told(output):
            told = write(config, parts, quant, partial, wanted | {"chosen": base.name, "on": world.device.type}, world)
        record = wanted | {"base_weights": base.name} | told
        if parts.result is not None and parts.result.manifest is not None:
            record["checkpoint_step"] = parts.result.manifest.step
        print(f"merged {told['num_layers']} layers in {time.perf_counter() - started:.1f} s")
        if "relative_error" in told:
            print(f"rank {record['lora_rank']} leaves out {told['relative_error']:.1%} of the weights' change (norm)")
        verification = None
        if config.verify and held_out is not None:
            verification = _verified(config, parts, quant, held_out, partial)
        with _room_is_told(output):
            _write_rest(partial, parts, record, verification, output)
            finish(partial, output)
    unverified = "" if config.verify else "; it was not verified, the same command without verify=false does it"
    print(f"written to {output}; {CARD} says how to load it{unverified}")
    return _conclude(record, verification, output)


def _there_already(config: MergeConfig, parts: Parts, output: Path, wanted: dict[str, Any]) -> int:
    """Verifies what is in `output` if that is wanted and was not done."""
    record = _same(output, wanted)
    (output / JOURNAL).unlink(missing_ok=True)  # of a process that was killed at its very end
    if config.verify and not (output / VERIFICATION).exists():
        print(f"{output} is this merge already, not verified yet")
        quant = _quant(parts, record["base_weights"])
        verification = _verified(config, parts, quant, _held_out(config, parts), output)
        with _room_is_told(output):
            _write_rest(output, parts, record, verification, output)
        return _conclude(record, verification, output)
    if (output / MARK).exists():
        print(f"{output} is this merge already, and NOT the model that was trained: see {CARD}")
        return EXIT_NOT_VERIFIED
    print(f"{output} is this merge already")
    return 0


def _wanted(config: MergeConfig, parts: Parts) -> dict[str, Any]:
    """All that decides what is written."""
    adapter = hashlib.sha256()
    for name in (peft_format.CONFIG, peft_format.WEIGHTS):
        adapter.update((parts.adapter_folder / name).read_bytes())
    return {
        "base": str(parts.model.path),
        "base_fingerprint": CheckpointFiles(parts.base).fingerprint(),
        "quantised": parts.quant.method.name,
        "double_quant": parts.quant.double_quant,
        "quantised_embeddings": parts.quant.embeddings or None,
        "trained_in": parts.model.dtype.name,
        "base_option": config.base.name,
        "adapter": adapter.hexdigest(),
        "adapter_tokenizer": tokenizer_fingerprint(parts.adapter_folder),
        "chat_template_kwargs": parts.model.chat_template_kwargs or None,
        "format": config.format.name,
        "dtype": config.gguf.type.name if config.format is MergeFormat.gguf else config.dtype.name,
        "lora_rank": lora_rank(parts.adapter, config.lora_rank) if config.format is MergeFormat.lora else None,
    }


def _same(output: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The record of what is in `output`, which must be a merge of the same."""
    found = output / RECORD
    if not found.exists():
        raise ConfigError(f"output={output} exists and is not a merge: give another folder")
    try:
        record: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"{found} is damaged: remove {output}, or give another folder") from None
    different = [name for name, value in wanted.items() if record.get(name) != value]
    if different:
        pairs = ", ".join(f"{name} {record.get(name)} (now {wanted[name]})" for name in different)
        raise ConfigError(f"output={output} holds another merge: {pairs}. Remove it, or give another folder")
    return record


def _quant(parts: Parts, base: str) -> QuantConfig:
    """What the base that is merged into was quantised to."""
    if base == MergeBase.nf4.name:
        return parts.quant
    if parts.is_stored_in_4_bits:
        raise ConfigError(
            f"base={base}: {parts.model.path} is stored in 4 bits; give the checkpoint that it was made from as "
            "model.path, or base=nf4"
        )
    return QuantConfig(method=QuantMethod.none)


def _held_out(config: MergeConfig, parts: Parts) -> HeldOut:
    tokenizer = load_tokenizer(parts.base, parts.model, parts.adapter_folder)
    check_vocabulary(parts.base, tokenizer)
    return find_held_out(parts, config.held_out, tokenizer)


def _verified(config: MergeConfig, parts: Parts, quant: QuantConfig, held_out: HeldOut, folder: Path) -> dict[str, Any]:
    return verify(parts, quant, held_out, folder, config.format, exactness(config, parts.adapter, quant))


def _base(config: MergeConfig, parts: Parts, held_out: HeldOut | None) -> MergeBase:
    """The base to merge into; over weights that were not quantised there is one only."""
    if parts.quant.method is QuantMethod.none:
        return MergeBase.original
    if config.base is not MergeBase.auto or held_out is None:
        return config.base
    base, losses = better_base(parts, held_out)
    measured = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()) or "there is no other"
    print(f"base=auto takes {base.name}: loss on {held_out.source}: {measured}")
    return base


def _write_rest(
    folder: Path, parts: Parts, record: dict[str, Any], verification: dict[str, Any] | None, output: Path
) -> None:
    for stale in (VERIFICATION, MARK):  # of a verification after which something failed
        (folder / stale).unlink(missing_ok=True)
    if verification is not None:
        if verification["failed"]:  # before what says that it was verified
            write_durably(folder / MARK, "\n".join(verification["failed"]) + "\n")
        write_durably(folder / VERIFICATION, json.dumps(verification, indent=2) + "\n")
    system = read_system(parts.adapter_folder)
    if system is not None:
        write_note(folder, None, system=system)
    write_durably(folder / CARD, model_card(parts, record, verification, output))
    write_durably(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _conclude(record: dict[str, Any], verification: dict[str, Any] | None, output: Path) -> int:
    """Prints what the verification says; returns the exit status."""
    if verification is None:
        return 0
    if "unreadable" in verification:
        print(f"not verified: transformers cannot read it ({verification['unreadable']})")
        return 0
    over = ", the adapter over the original weights" if _moved(record) else ""
    perplexity = ", ".join(f"{name} {_shown(value)}" for name, value in verification["perplexity"].items())
    print(
        f"verified on {verification['num_tokens']} tokens of {verification['held_out']}: perplexity {perplexity}; "
        f"same top token {_shown(verification['top1_agreement'])}, KL {_shown(verification['mean_kl'])} nats a token"
        + over
    )
    if verification["passed"]:
        return 0
    print(f"it is NOT the model that was trained: {'; '.join(verification['failed'])}. {output / MARK} marks it")
    if record["format"] == "nf4" and record["base_weights"] == "nf4":
        print("NF4 rounds most weights back to those that were trained over: try base=original, or format=hf")
    return EXIT_NOT_VERIFIED


def _moved(record: dict[str, Any]) -> bool:
    """Whether the adapter was merged into other weights than it was trained over."""
    return bool(record["quantised"] == "nf4" and record["base_weights"] == "original")


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


@contextmanager
def _room_is_told(output: Path) -> Iterator[None]:
    """Raises `ConfigError` where files cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in NO_ROOM
        raise ConfigError(
            f"output={output} could not be written: {error}." + (" Make room;" if full else "") + " the same command "
            "goes on"
        ) from None


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keeps a second merge from the same output.

    Raises:
        ConfigError: another process merges there, or the folder cannot be made.
    """
    name = output.with_name(f".{output.name}.lock")
    try:
        if output.name in ("", "..") or (output.is_symlink() and not output.exists()):
            raise ConfigError(f"output={output} is not a folder that can be made: give its name")
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"output={output} cannot be made: {error.strerror}") from None
    try:
        # The lock of a merge that has just ended has no name any more.
        if not (lock(descriptor) and name.exists() and name.stat().st_ino == os.fstat(descriptor).st_ino):
            raise ConfigError(f"another process merges into {output} now: wait, or give another folder")
        try:
            yield
        finally:
            name.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
