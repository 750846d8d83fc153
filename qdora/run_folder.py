"""A run's own folder: config.yaml, metrics.jsonl, summary.json, adapter/, checkpoints/, report.png."""

import json
import logging
import os
import time
from collections.abc import Container
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from qdora import checkpoint
from qdora.adapter import peft_format
from qdora.checkpoint import Manifest
from qdora.config import Attention, RunConfig
from qdora.data.sources import content
from qdora.errors import CheckpointError, ConfigError, DataError, ModelError
from qdora.files import existing, lock, read_json, write_durably
from qdora.model.checkpoint_files import CheckpointFiles
from qdora.waits import wait_s

T = TypeVar("T")
logger = logging.getLogger(__name__)
_IDENTITY = ("model", "quant", "adapter", "data", "seed")
"""Groups that make a run what it is: a checkpoint continues only under the same values."""
_HARMLESS = {"data.cache_dir", "data.eval", "data.train", "model.path"}
"""Data and model that were moved are the same: the checkpoint knows their fingerprints."""


def differing(ours: dict[str, Any], theirs: dict[str, Any], but: Container[str]) -> list[str]:
    """Names of the flat options `ours` that are not as in `theirs`, apart from those in `but`."""
    different = [name for name in ours if name not in but and ours[name] != theirs.get(name)]
    name = "model.attention"  # `auto` is another one on another machine, and computes the same
    kinds = {attention.name: attention.untrained for attention in Attention}
    if name in different and kinds[ours[name]] is kinds.get(theirs.get(name, "")):
        different.remove(name)
    return different


