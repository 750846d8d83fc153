"""Variables of chat templates (`enable_thinking`, ...): which ones a template reads, and values for them.

A value for a whole run becomes a default within the template, as families write their own: `{%- if x is not defined
%}{%- set x = ... %}{%- endif %}`. What is trained, generated with and exported is then one text, and who asks with
another value (`apply_chat_template(..., enable_thinking=True)`, vLLM's `chat_template_kwargs`) is given that.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qdora.errors import ConfigError, nearest

NAME = "chat_template_kwargs"
_TAKEN = frozenset(
    (
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
        *("additional_special_tokens", "conversation", "tokenize", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)
"""What `apply_chat_template` gives a template itself, and its own arguments."""
_OF_TRANSFORMERS = ("raise_exception", "strftime_now")
_MARK = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_DEFAULT = re.compile(r"\{%- if (\w+) is not defined %\}(\{%- set \1 = .* %\})\{%- endif %\}\n")


def refusal(values: Any) -> str | None:
    """Says why something cannot be the variables of a template; None where it can. A null sets nothing."""
    if not isinstance(values, Mapping):
        return f"must be variables of the chat template by name, such as {{enable_thinking: false}}, not {values!r:.60}"
    for name, value in values.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            return f"{name!r:.60} is no name of a variable"
        if name in _TAKEN:
            return f"{name} is no variable: the rows and the tokenizer say it"
        if isinstance(value, str) and value.strip().lower() in ("true", "false", "null", "none"):
            return f"{name} is the text {value!r}, which templates take for true: write it without quotes"
        if not _is_plain(value):
            return f"{name} must be true, false, a number, a text, or a list or mapping of those, not {value!r:.60}"
    return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return abs(value) < float("inf")
    return value is None or isinstance(value, str | int)


@lru_cache(maxsize=64)
def variables_of(template: str) -> tuple[str, ...]:
    """Returns the names that a template reads and that nobody but its user sets; none of one that is no Jinja.

    What a template sets in one branch and reads behind it may be undefined there as well: of names that it sets, those
    are its user's which it asks for by `is defined` or `default`.
    """
    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
    try:
        tree = environment.parse(_MARK.sub("", template))
    except TemplateSyntaxError:
        return ()
    asking: Iterable[Any] = tree.find_all((nodes.Test, nodes.Filter))
    asked = {getattr(one.node, "name", "") for one in asking if one.name in ("defined", "undefined", "default", "d")}
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"} - asked
    return tuple(sorted(find_undeclared_variables(tree) - own - _TAKEN - {*_OF_TRANSFORMERS}))


def unknown(name: str, template: str) -> str:
    """Says that a template has no such variable, and which it has."""
    names = variables_of(template)
    known = f"it has {', '.join(names)}" if names else "it has none"
    return f"the model's chat template has no variable {name}{nearest(name, names)}; {known}"


def with_defaults(template: Any, values: Mapping[str, Any]) -> Any:
    """Returns a tokenizer's chat template, or several by name, with other defaults of its variables.

    Args:
        values: by name; a null takes back a default that was set here before.

    Raises:
        ConfigError: there is no template, or none of them reads a variable.
    """
    given = template if isinstance(template, dict) else {"default": template or ""}
    for name in values:
        if not any(name in variables_of(text) for text in given.values()):
            raise ConfigError(f"model.{NAME}: {unknown(name, given.get('default', ''))}")
    made = {key: _with_defaults(text, values) for key, text in given.items()}
    return made if isinstance(template, dict) else made["default"]


def _with_defaults(template: str, values: Mapping[str, Any]) -> str:
    kept = []
    while found := _DEFAULT.match(template):
        kept += [found[0]] if found[1] not in values else []
        template = template[found.end() :]
    # transformers takes away the end of a line after a block, so that the template itself begins as it did.
    new = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}\n"
        for name, value in values.items()
        if value is not None
    ]
    return "".join([*kept, *new]) + template


def _literal(value: Any) -> str:
    """A value as Jinja writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
        return f"'{escaped}'"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(one)}' for key, one in value.items())}}}"
    return f"[{', '.join(map(_literal, value))}]" if isinstance(value, list) else repr(value)


def fixed(template: str) -> str:
    """Returns a template whose defaults of `with_defaults` hold whatever it is given.

    For llama.cpp, which gives every template `enable_thinking`, true unless a request says otherwise.
    """
    lines = []
    while found := _DEFAULT.match(template):
        lines.append(f"{found[2]}\n")
        template = template[found.end() :]
    return "".join(lines) + template
