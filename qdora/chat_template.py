"""Chat templates: conversations as texts, and which characters of one its assistant said, exactly.

What is learned of a turn is all that a model has to say after the prompt that generation gives it: the words, a thought
or a tool call as the template writes them, and the end of the turn; of a turn that the template marks itself
(`{% generation %}`), what is marked and the end. Each assistant turn is replaced by a sentinel, and the conversation
rendered four times: as it is, with all turns replaced, and with every second one. What stands between two sentinels
that enclose a turn, less what stood there with a sentinel in its place, is the turn, without a search for its words;
and all of it put together again must be the conversation as it is. That takes time linear in the number of turns.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product, takewhile
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from qdora.errors import DataError, first_line

DEFAULT_TEMPLATE = (
    "{{ bos_token or '' }}{% if tools %}{{ '### Tools:\n' + (tools | tojson) + '\n\n' }}{% endif %}"
    "{% for message in messages %}{{ '### ' + message['role'].capitalize() + ':\n' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}"
    "{% endfor %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
_MARKS = re.compile(r"\{%-?\s*generation\b")

Span = tuple[int, int]
"""First character and the one after the last."""


class Unclear(Exception):
    """A template renders other turns differently with a sentinel in one."""


_TOOL = {
    "type": "function",
    "function": {
        "name": "qdoratool",
        "description": "qdora",
        "parameters": {
            "type": "object",
            "properties": {"qdora": {"type": "string", "description": "qdora"}},
            "required": ["qdora"],
        },
    },
}


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template, and what a row gives it beside its turns."""

    text: str
    variables: str = "{}"
    """JSON of an object."""
    with_tools: bool = False
    """Whether the row has any: some templates cannot do without, or write turns in another way."""

    def arguments(self) -> dict[str, Any]:
        """The variables as the template's renderer takes them."""
        values: dict[str, Any] = json.loads(self.variables)
        return values

    def short_tools(self) -> list[dict[str, Any]] | None:
        """The tools of short conversations that show how the template writes turns."""
        return [_TOOL] if self.with_tools else None


def template_of(tokenizer: Any, tools: Any = None, variables: Mapping[str, Any] | None = None) -> Template:
    """The chat template of a tokenizer, which may have several, or `DEFAULT_TEMPLATE`; `variables`: of a row."""
    given = tokenizer.chat_template
    if isinstance(given, dict):
        given = given.get("tool_use" if tools and "tool_use" in given else "default")
    return Template(given or DEFAULT_TEMPLATE, json.dumps(variables or {}), bool(tools))


def render(
    messages: list[dict[str, Any]], tools: Any, tokenizer: Any, template: Template, where: str, prompt: bool = False
) -> str:
    """The text that a chat template makes of the turns; `prompt`: up to the next answer.

    Raises:
        DataError: the template refuses them.
    """
    try:
        return tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=prompt,
            chat_template=template.text,
            **template.arguments(),
        )
    except Exception as error:  # whatever a template's own code raises
        raise DataError(f"{where} does not fit the model's chat template: {first_line(error)}") from None


def assistant_spans(
    messages: list[dict[str, Any]], learned: Sequence[bool], tools: Any, tokenizer: Any, template: Template, where: str
) -> tuple[str, list[Span]]:
    """The rendered conversation, and where in it the turns stand that are `learned`.

    Raises:
        DataError: the template refuses the conversation, does not show what is to be learned, or shows it in a way that
            cannot be told from the rest.
    """
    whole = render(messages, tools, tokenizer, template, where)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant" and _says(message)]
    spans = _found(whole, messages, turns, tools, tokenizer, template, where)
    wanted = [span for span, index in zip(spans, turns, strict=True) if learned[index]]
    if _MARKS.search(template.text):
        wanted = _marked(wanted, _marks(messages, tools, tokenizer, template))
    if wanted and learned[-1] and not whole[wanted[-1][1] :].strip():
        start, end = wanted[-1]
        missing = _missing_end(whole[:end], _edges(tokenizer, template, _shape(messages[-1]), None), tokenizer)
        if missing:
            whole = whole[:end] + missing
            wanted[-1] = start, len(whole)
    return whole, wanted


def _missing_end(text: str, edges: "_Edges", tokenizer: Any) -> str:
    """What ends a turn within a conversation where nothing ends the last one, as in GLM's: the next turn's token."""
    if ends_with_a_token(text, tokenizer) or not edges.endings:
        return ""
    return edges.endings[-1].removeprefix(edges.tail).rstrip()


