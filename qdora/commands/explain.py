"""What Hydra and OmegaConf complain about, as one line that says what to type instead."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from qdora.errors import ConfigError, nearest

_OTHER_WORDS = {
    "lr": "optim.learning_rate",
    "learning_rate": "optim.learning_rate",
    "wd": "optim.weight_decay",
    "warmup": "optim.warmup_ratio",
    "epochs": "train.num_epochs",
    "num_epochs": "train.num_epochs",
    "num_train_epochs": "train.num_epochs",
    "max_steps": "train.num_steps",
    "steps": "train.num_steps",
    "batch_size": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.num_accumulation_steps",
    "gradient_checkpointing": "parallel.activation_checkpointing",
    "save_steps": "train.checkpoint_every",
    "logging_steps": "train.log_every",
    "r": "adapter.rank",
    "rank": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.target_modules",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "seq_len": "data.max_length",
    "dataset": "data.train",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "output": "output_dir",
    "load_in_4bit": "quant.method",
    "bf16": "model.dtype",
    "report_to": "tracker.kind",
}
"""What other programs call an option."""


def option_names(config_class: type, prefix: str = "") -> Iterator[str]:
    """Every option of a command, groups dotted."""
    hints = get_type_hints(config_class)
    for item in fields(config_class):
        kind = hints[item.name]
        if isinstance(kind, type) and is_dataclass(kind):
            yield from option_names(kind, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def option_kinds(config_class: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every option with its type: of an optional text `str`, of a list of texts `list`, of texts by names `dict`."""
    for name, kind in get_type_hints(config_class).items():
        if isinstance(kind, type) and is_dataclass(kind):
            yield from option_kinds(kind, f"{prefix}{name}.")
        elif kind in (str, str | None):
            yield f"{prefix}{name}", str
        else:
            is_texts = get_origin(kind) in (list, dict) and {*get_args(kind)} == {str}
            yield f"{prefix}{name}", get_origin(kind) if is_texts else kind


def check_known(values: DictConfig, config_class: type, prefix: str = "") -> None:
    """Raises `ConfigError` for a key that `config_class` has no field for; OmegaConf lets `+key=value` add one."""
    hints = get_type_hints(config_class)
    for key in values:
        name = f"{prefix}{key!s}"
        if key not in hints:
            raise ConfigError(f"there is no option {name}{nearest(name, option_names(config_class, prefix))}")
        if is_dataclass(hints[str(key)]):
            check_known(values[key], hints[str(key)], f"{name}.")


def own_yaml(command: str) -> str:
    """Says what a YAML file of a user's own lacks."""
    begins = f"defaults: [{command}, _self_]"
    return f"the YAML file of --config-name lacks the options of {command}: it begins with {begins!r}"


def explain(error: Exception, command: str, config_class: type, conf: Path, arguments: list[str]) -> str:
    """One message for an error that composing the command's configuration raised."""
    chain = [error]
    # With OC_CAUSE=1, or under a debugger, OmegaConf makes an error its own cause.
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)  # type: ignore[arg-type]
    is_own = any(re.match(r"--config-name|-cn", argument) for argument in arguments)
    for link in chain:
        if isinstance(link, OverrideParseException):
            return f"{link.override!r} is not an option: write name=value, and quote values with blanks or brackets"
        if isinstance(link, MissingConfigException):
            return _missing(link, conf, is_own)
        if isinstance(link, ValidationError):
            return _wrong_value(link)
    text = str(error)
    several = re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text)
    if several:
        return f"{several[1]}={several[2]}: several values are written as a list, {several[1]}=[{several[2]}]"
    empty = next((name for name in arguments if re.fullmatch(r"\w+=(null|\[.*\])?", name)), None)
    if text.startswith("Config group override") and empty is not None:
        return f"{empty}: a group takes the name of one of its choices"
    named = re.search(r"override '([^']+)'", text) or re.search(r"Key '([^']+)'", text)
    if named:
        name = named[1].lstrip("+~")
        if is_own and name.partition("=")[0] in option_names(config_class):
            return own_yaml(command)
        return _unknown(name, config_class, conf, chain, arguments)
    return text.splitlines()[0]


def _missing(error: MissingConfigException, conf: Path, is_own: bool) -> str:
    wanted = str(error.missing_cfg_file or "")
    group, _, name = wanted.rpartition("/")
    if is_own and not group:
        return f"--config-name: there is no {name.removesuffix('.yaml')}.yaml in the folder of --config-dir"
    if group in ("hydra/launcher", "hydra/sweeper"):
        return f"{group}={name}: no such choice: joblib and submitit want pip install 'qdora[sweep]'"
    choices = sorted(path.stem for path in (conf / group).glob("*.yaml"))
    if not group or not choices:
        groups = sorted(path.name for path in conf.iterdir() if path.is_dir())
        first = wanted.partition("/")[0]
        if first in groups:
            return f"{first}={wanted[len(first) + 1 :]}: no such choice of {first}; a path is given as {first}.path=..."
        return f"there is no option group {group or wanted!r}{nearest(group or wanted, groups)}"
    return f"{group}={name}: no such choice{nearest(name, choices)}; there are: {', '.join(choices)}"


def _wrong_value(error: OmegaConfBaseException) -> str:
    said = str(error.msg or error).splitlines()[0]
    option = error.full_key or "a value"
    return f"{option}: {said}"


def _unknown(name: str, config_class: type, conf: Path, chain: list[Exception], arguments: list[str]) -> str:
    key_error = next((link for link in chain if isinstance(link, ConfigKeyError)), None)
    if key_error is not None and key_error.full_key:
        name = key_error.full_key
    typed = next((argument for argument in arguments if re.match(rf"\+*{re.escape(name)}", argument)), None)
    options = list(option_names(config_class))
    groups = sorted(path.name for path in conf.iterdir() if path.is_dir())
    own_word = _OTHER_WORDS.get(name.rpartition(".")[2].lower())
    hint = f", did you mean {own_word!r}?" if own_word in options else nearest(name, [*options, *groups])
    if typed and name in groups and name == "experiment":
        return f"{typed}: a recipe is added with a plus sign: +{typed.lstrip('+')}"
    if name in groups or name in {option.partition(".")[0] for option in options}:
        return f"{typed or name}: this command has no choices of {name}. --help lists its options"
    entries, _, own = name.partition(".")
    if own and get_origin(get_type_hints(config_class).get(entries)) is dict:  # of names that users give
        return f"{entries} has no {own}: a new one is added whole, as +{entries}={{{own}:{{option:value}}}}"
    return f"there is no option {name}{hint or '.'} --help lists them all"
