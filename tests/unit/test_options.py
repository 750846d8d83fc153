"""Every option can be overridden, is read, and is documented."""

import ast
import itertools
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from qdora.commands import compose, typed
from qdora.commands.explain import option_names
from qdora.config import (
    ChatConfig,
    EvaluateConfig,
    GenerateConfig,
    MergeConfig,
    RunConfig,
    ShowConfig,
)
from tests.support.processes import run

NEEDED = ["model.path=m", "data.train=d"]


@cache
def composed(*overrides: str) -> Any:
    """The typed configuration of a run, not to be changed."""
    values = compose("train", [*NEEDED, *overrides])
    assert values is not None
    return typed(values, RunConfig)


@pytest.mark.parametrize("option", list(option_names(RunConfig)))
def test_every_option_can_be_overridden(option: str) -> None:
    *groups, name = option.split(".")
    kind: Any = RunConfig
    for group in groups:
        kind = get_type_hints(kind)[group]
    hint = get_type_hints(kind)[name]
    before = composed()
    for group in groups:
        before = getattr(before, group)
    now = getattr(before, name)
    if hasattr(hint, "__members__"):
        value = next(word for word in hint.__members__ if word != now.name)
    elif isinstance(now, bool):
        value = str(not now).lower()
    elif isinstance(now, list):
        value = "[other]"
    elif isinstance(now, dict):
        value = "{prompt:other}"
    else:
        value = "3" if "int" in str(hint) else "0.5" if "float" in str(hint) else "other"
    extra = {
        "adapter.method": ["quant=none"],
        "adapter.projection_key": ["adapter=vera"],
        "parallel.shard_size": ["parallel=hsdp"],
        "quant.method": [],
    }.get(option, [])
    made = composed(*extra, f"{option}={value}")
    for group in groups:
        made = getattr(made, group)
    assert getattr(made, name) != now


def options_read(root: Path, copy: Path, gone: Callable[[str], bool]) -> set[tuple[str, str]]:
    """(class, field) of each option that code outside qdora/config reads.

    A copy of the package loses the fields whose annotation is `gone`, and mypy then tells where they are missed.
    """

    def is_gone(item: ast.stmt) -> bool:
        if isinstance(item, ast.FunctionDef):
            return item.name == "__post_init__"  # where an option is set, it is there for mypy
        return isinstance(item, ast.AnnAssign) and gone(ast.unparse(item.annotation))

    shutil.copytree(root / "qdora", copy / "qdora", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (copy / "qdora" / "config" / "groups.py", copy / "qdora" / "config" / "commands.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for kind in (item for item in tree.body if isinstance(item, ast.ClassDef)):
            kind.body = [item for item in kind.body if not is_gone(item)]
        file.write_text(ast.unparse(tree), encoding="utf-8")
    options = ["--follow-imports=skip", "--ignore-missing-imports", f"--cache-dir={copy / 'cache'}", "--config-file="]
    done = run([sys.executable, "-m", "mypy", "-p", "qdora", "--no-error-summary", *options], cwd=copy, PYTHONPATH="")
    pattern = r'^(?!qdora/config/).*: error: (?:Item )?"(\w+)"(?: of "[^"]*")? has no attribute "(\w+)"'
    missed = re.findall(pattern, done.stdout, re.MULTILINE)
    return set(missed)


@pytest.mark.nightly(paths=["qdora/config/*.py"])
def test_every_option_is_read_somewhere(root: Path, tmp_path: Path) -> None:
    """Single options of each class first, then the groups of each command, which the former need."""
    commands, groups = {RunConfig, MergeConfig, EvaluateConfig, ChatConfig, GenerateConfig, ShowConfig}, set()
    for kind in commands:
        groups |= {hint for hint in get_type_hints(kind).values() if is_dataclass(hint)}
    names = {kind.__name__ for kind in groups}
    read = options_read(root, tmp_path / "options", lambda annotation: annotation not in names)
    read |= options_read(root, tmp_path / "groups", lambda annotation: annotation in names)
    own = {(kind.__name__, name) for kind in commands | groups for name in kind.__annotations__}
    assert own - read == set()


def test_every_option_is_documented_or_speaks_for_itself(root: Path) -> None:
    """A docstring under each field, but for the few whose name says it all."""
    undocumented = []
    for file in ("groups.py", "commands.py"):
        lines = (root / "qdora" / "config" / file).read_text(encoding="utf-8").splitlines()
        for line, following in itertools.pairwise(lines):
            if re.match(r"    \w+: .+ = ", line) and "field(" not in line and not following.strip().startswith('"""'):
                undocumented.append(line.split(":")[0].strip())
    assert set(undocumented) <= {"beta1", "beta2", "epsilon", "project", "entity", "seed", "model", "quant", "data"}