def _says(message: dict[str, Any]) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


def turn_ends(tokenizer: Any) -> set[int]:
    """The ids of the tokens with which the chat template ends an assistant turn, the last one or another."""
    edges, ends = _edges(tokenizer, template_of(tokenizer), _Shape("{c}", False, ()), None), _ends(tokenizer)
    found = [re.search(f"({'|'.join(map(re.escape, ends))})\\s*$", text) for text in edges.endings] if any(ends) else []
    return {int(tokenizer.convert_tokens_to_ids(token[1])) for token in found if token}


def ends_with_a_token(text: str, tokenizer: Any) -> bool:
    """Whether a text ends with a token that is no text of somebody's."""
    return any(token and text.endswith(token) for token in _ends(tokenizer))


def with_thoughts_shown(messages: list[dict[str, Any]], tokenizer: Any, template: Template) -> list[dict[str, Any]]:
    """The turns, their thoughts within the words, as `<think>`, where the template has no place of its own for them.

    A template that cuts thoughts out of words gets none.
    """
    shown = []
    for message in messages:
        thought = message.get("reasoning_content")
        shows = _edges(tokenizer, template, _shape(message), None).shows if thought else None
        if shows is not None and "r" not in shows:
            message = {key: value for key, value in message.items() if key not in ("reasoning_content", "thinking")}
            if not _cuts_thoughts(tokenizer, template):
                message |= {"content": f"<think>\n{thought}\n</think>\n\n{message['content']}"}
        shown.append(message)
    return shown


@lru_cache(maxsize=16)
def _cuts_thoughts(tokenizer: Any, template: Template) -> bool:
    words = "<think>\nqdorathought\n</think>\n\nqdoraword"
    turns = [{"role": "user", "content": "qdorauser"}, {"role": "assistant", "content": words}]
    try:
        text = render(turns, template.short_tools(), tokenizer, template, "a short conversation")
        return "qdorathought" not in text
    except DataError:
        return False


def shows_calls(message: dict[str, Any], tokenizer: Any, template: Template) -> bool:
    """Whether the template shows what a turn calls."""
    shows = _edges(tokenizer, template, _shape(message), None).shows
    return shows is None or "n" in shows


def _marks(messages: list[dict[str, Any]], tools: Any, tokenizer: Any, template: Template) -> list[Span]:
    """What the template itself marks as said."""
    _, (marks,) = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=template.text,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **template.arguments()},
    )
    return [(start, end) for start, end in marks]


def _marked(turns: list[Span], marks: list[Span]) -> list[Span]:
    """Cuts each turn to what is marked of it, and its end; a turn without a mark stays whole."""
    spans: list[Span] = []
    for start, end in turns:
        own = [(max(start, first), min(end, last)) for first, last in marks if first < end and start < last]
        spans += [*own[:-1], (own[-1][0], end)] if own else [(start, end)]
    return spans


@lru_cache(maxsize=16)
def _ends(tokenizer: Any) -> tuple[str, ...]:
    """Tokens that are no text of somebody's, the longest first."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(added | set(map(str, tokenizer.all_special_tokens)), key=len, reverse=True))


def _leading(text: str, tokens: Iterable[str]) -> str:
    """The first of the tokens at the beginning of the text, with blanks before it; or nothing."""
    blanks = len(text) - len(text.lstrip())
    token = next((token for token in tokens if token and text.startswith(token, blanks)), "")
    return text[:blanks] + token if token else ""


def _with_token(tail: str, text: str, tokens: Sequence[str]) -> str:
    """The end of a turn, with the token that follows it in a text where it has none itself."""
    return (
        tail
        if any(token and tail.rstrip().endswith(token) for token in tokens)
        else tail + _leading(text[len(tail) :], tokens)
    )


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a turn is made of."""

    words: str
    """`{c}` for the words, after `{r}</think>` where there is a thought within them; or nothing."""
    thought: bool
    calls: tuple[tuple[str, str], ...]
    """The id and the function of each call: templates write both beside the result, too."""
    as_text: bool = False
    """Whether the arguments of calls are JSON, not objects."""

    def blank(self, word: str) -> dict[str, Any]:
        """What of an assistant turn of this shape says something, with a word in its place."""
        turn: dict[str, Any] = {"role": "assistant", "content": self.words.format(c=f"{word}c", r=f"{word}r")}
        if self.thought:
            turn["reasoning_content"] = turn["thinking"] = f"{word}r"
        if self.calls:
            arguments = _arguments({f"{word}n": "0"}, self.as_text)
            turn["tool_calls"] = [
                {"type": "function", "function": {"name": name, "arguments": arguments}} | ({"id": own} if own else {})
                for own, name in self.calls
            ]
        return turn

    def following(self, result: str = "0") -> list[dict[str, Any]]:
        """Turns that may follow one of this shape: the results of its calls, or a question; and an answer."""
        results = [{"role": "tool", "tool_call_id": own, "name": name, "content": result} for own, name in self.calls]
        question = {"role": "user", "content": "qdorauser2"}
        return [*(results or [question]), {"role": "assistant", "content": "qdoralater"}]


