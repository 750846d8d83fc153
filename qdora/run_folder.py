"""A run's own folder: config.yaml, metrics.jsonl, summary.json, adapter/, checkpoints/, report.png."""

import json
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from qdora import checkpoint
from qdora.checkpoint import Manifest
from qdora.config import RunConfig
from qdora.errors import CheckpointError, ConfigError

T = TypeVar("T")
_IDENTITY = ("model", "quant", "adapter", "data", "seed")
"""Groups that make a run what it is: a checkpoint continues only under the same values."""
_HARMLESS = {"data.cache_dir", "data.eval"}


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

    def find_checkpoint(self, config: RunConfig) -> tuple[Path, Manifest] | None:
        """The checkpoint to go on from under `config.resume`, or None for a fresh start.

        Raises:
            ConfigError: the folder is of another run, or not empty where a new one is wanted.
            CheckpointError: `resume` names a path without a checkpoint.
        """
        if config.resume == "never":
            if self.path.exists() and any(self.path.iterdir()):
                raise ConfigError(f"resume=never wants a new folder, but {self.path} is not empty")
            return None
        self._check_same_run(config)
        if config.resume != "auto":
            found = Path(config.resume)
            if not (found / checkpoint.MANIFEST).exists():
                raise CheckpointError(f"resume={config.resume}: no checkpoint there (no {checkpoint.MANIFEST})")
        else:
            checkpoints = checkpoint.complete(self.checkpoints)
            if not checkpoints:
                return None
            found = checkpoints[-1]
        manifest = checkpoint.read_manifest(found)
        _check_identity(config_values(config), manifest.config, str(found))
        return found, manifest

    def _check_same_run(self, config: RunConfig) -> None:
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not self.config.exists():
            raise ConfigError(f"output_dir={self.path} holds files that are not of a run: give another folder")
        stored = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        _check_identity(config_values(config), stored, str(self.path))

    def read_config(self) -> RunConfig:
        """The configuration that the run in this folder was started with.

        Raises:
            ConfigError: there is no run here.
        """
        if not self.config.exists():
            raise ConfigError(f"run={self.path}: no run there (no {self.config.name})")
        return config_from_values(RunConfig, yaml.safe_load(self.config.read_text(encoding="utf-8")))

    def is_finished(self) -> bool:
        """Whether the run ended and its result is there."""
        if not self.summary.exists() or not (self.adapter.exists() or self.model.exists()):
            return False
        return bool(json.loads(self.summary.read_text(encoding="utf-8"))["status"] == "finished")

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
        raise ConfigError(f"run={self.path} has no adapter: it is not finished; start it again to go on")

    def start(self, config: RunConfig, first_step: int) -> None:
        """Writes config.yaml and drops metrics of steps after `first_step`, which will be made again."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config_values(config), sort_keys=False, allow_unicode=True)
        _write(self.config, text)
        kept = [record for record in self.read_metrics() if record["step"] <= first_step] if first_step else []
        _write(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl."""
        return read_metrics(self.metrics)

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        _write(self.summary, json.dumps(summary, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _check_identity(wanted: dict[str, Any], stored: dict[str, Any], where: str) -> None:
    ours = flatten({key: wanted[key] for key in _IDENTITY})
    theirs = flatten({key: stored.get(key) for key in _IDENTITY})
    different = [name for name in ours if name not in _HARMLESS and ours[name] != theirs.get(name)]
    if different:
        pairs = ", ".join(f"{name}={theirs.get(name)} (now {ours[name]})" for name in different)
        raise ConfigError(
            f"{where} belongs to another run: it has {pairs}. Use those values, or another output_dir (or resume=never)"
        )
