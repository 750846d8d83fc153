"""Chat templates: conversations as texts, and which characters of one its assistant said, exactly.

What is learned of a turn is all that a model has to say after the prompt that generation gives it: the words, a thought
or a tool call as the template writes them, and the end of the turn. Where the template marks that itself
(`{% generation %}`), its marks are taken. Else each assistant turn is replaced by a sentinel, and the same conversation
rendered four times: as it is, with all turns replaced, and with every second one. What stands between two sentinels
that enclose a turn, less what stood there with a sentinel in its place, is the turn, without a search for its words;
and all of it put together again must be the conversation as it is. That takes time linear in the number of turns.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, takewhile
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from qdora.errors import DataError

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


def render(messages: list[dict[str, Any]], tools: Any, tokenizer: Any, where: str, prompt: bool = False) -> str:
    """The text that the chat template, or `DEFAULT_TEMPLATE`, makes of the turns; `prompt`: up to the next answer.

    Raises:
        DataError: the template refuses them.
    """
    try:
        return tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=prompt,
            chat_template=None if tokenizer.chat_template else DEFAULT_TEMPLATE,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{where} does not fit the model's chat template: {error}") from None


def assistant_spans(
    messages: list[dict[str, Any]], learned: Sequence[bool], tools: Any, tokenizer: Any, where: str
) -> tuple[str, list[Span]]:
    """The rendered conversation, and where in it the turns stand that are `learned`.

    Raises:
        DataError: the template refuses the conversation, does not show what is to be learned, or shows it in a way that
            cannot be told from the rest.
    """
    whole = render(messages, tools, tokenizer, where)
    template = tokenizer.chat_template
    marked = _marked(messages, tools, tokenizer) if isinstance(template, str) and _MARKS.search(template) else []
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if marked and all(learned[index] for index in turns):
        return whole, marked
    spans = _found(whole, messages, turns, tools, tokenizer, where)
    wanted = [span for span, index in zip(spans, turns, strict=True) if learned[index]]
    if marked:
        wanted = [mark for mark in marked if any(start < mark[1] and mark[0] < end for start, end in wanted)]
    return whole, wanted


def with_thoughts_shown(messages: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """The turns, their thoughts within the words, as `<think>`, where the template has no place of its own for them."""
    shown = []
    for message in messages:
        thought = message.get("reasoning_content")
        shows = _edges(tokenizer, tokenizer.chat_template, _shape(message)).shows if thought else None
        if shows is not None and "r" not in shows:
            own = {key: value for key, value in message.items() if key not in ("reasoning_content", "thinking")}
            message = own | {"content": f"<think>\n{thought}\n</think>\n\n{message['content']}"}
        shown.append(message)
    return shown


def shows_calls(message: dict[str, Any], tokenizer: Any) -> bool:
    """Whether the template shows what a turn calls."""
    shows = _edges(tokenizer, tokenizer.chat_template, _shape(message)).shows
    return shows is None or "n" in shows


def turn_ends(tokenizer: Any) -> set[int]:
    """The ids of the tokens with which the chat template ends an assistant turn, the last one or another."""
    plain = _Shape(True, False, ())
    edges, ends = _edges(tokenizer, tokenizer.chat_template, plain), _ends(tokenizer)
    found = [re.search(f"({'|'.join(map(re.escape, ends))})\\s*$", text) for text in edges.endings] if any(ends) else []
    return {int(tokenizer.convert_tokens_to_ids(token[1])) for token in found if token}


def _marked(messages: list[dict[str, Any]], tools: Any, tokenizer: Any) -> list[Span]:
    """By the template's own marks, each with the end of its turn and without the prompt for it."""
    (text,), (marks,) = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    ends = _ends(tokenizer)
    header = _edges(tokenizer, tokenizer.chat_template, _Shape(True, False, ())).header
    spans = []
    for start, end in marks:
        start += len(header) if text.startswith(header, start) else 0
        said = text[start:end].rstrip()
        if said and not any(said.endswith(token) for token in ends):
            end += len(_leading(text[end:], ends))
        spans.append((start, start + len(text[start:end].rstrip())))
    return [(start, end) for start, end in spans if end > start]


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


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a turn is made of."""

    content: bool
    thought: bool
    calls: tuple[str, ...]
    """The ids of its calls, which their results name; templates write them."""

    def blank(self, word: str) -> dict[str, Any]:
        """What of an assistant turn of this shape says something, with a word in its place."""
        turn: dict[str, Any] = {"role": "assistant", "content": f"{word}c" if self.content else ""}
        if self.thought:
            turn["reasoning_content"] = turn["thinking"] = f"{word}r"
        if self.calls:
            call = {"type": "function", "function": {"name": f"{word}n", "arguments": {}}}
            turn["tool_calls"] = [call | ({"id": own} if own else {}) for own in self.calls]
        return turn

    def following(self) -> list[dict[str, Any]]:
        """Turns that may follow one of this shape: the results of its calls, or a question; and an answer."""
        results = [{"role": "tool", "tool_call_id": own, "name": "qdoraname", "content": "0"} for own in self.calls]
        question = {"role": "user", "content": "qdorauser2"}
        return [*(results or [question]), {"role": "assistant", "content": "qdoralater"}]


def _shape(message: dict[str, Any]) -> _Shape:
    calls = tuple(str(call.get("id", "")) for call in message.get("tool_calls") or [])
    return _Shape(bool(message["content"]) or not calls, bool(message.get("reasoning_content")), calls)


@dataclass(frozen=True, slots=True)
class _Edges:
    """How a template encloses turns of a shape."""

    header: str = ""
    """What it adds to ask for an answer."""
    starts: tuple[tuple[str, int], ...] = ()
    """Text that ends where the first sentinel begins, and how much of it the model says: an empty thought, say."""
    tail: str = ""
    """What follows the last sentinel up to the end of the turn, where that is the same everywhere."""
    endings: tuple[str, ...] = ()
    """The same at the end of a conversation, and within."""
    shows: frozenset[str] | None = None
    """Letters of the sentinels that are there at all: c for the words, r for a thought, n for a call; None: unknown."""


_SAID = re.compile(r"qdorasaid([crn])")


@lru_cache(maxsize=256)
def _edges(tokenizer: Any, template: str | None, shape: _Shape) -> _Edges:
    """By short conversations; `template` is the tokenizer's, which somebody may change."""

    def text(*turns: dict[str, Any], prompt: bool = False) -> str:
        return render([*turns], None, tokenizer, "a short conversation", prompt)

    question, said = {"role": "user", "content": "qdorauser1"}, shape.blank("qdorasaid")
    try:
        asked, prompt = text(question), text(question, prompt=True)
        last = text(question, said)
    except DataError:  # a template that wants more than that
        return _Edges()
    try:
        inner = text(question, said, *shape.following())
    except DataError:
        inner = last
    header = prompt[len(asked) :] if prompt.startswith(asked) else ""
    places = [*_SAID.finditer(last)]
    if not places:
        return _Edges(header, shows=frozenset())
    after_user = prompt.rfind("qdorauser1") + len("qdorauser1")
    starts = set()
    for rendered in (last, inner):
        place = _SAID.search(rendered)
        before = rendered[: place.start()] if place else ""
        shared = _shared(before, prompt, _ends(tokenizer))
        begun = len(asked) if header and before.startswith(asked) else after_user
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
    endings = (tail,) if tail.strip() else tuple(_leading(text, _ends(tokenizer)) for text in (ending, following))
    return _Edges(header, ordered, tail.rstrip(), endings, frozenset(found[1] for found in places))


