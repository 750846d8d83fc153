"""Options as users write them, in the grammar of Hydra: `data.train=train(1).jsonl` is a file of that name.

Hydra refuses or changes values with brackets, commas, equals signs or letters beyond ASCII, and reads `1e5` as a
number. Here the value of each option that is a text, a list of texts, or texts by names (`data.columns`), gets the
quotes that Hydra wants. Values by names (`model.chat_template_kwargs`) stay what Hydra reads: numbers, true, false.
"""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from qdora.commands.explain import option_kinds
from qdora.config.commands import quoted, written
from qdora.errors import ConfigError

TEXTS = ("prompt", "system", "find")
"""Options that are taken as they are written, quotes and all: they hold what people say."""
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_OF_GRAMMAR = re.compile(rf"""(?s:(?i:null)|\?\?\?|.*\$\{{.*|.*\\[\\()\[\]{{}}:=,\s].*|\s*(?:{_QUOTED})\s*|)\Z""")
"""A value in which Hydra's grammar is meant: nothing, quotes around it, an escape, an interpolation."""
_PART = re.compile(rf"(?s)\s*({_QUOTED}|[^,]*?)\s*(?:,|\Z)")
_PAIR = re.compile(rf"(?s)\s*(\w+)\s*:\s*({_QUOTED}|[^,]*?)\s*(?:,|\Z)")
_CALL = re.compile(r"(?:choice|range|interval|glob|shuffle|sort|tag)\(")
"""Functions of sweeps that make several values."""
_INTERPOLATION = re.compile(r"(\\*)\$\{")


def in_grammar(arguments: list[str], config_class: type, sweep: bool = False) -> list[str]:
    """Returns the arguments, texts and lists of texts in quotes, unless Hydra's grammar is meant (`${...}`, say).

    Texts by names may come as a shell expands their braces, an argument for each; they are put together.

    Args:
        sweep: commas stand between values; only values that Hydra would refuse or change get quotes, as the runs of a
            sweep are named after what is written.

    Raises:
        ConfigError: texts by names are written otherwise, or a name comes twice.
    """
    kinds = dict(option_kinds(config_class))
    values_by_name = {option for option, kind in kinds.items() if kind == dict[str, Any]}
    kinds = {option: kind for option, kind in kinds.items() if kind in (str, list, dict)}
    lines = []
    named: dict[str, dict[str, str]] = {}
    whole: set[str] = set()
    for argument in arguments:
        option, equals, value = argument.partition("=")
        plain = option.lstrip("+")
        group, _, name = plain.rpartition(".")
        if equals and (plain in values_by_name or group in values_by_name):
            lines.append(_values_by_name(plain, value, plain in values_by_name, sweep))
            continue
        if equals and kinds.get(group) is dict:
            plain, value = group, f"{name}:{value}"
        elif equals and kinds.get(plain) is dict:
            whole.add(plain)
        if equals and kinds.get(plain) is dict:
            if sweep and re.search(r"\}\s*,\s*\{", value):  # several of them
                lines.append(f"++{plain}={value}")
            else:
                named[plain] = _by_names(plain, value, named.get(plain, {}))
            continue
        kind = kinds.get(plain if plain in TEXTS else option)
        if not equals or kind is None:
            lines.append(argument)
            continue
        if plain in TEXTS:
            # OmegaConf would look `${name}` up, and takes `???` for a value that is missing.
            value = quoted(_INTERPOLATION.sub(r"\1\1\\${", value) if value != "???" else "??? ")
        elif sweep:
            value = value if _CALL.match(value) else ",".join(_where_needed(one, kind) for one in _values(value, kind))
        else:
            value = _list(value) if kind is list else _text(value)
        lines.append(f"{option}={value}")
    mappings = [text for option, texts in named.items() for text in _mapping(option, texts, option in whole)]
    return [*mappings, *lines]


def without_folders(arguments: list[str], config_class: type, conf: Path) -> tuple[list[str], dict[str, str | None]]:
    """Takes out options that hold a folder and have a group's name (`adapter=DIR`): Hydra would look for a choice."""
    groups = {folder.name for folder in conf.iterdir() if folder.is_dir()}
    hints = get_type_hints(config_class)
    plain = {option for option, hint in hints.items() if option in groups and not is_dataclass(hint)}
    kept: list[str] = []
    folders: dict[str, str | None] = {}
    for argument in arguments:
        option, equals, value = argument.lstrip("+").partition("=")
        if equals and option in plain:
            if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
                value = value[1:-1]
            folders[option] = None if value == "null" else value
        else:
            kept.append(argument)
    return kept, folders


