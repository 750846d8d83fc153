"""Waits, and the environment variables that change them."""

import ast
from pathlib import Path

import pytest

from qdora.commands import run
from qdora.errors import ConfigError
from qdora.waits import USUAL_S, check_waits, wait_s


@pytest.fixture(autouse=True)
def _usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the tests' own environment sets."""
    for name in USUAL_S:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", USUAL_S)
def test_environment_sets_a_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wait_s(name) == USUAL_S[name]
    for given in ("0", "0.5", "1e3"):
        monkeypatch.setenv(name, given)
        check_waits()
        assert wait_s(name) == float(given)


@pytest.mark.parametrize("given", ["", "soon", "-1", "nan", "inf"])
def test_what_is_no_number_of_seconds_is_one_message(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QDORA_GRACE_S", given)
    with pytest.raises(ConfigError, match=r"QDORA_GRACE_S is .*; it must be a number of seconds, 0 or more"):
        check_waits()
    assert wait_s("QDORA_GRACE_S") == USUAL_S["QDORA_GRACE_S"], "the message itself waits"
    assert run(["train"]) == 2
    assert capsys.readouterr().err.startswith(f"qdora: the environment variable QDORA_GRACE_S is {given!r};")


def test_every_wait_is_used(root: Path) -> None:
    asked = {
        node.args[0].value
        for file in (root / "qdora").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "wait_s"
        and isinstance(node.args[0], ast.Constant)
    }
    assert asked == USUAL_S.keys()