def _shape(message: dict[str, Any]) -> _Shape:
    given = message.get("tool_calls") or []
    calls = tuple((str(call.get("id", "")), str(call["function"]["name"])) for call in given)
    as_text = any(isinstance(call["function"]["arguments"], str) for call in given)
    thought = bool(message.get("reasoning_content"))
    inner, closes, words = message["content"].rpartition("</think>")
    shown = "{c}" if words or not (calls or thought or closes) else ""
    if closes:
        shown = ("<think>\n" if "<think>" in inner else "") + "{r}\n</think>\n\n" + shown
    return _Shape(shown, thought, calls, as_text)


def _arguments(values: Any, as_text: bool) -> Any:
    return json.dumps(values, ensure_ascii=False) if as_text and not isinstance(values, str) else values


def with_calls_shown(messages: list[dict[str, Any]], tokenizer: Any, template: Template) -> list[dict[str, Any]]:
    """The turns, the arguments of their calls as JSON where the template takes no objects, as DeepSeek's."""
    if not any(message.get("tool_calls") for message in messages) or not _takes_text(tokenizer, template):
        return messages
    made = []
    for message in messages:
        functions = [call["function"] for call in message.get("tool_calls") or []]
        texts = [function | {"arguments": _arguments(function["arguments"], True)} for function in functions]
        calls = [call | {"function": text} for call, text in zip(message.get("tool_calls") or [], texts, strict=True)]
        made.append(message | {"tool_calls": calls} if calls else message)
    return made


@lru_cache(maxsize=64)
def _takes_text(tokenizer: Any, template: Template) -> bool:
    """Whether arguments are refused as an object, or shown as Python writes it, and shown as JSON."""
    shown = []
    for as_text in (False, True):
        shape = _Shape("", False, (("call00001", "qdoratool"),), as_text)
        turns = [{"role": "user", "content": "qdorauser"}, shape.blank("qdorasaid"), *shape.following()]
        try:
            text = render(turns, template.short_tools(), tokenizer, template, "a short conversation")
        except DataError:
            text = ""
        shown.append("qdorasaidn" in text.lower() and "{'" not in text)
    return shown == [False, True]


@dataclass(frozen=True, slots=True)
class _Edges:
    """How a template encloses turns of a shape."""

    starts: tuple[tuple[str, int], ...] = ()
    """Text that ends where the first sentinel begins, and how much of it the model says: an empty thought, say."""
    tail: str = ""
    """What follows the last sentinel up to the end of the turn, where that is the same everywhere."""
    endings: tuple[str, ...] = ()
    """The same at the end of a conversation, and within."""
    shows: frozenset[str] | None = None
    """Letters of the sentinels that are there at all: c for the words, r for a thought, n for a call; None: unknown."""


_SAID = re.compile(r"qdorasaid([crn])", re.IGNORECASE)


@lru_cache(maxsize=256)
def _edges(tokenizer: Any, template: Template, shape: _Shape, called: tuple[str, str] | None) -> _Edges:
    """By short conversations, with a system turn where the template wants one.

    Args:
        called: id and function of the call whose result the turn follows, where some templates begin no new turn.
    """
    asked: list[list[dict[str, Any]]] = [[{"role": "user", "content": "qdorauser1"}]]
    if called is not None:
        caller = _Shape("", False, (called,), _takes_text(tokenizer, template))
        asked.insert(0, [*asked[0], caller.blank("qdoracall"), *caller.following("qdorauser1")[:-1]])
    for before, opening in product(asked, ([], [{"role": "system", "content": "qdorasystem"}])):
        with suppress(DataError):
            return _edges_after([*opening, *before], tokenizer, template, shape)
    return _Edges()