def _mapping(option: str, texts: dict[str, str], whole: bool) -> list[str]:
    """What sets texts by names, also those that are not there yet, which Hydra refuses without the signs."""
    if not whole:
        return [f"++{option}.{name}={quoted(text)}" for name, text in texts.items()]
    return [f"++{option}={{{','.join(f'{name}:{quoted(text)}' for name, text in texts.items())}}}"]


def replace_mappings(values: DictConfig, arguments: Iterable[str], config_class: type) -> None:
    """Puts texts by names that are given whole (`data.columns={...}`) in the place of a recipe's, which Hydra merges.

    Args:
        arguments: as `in_grammar` returned them.
    """
    mappings = [option for option, kind in option_kinds(config_class) if kind is dict]
    parser = OverridesParser.create()
    for argument in arguments:
        option = argument.lstrip("+").partition("=")[0]
        if option in mappings:
            OmegaConf.update(values, option, parser.parse_override(argument).value(), merge=False, force_add=True)


def _values_by_name(option: str, value: str, is_whole: bool, sweep: bool) -> str:
    """What sets values by names: all of them in braces, JSON too, or one (`option=name:value`, as shells expand them).

    Raises:
        ConfigError: they are written otherwise.
    """
    refusal = ConfigError(f"{option}={value}: names and values stand in braces: '{option}={{enable_thinking: false}}'")
    if is_whole and value.startswith(("{", "${")):
        with suppress(ValueError):
            value = written(json.loads(value))
        if _parsed(value) is None:
            raise refusal
        return f"++{option}={value}"
    if is_whole:
        name, colon, value = value.partition(":")
        if not (colon and re.fullmatch(r"\s*\w+\s*", name)):
            raise refusal
        option = f"{option}.{name.strip()}"
    found = _parsed(value)
    return f"++{option}={quoted(value) if found is None or (found.is_sweep_override() and not sweep) else value}"


def _parsed(value: str) -> Override | None:
    """What Hydra's grammar reads; None of what it refuses."""
    try:
        return OverridesParser.create().parse_override(f"x={value}")
    except HydraException:
        return None


def _by_names(option: str, value: str, before: dict[str, str]) -> dict[str, str]:
    """The texts of `{name:text,...}`; a pair without braces is added to those before."""
    value = "{}" if value == "null" else value
    whole = value.startswith("{") and value.endswith("}")
    found = {} if whole else dict(before)
    rest = value[1:-1].strip() if whole else value
    while rest or not whole:
        pair = _PAIR.match(rest)
        if pair is None or not (whole or pair.end() == len(rest)):
            example = f"'{option}={{prompt: question, completion: answer}}'"
            raise ConfigError(f"{option}={value}: write names and texts in braces, and quotes around it all: {example}")
        name, text = pair.groups()
        if name in found:
            raise ConfigError(f"{option}: {name} is named twice, for {found[name]!r} and {text!r}")
        found[name] = _unquoted(text) if text[:1] in ("'", '"') else text
        rest, whole = rest[pair.end() :], True
    return found


def _unquoted(text: str) -> str:
    """Returns what Hydra's grammar reads between quotes: a backslash is one, unless a quote follows, or the end."""
    return re.sub(rf"(\\+)(?={text[0]}|\Z)", lambda match: match[1][: len(match[1]) // 2], text[1:-1])


def _text(value: str) -> str:
    return value if _OF_GRAMMAR.match(value) else quoted(value)


def _list(value: str) -> str:
    if not (value.startswith("[") and value.endswith("]")) or re.search(r"\$\{", value):
        return value
    return f"[{','.join(_text(part) if part != 'null' else quoted(part) for part in _parts(value[1:-1]) if part)}]"


def _parts(value: str) -> Iterable[str]:
    """What stands between commas that are not in quotes; quotes are those around all of a part."""
    position = 0
    while position < len(value):
        found = _PART.match(value, position)
        assert found is not None  # the second alternative takes anything up to a comma
        position = found.end()
        yield found[1]


def _values(value: str, kind: object) -> Iterable[str]:
    return re.split(r"(?<=\])\s*,\s*(?=\[)", value) if kind is list else _parts(value)


def _where_needed(value: str, kind: object) -> str:
    in_quotes = _list(value) if kind is list else _text(value)
    try:
        given, wanted = (OverridesParser.create().parse_override(f"x={text}").value() for text in (value, in_quotes))
    except HydraException:
        return in_quotes
    return value if given == wanted and type(given) is type(wanted) else in_quotes
