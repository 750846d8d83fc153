"""From the command line to a typed configuration: the only code that knows Hydra and OmegaConf.

A command is a name, the dataclass of its options, its YAML in `conf/` and the function that does it. Hydra composes the
YAML over the dataclasses and applies the overrides; what is passed on is the dataclass alone.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qdora import config
from qdora.commands.explain import check_known, explain
from qdora.commands.help import describe
from qdora.errors import EXIT_USER_ERROR, ConfigError, QdoraError, nearest

EXIT_KEYBOARD = 130
"""What a shell shows for a Ctrl-C; during training it saves and ends in `EXIT_INTERRUPTED` instead."""
STATUS_FILE = "QDORA_STATUS_FILE"
"""Environment variable of the file that the first rank of a machine leaves its exit status in, for the launcher."""
HELP = ("-h", "--help")

GRACE_S = 10.0
"""How much later than the others rank 0 may find the same mistake."""


@dataclass(frozen=True, slots=True)
class Command:
    """One word after `qdora`."""

    config_class: type
    target: str
    """`module:function`, imported only when it is called; takes the dataclass, returns the exit status."""
    summary: str


COMMANDS = {
    "train": Command(config.RunConfig, "qdora.training:train", "fine-tune a model"),
    "merge": Command(config.MergeConfig, "qdora.merging:merge", "write base and adapter as one ordinary checkpoint"),
    "evaluate": Command(config.EvaluateConfig, "qdora.evaluation:evaluate", "score a run or a model on held-out data"),
}


def run(arguments: list[str]) -> int:
    """Runs one command on this rank and returns the exit status; a user's mistake is one message on rank 0."""
    is_main = int(os.environ.get("RANK", 0)) == 0
    try:
        if not arguments or arguments[0] in HELP:
            print(_usage())
            return 0 if arguments else EXIT_USER_ERROR
        name = arguments[0]
        if name not in COMMANDS:
            raise ConfigError(f"unknown command {name!r}{nearest(name, COMMANDS)}; there are: {', '.join(COMMANDS)}")
        overrides = [argument for argument in arguments[1:] if argument not in HELP]
        values = compose(name, overrides)
        if values is None:
            return 0
        if len(overrides) < len(arguments) - 1:
            if is_main:
                _show(describe(name, COMMANDS[name].config_class, values, conf_folder()))
            return 0
        return _call(COMMANDS[name], values)
    except QdoraError as error:
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if under_torchrun and not is_main:
            # torchrun ends all ranks as soon as one has failed: that must be rank 0, which tells what all know.
            time.sleep(GRACE_S)
        if under_torchrun or is_main:  # another rank that is still here is the only one that knows
            print(f"qdora: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        if is_main:
            print("qdora: interrupted at once; nothing new was saved", file=sys.stderr, flush=True)
        return EXIT_KEYBOARD


def conf_folder() -> Path:
    """`conf/` of a checkout, or the copy inside an installed package."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def compose(name: str, arguments: list[str]) -> DictConfig | None:
    """The configuration of a command under the given overrides; None where Hydra did something else (`--cfg`).

    Raises:
        ConfigError: an override names nothing, or has a value of the wrong type.
    """
    config_class = COMMANDS[name].config_class
    ConfigStore.instance().store(name=f"{name}_schema", node=config_class)
    composed: list[DictConfig] = []
    with _environment(sys.argv, [f"qdora {name}", *arguments]):
        try:
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=name)(composed.append)()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error, config_class, conf_folder(), arguments)) from None
    if len(composed) > 1:
        raise ConfigError(f"{len(composed)} configurations were given (--multirun); one process does one run")
    return composed[0] if composed else None


def typed(values: DictConfig, config_class: type) -> Any:
    """The dataclass of a composed configuration; its checks run here.

    Raises:
        ConfigError: an option that does not exist, a value that is not allowed, values that contradict each other.
    """
    check_known(values, config_class)
    try:
        return OmegaConf.to_object(values)
    except OmegaConfBaseException as error:
        cause = error.__cause__
        raise (cause if isinstance(cause, ConfigError) else ConfigError(str(error).splitlines()[0])) from None


@contextmanager
def _environment(argv: list[str], replacement: list[str]) -> Iterator[None]:
    """Hydra reads `sys.argv`; without HYDRA_FULL_ERROR it prints its errors itself and exits with 1."""
    before, full_error = list(argv), os.environ.get("HYDRA_FULL_ERROR")
    argv[:] = replacement
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        argv[:] = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _call(command: Command, values: DictConfig) -> int:
    typed_config = typed(values, command.config_class)
    module, function = command.target.split(":")
    target: Callable[[Any], int] = getattr(importlib.import_module(module), function)
    return target(typed_config)


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has read enough; Python would complain again when it flushes at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage() -> str:
    lines = [f"  {name:10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qdora COMMAND [option=value ...]",
            *lines,
            "",
            "qdora COMMAND --help lists its options; --cfg job prints the configuration instead of running.",
        ]
    )
