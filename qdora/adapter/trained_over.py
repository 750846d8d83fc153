"""What an adapter was trained over, and under which system turn: a note beside PEFT's two files, which say neither.

A model that was trained whole, or merged, has the system turn in such a note.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qdora.config import QuantConfig, QuantMethod
from qdora.config.commands import changed, given_options
from qdora.errors import AdapterError
from qdora.files import read_json, write_durably

NOTE = "trained_over.json"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""PEFT's two files."""


def write_note(
    folder: Path,
    quant: QuantConfig | None,
    *,
    base_fingerprint: str | None = None,
    checkpoint: str | None = None,
    system: str | None = None,
) -> None:
    """Says beside an adapter, or a model, what it was trained over and with.

    Args:
        quant: what its base was quantised to; None of a model.
        base_fingerprint: of its base's weights.
        checkpoint: digest of the checkpoint that it was made of, if it is not a run's end.
        system: the system turn that every sample of training had.
    """
    note: dict[str, Any] = {} if quant is None else {"quant": {**asdict(quant), "method": quant.method.name}}
    others = {"base_fingerprint": base_fingerprint, "checkpoint": checkpoint, "system": system}
    note |= {name: value for name, value in others.items() if value is not None}
    write_durably(folder / NOTE, json.dumps(note, indent=2, ensure_ascii=False) + "\n")


def read_system(folder: Path) -> str | None:
    """Returns the system turn that the note of an adapter or a model says; None where there is none."""
    system = read_json(folder / NOTE).get("system")
    return system if isinstance(system, str) and system else None


def read_note(folder: Path) -> QuantConfig | None:
    """What the note says; None where there is none, or none that can be read."""
    values = read_json(folder / NOTE).get("quant")
    try:
        return None if values is None else QuantConfig(**{**values, "method": QuantMethod[values["method"]]})
    except (TypeError, KeyError):
        return None


def read_base_fingerprint(folder: Path) -> str | None:
    """Returns the fingerprint of the weights that an adapter was trained over, where its folder has it."""
    value = read_json(folder / NOTE).get("base_fingerprint")
    return value if isinstance(value, str) else None


def is_adapter(path: str) -> bool:
    """Returns whether a folder has the config of an adapter."""
    return (Path(path) / CONFIG).is_file()


def check_adapter(path: str) -> None:
    """Raises `AdapterError` where `adapter.path` names no adapter."""
    if not is_adapter(path):
        raise AdapterError(f"adapter.path={path}: no {CONFIG} there: give the folder of an adapter in PEFT format")


def gone(path: str) -> str:
    """Returns what is told where the adapter with which a run began is not there any more."""
    return (
        f"adapter.path={path}, with which the run began, is not there: the tokenizer of the base is taken; if that "
        "folder had its own, put it back"
    )


def is_stored_in_4_bits(base: Path) -> bool:
    """Whether a base has no original weights in its folder."""
    return "quantization_config" in read_json(base / "config.json")


def find_quant(adapter: Path, given: QuantConfig, base: Path | None = None) -> tuple[QuantConfig, bool]:
    """What the base of an adapter is quantised to, and whether that is known to be what it was trained over.

    Args:
        given: what the user says, which counts if it was said, or is not what is usual (`none`); options of NF4 alone
            say NF4.
        base: folder of the base model, which may be stored in 4 bits; None where it is not looked at.
    """
    usual = QuantConfig(method=QuantMethod.none)
    if changed(given, usual).keys() - {"method"}:
        return replace(given, method=QuantMethod.nf4), True
    if given_options(given, usual):
        return given, True
    noted = read_note(adapter)
    if noted is not None:
        return noted, True
    in_4_bits = base is not None and is_stored_in_4_bits(base)
    return QuantConfig(method=QuantMethod.nf4) if in_4_bits else given, in_4_bits