def _edges_after(question: list[dict[str, Any]], tokenizer: Any, template: Template, shape: _Shape) -> _Edges:
    """Those of a turn after some others, the last of which says `qdorauser1`."""

    def text(*turns: dict[str, Any], prompt: bool = False) -> str:
        return render([*question, *turns], template.short_tools(), tokenizer, template, "a short conversation", prompt)

    said = shape.blank("qdorasaid")
    asked, prompt = text(), text(prompt=True)
    last = text(said)
    try:
        inner = text(said, *shape.following())
    except DataError:
        inner = last
    earlier = inner
    if shape.calls:  # templates that leave thoughts out of what stands before the last question
        with suppress(DataError):
            earlier = text(said, *shape.following(), *_Shape("", False, ()).following())
    header = prompt[len(asked) :] if prompt.startswith(asked) else ""
    places = [*_SAID.finditer(last)]
    if not places:
        return _Edges(shows=frozenset())
    asked, prompt = (text.rpartition("qdorauser1")[2] for text in (asked, prompt))
    starts = set()
    for rendered in (last, inner, earlier):
        place = _SAID.search(rendered)
        before = rendered[: place.start()].rpartition("qdorauser1")[2] if place else ""
        shared = _shared(before, prompt, _ends(tokenizer))
        begun = len(asked) if header and before.startswith(asked) else 0
        if shared > begun:
            starts.add((before[begun:], len(before) - shared))
    *_, inner_place = [None, *_SAID.finditer(inner)]
    ending, following = last[places[-1].end() :], inner[inner_place.end() :] if inner_place else ""
    tail = ""
    for piece in _pieces(ending, _ends(tokenizer)):
        if inner is not last and not following.startswith(tail + piece):
            break
        tail += piece
    ordered = tuple(sorted(starts, key=lambda start: -len(start[0])))
    endings = tuple(_with_token(tail, text, _ends(tokenizer)) for text in (ending, following))
    return _Edges(ordered, tail.rstrip(), endings, frozenset(found[1].lower() for found in places))


def _shared(text: str, other: str, tokens: Sequence[str]) -> int:
    """How much two texts have in common at their beginning, without half of a token or a word of the first."""
    position = 0
    for piece in _pieces(text, tokens):
        if not other.startswith(piece, position):
            pairs = zip(piece, other[position:], strict=False)
            size = 0 if piece in tokens else sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            is_all = position + size == len(other)
            return position + (size if is_all else len(re.sub(r"\S+\Z", "", piece[:size])))
        position += len(piece)
    return position


def _pieces(text: str, tokens: Sequence[str]) -> list[str]:
    """The text cut before and after each of the tokens."""
    pattern = "|".join(map(re.escape, filter(None, tokens)))
    return [piece for piece in re.split(f"({pattern})", text) if piece] if pattern else [text]


def _called(message: dict[str, Any]) -> tuple[str, str] | None:
    """The id and the function of the call whose result a turn is."""
    if message["role"] != "tool":
        return None
    return str(message.get("tool_call_id", "")), str(message.get("name", "qdoratool"))


def _found(
    whole: str,
    messages: list[dict[str, Any]],
    turns: list[int],
    tools: Any,
    tokenizer: Any,
    template: Template,
    where: str,
) -> list[Span]:
    """Finds each assistant turn by sentinels."""
    if not turns:
        return []
    word = "qdoraturn"
    while word in whole.lower():
        word += "x"
    shapes = [_shape(messages[index]) for index in turns]
    blanks = [
        messages[index] | shape.blank(f"{word}{number}z")
        for number, (index, shape) in enumerate(zip(turns, shapes, strict=True))
    ]
    called = [_called(messages[index - 1]) if index else None for index in turns]
    edges = [_edges(tokenizer, template, *one) for one in zip(shapes, called, strict=True)]
    sentinel = re.compile(rf"{word}(\d+)z[crn]", re.IGNORECASE)

    def rendered(is_blank: Callable[[int], bool]) -> "_Rendered":
        some = list(messages)
        for number, index in enumerate(turns):
            if is_blank(number):
                some[index] = blanks[number]
        return _Rendered(whole if some == messages else render(some, tools, tokenizer, template, where), sentinel)

    ends = _ends(tokenizer)
    try:
        every = rendered(lambda _: True)
        frames = [every.frame(number, edge, ends) for number, edge in enumerate(edges)]
        said = _between(whole, frames, every, rendered)
    except Unclear:
        said = _one_by_one(whole, turns, edges, ends, rendered, where)
    return [(start, start + len(whole[start:end].rstrip())) for start, end in said]