def _shared(text: str, other: str, tokens: Sequence[str]) -> int:
    """How much two texts have in common at their beginning, without half of a token of the first."""
    position = 0
    for piece in _pieces(text, tokens):
        if not other.startswith(piece, position):
            same = takewhile(lambda pair: pair[0] == pair[1], zip(piece, other[position:], strict=False))
            return position + (0 if piece in tokens else sum(1 for _ in same))
        position += len(piece)
    return position


def _pieces(text: str, tokens: Sequence[str]) -> list[str]:
    """The text cut before and after each of the tokens."""
    pattern = "|".join(map(re.escape, filter(None, tokens)))
    return [piece for piece in re.split(f"({pattern})", text) if piece] if pattern else [text]


def _found(
    whole: str, messages: list[dict[str, Any]], turns: list[int], tools: Any, tokenizer: Any, where: str
) -> list[Span]:
    """Of each assistant turn, by sentinels."""
    word = "qdoraturn"
    while word in whole:
        word += "x"
    shapes = [_shape(messages[index]) for index in turns]
    blanks = [
        messages[index] | shape.blank(f"{word}{number}z")
        for number, (index, shape) in enumerate(zip(turns, shapes, strict=True))
    ]
    edges = [_edges(tokenizer, tokenizer.chat_template, shape) for shape in shapes]
    sentinel = re.compile(rf"{word}(\d+)z[crn]")

    def rendered(is_blank: Callable[[int], bool]) -> "_Rendered":
        some = list(messages)
        for number, index in enumerate(turns):
            if is_blank(number):
                some[index] = blanks[number]
        return _Rendered(render(some, tools, tokenizer, where), sentinel)

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
        said = next((size for lead, size in edges.starts if self.text.endswith(lead, 0, first)), 0)
        following = self.text[last : last + len(edges.tail) + 1000]
        tail = edges.tail if edges.tail and following.startswith(edges.tail) else _leading(following, ends)
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
