"""The folder of a run's training checkpoints: which are whole, what each knows of itself. Reads no tensor.

Without torch, whose import takes seconds: what forbids a run to go on shows before.
"""

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qdora.errors import CheckpointError, first_line

MANIFEST = "manifest.json"
LATEST = "latest"
SCHEMA_VERSION = 5
READABLE_VERSIONS = (3, 4, 5)
"""3 had no `changes`, 4 neither `system` nor `template`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """An option (or what else belongs to a run) that had another value after the run was resumed."""

    from_step: int
    """The first step under the new value."""
    option: str
    before: Any
    now: Any


@dataclass(kw_only=True, slots=True)
class Manifest:
    """What a checkpoint knows besides its tensors; JSON."""

    schema_version: int = SCHEMA_VERSION
    step: int
    num_tokens: int
    eval_loss: float | None
    loader: dict[str, int]
    guard: dict[str, Any]
    """State of `StepGuard`."""
    rows_per_step: int
    world_size: int
    run_id: str
    tracker_id: str | None
    config: dict[str, Any]
    """As it was given: on another number of ranks than at first, accumulation makes up for them."""
    versions: dict[str, str]
    data_fingerprint: str
    model_fingerprint: str
    checksums: dict[str, str] = field(default_factory=dict)
    """Every other file's SHA-256."""
    changes: list[Change] = field(default_factory=list)
    """All up to this step, oldest first."""
    system: str | None = None
    """The system turn that every sample of the training has."""
    template: str | dict[str, str] | None = None
    """The chat template that the run's end writes: that of the training, where neither base nor adapter has it."""

    def __post_init__(self) -> None:
        self.changes = [Change(**change) if isinstance(change, dict) else change for change in self.changes]

    def to_json(self) -> str:
        """With the SHA-256 of its own text."""
        values = asdict(self)
        return json.dumps(values | {"sha256": digest_of(values)}, indent=2) + "\n"


def checksum(file: Path) -> str:
    """Returns the SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digest_of(values: Any) -> str:
    """Returns the SHA-256 of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def complete(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; what is half written has a suffix."""
    return sorted(path for path in folder.glob("step-*") if not path.suffix)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None.

    Raises:
        CheckpointError: of another version of qdora.
    """
    try:
        manifest = read_manifest(checkpoint)
    except DamagedError as error:
        return str(error)
    try:
        there = {file.name for file in checkpoint.iterdir()} - {MANIFEST}
    except OSError as error:  # a run that goes on has removed it
        return first_line(error)
    for name in manifest.checksums.keys() ^ there:
        return f"{name} is missing" if name in manifest.checksums else f"{name} does not belong there"
    for name, expected in manifest.checksums.items():
        try:
            if checksum(checkpoint / name) != expected:
                return f"{name} is not what was written"
        except OSError as error:
            return first_line(error)
    return None


class DamagedError(CheckpointError):
    """A checkpoint whose files are not what was written."""


def newest_valid(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Returns the newest checkpoint whose files are what was written, and what is wrong with each newer one.

    Raises:
        CheckpointError: one is of another version of qdora.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(complete(folder)):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint, damaged
        damaged[checkpoint] = reason
    return None, damaged


def newest_readable(folder: Path) -> tuple[Path, Manifest] | None:
    """Returns the newest checkpoint with a manifest that can be read; its other files are not looked at."""
    for checkpoint in reversed(complete(folder)):
        with suppress(CheckpointError):
            return checkpoint, read_manifest(checkpoint)
    return None


def latest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what was written, and what to tell of the newer ones, set aside now.

    Raises:
        CheckpointError: there are checkpoints and all are damaged, or one is of another version of qdora.
    """
    checkpoint, damaged = newest_valid(folder)
    if checkpoint is not None:
        return checkpoint, [
            f"{bad} is damaged ({why}) and was renamed to {_set_aside(bad, 'damaged').name}"
            for bad, why in damaged.items()
        ]
    if damaged:
        newest, reason = next(iter(damaged.items()))
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged, the newest ({newest.name}): {reason}. To start anew, give "
            "another output_dir or remove them"
        )
    return None, []


def _set_aside(checkpoint: Path, why: str) -> Path:
    aside = checkpoint.with_suffix(f".{why}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def set_aside(folder: Path, step: int) -> str:
    """Renames the checkpoint of weights that turned out not to compute, if there is one; what to tell the user."""
    given = folder / f"step-{step:08d}"
    told = ""
    if given.exists():
        told = f"{given.name} holds these weights and was renamed to {_set_aside(given, 'suspect').name}. "
    good = complete(folder)
    return told + (f"The same command goes on from {good[-1]}" if good else "There is no earlier checkpoint")


def supersede(folder: Path, step: int) -> None:
    """Renames the checkpoints after `step`: the run goes on from there, and theirs are steps of another course."""
    for later in complete(folder):
        if later.name > f"step-{step:08d}":
            _set_aside(later, "superseded")


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamagedError: it cannot be read.
        CheckpointError: it is of another version of qdora.
    """
    try:
        values = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        digest, version = values.pop("sha256", None), values["schema_version"]
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {first_line(error)}") from None
    if version not in READABLE_VERSIONS:
        known = ", ".join(map(str, READABLE_VERSIONS))
        raise CheckpointError(f"{checkpoint} has schema version {version}, this qdora reads {known}")
    if digest != digest_of(values):
        raise DamagedError(f"{MANIFEST} is not what was written")
    return Manifest(**values)