class _Rendered:
    """A conversation of which some assistant turns are sentinels."""

    def __init__(self, text: str, sentinel: re.Pattern[str]) -> None:
        self.text = text
        self.places: dict[int, Span] = {}
        for found in sentinel.finditer(text):
            number = int(found[1])
            self.places[number] = (self.places.get(number, found.span())[0], found.end())
        if any(first[1] > second[0] for first, second in pairwise(self.places.values())):
            raise Unclear

    def frame(self, number: int, edges: _Edges, ends: tuple[str, ...]) -> Span:
        """Where the turn that the sentinels stand for begins and ends."""
        if number not in self.places:
            raise Unclear
        first, last = self.places[number]
        said = next((size for lead, size in edges.starts if self.text.endswith(lead, 0, first)), None)
        if said is None:  # some templates number calls: what stands before a turn's words is another text in each turn
            after = max((end for other, (_, end) in self.places.items() if other < number), default=0)
            heads = (lead[: len(lead) - size] for lead, size in edges.starts)
            begun = max((self.text.rfind(head, after, first) + len(head) for head in heads if head.strip()), default=-1)
            said = first - begun if begun > after else 0
        following = self.text[last : last + len(edges.tail) + 1000]
        tail = _with_token(edges.tail if following.startswith(edges.tail) else "", following, ends)
        return first - said, last + len(tail)


def _between(
    whole: str, frames: list[Span], every: _Rendered, rendered: Callable[[Callable[[int], bool]], _Rendered]
) -> list[Span]:
    """Each turn by what is rendered with it as it is, and its neighbours replaced.

    Raises:
        Unclear: the texts do not fit into each other.
    """
    edges = [0, *(place for frame in frames for place in frame), len(every.text)]
    outside = [every.text[edges[2 * index] : edges[2 * index + 1]] for index in range(len(frames) + 1)]
    said: list[str] = [""] * len(frames)
    for parity in (0, 1) if len(frames) > 1 else (0,):
        own = rendered(lambda number, parity=parity: number % 2 != parity)  # type: ignore[misc]
        position = 0
        for number, (start, end) in enumerate(frames):
            position = _after(own.text, position, outside[number])
            if number % 2 != parity:
                position = _after(own.text, position, every.text[start:end])
                continue
            if number + 1 < len(frames):
                shift = every.places[number + 1][0] - frames[number + 1][0]
                if number + 1 not in own.places:
                    raise Unclear
                until = own.places[number + 1][0] - shift
            else:
                until = len(own.text)
            until -= len(outside[number + 1])
            if until < position or not own.text.startswith(outside[number + 1], until):
                raise Unclear
            said[number] = own.text[position:until]
            position = until
        _after(own.text, position, outside[-1])
    spans = []
    position = 0
    for before, text in zip(outside, said, strict=False):
        position = _after(whole, position, before)
        spans.append((position, position + len(text)))
        position = _after(whole, position, text)
    if whole[position:] != outside[-1]:
        raise Unclear
    return spans


def _after(text: str, position: int, expected: str) -> int:
    if not text.startswith(expected, position):
        raise Unclear
    return position + len(expected)


def _one_by_one(
    whole: str,
    turns: list[int],
    edges: list[_Edges],
    ends: tuple[str, ...],
    rendered: Callable[[Callable[[int], bool]], _Rendered],
    where: str,
) -> list[Span]:
    """Each turn by a rendering of its own: for templates where one turn changes how another is shown."""
    spans: list[Span] = []
    for number, index in enumerate(turns):
        unclear = DataError(
            f"{where}: which tokens the assistant says in turn {index + 1} cannot be told: the model's chat template "
            "does not show the turn, or shows others differently with other words in it"
        )
        try:
            own = rendered(lambda n, one=number: n == one)  # type: ignore[misc]
            start, end = own.frame(number, edges[number], ends)
        except Unclear:
            raise unclear from None
        after = own.text[end:]
        until = len(whole) - len(after)
        if not whole.startswith(own.text[:start]) or not whole.endswith(after) or until < start:
            raise unclear
        if spans and start < spans[-1][1]:
            raise unclear
        spans.append((start, until))
    return spans