def plain(value: Any) -> Any:
    """A config as dictionaries, lists, numbers and words."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value


def config_values(config: RunConfig) -> dict[str, Any]:
    """The resolved config as YAML and JSON hold it."""
    values: dict[str, Any] = plain(asdict(config))
    return values


def config_from_values(kind: type[T], values: dict[str, Any]) -> T:
    """The dataclass that `config_values` was made from.

    Raises:
        ConfigError: an option of another version of qdora.
    """
    hints = get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ConfigError(f"{kind.__name__} has no option {unknown[0]}; it was written by another version of qdora")
    typed: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if isinstance(hint, type) and is_dataclass(hint):
            typed[name] = config_from_values(hint, value)
        elif isinstance(hint, type) and issubclass(hint, Enum):
            typed[name] = hint[value]
        else:
            typed[name] = value
    return kind(**typed)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as dotted options."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, none if there is no file; a line that a killed run left torn is passed over."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "step" in record]


def inputs(config: RunConfig, base: Path | None) -> dict[str, str | None]:
    """Hashes of what a run trains on and from, by option; None of what lies on the hub.

    Args:
        base: the folder of the model, if that is to be among them.

    Raises:
        DataError: the data is not there.
        ModelError: the model is not.
    """
    data = {"data.train": config.data.train, "data.eval": config.data.eval}
    told = {name: content(source) for name, source in data.items() if source is not None}
    return told if base is None else told | {"model.path": CheckpointFiles(base).fingerprint()}


class RunFolder:
    """Paths and files of one run; the methods that write are for rank 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.checkpoints = path / "checkpoints"
        self.report = path / "report.png"
        self.summary = path / "summary.json"
        self.config = path / "config.yaml"
        self._unwritten: list[str] = []
        self._lock: int | None = None

    def find_checkpoint(self, config: RunConfig) -> tuple[Path, Manifest] | None:
        """The checkpoint to go on from under `config.resume`, or None for a fresh start.

        Raises:
            ConfigError: the folder is of another run, or not empty where a new one is wanted.
            CheckpointError: `resume` names a path without a whole checkpoint, or all of the folder's are damaged.
        """
        _check_can_be_made(self.path)
        if self.path.exists():
            self._take()
        same_command = self.config.exists() and self._stored_config().get("resume") == config.resume
        if config.resume == "never" and not same_command:
            if self._holds_something():
                raise ConfigError(f"resume=never wants a new folder, but {self.path} is not empty")
            return None
        self._check_same_run(config)
        # The same command again goes on from what it had made; else it would begin at `resume` each time.
        if config.resume != "auto" and not (same_command and checkpoint.complete(self.checkpoints)):
            if config.resume == "never":
                return None
            found = Path(config.resume)
            if found.name == checkpoint.LATEST and found.is_file():
                found = found.parent / found.read_text(encoding="utf-8").strip()
            if not (found / checkpoint.MANIFEST).exists():
                raise CheckpointError(
                    f"resume={config.resume}: no checkpoint there (no {checkpoint.MANIFEST}); it is auto, never, "
                    "or the folder of one, such as RUN/checkpoints/step-00000010"
                )
            reason = checkpoint.damage(found)
            if reason is not None:
                raise CheckpointError(f"resume={config.resume} is damaged: {reason}")
        else:
            newest, told = checkpoint.latest_valid(self.checkpoints)
            for line in told:
                logger.warning("%s", line)
            if newest is None:
                return None
            found = newest
        manifest = checkpoint.read_manifest(found)
        _check_identity(config, manifest.config, str(found))
        return found, manifest

    def _check_same_run(self, config: RunConfig) -> None:
        if not self._holds_something():
            return
        if not self.config.exists():
            raise ConfigError(f"output_dir={self.path} holds files that are not of a run: give another folder")
        _check_identity(config, self._stored_config(), str(self.path))

    def _holds_something(self) -> bool:
        """Also what is half written may be left of a start that failed."""
        return self.path.exists() and any(file.suffix != ".partial" for file in self.path.iterdir())

    def _take(self) -> None:
        """Locks the folder for this process, as long as it lives.

        Raises:
            ConfigError: a run is going on in it.
        """
        if self._lock is None:
            self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        deadline = time.monotonic() + wait_s("QDORA_LOCK_PATIENCE_S")
        while not lock(self._lock):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"a run is going on in {self.path}: wait for its end, stop it, or give another output_dir"
                )
            time.sleep(0.2)

    def release(self) -> None:
        """Lets other runs have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def see(self, mark: Path) -> None:
        """Waits for a file that another machine has made there.

        Raises:
            ConfigError: it does not come: the folder is not the same one on each machine.
        """
        deadline = time.monotonic() + wait_s("QDORA_SEEN_AFTER_S")
        while not mark.exists():
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"output_dir={self.path} is not the same folder on every machine, and each rank writes its part of "
                    "a checkpoint there: put it on a file system that they share"
                )
            time.sleep(0.2)

    def _stored_config(self) -> dict[str, Any]:
        try:
            stored = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.config} is damaged: {' '.join(str(error).split())}") from None
        if not isinstance(stored, dict):
            raise ConfigError(f"{self.config} is damaged: it holds no options")
        return stored

    def read_config(self) -> RunConfig:
        """The configuration that the run in this folder was started with.

        Raises:
            ConfigError: there is no run here.
        """
        if not self.config.exists():
            raise ConfigError(f"run={self.path}: no run there (no {self.config.name})")
        return config_from_values(RunConfig, self._stored_config())

    def is_finished(self) -> bool:
        """Whether the run ended and its result is there."""
        if not self.summary.exists() or not (self.adapter.exists() or self.model.exists()):
            return False
        weights = self.adapter / peft_format.WEIGHTS
        if weights.exists() and not weights.stat().st_size:
            return False
        with suppress(ValueError, TypeError, KeyError):  # damaged: made again
            return bool(json.loads(self.summary.read_text(encoding="utf-8"))["status"] == "finished")
        return False

    def check_base(self, base: Path) -> None:
        """Compares the base with the one that the run was trained over, where its summary or a checkpoint knows that.

        Raises:
            ConfigError: it is another one.
            ModelError: it is none.
        """
        known = read_json(self.summary).get("model_fingerprint") or self._newest_fingerprint()
        if known not in (None, CheckpointFiles(base).fingerprint()):
            raise ConfigError(
                f"run={self.path} was trained over another model than the one in {base}: its weights differ. Give the "
                "right one as model.path=DIR"
            )

    def replaced(self, config: RunConfig) -> list[str]:
        """Options of `config` whose files are there and are not what the run was trained with, by its summary."""
        base = Path(str(config.model.path))
        summary = read_json(self.summary)
        then = {"model.path": summary.get("model_fingerprint"), **summary.get("data_fingerprints", {})}
        now: dict[str, str | None] = {}
        with suppress(DataError, ModelError):  # a finished run needs neither
            now = inputs(config, base if base.is_dir() else None)
        return [name for name, told in now.items() if None not in (told, then.get(name)) and told != then[name]]

    def _newest_fingerprint(self) -> str | None:
        """Of the base, as the newest checkpoint that can be read has it."""
        for path in reversed(checkpoint.complete(self.checkpoints)):
            with suppress(CheckpointError):
                return checkpoint.read_manifest(path).model_fingerprint
        return None

    def finished_adapter(self) -> Path:
        """The folder of the run's adapter.

        Raises:
            ConfigError: the run has none, because it is not finished or trained every weight.
        """
        if self.adapter.exists():
            return self.adapter
        if self.model.exists():
            raise ConfigError(
                f"run={self.path} trained every weight: model.path={self.model} is an ordinary checkpoint already"
            )
        raise ConfigError(
            f"run={self.path} has no adapter: it is not finished; wait for its end, or start it again to go on"
        )

    def start(self, config: RunConfig, first_step: int) -> None:
        """Takes the folder and writes config.yaml; the summary goes, and of steps after `first_step` the metrics, too.

        Checkpoints of such steps are set aside: those steps are made again.

        Raises:
            ConfigError: another run has the folder, or it cannot be written.
        """
        text = yaml.safe_dump(config_values(config), sort_keys=False, allow_unicode=True)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
            write_durably(self.config, text)
            self.summary.unlink(missing_ok=True)
            kept = [record for record in self.read_metrics() if record["step"] <= first_step] if first_step else []
            write_durably(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
            checkpoint.supersede(self.checkpoints, first_step)
        except OSError as error:
            raise ConfigError(f"output_dir={self.path} cannot be written: {error}") from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl."""
        return read_metrics(self.metrics)

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl; what a full disk does not take is appended with a later one."""
        self._unwritten.append(json.dumps(record) + "\n")
        try:
            self.flush()
        except OSError as error:
            if len(self._unwritten) == 1:
                logger.warning("%s could not be written, its lines are kept for later: %s", self.metrics, error)

    def flush(self) -> None:
        """Appends what is kept, or raises `OSError`."""
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write("".join(self._unwritten))
        except OSError:
            with suppress(OSError):
                os.truncate(self.metrics, size)  # half a line would spoil the next
            raise
        self._unwritten.clear()

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        write_durably(self.summary, json.dumps(summary, indent=2) + "\n")


def _check_can_be_made(folder: Path) -> None:
    """Raises `ConfigError` before anything is loaded; what the system refuses all the same shows when it is made."""
    there = existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written" if there.is_dir() else "is a file"
        raise ConfigError(f"output_dir={folder} cannot be made: {there} {what}")


def _check_identity(config: RunConfig, stored: dict[str, Any], where: str) -> None:
    if config.allow_changes:
        return
    wanted = config_values(config)
    ours = flatten({key: wanted[key] for key in _IDENTITY})
    usual = config_values(RunConfig(model=config.model, data=config.data))
    # An option that a run did not know yet was as it is by default.
    theirs = flatten({key: usual[key] for key in _IDENTITY}) | flatten({key: stored.get(key) for key in _IDENTITY})
    different = differing(ours, theirs, _HARMLESS)
    if different:
        different += [name for name in ("data.train", "model.path") if ours[name] != theirs.get(name)]
        pairs = ", ".join(f"{name}={theirs.get(name)} (now {ours[name]})" for name in different)
        raise ConfigError(
            f"{where} belongs to another run: it has {pairs}. Use another output_dir, those values, or "
            "allow_changes=true to go on all the same"
        )
