"""A command's options as plain values, as dotted names, and as words of a command line."""

import re
import shlex
from dataclasses import asdict, is_dataclass
from enum import Enum
from typing import Any, TypeVar, get_type_hints

from qdora.config.commands import RunConfig, written
from qdora.config.groups import DataConfig, ModelConfig
from qdora.errors import ConfigError

T = TypeVar("T")
PLAIN = re.compile(r"[A-Za-z_/.][\w/.:+-]*")
"""Texts that neither Hydra nor a shell misreads."""
WORDS = {"null", "true", "false", "nan", "inf"}


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


def usual_options() -> dict[str, Any]:
    """Returns the flat options of a run at their defaults, `-` where one is to be given."""
    return flatten(config_values(RunConfig(model=ModelConfig(path="-"), data=DataConfig(train="-"))))


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


_MAPPINGS = {"data.columns", "model.chat_template_kwargs"}
"""Options whose value is a mapping and no group."""


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested groups as dotted options."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        is_group = isinstance(value, dict) and name not in _MAPPINGS
        flat |= flatten(value, f"{name}.") if is_group else {name: value}
    return flat


def option(name: str, value: Any) -> str:
    """`name=value` as a shell hands it to Hydra."""
    return shlex.quote(f"{name}={as_word(value)}")


def as_word(value: Any) -> str:
    """A value without quotes where it needs none."""
    if isinstance(value, list):
        return f"[{','.join(map(as_word, value))}]"
    plain_text = isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in WORDS
    return str(value) if plain_text else written(value)
