"""`qdora COMMAND --help`: every option with its value, what it does and the words it takes."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf

WIDTH = 100
RECIPES = {"train": "experiment", "study": "study"}
"""Folder of a command's recipes, each of which sets options of several groups."""


def describe(name: str, config_class: type, values: DictConfig, conf: Path) -> str:
    """The help of a command; `values` are what it would run with, recipes and overrides applied."""
    header = OmegaConf.load(conf / f"{name}.yaml").hydra.help.header
    groups = {path.name: sorted(path.glob("*.yaml")) for path in sorted(conf.iterdir()) if path.is_dir()}
    recipes = groups[RECIPES[name]] if name in RECIPES else []
    lines = [f"usage: qdora {name} [option=value ...] [group=choice ...]", "", header.rstrip(), ""]
    lines += ["Options, each with the value it has now:", "", *_options(config_class, values)]
    plain = {name for name, hint in get_type_hints(config_class).items() if not is_dataclass(hint)}
    chosen = sorted(groups.keys() & values.keys() - plain)
    if chosen:
        lines += ["Option groups; a choice sets options of its group at once, as in model=qwen3_0_6b:", ""]
    for group in chosen:
        lines += _paragraph(f"{group}: {', '.join(file.stem for file in groups[group])}")
    if recipes:
        added = f"+{RECIPES[name]}"
        lines += ["", f"Recipes; {added}=NAME sets options of several groups, and what follows overrides it:", ""]
        for file in recipes:
            lines += [f"  {added}={file.stem}", *_paragraph(_about(file), "      ")]
    lines += ["", "--cfg job prints the configuration as YAML instead of running."]
    return "\n".join(lines)


def _about(recipe: Path) -> str:
    """What a recipe says of itself before it names its sources."""
    head = recipe.read_text(encoding="utf-8").partition("\n# Source")[0].splitlines()
    return " ".join(line[2:] for line in head if line.startswith("# ") and "@package" not in line)


def field_docs(config_class: type) -> dict[str, str]:
    """The docstring under each field that has one, those of a base class included."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    docs: dict[str, str] = {}
    for parent in config_class.__bases__:
        docs |= field_docs(parent) if is_dataclass(parent) else {}
    field = ""
    for statement in definition.body:  # type: ignore[attr-defined]
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            field = statement.target.id
        elif field and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            docs[field] = inspect.cleandoc(str(statement.value.value))
        else:
            field = ""
    return docs


def _options(config_class: type, values: DictConfig, prefix: str = "") -> Iterator[str]:
    """The options of a command itself, then those of each group."""
    hints, docs = get_type_hints(config_class), field_docs(config_class)
    groups = [item.name for item in fields(config_class) if is_dataclass(hints[item.name])]
    names = [item.name for item in fields(config_class) if item.name not in groups]
    for name in sorted(names, key=lambda name: name not in config_class.__annotations__):  # a base class's come last
        yield f"  {prefix}{name}={_word(values[name])}"
        yield from _paragraph(docs.get(name, ""), "      ")
        yield from _paragraph(_allowed(hints[name]), "      ")
    yield ""
    for group in groups:
        yield from _options(hints[group], values[group], f"{group}.")


def _allowed(hint: Any) -> str:
    hint = next((part for part in get_args(hint) if part is not type(None)), hint)  # of `Word | None`
    return f"One of: {', '.join(hint.__members__)}" if isinstance(hint, type) and issubclass(hint, Enum) else ""


def _word(value: Any) -> str:
    """A value as one types it."""
    if OmegaConf.is_list(value):
        return f"[{','.join(map(str, value))}]"
    if OmegaConf.is_dict(value):
        return f"{{{','.join(map(str, value))}}}"
    if isinstance(value, Enum):
        return value.name
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _paragraph(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  " * (indent == "  "))
